"""Registers `dataset.patchsweep` as soon as xarray is imported, before or after patchsweep.

xarray takes longer to import than patchsweep itself, and many commands need none of it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def _register() -> None:
    """Let datasets have `.patchsweep`; its class is loaded when it is first used."""
    xarray = sys.modules["xarray"]

    @xarray.register_dataset_accessor("patchsweep")
    def accessor(ds: Any) -> Any:
        return import_module("patchsweep.notebook.accessor").PatchsweepAccessor(ds)


class _Then(Loader):
    """Loads xarray with its own loader, then registers the accessor."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Xarray(MetaPathFinder):
    """Finds xarray; asking for its spec, as some packages do, is no import."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "xarray":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


if "xarray" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Xarray())
