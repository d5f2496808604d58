"""Logit lens: predictions of the final norm and unembedding from every point of the stream."""

from patchsweep.analyses.logit_lens.compute import describe, lens
from patchsweep.analyses.logit_lens.patches import Patch, Sublayer
from patchsweep.analyses.logit_lens.sublayers import sublayers

__all__ = ["Patch", "Sublayer", "describe", "lens", "sublayers"]
