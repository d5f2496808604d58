"""The lens: what the model would predict if it stopped at each place of the residual stream."""

from patchsweep.analyses.logit_lens.compute import describe, lens
from patchsweep.analyses.logit_lens.patches import Patch, Sublayer
from patchsweep.analyses.logit_lens.sublayers import sublayers

__all__ = ["Patch", "Sublayer", "describe", "lens", "sublayers"]
