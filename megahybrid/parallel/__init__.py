"""Process groups, Megatron-core layers, and the joining of Megatron-core with DeepSpeed."""
