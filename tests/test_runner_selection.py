"""Which runner a sweep gets: what it is told, and what a failure is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from patchsweep.hooked import HookedRunner
from patchsweep.metrics import METRICS
from patchsweep.models import load_model
from patchsweep.planner import PatchSet
from patchsweep.request import make_request
from patchsweep.waves.capture import capture
from patchsweep.waves.replica import Replica, Unsupported
from subjects import demo_pairs, model
from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def counted_passes(bridge: TransformerBridge) -> Iterator[list[int]]:
    """Tokens of every forward pass through `bridge`."""
    passes: list[int] = []
    own = TransformerBridge.forward

    def forward(self: TransformerBridge, tokens: torch.Tensor, *args, **kwargs):
        if self is bridge:
            passes.append(tokens.numel())
        return own(self, tokens, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerBridge, "forward", forward)
        yield passes


def test_hooked_runner_shares_a_pass_among_sites_and_layers() -> None:
    bridge = model("tiny:llama")
    request = make_request(bridge, demo_pairs("tiny:llama"), ["resid_pre", "z", "k"])
    batch = request.batches([0])[0]
    runner = HookedRunner(bridge, request.sites)
    loaded = runner.load(batch, request.intervention)
    sets = [PatchSet(plan, plan.live_patches()[::7]) for plan in request.plans]
    with counted_passes(bridge) as passes:
        shared = runner.run_together(loaded, sets, (METRICS["logit_diff"],))
    assert len(passes) == 1
    for chosen, values in zip(sets, shared, strict=True):
        for column in (0, len(chosen.patches) - 1):
            alone = runner.run(
                loaded, chosen.plan, chosen.patches[[column]], (METRICS["logit_diff"],)
            )
            torch.testing.assert_close(values[:, [column]], alone, rtol=1e-5, atol=1e-4)


def test_an_error_before_attention_keeps_its_own_name() -> None:
    replica = Replica(load_model("tiny:llama", device="cpu"))

    def fail(*_: object) -> None:
        raise RuntimeError("tensors on two devices")

    replica.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="tensors on two devices"):
        capture(replica, torch.arange(5).unsqueeze(0))


def test_attention_of_its_own_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(load_model("tiny:llama", device="cpu"))
    monkeypatch.setattr(Replica, "takes_attention_functions", False)

    def fail(*_: object) -> None:
        raise RuntimeError("no mask")

    replica.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(Unsupported, match=r"attention interface .*no mask"):
        capture(replica, torch.arange(5).unsqueeze(0))
