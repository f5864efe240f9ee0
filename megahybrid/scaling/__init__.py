"""Sizes of models and runs."""
