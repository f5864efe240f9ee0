"""Scaling studies: one file, from plan to report."""
