"""The lens: what the model would predict if it stopped at each place of the residual stream."""

from patchsweep.lens.grid import describe, lens
from patchsweep.lens.patches import Patch, Sublayer
from patchsweep.lens.sublayers import sublayers

__all__ = ["Patch", "Sublayer", "describe", "lens", "sublayers"]
