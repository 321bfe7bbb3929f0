"""Dense linear algebra on torch, nothing else."""
