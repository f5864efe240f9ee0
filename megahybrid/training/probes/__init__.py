"""Probes in the training loop: what a model recalls, from how far, and what its heads hold. Names and pictures of what
they find need no torch."""
