"""Training: engine, loop, controller, metrics, tracking and checkpoints."""
