"""Read HDF5 files: in place, as a data set, and as the source of a conversion."""
