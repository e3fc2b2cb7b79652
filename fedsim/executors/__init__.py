"""Who really computes what a message asks for."""
