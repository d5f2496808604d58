"""Offloaded weights on a virtual GPU: the next block's are on their way before this one runs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from patchsweep.forward.weight_streaming import WeightCopies, WeightTraffic, stream_modules
from patchsweep.models.offload import Home
from torch import Tensor, nn

from gpu.virtual_cuda import virtual_cuda
from gpu.virtual_device import Virtual

SIZES = ((8, 16), (16, 4), (4, 8), (8, 8))


def blocks_of(weights: list[Tensor]) -> tuple[nn.Sequential, dict[nn.Module, Home]]:
    """Linear blocks on cuda:0, whose weights are on the CPU until they run."""
    blocks = nn.Sequential(*(nn.Linear(n, m, bias=False, device="meta") for n, m in SIZES))
    homes: dict[nn.Module, Home] = {
        block: Home(torch.device("cuda", 0), {"weight": weight})
        for block, weight in zip(blocks, weights, strict=True)
    }
    return blocks, homes


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_next_blocks_weights_are_sent_before_this_block_runs(dtype: torch.dtype | None) -> None:
    stored = torch.float32 if dtype is None else torch.bfloat16
    weights = [torch.randn(m, n).to(stored) for n, m in SIZES]
    x = torch.randn(3, 8)
    expected = x
    for weight in weights:
        expected = expected @ weight.float().T
    order: list[str] = []
    send = WeightCopies.send

    def told(self: WeightCopies, sent: Any) -> list[Tensor]:
        number = next(i for i, w in enumerate(weights) if w.shape == sent[0][0].shape)
        order.append(f"send {number}")
        return send(self, sent)

    blocks, homes = blocks_of(weights)
    if dtype is not None:
        for block in blocks:
            block.weight = nn.Parameter(block.weight.to(stored), requires_grad=False)
    with virtual_cuda() as gpu, mock.patch.object(WeightCopies, "send", told), torch.no_grad():
        traffic = WeightTraffic()
        streamed = stream_modules(blocks, list(blocks), homes, traffic, dtype)
        for number, block in enumerate(blocks):
            streamed[block].serve(block)
            block.register_forward_pre_hook(
                lambda *_, number=number: order.append(f"run {number}")  # type: ignore[misc]
            )
        there = x.to("cuda:0")
        gpu.syncs.clear()
        gpu.copies.clear()
        found = blocks(there)
        assert not gpu.syncs
        assert {kind for _, kind, _ in gpu.copies} == {"H2D async (pinned)"}
        assert isinstance(found, Virtual)
        torch.testing.assert_close(found.cpu(), expected)
        torch.testing.assert_close(blocks(there).cpu(), expected)  # the buffers are used again
        assert gpu.events == 2 * len(SIZES) - 2
    first = "send 0, send 1, run 0, send 2, run 1, send 3, run 2, run 3".split(", ")
    assert order == first + first
    assert all(block.weight.is_meta for block in blocks)
    assert traffic.n_bytes == 2 * sum(w.numel() * w.element_size() for w in weights)


def test_passes_with_gradients_send_nothing_ahead() -> None:
    weights = [torch.randn(m, n) for n, m in SIZES]
    blocks, homes = blocks_of(weights)
    with virtual_cuda(), torch.enable_grad():
        streamed = stream_modules(blocks, list(blocks), homes, WeightTraffic(), None)
        streamed[blocks[0]].fetch()
        assert streamed[blocks[1]]._arriving is None
        streamed[blocks[0]].release()
