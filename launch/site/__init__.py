"""A cluster: its profile, what Slurm says and is told, what doctor found, which nodes are left out."""
