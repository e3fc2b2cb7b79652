"""Flower strategies that run in any Flower app; never imports fedsim."""
