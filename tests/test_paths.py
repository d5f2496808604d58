"""Edges: their estimates sum to attribution patching, exact ones equal hooks, and each other."""

from __future__ import annotations

from dataclasses import replace as replace_field
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep.analyses.circuits.edge_batch as scene_module
import pytest
import torch
import xarray as xr
from patchsweep.analyses.circuits import (
    Edge,
    Nodes,
    Reader,
    Sender,
    edges,
    exact_edges,
    screen_edges,
)
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, MethodError, MetricError, PlanError
from patchsweep.forward.block_structure import parallel_blocks
from patchsweep.forward.blockwise import Blocks
from patchsweep.models import load_model
from patchsweep.spec.batch import Batch, make_batches
from patchsweep.store.attributes import attributes
from patchsweep.store.save import load_dataset, save_dataset
from plain import make_plain_and_bridge, pairs_for
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.patching import get_act_patch_direct_path

from tools.architectures import tiny_bridge

# fused and split projections, learned and rotary positions, grouped heads, parallel blocks, norms
# after attention, query and key norms, experts
FAMILIES = ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3", "mixtral", "phi3"]


def batch_of(name: str) -> Batch:
    device = torch.device("cpu")
    return make_batches(demo_pairs(name), [0], "denoising", -1, device)[0]


def hooked(bridge: TransformerBridge, tokens: Tensor, *hooks: tuple[str, Any]) -> float:
    """logit_diff of a run with hooks, right answer after the clean prompt first."""
    batch = batch_of("tiny:gpt2")  # every tiny model has the same tokenizer
    with torch.no_grad():
        logits = bridge.run_with_hooks(tokens, fwd_hooks=[*hooks])[0, -1]
    return float(logits[batch.answer[0, 0]] - logits[batch.wrong[0, 0]])


def seen(bridge: TransformerBridge, tokens: Tensor, name: str, *hooks: tuple[str, Any]) -> Tensor:
    """The activation at a hook point of a run with hooks."""
    found: list[Tensor] = []
    hooked(bridge, tokens, *hooks, (name, lambda x, hook: found.append(x.clone())))
    return found[-1]


def replace(value: Tensor, head: int | None = None) -> Any:
    def hook(x: Tensor, hook: Any) -> Tensor:
        if head is None:
            return value.clone()
        x = x.clone()
        x[:, :, head] = value[:, :, head]
        return x

    return hook


def add(delta: Tensor) -> Any:
    # in place, so that the skip connection has it too
    return lambda x, hook: x.add_(delta)


def written(bridge: TransformerBridge, sender: Sender, batch: Batch) -> Tensor:
    """What the stream gains by the sender's source value, everything before it kept."""
    if sender.kind == "embed":
        name = "blocks.0.hook_resid_pre"
        return seen(bridge, batch.source, name) - seen(bridge, batch.base, name)
    if sender.kind == "mlp":
        name = f"blocks.{sender.layer}.hook_mlp_out"
        return seen(bridge, batch.source, name) - seen(bridge, batch.base, name)
    z, out = f"blocks.{sender.layer}.attn.hook_z", f"blocks.{sender.layer}.hook_attn_out"
    patch = (z, replace(seen(bridge, batch.source, z), sender.head))
    return seen(bridge, batch.base, out, patch) - seen(bridge, batch.base, out)


def edge_by_hooks(bridge: TransformerBridge, edge: Edge, batch: Batch) -> float:
    """One edge, by one run that shows what the reader makes of its input and one that has it."""
    delta = written(bridge, edge.sender, batch)
    if edge.pos is not None:
        alone = torch.zeros_like(delta)
        alone[:, edge.pos] = delta[:, edge.pos]
        delta = alone
    reader, block = edge.reader, f"blocks.{edge.reader.layer}."
    if reader.kind == "logits":
        last = f"blocks.{reader.layer - 1}.hook_resid_post"
        return hooked(bridge, batch.base, (last, add(delta)))
    moved = [(f"{block}hook_resid_pre", add(delta))]
    if reader.kind == "mlp":
        attention = f"{block}hook_attn_out"
        moved.append((attention, replace(seen(bridge, batch.base, attention))))
        name, head = f"{block}hook_mlp_out", None
    else:
        name, head = f"{block}attn.hook_{reader.kind}", reader.head
    value = seen(bridge, batch.base, name, *moved)
    return hooked(bridge, batch.base, (name, replace(value, head)))


def some_edges(nodes: Nodes, n: int) -> list[Edge]:
    """Some of each kind of sender and reader."""
    rng = np.random.default_rng(0)
    found = []
    for sender_kind in ("embed", "head", "mlp"):
        for reader_kind in ("q", "k", "v", "mlp", "logits"):
            possible = [
                Edge(u, v)
                for i, u in enumerate(nodes.senders)
                for j, v in enumerate(nodes.readers)
                if u.kind == sender_kind and v.kind == reader_kind and nodes.possible[i, j]
            ]
            found += [possible[k] for k in rng.permutation(len(possible))[:n]]
    return found


def at_positions(name: str, chosen: list[Edge]) -> list[Edge]:
    """Each of them at one of the positions where something may change."""
    batch = batch_of(name)
    live = range(int((batch.base != batch.source)[0].int().argmax()), batch.length)
    return [replace_field(e, pos=live[i % len(live)]) for i, e in enumerate(chosen)]


def at_labels(edge: Edge) -> dict[str, Any]:
    """Where its estimate stands."""
    pos = {} if edge.pos is None else {"pos": edge.pos}
    return {"sender": str(edge.sender), "reader": str(edge.reader), **pos}


def nodes_of(name: str) -> Nodes:
    bridge = model(name)
    return scene_module.nodes_of(bridge, parallel_blocks(Blocks(bridge)))


def attribution(name: str, zero: bool = False) -> dict[str, float]:
    """Attribution patching of every sender, by autograd through the bridge's hooks."""
    bridge, batch = model(name), batch_of(name)
    names = {"embed": "blocks.0.hook_resid_pre"}
    for layer in range(bridge.cfg.n_layers):
        names[f"z{layer}"] = f"blocks.{layer}.attn.hook_z"
        names[f"m{layer}"] = f"blocks.{layer}.hook_mlp_out"
    change, nudges, hooks = {}, {}, []
    for key, hook_name in names.items():
        base = seen(bridge, batch.base, hook_name)
        new = torch.zeros_like(base) if zero else seen(bridge, batch.source, hook_name)
        change[key] = new - base
        nudges[key] = torch.zeros_like(base, requires_grad=True)
        hooks.append((hook_name, lambda x, hook, nudge=nudges[key]: x + nudge))
    logits = bridge.run_with_hooks(batch.base, fwd_hooks=hooks)[0, -1]
    metric = logits[batch.answer[0, 0]] - logits[batch.wrong[0, 0]]
    grads = dict(zip(nudges, torch.autograd.grad(metric, [*nudges.values()]), strict=True))
    found = {}
    for key, delta in change.items():
        product = delta * grads[key]
        if key.startswith("z"):
            per_head = product.sum(dim=(0, 1, 3))
            found |= {f"a{key[1:]}.h{h}": float(x) for h, x in enumerate(per_head)}
        else:
            found[key] = float(product.sum())
    return found


def test_gpt2_has_32491_edges() -> None:
    assert Nodes(12, 12, 12, (False,) * 12).n_edges == 32_491


def test_parallel_blocks_have_no_edge_from_a_head_to_the_mlp_of_its_layer() -> None:
    assert nodes_of("tiny:gpt_neox").parallel == (True, True, True)
    assert nodes_of("tiny:llama").parallel == (False, False, False)
    scores = edges(model("tiny:gpt_neox"), demo_pairs("tiny:gpt_neox"))["edge_eap"][0, 0]
    assert np.isnan(scores.sel(sender="a1.h0", reader="m1"))
    assert np.isfinite(scores.sel(sender="a1.h0", reader="m2"))
    assert np.isnan(scores.sel(sender="a1.h0", reader="a1.h0.q"))


@pytest.mark.parametrize(
    "silent",
    ["model.embed_tokens.weight", "model.layers.1.post_attention_layernorm.weight"],
    ids=["attention", "mlp-norm"],
)
def test_no_edge_of_the_model_is_nan_whatever_its_weights(silent: str) -> None:
    """Attention that gives nothing on a prompt, or an MLP that hears nothing, has edges."""
    _, bridge = make_plain_and_bridge("LlamaForCausalLM")
    weight = dict(bridge.original_model.named_parameters())
    name = next(n for n in weight if n.replace("_original_component.", "") == silent)
    with torch.no_grad():
        weight[name][0 if "embed" in silent else ...] = 0.0
    ds = edges(bridge, pairs_for(bridge))
    to_mlps = [f"m{layer}" for layer in range(3)]
    heads = [f"a{layer}.h{head}" for layer in range(3) for head in range(4)]
    found = ds.edge_eap.sel(reader=to_mlps, sender=heads)
    assert int(found.notnull().sum()) == 4 * (1 + 2 + 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_of_a_sender_sum_to_its_attribution(family: str) -> None:
    name = f"tiny:{family}"
    scores = edges(model(name), demo_pairs(name))["edge_eap"][0, 0].sum("reader", skipna=True)
    expected = attribution(name)
    assert set(expected) == set(scores["sender"].values.tolist())
    found = [float(scores.sel(sender=sender)) for sender in expected]
    # effects are about one logit; fp32 sums over 17 positions and 32 dimensions
    np.testing.assert_allclose(found, [*expected.values()], atol=2e-4)


def test_zero_ablated_edges_of_a_sender_sum_to_its_attribution() -> None:
    name = "tiny:gemma2"
    pairs = demo_pairs(name)
    scores = edges(model(name), pairs, intervention="zero", direction="denoising")["edge_eap"]
    total = scores[0, 0].sum("reader", skipna=True)
    for sender, expected in attribution(name, zero=True).items():
        assert float(total.sel(sender=sender)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_positions_sum_to_the_edge(family: str) -> None:
    name = f"tiny:{family}"
    whole = edges(model(name), demo_pairs(name))["edge_eap"]
    by_pos = edges(model(name), demo_pairs(name), positions=True)
    assert by_pos["edge_eap"].dims == ("metric", "pair", "sender", "reader", "pos")
    np.testing.assert_allclose(
        by_pos["edge_eap"].sum("pos", skipna=False), whole, atol=1e-4, equal_nan=True
    )
    first = int((by_pos["base_token"] != by_pos["source_token"])[0].argmax())
    assert float(np.abs(by_pos["edge_eap"][..., :first]).max()) == 0.0  # causality


@pytest.mark.parametrize("positions", [False, True], ids=["whole", "positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_estimate_is_the_slope_of_the_exact_edge(family: str, positions: bool) -> None:
    name = f"tiny:{family}"
    chosen = some_edges(nodes_of(name), 3)
    if positions:
        chosen = at_positions(name, chosen)

    def effect(share: float) -> np.ndarray:
        towards = lambda site, layer, base, source: base + share * (source - base)  # noqa: E731
        found = exact_edges(
            model(name), demo_pairs(name), chosen, intervention=towards, direction="denoising"
        )
        return found["edge"].values[0, 0]

    scores = edges(model(name), demo_pairs(name), positions=positions)["edge_eap"][0, 0]
    estimate = [float(scores.sel(at_labels(edge))) for edge in chosen]
    slope = (effect(0.003) - effect(-0.003)) / 0.006
    # logits round to 1e-5, which the step makes 2e-3; the third derivative is the rest
    np.testing.assert_allclose(slope, estimate, atol=2e-3 + 0.005 * np.abs(estimate).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_edges_equal_hooks_one_by_one(family: str) -> None:
    name = f"tiny:{family}"
    chosen = some_edges(nodes_of(name), 2)
    found = exact_edges(model(name), demo_pairs(name), chosen)["edge"].values[0, 0]
    expected = [edge_by_hooks(model(name), edge, batch_of(name)) for edge in chosen]
    base = hooked(model(name), batch_of(name).base)
    assert np.abs(np.array(expected) - base).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_edges_at_one_position_equal_hooks_one_by_one(family: str) -> None:
    name = f"tiny:{family}"
    chosen = at_positions(name, some_edges(nodes_of(name), 2))
    found = exact_edges(model(name), demo_pairs(name), chosen)
    assert found["edge_pos"].values.tolist() == [edge.pos for edge in chosen]
    expected = [edge_by_hooks(model(name), edge, batch_of(name)) for edge in chosen]
    base = hooked(model(name), batch_of(name).base)
    assert np.abs(np.array(expected) - base).max() > 0.01
    # effects are smaller than those of all positions; logits of about 10 round to 1e-6
    np.testing.assert_allclose(found["edge"].values[0, 0], expected, atol=2e-5)


def test_edges_at_every_position_equal_each_by_itself() -> None:
    name = "tiny:llama"
    labels = ["a0.h1->a1.h0.q", "m1->logits"]
    every = exact_edges(model(name), demo_pairs(name), labels, positions=True)
    assert every["edge"].dims == ("metric", "pair", "chosen", "pos")
    assert every["edge_sender"].values.tolist() == ["a0.h1", "m1"]
    one_by_one = [f"{label}@{pos}" for label in labels for pos in every["pos"].values]
    alone = exact_edges(model(name), demo_pairs(name), one_by_one)
    np.testing.assert_allclose(
        every["edge"].values.ravel(), alone["edge"].values.ravel(), atol=1e-5
    )
    first = int((every["base_token"] != every["source_token"])[0].argmax())
    base = float(every["base_metric"][0, 0])
    assert (every["edge"].values[..., :first] == base).all()  # nothing changes before it


def test_edges_read_after_the_last_logits_change_nothing() -> None:
    name = "tiny:llama"
    labels = ["a0.h1->a1.h0.q", "embed->m0", "m1->logits"]
    early = exact_edges(model(name), demo_pairs(name), labels, read=4)
    assert (early["edge"].values == early["base_metric"].values[..., None]).all()
    last = len(demo_pairs(name)[0]) - 1
    read = exact_edges(model(name), demo_pairs(name), ["embed->m0"], read=last - 2, positions=True)
    effect = np.abs((read["edge"] - read["base_metric"]).values[0, 0, 0])
    assert (effect[last - 1 :] == 0).all()
    assert effect[: last - 1].max() > 1e-3


# TransformerLens refuses k and v of grouped heads, and norms after attention
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in ("gpt2", "gpt_neox") for kind in "qkv"]
    + [(family, "q") for family in ("llama", "qwen3", "mixtral")],
)
def test_direct_paths_equal_transformer_lens(family: str, kind: Any) -> None:
    name = f"tiny:{family}"
    bridge, batch = model(name), batch_of(name)
    _, clean = bridge.run_with_cache(batch.source)
    _, corrupted = bridge.run_with_cache(batch.base)
    nodes = nodes_of(name)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, batch.answer[0, 0]] - logits[0, -1, batch.wrong[0, 0]]

    with torch.no_grad():
        expected = get_act_patch_direct_path(
            bridge, batch.base, clean, corrupted, metric, 0, 2, component=kind, verbose=False
        )
    chosen = [(layer, head) for layer in (1, 2) for head in range(nodes.n_heads)]
    labels = [("a0.h2", f"a{layer}.h{head}.{kind}") for layer, head in chosen]
    found = exact_edges(bridge, demo_pairs(name), labels)["edge"].values[0, 0]
    # effects of 1e-2 and, in mixtral, 1e-4; logits round to 1e-6
    np.testing.assert_allclose(found, [float(expected[at]) for at in chosen], atol=1e-5)


def test_integrated_edges_of_the_embeddings_sum_to_the_whole_effect() -> None:
    name = "tiny:gpt2"  # of the tiny models the one whose path is smooth
    found = edges(model(name), demo_pairs(name), steps=24)
    total = float(found["edge_eap_ig"].sel(sender="embed").sum(skipna=True))
    effect = float((found["source_metric"] - found["base_metric"]).sum())
    assert total == pytest.approx(effect, abs=1e-4)


def test_pairs_of_several_lengths_equal_each_alone() -> None:
    name = "tiny:llama"
    bridge = model(name)
    clean = [CLEAN, f"Then {CLEAN}", CLEAN.replace("milk", "bag")]
    corrupted = [CORRUPTED, f"Then {CORRUPTED}", CORRUPTED.replace("milk", "bag")]
    answers = [(" Mary", " John")] * 3
    pairs = PromptPairs.from_strings(bridge, clean=clean, corrupted=corrupted, answers=answers)
    chosen = ["a0.h1->a1.h0.q", "embed->m2", "m1->a2.h1.v", "a2.h3->m2", "m0->logits"]
    metrics = ["logit_diff", "log_prob"]
    together = exact_edges(bridge, pairs, chosen, metrics)
    scores = edges(bridge, pairs, metrics)
    for i in range(3):
        alone = PromptPairs((pairs[i],))
        by_itself = exact_edges(bridge, alone, chosen, metrics)
        np.testing.assert_allclose(together["edge"][:, i], by_itself["edge"][:, 0], atol=1e-4)
        own = edges(bridge, alone, metrics)["edge_eap"]
        np.testing.assert_allclose(scores["edge_eap"][:, i], own[:, 0], atol=1e-3, equal_nan=True)
        for reference in ("base_metric", "source_metric"):
            np.testing.assert_allclose(
                scores[reference][:, i], by_itself[reference][:, 0], atol=1e-4
            )


def test_mean_ablated_edges_read_the_mean_of_the_clean_prompts() -> None:
    names = ["Mary", "Anna", "Lucy", "Emma"]
    bridge = model("tiny:gpt2")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[CLEAN.replace("Mary", name) for name in names],
        corrupted=[CORRUPTED.replace("Mary", name) for name in names],
        answers=[(f" {name}", " John") for name in names],
    )
    found = exact_edges(bridge, pairs, ["m0->logits"], intervention="mean")
    tokens = torch.tensor([pair.clean for pair in pairs])
    name_out, last = "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"
    mlp = torch.cat([seen(bridge, row[None], name_out) for row in tokens])
    delta = mlp.mean(dim=0, keepdim=True) - mlp[:1]
    assert found.attrs["direction"] == "noising"
    assert float(found["edge"][0, 0, 0]) == pytest.approx(
        hooked(bridge, tokens[:1], (last, add(delta))), abs=1e-4
    )


def test_screen_verifies_the_highest_estimates() -> None:
    name = "tiny:qwen3"
    found = screen_edges(model(name), demo_pairs(name), top=12)
    assert found.sizes["chosen"] == 12
    ranked = np.abs(found["edge_estimate"].values[0, 0])
    assert (np.diff(ranked) <= 0).all()
    every = np.abs(found["edge_eap"].values)
    assert ranked[-1] == np.sort(every[np.isfinite(every)])[-12]
    labels = list(zip(found["edge_sender"].values, found["edge_reader"].values, strict=True))
    again = exact_edges(model(name), demo_pairs(name), labels)
    np.testing.assert_allclose(found["edge"], again["edge"], atol=1e-5)


def test_screening_positions_verifies_the_highest_estimates() -> None:
    name = "tiny:llama"
    found = screen_edges(model(name), demo_pairs(name), top=9, positions=True)
    every = found["edge_eap"].values[0, 0]
    highest = np.sort(np.abs(every[np.isfinite(every)]))[-9:][::-1]
    np.testing.assert_array_equal(np.abs(found["edge_estimate"].values[0, 0]), highest)
    ends = (found[f"edge_{name}"].values.tolist() for name in ("sender", "reader", "pos"))
    labels = list(zip(*ends, strict=True))
    again = exact_edges(model(name), demo_pairs(name), labels)
    np.testing.assert_allclose(found["edge"], again["edge"], atol=1e-5)
    assert found.attrs["kind"] == "edges"
    assert attributes(found)["positions"] is True


def test_pairs_too_short_for_a_position_are_nan_there_and_count_as_nothing() -> None:
    name = "tiny:llama"
    pairs = PromptPairs.from_strings(
        model(name),
        clean=[CLEAN, f"Then {CLEAN}"],
        corrupted=[CORRUPTED, f"Then {CORRUPTED}"],
        answers=[(" Mary", " John")] * 2,
    )
    found = screen_edges(model(name), pairs, top=60, positions=True)
    last = len(pairs[1]) - 1
    late = found["edge_pos"].values == last
    assert late.any()
    assert not late.all()
    assert np.isnan(found["edge"].values[0, 0, late]).all()
    assert np.isfinite(found["edge"].values[0, 1]).all()
    strength = np.abs(np.nan_to_num(found["edge_estimate"].values[0])).sum(axis=0)
    assert (np.diff(strength) <= 0).all()


def test_edges_outlive_the_process_in_a_store(tmp_path: Path) -> None:
    name = "tiny:llama"
    found = screen_edges(model(name), demo_pairs(name), top=5, positions=True)
    save_dataset(found, tmp_path / "edges.zarr")
    again = load_dataset(tmp_path / "edges.zarr", {"kind": "edges"})
    assert again is not None
    xr.testing.assert_equal(again, found)
    assert {"edge", "edge_estimate", "edge_eap"} <= set(again.data_vars)


def test_weights_take_gradients_again_afterwards() -> None:
    bridge = model("tiny:llama")
    before = [p.requires_grad for p in bridge.original_model.parameters()]
    with pytest.raises(MetricError, match="one number per row"):
        edges(bridge, demo_pairs("tiny:llama"), metrics=lambda logits: logits[:, 0])
    edges(bridge, demo_pairs("tiny:llama"))
    assert [p.requires_grad for p in bridge.original_model.parameters()] == before


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"metrics": "kl_base"}, MethodError, "logit_diff"),
        ({"metrics": "rank"}, MethodError, "exact_edges"),
        ({"metrics": "nope"}, MetricError, "nope"),
        ({"metrics": lambda x: x.detach()[:, 0, 0]}, MethodError, "gradient"),
        ({"intervention": "shuffle"}, MethodError, "resample"),
        ({"intervention": "zero", "steps": 3}, MethodError, "leave steps out"),
        ({"steps": 0}, MethodError, "steps=0"),
        ({"direction": "up"}, ConfigError, "denoising"),
        ({"read": 40}, PlanError, "read=40"),
    ],
)
def test_mistakes_are_named_before_any_forward(
    arguments: dict[str, Any], error: type[Exception], words: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Blocks, "__init__", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(error, match=words):
        edges(model("tiny:llama"), demo_pairs("tiny:llama"), **arguments)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([], "no list"),
        ("m0->logits", "no list"),
        (["m0"], "sender and a reader"),
        (["m9->logits"], "no sender 'm9'"),
        (["m0->a1.h2.k"], "no reader 'a1.h2.k'"),
        (["m1->a1.h0.q"], "comes later"),
        (["a1.h0->a1.h0.q"], "comes later"),
        (["m0->logits", ("m0", "logits")], "twice"),
        (["m0->logits@3", ("m0", "logits", 3)], "twice"),
        (["m0->logits@3", "m0->logits"], "all of them one, or none"),
        (["m0->logits@17"], r"positions 0\.\.16"),
        ([("m0", "logits", -1)], "sender and a reader"),
    ],
)
def test_edges_that_do_not_exist_are_named_before_any_forward(
    chosen: Any, words: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Blocks, "__init__", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(PlanError, match=words):
        exact_edges(model("tiny:llama"), demo_pairs("tiny:llama"), chosen)


def test_positions_are_given_once() -> None:
    with pytest.raises(PlanError, match="leave one of them out"):
        exact_edges(model("tiny:llama"), demo_pairs("tiny:llama"), ["m0->logits@3"], positions=True)


def test_a_heads_edge_to_a_parallel_mlp_is_an_error() -> None:
    with pytest.raises(PlanError, match="comes later"):
        exact_edges(model("tiny:gpt_neox"), demo_pairs("tiny:gpt_neox"), ["a1.h0->m1"])


@pytest.mark.parametrize(("top", "positions"), [(0, False), (191, False), (3231, True)])
def test_screening_more_edges_than_there_are_is_an_error(top: int, positions: bool) -> None:
    most = 190 * 17 if positions else 190
    with pytest.raises(PlanError, match=rf"from 1 to {most}$"):
        screen_edges(model("tiny:llama"), demo_pairs("tiny:llama"), top=top, positions=positions)


def test_labels_name_ends_and_back() -> None:
    nodes = nodes_of("tiny:llama")
    for text in ("embed->a0.h3.q", "a0.h3->m0", "m1->a2.h1.k", "m2->logits"):
        assert str(nodes.edge(text)) == text
    assert str(nodes.edge(("m1", "logits", 16))) == "m1->logits@16"
    assert nodes.edge("m1 -> logits @ 16") == Edge(Sender("mlp", 1), Reader("logits", 3), 16)
    assert nodes.edge("a0.h3->m0") == Edge(Sender("head", 0, 3), Reader("mlp", 0))


@pytest.mark.parametrize("architecture", ["GPTJForCausalLM", "MambaForCausalLM"])
def test_models_whose_blocks_cannot_be_taken_apart_are_refused(architecture: str) -> None:
    bridge = tiny_bridge(architecture)
    pairs = PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )
    with pytest.raises(MethodError, match="cannot be taken apart"):
        edges(bridge, pairs)


def test_answers_of_several_tokens_are_read_together() -> None:
    bridge = model("tiny:llama")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[CLEAN],
        corrupted=[CORRUPTED],
        answers=[(" Mary said", " John said")],
        multi_token=True,
    )
    assert len(pairs[0].answer) == 2
    found = screen_edges(bridge, pairs, top=3)
    chosen = found["edge"].values[0, 0] - found["base_metric"].values[0, 0]
    assert np.isfinite(chosen).all()
    scores = edges(bridge, pairs, steps=2, positions=True)
    assert scores.sizes["pos"] == len(pairs[0].clean) + 1


def test_bfloat16_estimates_follow_those_of_float32() -> None:
    pairs = demo_pairs("tiny:gpt2")
    low = edges(load_model("tiny:gpt2", device="cpu", dtype="bfloat16"), pairs)["edge_eap"]
    high = edges(model("tiny:gpt2"), pairs)["edge_eap"]
    known = np.isfinite(high.values)
    assert np.corrcoef(low.values[known], high.values[known])[0, 1] > 0.99
