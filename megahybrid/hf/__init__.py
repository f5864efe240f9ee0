"""Hugging Face format: the exported model's own files, export, import, and the check that both give the same model."""
