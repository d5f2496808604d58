"""Which runner a sweep gets: what it is told, and what a failure is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.errors import ModelError, SiteError
from patchsweep.forward.capture import capture
from patchsweep.forward.unwrapped import Unsupported, UnwrappedModel
from patchsweep.models import load_model
from patchsweep.runners.hooked import HookedRunner
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.spec.metrics import METRICS
from patchsweep.spec.plan import PatchSet
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.attributes import attributes
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from transformer_lens.model_bridge import TransformerBridge

from tools.architectures.table import tiny_bridge


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
    request = make_request(bridge, demo_pairs("tiny:llama"), SweepSpec(["resid_pre", "z", "k"]))
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
    unwrapped = UnwrappedModel(load_model("tiny:llama", device="cpu"))

    def fail(*_: object) -> None:
        raise RuntimeError("tensors on two devices")

    unwrapped.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="tensors on two devices"):
        capture(unwrapped, torch.arange(5).unsqueeze(0))


def test_attention_of_its_own_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    unwrapped = UnwrappedModel(load_model("tiny:llama", device="cpu"))
    monkeypatch.setattr(UnwrappedModel, "takes_attention_functions", False)

    def fail(*_: object) -> None:
        raise RuntimeError("no mask")

    unwrapped.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(Unsupported, match=r"attention interface .*no mask"):
        capture(unwrapped, torch.arange(5).unsqueeze(0))


def fresh(family: str = "llama") -> TransformerBridge:
    """A model about which nothing is known yet."""
    return load_model(f"tiny:{family}", device="cpu")


def sweep(bridge: TransformerBridge, sites: str | list[str] = "z", **settings):
    settings.setdefault("layers", [1])
    return ps.sweep(bridge, demo_pairs("tiny:llama"), sites, **settings)


def runner_of(ds) -> tuple[str, str]:
    provenance = attributes(ds)["provenance"]
    return provenance["runner"], provenance["runner_reason"]


def test_a_model_is_tested_once() -> None:
    bridge = fresh()
    with counted_passes(bridge) as passes:
        first = sweep(bridge, ["resid_pre", "z"])
        n_tested = len(passes)
        second = sweep(bridge, ["resid_pre", "z"])
        sweep(bridge, "z", layers=[0], positions=[3, 16])
        assert len(passes) == n_tested
    assert n_tested <= 8  # 4 of them try the hook points
    assert runner_of(first) == runner_of(second) == ("packed", "passes the self-test")
    np.testing.assert_array_equal(first["z"], second["z"])


@pytest.mark.parametrize(
    "settings",
    [
        {"sites": "k"},
        {"intervention": "zero"},
        {"layers": [(0, 1)]},
    ],
    ids=["another-site", "another-kind-of-values", "layers-together"],
)
def test_what_was_not_tested_yet_is_tested(settings: dict) -> None:
    bridge = fresh()
    sweep(bridge)
    with counted_passes(bridge) as passes:
        sweep(bridge, **settings)
    assert passes


def test_edited_weights_are_tested_anew() -> None:
    bridge = fresh()
    sweep(bridge)
    with torch.no_grad():
        bridge.original_model.model.layers[1].mlp.down_proj.weight[:, 3] = 0
    with counted_passes(bridge) as passes:
        sweep(bridge)
    assert passes


def test_the_runner_that_a_store_records_is_trusted(tmp_path) -> None:
    first = sweep(fresh(), store=tmp_path / "a.zarr")
    bridge = fresh()
    with counted_passes(bridge) as passes:
        again = sweep(bridge, store=tmp_path / "a.zarr")
    assert not passes
    assert runner_of(first) == runner_of(again) == ("packed", "passes the self-test")


def test_the_hooked_runner_that_a_store_records_is_trusted(tmp_path) -> None:
    pairs = demo_pairs("tiny:llama")
    hook = "blocks.1.mlp.hook_post"
    first = ps.sweep(fresh(), pairs, hook, positions=[16], store=tmp_path / "a.zarr")
    assert runner_of(first)[0] == "hooked"
    again = ps.sweep(fresh(), pairs, hook, positions=[16], store=tmp_path / "a.zarr")
    assert runner_of(again) == runner_of(first)


def test_a_switch_to_hooks_is_told_and_stored(caplog: pytest.LogCaptureFixture) -> None:
    bridge = fresh()
    ds = ps.sweep(bridge, demo_pairs("tiny:llama"), "blocks.1.mlp.hook_post", positions=[16])
    runner, reason = runner_of(ds)
    assert runner == "hooked"
    assert "was given by its full name" in reason
    assert "tens of times slower" in caplog.text
    assert reason in caplog.text


def test_packed_batches_that_differ_from_the_hooks_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = PackedRunner.run_together

    def half(self, loaded, sets, metrics, null=()):
        base = self.references(loaded, metrics)[0].cpu()
        found = own(self, loaded, sets, metrics, null)
        pairs = [chosen.plan.pair[chosen.patches] for chosen in sets]
        return [(v + base[:, pair]) / 2 for v, pair in zip(found, pairs, strict=True)]

    monkeypatch.setattr(PackedRunner, "run_together", half)
    runner, reason = runner_of(sweep(fresh()))
    assert runner == "hooked"
    assert "differs from the bridge's hooks at pair" in reason


def test_where_no_runner_can_the_error_is_the_bridges_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = fresh()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("tensors on two devices")

    monkeypatch.setattr(type(bridge.original_model.model.layers[0].mlp.up_proj), "forward", fail)
    with pytest.raises(ModelError, match=r"cannot be run.*tensors on two devices"):
        sweep(bridge)


def test_running_out_of_memory_is_no_reason_for_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(PackedRunner, "load", fail)
    with pytest.raises(torch.OutOfMemoryError):
        sweep(fresh())


def test_blocks_that_break_when_they_are_replayed_go_to_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexError("no such axis")

    monkeypatch.setattr(PackedRunner, "load", fail)
    assert runner_of(sweep(fresh())) == (
        "hooked",
        "the packed runner cannot: IndexError: no such axis",
    )


def test_a_site_that_mixes_tokens_behind_it_is_refused() -> None:
    bridge = tiny_bridge("RwkvForCausalLM")  # its channel mixing reads the token before
    pairs = ps.PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )
    with pytest.raises(SiteError, match="something behind the site mixes tokens"):
        ps.sweep(bridge, pairs, "resid_mid", runner="hooked", intervention="zero")


def test_packed_batches_are_not_taken_where_the_embedding_is_read_again() -> None:
    bridge = tiny_bridge("Gemma4ForCausalLM")  # each layer reads the token embeddings too
    pairs = ps.PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )
    assert runner_of(ps.sweep(bridge, pairs, "embed", positions=[16]))[0] == "hooked"
