"""Training: engine, loop, regulation, metrics, tracking and checkpoints."""
