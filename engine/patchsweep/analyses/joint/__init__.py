"""Joint patches: sets of patches that act in one run, and interactions of pairs of heads."""

from patchsweep.analyses.joint.interactions import interactions
from patchsweep.analyses.joint.patches import run_patches
from patchsweep.sweeps.joint import Patch

__all__ = ["Patch", "interactions", "run_patches"]
