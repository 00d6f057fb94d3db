"""Read a converted data set."""
