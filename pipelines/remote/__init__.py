"""Read a converted data set from an object store, through a cache on this machine."""
