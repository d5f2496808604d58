"""Sweeps and analyses on a virtual GPU: no mix of devices, and the numbers of the CPU.

TRITON_INTERPRET=1 runs the same with the real kernels, in Triton's interpreter: slow, so one test
here does it for a few.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.attribution.estimates import Work
from patchsweep.attribution.patterns import pattern_scores
from patchsweep.attribution.run import Attribution
from patchsweep.runners.packed import runner as packed
from patchsweep.store.attributes import attributes
from patchsweep.sweeps.screen_settings import Screen
from patchsweep_kernels.attention_change import attention_change
from patchsweep_kernels.dispatch import INTERPRETED
from patchsweep_kernels.replaced import replaced_attention
from patchsweep_kernels.tokens import Tokens
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from gpu.virtual_cuda import LAUNCHES, move, on_cpu, virtual_cuda
from gpu.virtual_device import DeviceMix

HERE = Path(__file__)
NAMES = [("John", "Mary"), ("Paul", "Anna"), ("Tom", "Lucy"), ("James", "Emma")]
# a GPU's packed batches are larger and its norms are other kernels, so both round otherwise
TOLERANCE = 1e-4 if INTERPRETED else 3e-5


def loaded(name: str, **more: Any) -> TransformerBridge:
    with on_cpu():
        return ps.load_model(name, device="cpu", **more)


def pairs(model: TransformerBridge, n: int = 1, *, several_lengths: bool = False) -> Any:
    text = "When {0} and {1} went to the shops, {2} gave a bottle of milk to"
    chosen = [(text, names) for names in NAMES[:n]]
    if several_lengths:
        short = text.replace(" a bottle of", "")
        chosen += [(short, names) for names in NAMES[:n]]
    return ps.PromptPairs.from_strings(
        model,
        clean=[t.format(a, b, a) for t, (a, b) in chosen],
        corrupted=[t.format(a, b, b) for t, (a, b) in chosen],
        answers=[(f" {b}", f" {a}") for _, (a, b) in chosen],
    )


def both(
    call: Callable[[TransformerBridge, Any], Any],
    name: str = "tiny:llama",
    *,
    n: int = 1,
    several_lengths: bool = False,
    gradients: bool = False,
    **more: Any,
) -> tuple[Any, Any]:
    """What `call` gives on the CPU, and on the virtual GPU."""
    model = loaded(name, **more)
    given = pairs(model, n, several_lengths=several_lengths)
    with on_cpu():
        expected = call(model, given)
    model = loaded(name, **more)
    with virtual_cuda(gradients=gradients):
        move(model)
        model.cfg.device = "cuda:0"
        return expected, call(model, given)


def check_equal(expected: Any, found: Any, tolerance: float = TOLERANCE) -> None:
    assert expected.data_vars.keys() == found.data_vars.keys()
    for name, values in expected.data_vars.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(found[name], values, atol=tolerance, rtol=0, err_msg=name)


def sweep(sites: Any, **settings: Any) -> Callable[[TransformerBridge, Any], Any]:
    settings.setdefault("runner", "packed")
    return lambda model, given: ps.sweep(model, given, sites, **settings)


PLAIN = ["resid_pre", "z", "mlp_out"]
INSIDE = [
    "q",
    "k",
    "v",
    "rot_q",
    "rot_k",
    "pattern",
    "pattern_cell",
    "result",
    "embed",
    "resid_post",
]
SWEEPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (sweep(PLAIN), {}),
    "gpt2": (sweep(PLAIN), {"name": "tiny:gpt2"}),
    "window-and-softcap": (sweep(PLAIN), {"name": "tiny:gemma2"}),
    "experts": (sweep(PLAIN), {"name": "tiny:mixtral"}),
    "inside-attention": (sweep(INSIDE), {}),
    "hooked": (sweep(["resid_pre", "z", "pattern_cell"], runner="hooked"), {}),
    "self-test": (sweep(["resid_pre", "z"], runner="auto"), {}),
    "vocabulary": (
        sweep("resid_pre", metrics=["logit_diff", "log_prob", "kl_base", "tv_source", "rank"]),
        {},
    ),
    "means-of-several-lengths": (
        sweep(["z", "embed"], intervention="mean"),
        {"n": 4, "several_lengths": True},
    ),
    "spilled": (sweep(["z", "k", "pattern"], cache_budget=0), {}),
    "some-spilled": (
        sweep(["pattern_cell", "z"], intervention="zero", cache_budget=60_000),
        {},
    ),
    "small-batches": (sweep("z", max_tokens=64), {}),
    "bf16-weights-in-fp32": (sweep(PLAIN, compute_dtype="float32"), {"dtype": "bfloat16"}),
}


def latents(model: TransformerBridge, given: Any) -> Any:
    with on_cpu(), torch.device("cpu"):
        width, n = int(model.cfg.d_model), 32
        g = torch.Generator().manual_seed(0)
        encoder, decoder = (torch.randn(*size, generator=g) for size in ((width, n), (n, width)))
        known = ps.Dictionary(encoder, decoder, torch.zeros(n), torch.zeros(width), "resid_post", 1)
    return ps.latents(model, given, known, estimates=["atp", "ig"])


WITH_GRADIENTS: dict[str, Any] = {
    "latents": latents,
    "attribution": sweep(PLAIN, method=["atp", "ig_inputs", "relp"], runner="auto"),
    "screen": sweep(["z"], method=Screen(k=5), runner="auto"),
    "tolerance": sweep(["z", "resid_pre", "k"], tolerance=0.1),
    "edges": lambda model, given: ps.screen_edges(model, given, top=6),
    "all-edges": lambda model, given: ps.exact_edges(model, given, "all", tolerance=0.1),
    "joint-tolerance": lambda model, given: ps.interactions(model, given, tolerance=0.1),
    "circuit": lambda model, given: ps.circuit(model, given, sizes=[0.1]),
    "pattern-scores": lambda model, given: pattern_scores(model, given).scores,
    "lens": lambda model, given: ps.lens(model, given, remove=("mlp", 1)),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_on_a_gpu_equals_the_cpus(name: str) -> None:
    call, settings = SWEEPS[name]
    expected, found = both(call, **settings)
    check_equal(expected, found)
    runners = [attributes(ds)["provenance"]["runner"] for ds in (expected, found)]
    assert runners[0] == runners[1]


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_analysis_on_a_gpu_equals_the_cpus(name: str) -> None:
    check_equal(*both(WITH_GRADIENTS[name], gradients=True), tolerance=10 * TOLERANCE)


def test_a_gpu_captures_the_next_batch_before_results_are_read() -> None:
    order: list[str] = []

    def told(word: str, call: Any) -> Any:
        def inner(*args: Any, **more: Any) -> Any:
            order.append(word)
            return call(*args, **more)

        return inner

    with (
        mock.patch.object(Attribution, "_work", told("capture", Attribution._work)),
        mock.patch.object(Work, "references", told("read", Work.references)),
    ):
        call = sweep(["resid_pre", "z"], method="atp")
        check_equal(*both(call, n=2, several_lengths=True, gradients=True))
    alone, overlapped = (
        ["capture", "read", "capture", "read"],
        ["capture", "capture", "read", "read"],
    )
    assert order == alone + overlapped


@pytest.mark.parametrize("runner", ["packed", "hooked", "auto"])
def test_default_device_of_the_users_changes_nothing(runner: Any) -> None:
    call = sweep(["resid_pre", "z"], runner=runner)

    def inside(model: TransformerBridge, given: Any) -> Any:
        on_gpu = str(model.cfg.device) == "cuda:0"
        with torch.device("cuda:0") if on_gpu else nullcontext():
            return call(model, given)

    expected, found = both(inside)
    check_equal(expected, found)
    assert attributes(found)["provenance"]["runner"] == attributes(expected)["provenance"]["runner"]


def test_model_on_the_second_gpu_gets_its_prompts_there() -> None:
    def to(self: Any, *args: Any, device: Any = None, dtype: Any = None, **_: Any) -> Any:
        device = device or next((x for x in args if isinstance(x, str | torch.device)), None)
        if device is not None and str(device) != "cpu":
            move(self, str(device))
        return self

    model = loaded("tiny:llama")
    given = pairs(model)
    with on_cpu():
        expected = sweep(PLAIN)(model, given)
    with virtual_cuda(n_devices=2), mock.patch.object(PreTrainedModel, "to", to):
        model = ps.load_model("tiny:llama", device="cuda:1")
        assert str(model.cfg.device) == "cuda:1"
        found = sweep(PLAIN)(model, pairs(model))
    check_equal(expected, found)


def test_batch_that_does_not_fit_is_halved() -> None:
    original, failed = packed.run_packed_batch, []

    def once(*args: Any) -> Any:
        hidden = original(*args)
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return hidden

    model = loaded("tiny:llama")
    given = pairs(model)
    with on_cpu():
        expected = sweep("z")(model, given)
    with virtual_cuda(), mock.patch.object(packed, "run_packed_batch", once):
        move(model)
        model.cfg.device = "cuda:0"
        found = sweep("z")(model, given)
    assert failed
    check_equal(expected, found)


def test_mixes_of_devices_are_seen() -> None:
    """Or all that is above would prove nothing."""
    with virtual_cuda():
        there = torch.zeros(3).to("cuda:0")
        with pytest.raises(DeviceMix, match="aten::add"):
            there + torch.ones(3)
        with pytest.raises(DeviceMix, match="indices should be on the CPU"):
            torch.ones(3)[there.long()]
        assert (there + torch.tensor(1.0)).cpu().tolist() == [1, 1, 1]


@pytest.mark.skipif(not INTERPRETED, reason="runs the launchers of the real kernels")
def test_kernels_of_adaptive_passes_never_wait() -> None:
    with virtual_cuda() as gpu:
        at = torch.tensor([[0, 0, 1], [2, 5, 6], [0, 0, 1]]).to("cuda:0")
        tokens = Tokens(*at.unbind())
        q, k = (torch.randn(3, heads, 8).to("cuda:0") for heads in (4, 2))
        base_q, base_k = (torch.randn(2, heads, 8, 8).to("cuda:0") for heads in (4, 2))
        grad = base_q.unsqueeze(0)
        gpu.syncs.clear()
        gpu.launches.clear()
        replaced_attention(q, tokens, k, k, tokens, base_k, base_k, scale=1.0)
        assert gpu.launches.total() == LAUNCHES["replaced"]
        gpu.launches.clear()
        attention_change(base_q, base_k, base_k, grad, k, k, tokens, 2, scale=1.0)
        assert gpu.launches.total() == LAUNCHES["attention_change"]
        assert not gpu.syncs


@pytest.mark.skipif(INTERPRETED, reason="the test itself")
def test_real_kernels_take_what_sweeps_pass_them() -> None:
    chosen = "(on_a_gpu and (llama or vocabulary or tolerance)) or never_wait"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(HERE), "-k", chosen, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert "5 passed" in ran.stdout
