"""The only place, beside the executors, that knows Flower."""
