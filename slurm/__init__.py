"""Submit and manage runs on a SLURM cluster."""
