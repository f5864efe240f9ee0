"""Which kinds of layers are regulated, and how."""

from megahybrid.mixers.lte.controller import LambdaController
from megahybrid.model.regulation import Regulator

REGULATORS: dict[str, type[Regulator]] = {"L": LambdaController}
"""By the kind's letter."""
