"""Joint patches: sets of patches that act in one run, pairs of heads, doses of a direction."""

from patchsweep.analyses.joint.directions import difference_of_means, dose
from patchsweep.analyses.joint.interactions import interactions
from patchsweep.analyses.joint.patches import run_patches
from patchsweep.sweeps.patches import Patch

__all__ = ["Patch", "difference_of_means", "dose", "interactions", "run_patches"]
