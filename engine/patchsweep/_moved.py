"""Paths of modules before release 0.2: importing one warns and hands on the module of today."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "patchsweep.attention": "patchsweep.analyses.attention",
    "patchsweep.compare": "patchsweep.results.compare",
    "patchsweep.heads": "patchsweep.analyses.heads",
    "patchsweep.interventions": "patchsweep.spec.interventions",
    "patchsweep.lens": "patchsweep.analyses.logit_lens",
    "patchsweep.metrics": "patchsweep.spec.metrics",
    "patchsweep.pairs": "patchsweep.data.pairs",
    "patchsweep.paths": "patchsweep.analyses.circuits",
    "patchsweep.results.discoveries": "patchsweep.results.accessor",
    "patchsweep.screening": "patchsweep.sweeps.screen_settings",
    "patchsweep.sites": "patchsweep.spec.sites",
    "patchsweep.store.whole": "patchsweep.store.save",
    "patchsweep.summary": "patchsweep.results.accessor",
}


class _OldModule(ModuleType):
    """A module of an old path: its names are those of the new module.

    Python sets it as an attribute of `patchsweep`, where `lens`, `compare` and `attention` are
    functions too; so it can be called like them.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(MOVED[self.__name__]), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _OldPaths(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        warnings.warn(
            f"{module.__name__} is now {MOVED[module.__name__]}; the old path goes with the next "
            "release",
            DeprecationWarning,
            stacklevel=2,
        )


sys.meta_path.append(_OldPaths())
