"""Messages in virtual time; knows nothing of Flower."""
