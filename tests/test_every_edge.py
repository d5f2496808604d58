"""All edges in one table: each equals its own run, and those proved dead change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from patchsweep.analyses.circuits import Edge, exact_edges, screen_edges
from patchsweep.analyses.circuits import every_edge as every_module
from patchsweep.analyses.circuits.exact import UNCHANGED, UNREAD
from patchsweep.analyses.stages import Stages, Unfinished
from patchsweep.cli.main import EXIT_DONE, main
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PlanError
from patchsweep.models import load_model
from patchsweep.store.attributes import attributes
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from test_paths import batch_of, edge_by_hooks, hooked, nodes_of
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

NAMES = ["tiny:llama", "tiny:gpt_neox"]


def all_edges(name: str, **settings: Any) -> xr.Dataset:
    return exact_edges(model(name), demo_pairs(name), "all", **settings)


@pytest.mark.parametrize("name", NAMES)
def test_every_edge_is_there_and_equals_hooks(name: str) -> None:
    found, nodes = all_edges(name), nodes_of(name)
    values = found["edge"].values[0, 0]
    assert (np.isfinite(values) == nodes.possible).all()
    assert ((found["edge_dead"].values[0] >= 0) == nodes.possible).all()
    rng = np.random.default_rng(0)
    at = np.argwhere(nodes.possible)
    some = at[rng.permutation(len(at))[:24]]
    edges = [Edge(nodes.senders[u], nodes.readers[v]) for u, v in some]
    expected = [edge_by_hooks(model(name), edge, batch_of(name)) for edge in edges]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(values[tuple(some.T)], expected, atol=1e-4)


def test_dead_edges_change_nothing_and_say_why() -> None:
    name = "tiny:llama"
    found = all_edges(name, positions=True)
    codes = found["edge_dead"].sel(pair=0)
    base = hooked(model(name), batch_of(name).base)
    first = int((found["base_token"] != found["source_token"])[0].argmax())
    assert (codes.sel(sender="m0", reader="logits").values[:first] == UNCHANGED).all()
    assert codes.sel(sender="m0", reader="logits", pos=first) == UNREAD
    assert codes.sel(sender="m0", reader="a2.h1.q", pos=first) == UNREAD
    assert codes.sel(sender="m0", reader="a2.h1.k", pos=first) == 0
    assert codes.sel(sender="embed", reader="m1", pos=first + 1) == UNCHANGED
    nodes = nodes_of(name)
    for label in (f"m0->logits@{first}", f"a1.h2->a2.h1.q@{first + 1}", f"embed->m1@{first + 1}"):
        assert edge_by_hooks(model(name), nodes.edge(label), batch_of(name)) == pytest.approx(
            base, abs=1e-5
        )
    dead = codes.values > 0
    assert (found["edge"].values[0, 0][dead] == found["base_metric"].item()).all()
    assert sum(attributes(found)["dead"].values()) == dead.sum()
    # of the rest most do something; what is left is lost in rounding, of which machines differ
    alive = found["edge"].values[0, 0][codes.values == 0]
    assert (alive != found["base_metric"].item()).mean() > 0.7


def test_an_edge_alone_equals_its_cell() -> None:
    name = "tiny:llama"
    table = all_edges(name, positions=True)["edge"]
    labels = ["a0.h1->a1.h0.k@12", "m1->m2@14", "embed->a2.h1.v@11", "a1.h3->logits@16"]
    alone = exact_edges(model(name), demo_pairs(name), labels)
    for i, (sender, reader, pos) in enumerate(
        zip(alone.edge_sender.values, alone.edge_reader.values, alone.edge_pos.values, strict=True)
    ):
        cell = table.sel(sender=sender, reader=reader, pos=pos).item()
        assert cell == pytest.approx(alone.edge[0, 0, i].item(), abs=1e-5)


def test_pairs_of_two_lengths_and_two_metrics() -> None:
    bridge = model("tiny:llama")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[CLEAN, f"Then {CLEAN}"],
        corrupted=[CORRUPTED, f"Then {CORRUPTED}"],
        answers=[(" Mary", " John")] * 2,
    )
    together = exact_edges(bridge, pairs, "all", ["logit_diff", "kl_base"], positions=True)
    alone = exact_edges(bridge, PromptPairs((pairs[0],)), "all", ["logit_diff", "kl_base"])
    last = len(pairs[1]) - 1
    assert np.isnan(together["edge"].values[:, 0, ..., last]).all()
    np.testing.assert_allclose(together["base_metric"][:, 0], alone["base_metric"][:, 0], atol=1e-4)


def test_slices_and_an_interruption_give_the_same_table(tmp_path: Path) -> None:
    name = "tiny:llama"
    whole = all_edges(name)
    store = tmp_path / "all.zarr"

    def slice_of(index: int) -> xr.Dataset:
        stages = Stages(store, slice_index=index, n_slices=2)
        return all_edges(name, stages=stages)

    with pytest.raises(Unfinished, match="units of other slices"):
        slice_of(0)
    ran: list[int] = []
    fill = every_module._fill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(every_module, "_fill", lambda *x: (ran.append(x[2]), fill(*x))[1])
        found = slice_of(1)
    assert ran == [1, 3]  # layers of the other slice are done
    xr.testing.assert_equal(found["edge"], whole["edge"])
    xr.testing.assert_equal(found["edge_dead"], whole["edge_dead"])


def test_the_command_runs_all_edges_and_says_what_was_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["edges", "model=tiny", "task=ioi_demo", "top=all", "store=e.zarr"]) == EXIT_DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "190 edges scored, all of them run exactly but" in said
    assert "proved dead" in said
    assert main(["report", "e.zarr"]) == EXIT_DONE
    assert "proved dead" in Path("report.html").read_text()
    ds = xr.open_zarr("e.zarr", consolidated=False)
    np.testing.assert_array_equal(ds["edge"], all_edges("tiny:llama")["edge"])
    assert ds["edge_eap"].dims == ds["edge"].dims


def test_words_that_are_no_list_are_refused() -> None:
    with pytest.raises(PlanError, match="or 'all'"):
        exact_edges(model("tiny:llama"), demo_pairs("tiny:llama"), "every")
    with pytest.raises(PlanError, match="top='most'"):
        screen_edges(model("tiny:llama"), demo_pairs("tiny:llama"), top="most")


class Formulas:
    """SmolLM2 on the demo pair by the Llama formulas written out, with one reader's input moved."""

    def __init__(self, bridge: TransformerBridge) -> None:
        model = bridge.original_model
        config, state = model.config, model.state_dict()
        # the bridge puts its own name before each module's
        weights = {name.replace("_original_component.", ""): w for name, w in state.items()}
        self.w = {name.removeprefix("model."): w.float() for name, w in weights.items()}
        self.n_layers, self.d = config.num_hidden_layers, config.hidden_size
        self.n_heads, self.n_kv = config.num_attention_heads, config.num_key_value_heads
        self.d_head, self.eps = self.d // self.n_heads, config.rms_norm_eps
        batch = batch_of("smollm2-135m")
        self.answers = [int(x[0, 0]) for x in (batch.answer, batch.wrong)]
        length = batch.base.shape[1]
        powers = torch.arange(0, self.d_head, 2) / self.d_head
        theta = float(config.rope_parameters["rope_theta"])
        turns = torch.arange(length)[:, None] * theta**-powers
        self.cos, self.sin = (f(torch.cat([turns, turns], -1)) for f in (torch.cos, torch.sin))
        self.causal = torch.ones(length, length).tril().bool()
        self.base, self.source = ([self.w["embed_tokens.weight"][tokens[0]]] for tokens in
                                  (batch.base, batch.source))  # fmt: skip
        self.writes: list[list[Tensor]] = []  # of both runs: what embed, heads and MLPs write
        for stream in (self.base, self.source):
            written = [stream[0]]
            for layer in range(self.n_layers):
                heads, mlp = self.block(layer, stream[-1])
                written += [*heads, mlp]
                stream.append(stream[-1] + sum(heads) + mlp)
            self.writes.append(written)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.w[name]

    def project(self, layer: int, kind: str, x: Tensor) -> Tensor:
        """q (or k, v) of every head, [head, pos, d_head]."""
        x = self.norm(x, f"layers.{layer}.input_layernorm.weight")
        made = x @ self.w[f"layers.{layer}.self_attn.{kind}_proj.weight"].T
        heads = made.unflatten(-1, (-1, self.d_head)).transpose(0, 1)
        if kind == "v":
            return heads
        first, second = heads.chunk(2, -1)
        return heads * self.cos + torch.cat([-second, first], -1) * self.sin

    def block(
        self, layer: int, x: Tensor, kind: str = "", head: int | None = None, more: Any = 0
    ) -> tuple[list[Tensor], Tensor]:
        """What heads and MLP write; the reader `kind` of `head` sees `more` in its input."""
        qkv = {name: self.project(layer, name, x) for name in "qkv"}
        if kind in qkv:
            qkv[kind] = qkv[kind].clone()
            qkv[kind][head] = self.project(layer, kind, x + more)[head]
        k, v = (qkv[name].repeat_interleave(self.n_heads // self.n_kv, 0) for name in "kv")
        scores = qkv["q"] @ k.transpose(1, 2) / self.d_head**0.5
        z = scores.masked_fill(~self.causal, float("-inf")).softmax(-1) @ v
        w_o = self.w[f"layers.{layer}.self_attn.o_proj.weight"].unflatten(1, (self.n_heads, -1))
        heads = [*torch.einsum("hpd,mhd->hpm", z, w_o)]
        seen = self.norm(
            x + sum(heads) + (more if kind == "mlp" else 0),
            f"layers.{layer}.post_attention_layernorm.weight",
        )
        gate, up, down = (self.w[f"layers.{layer}.mlp.{n}_proj.weight"] for n in
                          ("gate", "up", "down"))  # fmt: skip
        return heads, (torch.nn.functional.silu(seen @ gate.T) * (seen @ up.T)) @ down.T

    def metric(self, edge: Edge, sender: int) -> float:
        more, layer = self.writes[1][sender] - self.writes[0][sender], edge.reader.layer
        x = self.base[layer]
        if edge.reader.kind == "logits":
            x = x + more
        for at in range(layer, self.n_layers):
            own = (edge.reader.kind, edge.reader.head, more) if at == layer else ()
            heads, mlp = self.block(at, x, *own)
            x = x + sum(heads) + mlp
        final = self.norm(x[-1], "norm.weight")
        answer, wrong = (self.w["embed_tokens.weight"][i] for i in self.answers)
        return float(final @ (answer - wrong))


@pytest.mark.slow
@torch.no_grad()
def test_three_hundred_edges_of_smollm2_equal_the_formulas() -> None:
    name = "smollm2-135m"
    nodes, plain = nodes_of(name), Formulas(model(name))
    at = np.argwhere(nodes.possible)
    chosen = at[np.random.default_rng(7).permutation(len(at))[:300]]
    edges = [Edge(nodes.senders[u], nodes.readers[v]) for u, v in chosen]
    found = exact_edges(model(name), demo_pairs(name), edges)["edge"].values[0, 0]
    wanted = [plain.metric(edge, int(u)) for edge, (u, _) in zip(edges, chosen, strict=True)]
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_attention_that_adds_more_than_its_heads_is_refused() -> None:
    bridge = load_model("tiny:llama", device="cpu")
    attention = bridge.blocks[1].attn.original_component

    class Doubled(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, *rest = super().forward(*args, **kwargs)
            return 2 * out, *rest

    attention.__class__ = Doubled
    pairs = PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )
    with pytest.raises(MethodError, match=r"attention of block 1 .* W_O"):
        exact_edges(bridge, pairs, ["a0.h1->logits"])
