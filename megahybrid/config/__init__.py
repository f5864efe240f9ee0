"""Configuration: dataclasses, loading and validation."""

from megahybrid.config.load import load_config, save_config
from megahybrid.config.schema import Config

__all__ = ["Config", "load_config", "save_config"]
