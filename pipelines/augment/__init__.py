"""Random augmentation of samples: draws and programs. NumPy only."""
