"""patchsweep: exact activation-patching sweeps of language models in a few packed passes.

What is here is the public face. Each name is loaded when it is first used, so that a command
which needs no model starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchsweep import _accessor, _moved  # noqa: F401
from patchsweep.errors import PatchsweepError

if TYPE_CHECKING:
    from patchsweep import attribution
    from patchsweep.analyses.attention import attention
    from patchsweep.analyses.circuits import (
        acdc,
        bootstrap_circuit,
        circuit,
        circuit_scores,
        cross_validate_circuit,
        edges,
        exact_edges,
        multiverse,
        read_circuit,
        screen_edges,
        write_circuit,
    )
    from patchsweep.analyses.generation import continuations
    from patchsweep.analyses.heads import detect_heads, study
    from patchsweep.analyses.joint import (
        Patch,
        difference_of_means,
        dose,
        interactions,
        run_patches,
    )
    from patchsweep.analyses.latents import latents
    from patchsweep.analyses.logit_lens import lens, sublayers
    from patchsweep.analyses.tracing import Noise, trace
    from patchsweep.data.pairs import PromptPairs
    from patchsweep.forward.ungroup import ungrouped
    from patchsweep.models import load_model
    from patchsweep.report import write_report
    from patchsweep.results import accessor as summary
    from patchsweep.results.compare import compare
    from patchsweep.spec import metrics
    from patchsweep.spec.dictionary import Dictionary
    from patchsweep.spec.directions import Ablate, Add, Project, Scale
    from patchsweep.spec.interventions import Custom
    from patchsweep.spec.metrics import Metric
    from patchsweep.spec.spec import SweepSpec
    from patchsweep.store.dataset import open_store
    from patchsweep.sweeps.api import plan, sweep
    from patchsweep.sweeps.sample import sample_exact
    from patchsweep.sweeps.screen_settings import Screen
    from patchsweep.tasks import (
        check_pairs,
        keep_answered,
        load_task,
        template_task,
        text_pairs,
    )

__all__ = [
    "Ablate",
    "Add",
    "Custom",
    "Dictionary",
    "Metric",
    "Noise",
    "Patch",
    "PatchsweepError",
    "Project",
    "PromptPairs",
    "Scale",
    "Screen",
    "SweepSpec",
    "acdc",
    "attention",
    "attribution",
    "bootstrap_circuit",
    "check_pairs",
    "circuit",
    "circuit_scores",
    "compare",
    "continuations",
    "cross_validate_circuit",
    "detect_heads",
    "difference_of_means",
    "dose",
    "edges",
    "exact_edges",
    "interactions",
    "keep_answered",
    "latents",
    "lens",
    "load_model",
    "load_task",
    "metrics",
    "multiverse",
    "open_store",
    "plan",
    "read_circuit",
    "run_patches",
    "sample_exact",
    "screen_edges",
    "study",
    "sublayers",
    "summary",
    "sweep",
    "template_task",
    "text_pairs",
    "trace",
    "ungrouped",
    "write_circuit",
    "write_report",
]

# module -> the names that it gives
_NAMES = {
    "analyses.attention": ("attention",),
    "analyses.circuits": (
        "acdc", "bootstrap_circuit", "circuit", "circuit_scores", "cross_validate_circuit",
        "edges", "exact_edges", "multiverse", "read_circuit", "screen_edges", "write_circuit",
    ),
    "analyses.generation": ("continuations",),
    "analyses.heads": ("detect_heads", "study"),
    "analyses.joint": ("Patch", "difference_of_means", "dose", "interactions", "run_patches"),
    "analyses.latents": ("latents",),
    "analyses.logit_lens": ("lens", "sublayers"),
    "analyses.tracing": ("Noise", "trace"),
    "data.pairs": ("PromptPairs",),
    "forward.ungroup": ("ungrouped",),
    "models": ("load_model",),
    "report": ("write_report",),
    "results.compare": ("compare",),
    "spec.dictionary": ("Dictionary",),
    "spec.directions": ("Ablate", "Add", "Project", "Scale"),
    "spec.interventions": ("Custom",),
    "spec.metrics": ("Metric",),
    "spec.spec": ("SweepSpec",),
    "store.dataset": ("open_store",),
    "sweeps.api": ("plan", "sweep"),
    "sweeps.sample": ("sample_exact",),
    "sweeps.screen_settings": ("Screen",),
    "tasks": ("check_pairs", "keep_answered", "load_task", "template_task", "text_pairs"),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = {"attribution": "attribution", "metrics": "spec.metrics", "summary": "results.accessor"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"patchsweep.{_MODULES[name]}")
    if name in _HOME:
        return getattr(import_module(f"patchsweep.{_HOME[name]}"), name)
    raise AttributeError(f"module 'patchsweep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
