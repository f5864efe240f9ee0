"""What a model recalls: tasks of any length on a checkpoint, with intervals and pictures (docs/evaluation.md)."""
