"""The model: mixers, block, and the stack of layers that a pipeline stage holds."""
