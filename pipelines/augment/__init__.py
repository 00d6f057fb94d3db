"""Draw the random augmentation of each sample. Uses NumPy only."""
