"""Draw the random augmentation of each sample on the CPU, with NumPy and (for mixup and CutMix) SciPy."""
