"""Where the runs of a study are trained: this machine, SLURM, Ray."""
