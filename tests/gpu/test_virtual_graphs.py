"""CUDA graphs of blocks on a virtual GPU: values, launches, captures that wait for nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.models.tiny import TINY_FAMILIES
from patchsweep.runners.packed import graphs, tables
from patchsweep.runners.packed.forward import PackedBlocks
from patchsweep_kernels import rms_norm

from gpu.test_virtual_gpu import TOLERANCE, loaded, pairs
from gpu.virtual_cuda import move, on_cpu, virtual_cuda
from gpu.virtual_device import Gpu, VirtualGraph

Fault = Callable[[torch.Tensor], torch.Tensor]
BLOCK = "packed batch: a block with a graph"


@dataclass(frozen=True)
class Replays:
    graphs: list[VirtualGraph]  # in order
    launches: list[int]  # of each visit of a block that had a graph


@contextmanager
def small_and_soon() -> Iterator[Replays]:
    """Inside, small blocks are padded, and captured at their first visit."""
    done = Replays([], [])
    replay, replay_graph = VirtualGraph.replay, PackedBlocks.replay_graph

    def counted(self: VirtualGraph) -> None:
        done.graphs.append(self)
        replay(self)

    def within(self: PackedBlocks, *args: Any) -> torch.Tensor:
        gpu = Gpu.current
        assert gpu is not None
        known, n, before = set(done.graphs), len(done.graphs), gpu.launches.total()
        with gpu.during(BLOCK):
            output = replay_graph(self, *args)
        if known.issuperset(done.graphs) and len(done.graphs) > n:
            done.launches.append(gpu.launches.total() - before)
        return output

    with (
        mock.patch.object(graphs, "VISITS", 1),
        mock.patch.object(tables, "LEAST_TOKENS", 32),
        mock.patch.object(VirtualGraph, "replay", counted),
        mock.patch.object(PackedBlocks, "replay_graph", within),
    ):
        yield done


@contextmanager
def deeper(family: str) -> Iterator[None]:
    """Inside, tiny models have five layers: some where no token enters."""
    model_type, sizes = TINY_FAMILIES[family]
    layers = {name: 5 for name in sizes if name in ("num_hidden_layers", "n_layer")}
    with mock.patch.dict(TINY_FAMILIES, {family: (model_type, {**sizes, **layers})}):
        yield


def swept(family: str, fault: Fault | None = None) -> tuple[Any, Any, Gpu, Replays]:
    """A sweep on the CPU, on the GPU with graphs; the GPU; the replays.

    `fault`: sees what every norm gives on the GPU, and replaces it.
    """
    with deeper(family):
        model = loaded(f"tiny:{family}")
    given = pairs(model) if fault else pairs(model, 2, several_lengths=True)
    settings: dict[str, Any] = {"runner": "packed", "max_tokens": 20, "layers": [0, 1]}
    with on_cpu():
        expected = ps.sweep(model, given, "resid_pre", **settings)
    with deeper(family):
        model = loaded(f"tiny:{family}")
    with virtual_cuda(graphs=True) as gpu, small_and_soon() as replays, ExitStack() as stack:
        move(model)
        model.cfg.device = "cuda:0"
        norm = rms_norm._triton
        if fault is not None:
            stack.enter_context(
                mock.patch.object(rms_norm, "_triton", lambda *args: fault(norm(*args)))
            )
        found = ps.sweep(model, given, "resid_pre", **settings)
    return expected, found, gpu, replays


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_replayed_blocks_give_the_cpus_numbers(family: str) -> None:
    expected, found, gpu, replays = swept(family)
    n_graphs = len(set(replays.graphs))
    assert len(replays.launches) >= n_graphs > 1
    np.testing.assert_allclose(found.resid_pre, expected.resid_pre, atol=TOLERANCE, rtol=0)
    # nothing waits, but that a graph's values are compared when it is captured
    waits = {why: n for (phase, why, _), n in gpu.syncs.items() if phase == BLOCK}
    assert waits == {"aten::equal": n_graphs}
    # one launch, and copies of what changed: hidden states, keys, values, arguments, tables
    assert min(replays.launches) == 1
    assert max(replays.launches) <= 11


def stray_item(x: torch.Tensor) -> torch.Tensor:
    return x * x.abs().sum().ne(0).item()


def other_values(x: torch.Tensor) -> torch.Tensor:
    assert Gpu.current is not None
    return x if Gpu.current.capture is None else x + 1


@pytest.mark.parametrize("fault", [stray_item, other_values])
def test_block_that_cannot_be_captured_runs_without(
    fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "patchsweep"):
        expected, found, _, _ = swept("llama", fault)
    said = [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert len(said) == 1
    np.testing.assert_allclose(found.resid_pre, expected.resid_pre, atol=TOLERANCE, rtol=0)


def test_graph_that_reads_freed_memory_is_seen() -> None:
    with virtual_cuda(graphs=True):
        x, gone = torch.ones(4).to("cuda:0"), torch.ones(4).to("cuda:0")
        graph = VirtualGraph()
        with graph.captured():
            x.add_(gone)
        graph.replay()
        assert x.cpu().tolist() == [3] * 4
        del gone
        with pytest.raises(RuntimeError, match="was freed"):
            graph.replay()
