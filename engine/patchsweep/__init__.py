"""patchsweep: exact activation-patching sweeps of language models in a few packed passes.

Names that need torch are loaded when they are first used, so that `patchsweep status` and a
notebook that reads a store start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchsweep import summary  # registers the accessor `dataset.patchsweep`
from patchsweep.errors import PatchsweepError

if TYPE_CHECKING:
    from patchsweep import metrics
    from patchsweep.api import plan, sweep
    from patchsweep.interventions import Custom
    from patchsweep.metrics import Metric
    from patchsweep.models import load_model
    from patchsweep.pairs import PromptPairs
    from patchsweep.store.dataset import open_store

__all__ = [
    "Custom",
    "Metric",
    "PatchsweepError",
    "PromptPairs",
    "load_model",
    "metrics",
    "open_store",
    "plan",
    "summary",
    "sweep",
]

_LATER = {
    "Custom": "patchsweep.interventions",
    "Metric": "patchsweep.metrics",
    "PromptPairs": "patchsweep.pairs",
    "load_model": "patchsweep.models",
    "open_store": "patchsweep.store.dataset",
    "plan": "patchsweep.api",
    "sweep": "patchsweep.api",
}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module("patchsweep.metrics")
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'patchsweep' has no attribute {name!r}")
