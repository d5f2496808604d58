"""The public face: which names there are, where old paths lead, and what an import costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import patchsweep as ps
import pytest
from patchsweep._moved import MOVED

ENGINE = Path(ps.__file__).parent
NAMES = [
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


def in_a_new_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_public_names_are_these() -> None:
    assert ps.__all__ == NAMES
    assert set(NAMES) <= set(dir(ps))
    code = "import patchsweep as ps; print(all(getattr(ps, n) is not None for n in ps.__all__))"
    assert in_a_new_process(code) == "True"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = ps.nothing_like_it


@pytest.mark.parametrize("old", MOVED)
def test_old_paths_warn_and_lead_to_the_new(old: str) -> None:
    sys.modules.pop(old, None)
    parent, _, name = old.rpartition(".")
    before = vars(sys.modules[parent]).get(name)
    try:
        with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
            module = import_module(old)
        new = import_module(MOVED[old])
        public = [n for n in vars(new) if not n.startswith("_")]
        assert public
        assert all(getattr(module, n) is getattr(new, n) for n in public)
    finally:
        sys.modules.pop(old, None)
        if before is None:
            vars(sys.modules[parent]).pop(name, None)
        else:
            setattr(sys.modules[parent], name, before)


def test_a_function_can_be_called_after_its_old_module_was_imported() -> None:
    code = "import patchsweep.lens, patchsweep as ps; print(callable(ps.lens), ps.lens.lens)"
    assert in_a_new_process(code).startswith("True <function lens")


def test_importing_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "xarray", "zarr", "scipy", "pandas")
    code = f"import patchsweep, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert in_a_new_process(code) == "[]"


@pytest.mark.parametrize("words", [["--help"], ["status", "nothing.zarr"]])
def test_verbs_that_only_tell_load_no_model_library(words: list[str]) -> None:
    heavy = ("torch", "transformers", "xarray", "hydra", "pandas")
    code = (
        f"import sys; from patchsweep.cli import main; main({words!r}); "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert in_a_new_process(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("first", ["patchsweep", "xarray"])
def test_datasets_have_the_accessor_in_either_order_of_imports(first: str) -> None:
    second = "xarray" if first == "patchsweep" else "patchsweep"
    code = f"import {first}, {second}, xarray as xr; print(type(xr.Dataset().patchsweep).__name__)"
    assert in_a_new_process(code) == "PatchsweepAccessor"


def test_datasets_have_the_accessor_after_somebody_asked_whether_xarray_is_there() -> None:
    code = (
        "import importlib.util, patchsweep; importlib.util.find_spec('xarray'); import xarray; "
        "print(type(xarray.Dataset().patchsweep).__name__)"
    )
    assert in_a_new_process(code) == "PatchsweepAccessor"


def test_the_top_level_holds_six_modules_and_no_file_is_long() -> None:
    assert len([*ENGINE.glob("*.py")]) <= 6
    long = {
        str(path.relative_to(ENGINE)): n
        for path in ENGINE.rglob("*.py")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert long == {}
