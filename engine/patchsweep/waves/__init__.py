"""The wave runner: exact patches, packed, through the model's own blocks."""

from patchsweep.waves.replica import Unsupported
from patchsweep.waves.runner import WaveRunner

__all__ = ["Unsupported", "WaveRunner"]
