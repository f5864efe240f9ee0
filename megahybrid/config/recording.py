"""Whether the passes of a run's steps become a CUDA graph (`megahybrid.training.graphs`)."""

from __future__ import annotations

from megahybrid.config.schema import Config
from megahybrid.config.task_sources import text_sources


def replayed(config: Config, processes: int) -> bool:
    """Whether they are asked to, and can be."""
    return config.train.cuda_graph and unrecorded(config, processes) is None


def unrecorded(config: Config, processes: int) -> str | None:
    """Why they cannot be, as a sentence; None where they can, as long as documents' lengths repeat."""
    if processes > 1 or config.parallel.zero_stage == 3:
        return "train.cuda_graph records nothing here: it is for one process, without ZeRO-3."
    text = [name for name, source in text_sources(config).items() if source.weight != 0]
    if text and config.data.document_masking:
        return (
            f"train.cuda_graph records nothing here: documents of data.sources.{text[0]} are taken to have other "
            "lengths in every step; data.document_masking=false makes each sample one."
        )
    return None
