"""patchsweep: exact activation-patching sweeps of language models in a few packed passes."""

from patchsweep import metrics, summary  # summary registers the accessor `dataset.patchsweep`
from patchsweep.errors import PatchsweepError
from patchsweep.models import load_model
from patchsweep.pairs import PromptPairs
from patchsweep.sweep import plan, sweep

__all__ = ["PatchsweepError", "PromptPairs", "load_model", "metrics", "plan", "summary", "sweep"]
