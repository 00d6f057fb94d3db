"""Where the runs of a sweep are trained: as processes of this machine, or as tasks on the nodes of a cluster."""
