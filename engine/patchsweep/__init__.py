"""patchsweep: exact activation-patching sweeps of language models in a few packed passes.

Names that need torch are loaded when they are first used, so that `patchsweep status` and a
notebook that reads a store start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchsweep.errors import PatchsweepError
from patchsweep.results import accessor as summary

if TYPE_CHECKING:
    from patchsweep.data.pairs import PromptPairs
    from patchsweep.models import load_model
    from patchsweep.spec import metrics
    from patchsweep.spec.interventions import Custom
    from patchsweep.spec.metrics import Metric
    from patchsweep.store.dataset import open_store
    from patchsweep.sweeps.api import plan, sweep

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
    "Custom": "patchsweep.spec.interventions",
    "Metric": "patchsweep.spec.metrics",
    "PromptPairs": "patchsweep.data.pairs",
    "load_model": "patchsweep.models",
    "open_store": "patchsweep.store.dataset",
    "plan": "patchsweep.sweeps.api",
    "sweep": "patchsweep.sweeps.api",
}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module("patchsweep.spec.metrics")
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'patchsweep' has no attribute {name!r}")
