"""Heads: each ablated in every way side by side, classed by what it does, the ways compared."""

from patchsweep.heads.analysis import study
from patchsweep.heads.classes import Thresholds
from patchsweep.heads.optimal import OptimalSettings
from patchsweep.heads.table import disagreement, effects

__all__ = ["OptimalSettings", "Thresholds", "disagreement", "effects", "study"]
