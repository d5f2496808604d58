"""Study of heads: ablates each head in several ways, classes heads and compares the ablations."""

from patchsweep.analyses.heads.classes import Thresholds
from patchsweep.analyses.heads.findings import disagreement, effects
from patchsweep.analyses.heads.optimal import OptimalSettings
from patchsweep.analyses.heads.scores import detect_heads
from patchsweep.analyses.heads.study import study

__all__ = ["OptimalSettings", "Thresholds", "detect_heads", "disagreement", "effects", "study"]
