"""Heads: each ablated in every way side by side, classed by what it does, the ways compared."""

from patchsweep.analyses.heads.classes import Thresholds
from patchsweep.analyses.heads.findings import disagreement, effects
from patchsweep.analyses.heads.optimal import OptimalSettings
from patchsweep.analyses.heads.study import study

__all__ = ["OptimalSettings", "Thresholds", "disagreement", "effects", "study"]
