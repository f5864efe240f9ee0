"""Slurm: submitting jobs, running in them, and following them."""
