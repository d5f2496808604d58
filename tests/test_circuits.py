"""Circuits: runs without the rest equal hooks and explicit sums, growth is as told, areas too."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
import xarray as xr
from patchsweep.analyses.circuits.ablate import run_edges, run_nodes
from patchsweep.analyses.circuits.circuits import circuit
from patchsweep.analyses.circuits.edge_batch import EdgeBatch, ExactBatches, ask
from patchsweep.analyses.circuits.nodes import Nodes, Reader
from patchsweep.analyses.circuits.scores import circuit_scores
from patchsweep.analyses.circuits.selection import (
    areas,
    connected,
    rank_greedy,
    rank_top,
    sizes_of,
    strength_of,
)
from patchsweep.attribution import IntegratedInputs
from patchsweep.cli.main import EXIT_MISTAKE, main
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.show import number
from patchsweep.errors import ConfigError, MethodError, PatchsweepError, PlanError
from patchsweep.forward.grad import frozen
from patchsweep.models.tiny import tiny_model
from patchsweep.report import write_report
from patchsweep.report.circuit import build, chosen_size
from patchsweep.spec.interventions import Custom
from patchsweep.store.attributes import attributes
from subjects import CLEAN, CORRUPTED, demo_pairs, model, reference_pairs
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# learned and rotary positions, grouped heads, parallel blocks, norms after attention and MLP,
# query and key norms, experts
FAMILIES = ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3", "mixtral", "phi3"]
# fp32 runs of the same sums in another order
TOLERANCE = 1e-4


def scene_of(name: str, pairs: PromptPairs | None = None, ablation: str = "resample") -> EdgeBatch:
    given = demo_pairs(name) if pairs is None else pairs
    question = ask(model(name), given, direction="noising", intervention=ablation)
    with frozen(question.bridge):
        return next(ExactBatches(question).of(range(len(given))))


def random_edges(nodes: Nodes, shares: Sequence[float]) -> np.ndarray:
    """[row, sender, reader] circuits of random edges."""
    rng = np.random.default_rng(0)
    draws = rng.random((len(shares), *nodes.possible.shape))
    return (draws < np.array(shares)[:, None, None]) & nodes.possible


def ran(scene: EdgeBatch, keep: np.ndarray, pair: int = 0) -> list[float]:
    """logit_diff of these circuits on one pair."""
    run = run_nodes if keep.ndim == 2 else run_edges
    pairs = torch.full((len(keep),), pair)
    return run(scene, torch.from_numpy(keep), pairs)[0].tolist()


BIASED = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
}
NORMS = {"gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "mixtral", "phi3"])
def test_nothing_kept_under_zero_gives_zero_logits(family: str) -> None:
    """No sender writes anything and there are no biases: every stream is zero, and so its norm."""
    scene = scene_of(f"tiny:{family}", ablation="zero")
    nothing = np.zeros((1, *scene.nodes.possible.shape), dtype=bool)
    mlps = nothing.copy()  # these read nothing, so they write nothing
    mlps[0, [sender.kind == "mlp" for sender in scene.nodes.senders], -1] = True
    assert ran(scene, nothing) == [0.0]
    assert ran(scene, mlps) == [0.0]


@pytest.mark.parametrize("family", BIASED)
def test_nothing_kept_under_zero_leaves_the_biases(family: str) -> None:
    scene = scene_of(f"tiny:{family}", ablation="zero")
    plain, _ = tiny_model(family)
    biases = [plain.get_submodule(BIASED[family].format(layer)).bias for layer in range(3)]
    with torch.no_grad():
        logits = plain.lm_head(plain.get_submodule(NORMS[family])(sum(biases)))
    pair = demo_pairs(f"tiny:{family}")[0]
    expected = float(logits[pair.answer[0]] - logits[pair.wrong_answer[0]])
    nothing = np.zeros((1, *scene.nodes.possible.shape), dtype=bool)
    assert ran(scene, nothing) == pytest.approx([expected], abs=TOLERANCE)
    assert abs(expected) > 0.1


# --- the oracles: nothing but the bridge and its hooks ---


def seen(bridge: TransformerBridge, tokens: Tensor, name: str, *hooks: tuple[str, Any]) -> Tensor:
    """The activation at a hook point of a run with hooks."""
    found: list[Tensor] = []
    keep = (name, lambda x, hook: found.append(x.clone()))
    with torch.no_grad():
        bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, keep])
    return found[-1]


def put(value: Tensor) -> Callable[[Tensor, Any], Tensor]:
    # in place, so that the skip connection has it too
    return lambda x, hook: x.copy_(value)


class Hooked:
    """One pair's runs and what ablated nodes give, all by hooks."""

    def __init__(self, scene: EdgeBatch, pair: int = 0, mean: bool = False) -> None:
        self.bridge, self.nodes = scene.blocks.unwrapped.bridge, scene.nodes
        batch = scene.batch
        self.clean, self.corrupted = batch.base[pair : pair + 1], batch.source[pair : pair + 1]
        self.answers = int(batch.answer[pair, 0]), int(batch.wrong[pair, 0])
        others = batch.base if mean else self.corrupted

        def ablated(name: str) -> Tensor:
            return seen(self.bridge, others, name).mean(dim=0, keepdim=True)

        layers = range(self.nodes.n_layers)
        self.embed = ablated("blocks.0.hook_resid_pre")
        self.z = [ablated(f"blocks.{layer}.attn.hook_z") for layer in layers]
        self.mlp = [ablated(f"blocks.{layer}.hook_mlp_out") for layer in layers]

    def metric(self, tokens: Tensor, *hooks: tuple[str, Any]) -> float:
        with torch.no_grad():
            logits = self.bridge.run_with_hooks(tokens, fwd_hooks=[*hooks])[0, -1]
        return float(logits[self.answers[0]] - logits[self.answers[1]])

    def of_nodes(self, keep: np.ndarray) -> float:
        """The metric with the nodes outside `keep` `[node]` ablated, one hook each."""
        hooks: list[tuple[str, Any]] = []
        for node, kept in zip(self.nodes.senders[1:], keep, strict=True):
            if kept:
                continue
            if node.kind == "mlp":
                hooks.append((f"blocks.{node.layer}.hook_mlp_out", put(self.mlp[node.layer])))
                continue

            def one_head(x: Tensor, hook: Any, node: Any = node) -> Tensor:
                x[:, :, node.head] = self.z[node.layer][:, :, node.head]
                return x

            hooks.append((f"blocks.{node.layer}.attn.hook_z", one_head))
        return self.metric(self.clean, *hooks)

    def of_edges(self, keep: np.ndarray) -> float:
        """The metric with the edges outside `keep` `[sender, reader]` ablated.

        Reader after reader: its stream is summed up from its senders' outputs, as they are in
        this run or ablated, and it is run on that.
        """
        nodes = self.nodes
        embed = seen(self.bridge, self.clean, "blocks.0.hook_resid_pre")
        z: list[Tensor] = []
        mlp: list[Tensor] = []
        place = {str(sender): i for i, sender in enumerate(nodes.senders)}

        def stream(reader: Reader) -> Tensor:
            kept = keep[:, nodes.readers.index(reader)]
            total = embed if kept[0] else self.embed
            last = reader.layer
            mixes_own = reader.kind == "mlp" and not nodes.parallel[last]
            for layer in range(last + 1 if mixes_own else last):
                heads = [bool(kept[place[f"a{layer}.h{h}"]]) for h in range(nodes.n_heads)]
                mixed = torch.where(torch.tensor(heads)[:, None], z[layer], self.z[layer])
                total = total + seen(
                    self.bridge,
                    self.corrupted,
                    f"blocks.{layer}.hook_attn_out",
                    (f"blocks.{layer}.attn.hook_z", put(mixed)),
                )
                if layer < last:
                    total = total + (mlp if kept[place[f"m{layer}"]] else self.mlp)[layer]
            return total

        for layer in range(nodes.n_layers):
            block = f"blocks.{layer}."
            own = {}
            for kind, n in (("q", nodes.n_heads), ("k", nodes.n_kv_heads), ("v", nodes.n_kv_heads)):
                parts = []
                for head in range(n):
                    x = stream(Reader(kind, layer, head))  # type: ignore[arg-type]
                    entering = (f"{block}hook_resid_pre", put(x))
                    name = f"{block}attn.hook_{kind}"
                    every = seen(self.bridge, self.corrupted, name, entering)
                    parts.append(every[:, :, head])
                own[kind] = torch.stack(parts, dim=2)
            hooks = [(f"{block}attn.hook_{kind}", put(value)) for kind, value in own.items()]
            z.append(seen(self.bridge, self.corrupted, f"{block}attn.hook_z", *hooks))
            x = stream(Reader("mlp", layer))
            entering = (f"{block}hook_resid_pre", put(x))
            nothing = (f"{block}hook_attn_out", lambda x, hook: torch.zeros_like(x))
            out = seen(self.bridge, self.corrupted, f"{block}hook_mlp_out", entering, nothing)
            mlp.append(out)
        final = stream(Reader("logits", nodes.n_layers))
        last = f"blocks.{nodes.n_layers - 1}.hook_resid_post"
        return self.metric(self.corrupted, (last, put(final)))


# --- runs ---


@pytest.mark.parametrize("family", FAMILIES)
def test_node_circuits_equal_hooks(family: str) -> None:
    name = f"tiny:{family}"
    ds = circuit(model(name), demo_pairs(name), level="nodes", sizes=[0.2, 0.5, 0.8])
    hooked = Hooked(scene_of(name))
    for i in range(3):
        member = ds["member"].values[i]
        kept, gone = hooked.of_nodes(member), hooked.of_nodes(~member)
        assert ds["circuit_metric"].values[0, 0, i] == pytest.approx(kept, abs=TOLERANCE)
        assert ds["complement_metric"].values[0, 0, i] == pytest.approx(gone, abs=TOLERANCE)
    nothing = hooked.of_nodes(np.zeros_like(member))
    assert ds["empty_metric"].item() == pytest.approx(nothing, abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_edge_circuits_equal_explicit_sums(family: str) -> None:
    scene = scene_of(f"tiny:{family}")
    keep = random_edges(scene.nodes, [0.2, 0.5, 0.8])
    hooked = Hooked(scene)
    wanted = [hooked.of_edges(row) for row in keep]
    assert ran(scene, keep) == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_mean_ablation_equals_hooks(family: str) -> None:
    name = f"tiny:{family}"
    pairs = PromptPairs.from_strings(
        model(name),
        clean=[CLEAN, CORRUPTED, CLEAN.replace("milk", "drink"), CLEAN.replace("shops", "park")],
        corrupted=[
            CORRUPTED,
            CLEAN,
            CORRUPTED.replace("milk", "drink"),
            CORRUPTED.replace("shops", "park"),
        ],
        answers=[(" Mary", " John"), (" John", " Mary"), (" Mary", " John"), (" Mary", " John")],
    )
    scene = scene_of(name, pairs, ablation="mean")
    edges = random_edges(scene.nodes, [0.3, 0.7])
    nodes = np.random.default_rng(1).random((2, len(scene.nodes.senders) - 1)) < 0.5
    for pair in range(2):
        hooked = Hooked(scene, pair, mean=True)
        wanted = [hooked.of_edges(row) for row in edges]
        assert ran(scene, edges, pair) == pytest.approx(wanted, abs=TOLERANCE)
        wanted = [hooked.of_nodes(row) for row in nodes]
        assert ran(scene, nodes, pair) == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_of_some_nodes_are_the_circuit_of_these_nodes(family: str) -> None:
    scene = scene_of(f"tiny:{family}")
    nodes = np.random.default_rng(2).random((3, len(scene.nodes.senders) - 1)) < 0.6
    with_embed = np.concatenate([np.ones((3, 1), dtype=bool), nodes], axis=1)
    edges = with_embed[:, :, None] & scene.nodes.possible
    assert ran(scene, edges) == pytest.approx(ran(scene, nodes), abs=TOLERANCE)


def test_edges_on_no_way_change_nothing_when_resampled() -> None:
    scene = scene_of("tiny:llama")
    keep = random_edges(scene.nodes, [0.02, 0.1, 0.2])
    fewer = connected(scene.nodes, keep)
    assert fewer.sum() < keep.sum()
    assert ran(scene, fewer) == pytest.approx(ran(scene, keep), abs=TOLERANCE)


def test_rows_in_parts_equal_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of("tiny:llama")
    edges = random_edges(scene.nodes, [0.2, 0.5, 0.8])
    nodes = edges[:, 1:, -1]
    together = ran(scene, edges), ran(scene, nodes)
    monkeypatch.setattr("patchsweep.analyses.circuits.ablate.ROW_BYTES", 1)
    apart = ran(scene, edges), ran(scene, nodes)
    assert apart == (pytest.approx(together[0], abs=1e-5), pytest.approx(together[1], abs=1e-5))


def smollm2_edges(scene: EdgeBatch, keep: np.ndarray) -> float:
    """The metric of one circuit by the Llama formulas written out, one reader after the other."""
    bridge, nodes = scene.blocks.unwrapped.bridge, scene.nodes
    hf = scene.blocks.unwrapped.model.model
    n_heads, group = nodes.n_heads, nodes.n_heads // nodes.n_kv_heads
    d = int(bridge.cfg.d_head)
    tokens = {"clean": scene.batch.base[:1], "corrupted": scene.batch.source[:1]}
    length = tokens["clean"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    cos, sin = hf.rotary_emb(hf.embed_tokens(tokens["clean"]), torch.arange(length)[None])

    def attend(attn: Any, streams: dict[tuple[str, int], Tensor], norm: Any) -> list[Tensor]:
        """What each head writes, q, k and v of every head read from a stream of its own."""
        made = {}
        for (kind, head), x in streams.items():
            w = getattr(attn, f"{kind}_proj").weight[head * d : (head + 1) * d]
            made[kind, head] = norm(x) @ w.T
            if kind != "v":
                y = made[kind, head][None, None]
                made[kind, head] = apply_rotary_pos_emb(y, y, cos, sin)[0][0, 0]
        writes = []
        for head in range(n_heads):
            q, k, v = (made[kind, head // (1 if kind == "q" else group)] for kind in "qkv")
            scores = (q @ k.T / d**0.5).masked_fill(~causal, float("-inf"))
            z = scores.softmax(dim=-1) @ v
            writes.append(z @ attn.o_proj.weight[:, head * d : (head + 1) * d].T)
        return writes

    def run(
        embed: Tensor, mix: Callable[[int, list[Tensor]], Tensor]
    ) -> tuple[list[Tensor], float]:
        """All that is written, when reader i sees `mix(i, what was written before)`."""
        writes, reader = [embed], 0
        for block in hf.layers:
            streams = {}
            for kind, n in (("q", n_heads), ("k", nodes.n_kv_heads), ("v", nodes.n_kv_heads)):
                for head in range(n):
                    streams[kind, head] = mix(reader, writes)
                    reader += 1
            writes += attend(block.self_attn, streams, block.input_layernorm)
            x = mix(reader, writes)
            reader += 1
            writes.append(block.mlp(block.post_attention_layernorm(x)))
        final = hf.norm(mix(reader, writes))[-1]
        answer, wrong = (int(x[0, 0]) for x in (scene.batch.answer, scene.batch.wrong))
        w = scene.blocks.unwrapped.model.lm_head.weight
        return writes, float(final @ (w[answer] - w[wrong]))

    with torch.no_grad():
        embeds = {which: hf.embed_tokens(t)[0] for which, t in tokens.items()}
        ablated, _ = run(embeds["corrupted"], lambda reader, writes: sum(writes))

        def mixed(reader: int, writes: list[Tensor]) -> Tensor:
            terms = zip(writes, ablated, keep[:, reader], strict=False)
            return sum(own if kept else other for own, other, kept in terms)  # type: ignore

        return run(embeds["clean"], mixed)[1]


@pytest.mark.slow
def test_smollm2_circuits_equal_hooks_and_formulas() -> None:
    name = "smollm2-135m"
    scene = scene_of(name)
    scores = circuit_scores(model(name), demo_pairs(name))
    ds = circuit(model(name), demo_pairs(name), scores=scores, sizes=[0.002, 0.02, 0.2])
    rank = ds["rank"].values
    for i, count in enumerate(ds["count"].values):
        wanted = smollm2_edges(scene, (rank >= 0) & (rank < count))
        assert ds["circuit_metric"].values[0, 0, i] == pytest.approx(wanted, abs=TOLERANCE)
    ds = circuit(model(name), demo_pairs(name), level="nodes", sizes=[0.05, 0.2, 0.5])
    hooked = Hooked(scene)
    for i in range(3):
        wanted = hooked.of_nodes(ds["member"].values[i])
        assert ds["circuit_metric"].values[0, 0, i] == pytest.approx(wanted, abs=TOLERANCE)


# --- growth, sizes, areas ---


@pytest.mark.parametrize("rank_by", ["size", "signed"])
def test_greedy_growth_takes_the_foremost_edge_that_leads_to_the_logits(rank_by: Any) -> None:
    nodes = Nodes(n_layers=2, n_heads=4, n_kv_heads=2, parallel=(False, True))
    scores = np.random.default_rng(3).normal(size=nodes.possible.shape)
    scores[~nodes.possible] = np.nan
    ranks = rank_greedy(nodes, strength_of(scores, rank_by))
    assert sorted(ranks[nodes.possible]) == [*range(nodes.n_edges)]
    # the same by looking at all edges each time
    kept = np.zeros_like(nodes.possible)
    for turn in range(nodes.n_edges):
        joined = {str(nodes.senders[i]) for i in np.flatnonzero(kept.any(axis=1))}
        open_readers = [
            reader.kind == "logits"
            or (reader.kind == "mlp" and str(reader) in joined)
            or (reader.kind == "q" and f"a{reader.layer}.h{reader.head}" in joined)
            or any(
                f"a{reader.layer}.h{2 * (reader.head or 0) + i}" in joined
                for i in range(2)
                if reader.kind in ("k", "v")
            )
            for reader in nodes.readers
        ]
        free = nodes.possible & ~kept & np.array(open_readers)
        strength = np.abs(scores) if rank_by == "size" else -scores
        best = np.unravel_index(np.argmax(np.where(free, strength, -np.inf)), free.shape)
        assert ranks[best] == turn
        kept[best] = True


def test_connected_keeps_whole_ways_alone() -> None:
    nodes = Nodes(n_layers=2, n_heads=2, n_kv_heads=1, parallel=(False, False))
    keep = np.zeros((1, *nodes.possible.shape), dtype=bool)

    def name(*edges: str) -> None:
        for text in edges:
            edge = nodes.edge(text)
            keep[0, nodes.sender_index(edge.sender), nodes.readers.index(edge.reader)] = True

    name("embed->m0", "m0->a1.h0.v", "a1.h1->logits")  # a1.h1 shares the key-value head
    whole = keep.copy()
    name("m1->logits", "embed->a0.h0.q", "a0.h1->m1")  # no input, no output, neither
    assert np.array_equal(connected(nodes, keep), whole)


@pytest.mark.parametrize(
    ("rank_by", "ranks"), [("size", [1, 0, -1, 2, 4, 3]), ("signed", [3, 0, -1, 4, 2, 1])]
)
def test_ranks_go_by_size_or_by_sign_and_ties_to_the_earlier(rank_by: Any, ranks: list) -> None:
    scores = np.array([0.5, -2.0, np.nan, 0.5, 0.0, -0.1])
    assert rank_top(strength_of(scores, rank_by)).tolist() == ranks


def test_sizes_are_shares_or_numbers() -> None:
    assert sizes_of([50, 0.29, 1], 100, "nodes").counts == (29, 50, 100)
    assert sizes_of(None, 32491, "edges").counts[:3] == (32, 64, 162)
    for wrong, words in (([0.0], "neither"), ([101], "neither"), ([0.5, 50], "twice")):
        with pytest.raises(PlanError, match=words):
            sizes_of(wrong, 100, "nodes")


def test_areas_are_those_of_mib() -> None:
    # a curve that overshoots: 1 to 1.5, then back to 1
    cpr, cmd = areas([0.001, 0.5, 1.0], [1.0, 1.5, 1.0])
    assert cpr == pytest.approx(0.499 * 1.25 + 0.5 * 1.25)
    assert cmd == pytest.approx(0.999 * 0.25)


# --- what comes back ---


def test_curves_are_ratios_of_means() -> None:
    name = "tiny:llama"
    pairs = PromptPairs.from_strings(
        model(name),
        clean=[CLEAN, "When John and Mary left, John gave it to"],
        corrupted=[CORRUPTED, "When John and Mary left, Mary gave it to"],
        answers=[(" Mary", " John")] * 2,
    )
    ds = circuit(model(name), pairs, ["logit_diff", "log_prob"], sizes=[0.2, 1.0])
    base, empty = ds["base_metric"].mean("pair"), ds["empty_metric"].mean("pair")
    for curve, raw in (("faithfulness", "circuit"), ("completeness", "complement")):
        wanted = (ds[f"{raw}_metric"].mean("pair") - empty) / (base - empty)
        np.testing.assert_allclose(ds[curve].values, wanted.values, atol=1e-5)
    np.testing.assert_allclose(ds["faithfulness"].values[:, 1], 1, atol=1e-3)
    np.testing.assert_allclose(ds["completeness"].values[:, 1], 0, atol=1e-3)
    np.testing.assert_allclose(ds["empty_metric"], ds["source_metric"], atol=1e-4)
    for i, metric in enumerate(("logit_diff", "log_prob")):
        both = areas([0.2, 1.0], ds["faithfulness"].values[i])
        told = attributes(ds)
        assert (told["cpr"][metric], told["cmd"][metric]) == pytest.approx(both)


@pytest.mark.parametrize(
    ("level", "method", "name"),
    [
        ("edges", "eap", "eap"),
        ("edges", "eap_ig", "eap_ig"),
        ("edges", IntegratedInputs(n_steps=3), "eap_ig"),
        ("edges", "exact", "exact"),
        ("nodes", "ig", "ig"),
        ("nodes", "exact", "exact"),
    ],
)
def test_every_method_ranks_all(level: Any, method: Any, name: str) -> None:
    ds = circuit(model("tiny:gpt2"), demo_pairs("tiny:gpt2"), level=level, method=method)
    ranks = ds["rank"].values
    assert sorted(ranks[ranks >= 0]) == [*range(int((ranks >= 0).sum()))]
    assert ds.attrs["method"] == name
    strength = np.abs(ds["score"].values[ranks >= 0])[np.argsort(ranks[ranks >= 0])]
    assert (np.diff(strength) <= 0).all()


def test_scores_of_other_pairs_rank_these() -> None:
    name = "tiny:llama"
    scores = circuit_scores(model(name), demo_pairs(name))
    ds = circuit(model(name), demo_pairs(name), scores=scores[::-1, ::-1], sizes=[0.1])
    own = circuit(model(name), demo_pairs(name), sizes=[0.1])
    xr.testing.assert_identical(ds["rank"], own["rank"])
    with pytest.raises(PlanError, match="dims"):
        circuit(model(name), demo_pairs(name), level="nodes", scores=scores)
    with pytest.raises(PlanError, match="other senders"):
        circuit(model(name), demo_pairs(name), scores=scores[1:])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"level": "neurons"}, PlanError, "use nodes or edges"),
        ({"growth": "random"}, PlanError, "use top or greedy"),
        ({"level": "nodes", "growth": "greedy"}, PlanError, "growth=top"),
        ({"sizes": [2.5]}, PlanError, "2.5"),
        ({"method": "atp_star"}, MethodError, "use eap"),
        ({"ablation": "shuffle"}, MethodError, "shuffle"),
        ({"ablation": "noise"}, ConfigError, "noise"),
        ({"ablation": "mean"}, ConfigError, "17 tokens: 1 .pair 0 needs it.*means_from"),
        ({"means_from": "pairs.jsonl"}, ConfigError, "means_from is for the interventions mean"),
        ({"rank_by": "sign"}, PlanError, "use size or signed"),
        ({"rank_by": "signed", "metrics": "kl_base"}, PlanError, "kl_base is smaller where"),
    ],
)
def test_mistakes_end_before_anything_runs(
    arguments: dict[str, Any],
    error: type[PatchsweepError],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("patchsweep.forward.blockwise.Blocks.trace", never)
    ran = torch.nn.modules.module.register_module_forward_pre_hook(never)
    with ran, pytest.raises(error, match=words):
        circuit(model("tiny:llama"), demo_pairs("tiny:llama"), **arguments)


def test_a_model_that_is_not_the_sum_of_its_parts_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def off(scene: EdgeBatch, keep: Tensor, pair: Tensor, at: Tensor | None) -> Tensor:
        return run_nodes(scene, keep, pair, at) + 0.1

    monkeypatch.setattr("patchsweep.analyses.circuits.ablate.run_nodes", off)
    with pytest.raises(MethodError, match="with nothing ablated, differs"):
        circuit(model("tiny:llama"), demo_pairs("tiny:llama"), level="nodes")


# --- from the command line to the page ---


@pytest.mark.parametrize("level", ["nodes", "edges"])
def test_one_command_stores_circuits_that_a_page_shows(
    level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "c.zarr"
    words = ["circuit", "model=tiny:llama", "task.n_pairs=2", f"level={level}", f"store={store}"]
    words.append("sizes=[0.2,0.5,1]")
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "CPR" in told
    assert "written" in told
    ds = xr.open_zarr(store, consolidated=False).load()
    assert ds.attrs["kind"] == "circuit"
    assert attributes(ds)["provenance"]["config"]["level"] == level
    assert f"CPR {number(float(attributes(ds)['cpr']['logit_diff']))}" in told

    page = write_report(store, tmp_path / "c.html").read_text(encoding="utf-8")
    i = chosen_size(ds)
    assert ds["faithfulness"].values[0, i] >= 0.8
    # the bold row of the table is the circuit that is drawn
    row = re.search(r"<tr class=chosen>(.*?)</tr>", page)
    assert row is not None
    assert f">{int(ds['count'].values[i])}<" in row[1]
    if level == "edges":
        n_lines = page.count("when it is ablated</title></path>")
        assert n_lines == min(60, int(ds["count"].values[i]))

    # the second time nothing is computed
    monkeypatch.setattr("patchsweep.sweeps.executor.run_work", None)
    assert main(words) == 0
    assert "nothing was run" in capsys.readouterr().out
    assert main([*words, "growth=top", "ablation=zero"]) == EXIT_MISTAKE
    assert "ablation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("sites=z", "circuits have no sites"),
        ("intervention=mean", "call it ablation"),
        ("level=neurons", "use nodes or edges"),
        ("sizes=0.5", "must be a list"),
        ("method=[atp,exact]", "one method"),
        ("method=screen", "one method"),
    ],
)
def test_wrong_words_end_in_one_line(
    word: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["circuit", "model=tiny:llama", word]) == EXIT_MISTAKE
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_page_escapes_tokens_and_tells_of_what_is_missing() -> None:
    name = "tiny:llama"
    ds = circuit(model(name), demo_pairs(name), sizes=[0.01])
    tokens = ds["base_token"].values.copy()
    tokens[0, 0] = "<script>alert(1)</script>"
    ds = ds.assign_coords(base_token=(("pair", "pos"), tokens))
    page = build(ds)
    assert "<script>alert" not in page
    assert "No circuit that was run keeps 0.8" in page
    same = ds.assign(faithfulness=ds["faithfulness"] * np.nan).assign_attrs(cpr={}, cmd={})
    assert "there is no such share" in build(same)


def test_faithfulness_of_an_ablation_that_changes_nothing_is_no_number() -> None:
    own = Custom(lambda site, layer, base, source: base)  # as a mean of one prompt would be
    name = "tiny:llama"
    for level in ("nodes", "edges"):
        ds = circuit(model(name), demo_pairs(name), ablation=own, level=level, sizes=[0.1, 1])
        assert np.isnan(ds["faithfulness"]).all()
        assert np.isnan(ds["completeness"]).all()
        told = attributes(ds)
        assert told["cpr"] == {} == told["cmd"]
        assert "within rounding" in told["undefined"]["logit_diff"]
        assert "There is no faithfulness: m(clean) - m(empty) is " in build(ds)
    real = circuit(model(name), demo_pairs(name), sizes=[0.1, 1])
    assert attributes(real)["undefined"] == {}
    assert np.isfinite(real["faithfulness"]).all()


def test_signed_circuits_take_what_the_metric_falls_without_first() -> None:
    name = "tiny:llama"
    given = {"level": "nodes", "sizes": [3, 5, 8]}
    size, signed = (
        circuit(model(name), demo_pairs(name), rank_by=how, **given) for how in ("size", "signed")
    )
    xr.testing.assert_equal(size["score"], signed["score"])
    order = np.argsort(signed["score"].values, kind="stable")
    assert signed["rank"].values[order].tolist() == [*range(len(order))]
    assert not np.array_equal(size["rank"], signed["rank"])
    assert (size.attrs["rank_by"], signed.attrs["rank_by"]) == ("size", "signed")


def test_scores_of_parallel_blocks_are_scores_for_circuits() -> None:
    # attention and MLP of a parallel block have no edge; only a run tells that they are parallel
    name = "tiny:gpt_neox"
    pairs = reference_pairs(name)
    own = ps.circuit(model(name), pairs, sizes=[2, 5])
    given = ps.circuit(
        model(name), pairs, sizes=[2, 5], scores=ps.circuit_scores(model(name), pairs)
    )
    np.testing.assert_array_equal(own["circuit_metric"], given["circuit_metric"])
    scores = ps.circuit_scores(model(name), pairs, by_pair=True)
    held_out = ps.cross_validate_circuit(model(name), pairs, scores, folds=2, sizes=[2, 5])
    assert np.isfinite(held_out["held_out"]).any()
    scores = scores.copy()
    scores[:, 0, 0] = np.nan
    with pytest.raises(PatchsweepError, match="1 of the scores"):
        ps.circuit(model(name), pairs, sizes=[2], scores=scores)
