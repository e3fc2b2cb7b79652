"""Models, local training of many devices at once, and evaluation."""
