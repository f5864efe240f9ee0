"""A kind of layer that only the tests know (T): the gated mean of all tokens so far, times a gain."""

from megahybrid.mixers.gdn import GDNConfig
from megahybrid.mixers.kind import Activations, Kind


class MeanKind(Kind):
    """As wide as the keys of Gated DeltaNet."""

    letter = "T"
    title = "causal mean"
    sections = {"gdn": GDNConfig}  # noqa: RUF012

    def split(self, model):
        return {}

    def flops(self, model, length):
        return {}

    def activations(self, model, batch):
        return Activations(0, 0)

    def module(self):
        from tests.hf.mean.module import CausalMean

        return CausalMean

    def exported(self):
        from tests.hf.mean.hf import CausalMean

        return CausalMean
