"""Circuit files: both directions of each layout, MIB's signs, areas and names, ungrouped heads."""

from __future__ import annotations

import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
import xarray as xr
from patchsweep.analyses.circuits.edge_batch import ExactBatches, ask
from patchsweep.errors import ConfigError, ModelError, PatchsweepError, PlanError
from patchsweep.forward.grad import frozen
from subjects import demo_pairs, model
from test_circuits import Hooked

NAME = "tiny:gpt2"


@pytest.fixture(scope="module")
def scores() -> xr.DataArray:
    return ps.circuit_scores(model(NAME), demo_pairs(NAME), method="eap")


@pytest.fixture(scope="module")
def node_scores() -> xr.DataArray:
    return ps.circuit_scores(model(NAME), demo_pairs(NAME), level="nodes", method="atp")


@pytest.mark.parametrize("suffix", [".json", ".pt", ".pkl"])
def test_edge_scores_and_circuits_round_trip(
    tmp_path: Path, scores: xr.DataArray, suffix: str
) -> None:
    file = tmp_path / f"scores{suffix}"
    ps.write_circuit(model(NAME), scores, file, count=40)
    back = ps.read_circuit(model(NAME), file)
    xr.testing.assert_equal(back["score"], scores)
    if suffix != ".pkl":  # auto-circuit keeps scores alone
        strongest = np.sort(np.abs(scores.values[~np.isnan(scores.values)]))[-40]
        assert (back["member"].values == (np.abs(scores.values) >= strongest)).all()
    again = tmp_path / f"again{suffix}"
    ps.write_circuit(model(NAME), back["score"], again, count=40)
    assert back.drop_attrs().equals(ps.read_circuit(model(NAME), again).drop_attrs())


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_node_scores_round_trip(tmp_path: Path, node_scores: xr.DataArray, suffix: str) -> None:
    file = tmp_path / f"nodes{suffix}"
    ps.write_circuit(model(NAME), node_scores, file, count=4)
    back = ps.read_circuit(model(NAME), file)
    np.testing.assert_array_equal(back["node_score"].values, node_scores.values)
    assert back["node_member"].values.sum() == 4
    out = back["member"].any("reader").values
    assert out[0]  # the embeddings belong to every circuit of nodes
    assert (out[1:] == back["node_member"].values).all()


def test_a_circuit_keeps_its_own_order(tmp_path: Path) -> None:
    ds = ps.circuit(model(NAME), demo_pairs(NAME), growth="greedy", sizes=[30, 1.0])
    ps.write_circuit(model(NAME), ds, tmp_path / "c.json", count=30)
    member = ps.read_circuit(model(NAME), tmp_path / "c.json")["member"]
    assert ((ds["rank"].values >= 0) & (ds["rank"].values < 30) == member.values).all()
    chosen = ps.circuit(
        model(NAME), demo_pairs(NAME), scores=-member.astype(float), sizes=[30], rank_by="signed"
    )
    assert chosen["faithfulness"].item() == pytest.approx(ds["faithfulness"].values[0, 0])


# --- MIB's layout and its numbers, computed from the file alone ---

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


def pruned(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Edges left after nodes without an edge in or out are dropped, again and again."""
    while True:
        into = {end.partition("<")[0] for _, end in edges} | {"input"}
        out = {start for start, _ in edges} | {"logits"}
        left = {(u, v) for u, v in edges if u in into and v.partition("<")[0] in out}
        if left == edges:
            return left
        edges = left


@pytest.mark.parametrize(
    "absolute", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["cmd", "cpr"]
)
def test_cpr_and_cmd_are_those_of_an_evaluation_of_the_file(
    tmp_path: Path, scores: xr.DataArray, absolute: bool
) -> None:
    pairs = demo_pairs(NAME)
    question = ask(model(NAME), pairs, direction="noising")
    with frozen(question.bridge):
        scene = next(ExactBatches(question).of(range(len(pairs))))
    ps.write_circuit(model(NAME), scores, tmp_path / "s.json")
    entries = json.loads((tmp_path / "s.json").read_text())["edges"]
    order = sorted(
        entries, key=lambda e: -(abs if absolute else float)(entries[e]["score"])
    )  # MIB scores a loss: large is important
    hooked = Hooked(scene)
    senders = {str(s) if i else "input": i for i, s in enumerate(scene.nodes.senders)}
    readers = {
        f"a{r.layer}.h{r.head}<{r.kind}>" if r.head is not None else str(r): i
        for i, r in enumerate(scene.nodes.readers)
    }

    @cache  # small circuits are often empty once pruned
    def run(edges: frozenset[tuple[str, str]]) -> float:
        keep = np.zeros(scene.nodes.possible.shape, dtype=bool)
        for u, v in edges:
            keep[senders[u], readers[v]] = True
        return hooked.of_edges(keep)

    clean, empty = hooked.metric(hooked.clean), run(frozenset())
    curve = []
    for share in SHARES:
        chosen = {tuple(e.split("->")) for e in order[: int(share * len(entries))]}
        curve.append((run(frozenset(pruned(chosen))) - empty) / (clean - empty))
    cpr = np.trapezoid(curve, SHARES)
    cmd = np.trapezoid(np.abs(1 - np.array(curve)), SHARES)
    ds = ps.circuit(
        model(NAME), pairs, scores=ps.read_circuit(model(NAME), tmp_path / "s.json")["score"],
        rank_by="size" if absolute else "signed",
    )  # fmt: skip
    assert ds["faithfulness"].values[0] == pytest.approx(curve, abs=1e-4)
    known = ds.patchsweep.attributes
    assert known["cpr"]["logit_diff"] == pytest.approx(cpr, abs=1e-4)
    assert known["cmd"]["logit_diff"] == pytest.approx(cmd, abs=1e-4)
    assert abs(1 - cpr) > 0.01  # a curve of ones would prove nothing


def test_mib_names_and_signs(tmp_path: Path, scores: xr.DataArray) -> None:
    ps.write_circuit(model(NAME), scores, tmp_path / "s.json", count=5)
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["cfg"] == {
        "n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32,
    }  # fmt: skip
    assert set(data["nodes"]) == {
        "input", "logits", *(f"m{i}" for i in range(3)),
        *(f"a{i}.h{j}" for i in range(3) for j in range(4)),
    }  # fmt: skip
    assert sum(e["in_graph"] for e in data["edges"].values()) == 5
    score = float(scores.sel(sender="embed", reader="a1.h2.k"))
    assert data["edges"]["input->a1.h2<k>"]["score"] == pytest.approx(-score)


def test_files_that_name_some_edges_only_leave_the_rest_at_zero(tmp_path: Path) -> None:
    data = {
        "cfg": {"n_layers": 3, "n_heads": 4, "d_model": 32},
        "nodes": {"input": True, "m0": True, "logits": True},  # an older layout
        "edges": {"input->m0": {"score": 2, "in_graph": True}},
    }
    (tmp_path / "part.json").write_text(json.dumps(data))
    ds = ps.read_circuit(model(NAME), tmp_path / "part.json")
    assert ds["score"].sel(sender="embed", reader="m0") == -2
    assert float(np.abs(ds["score"]).sum()) == 2
    assert ds["member"].sum() == 1
    assert "node_score" not in ds


def test_auto_circuit_pickles_of_its_own_kind_are_read(tmp_path: Path) -> None:
    bridge = model(NAME)
    made = {
        "blocks.0.hook_q_input": torch.nn.Parameter(torch.arange(4.0).reshape(4, 1)),
        "blocks.2.hook_resid_post": torch.arange(16.0),
    }
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(made))
    score = ps.read_circuit(bridge, tmp_path / "p.pkl")["score"]
    assert score.sel(sender="embed", reader="a0.h3.q") == -3
    assert score.sel(sender="m2", reader="logits") == -15
    assert score.sel(sender="embed", reader="a1.h0.q") == 0


# --- ungrouped heads ---


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", pytest.param("mixtral", marks=pytest.mark.slow)]
)
def test_ungrouped_models_compute_the_same_and_split_the_edges_of_shared_heads(
    family: str,
) -> None:
    name = f"tiny:{family}"
    pairs = demo_pairs(name)
    apart = ps.ungrouped(model(name))
    tokens = torch.tensor([pairs[0].clean])
    with torch.no_grad():
        torch.testing.assert_close(apart(tokens), model(name)(tokens))
    grouped, own = (ps.circuit_scores(m, pairs, method="eap") for m in (model(name), apart))
    assert own.sizes["reader"] == 3 * (3 * 4 + 1) + 1
    for kind in "kv":
        both = own.sel(reader=[f"a1.h2.{kind}", f"a1.h3.{kind}"]).sum("reader", skipna=False)
        np.testing.assert_allclose(
            both.values, grouped.sel(reader=f"a1.h1.{kind}").values, atol=1e-4
        )
    assert float(np.abs(own - 0).max()) > 0.1
    assert ps.ungrouped(apart) is apart


def test_ungrouping_leaves_the_model_as_it_was() -> None:
    bridge = model("tiny:llama")
    before = dict(bridge.original_model.config.to_dict())
    ps.ungrouped(bridge)
    assert bridge.original_model.config.to_dict() == before
    assert bridge.cfg.n_key_value_heads == 2


# --- what is refused ---


def entry(nodes: Any = None, edges: Any = None, **cfg: Any) -> dict[str, Any]:
    return {
        "cfg": {"n_layers": 3, "n_heads": 4, "d_model": 32, **cfg},
        "nodes": nodes or {},
        "edges": edges or {},
    }


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (entry(edges={"input->a7.h0<q>": {"score": 1}}), PlanError, r"names 'a7\.h0<q>'"),
        (entry(edges={"a9.h1->logits": {"score": 1}}), PlanError, r"names 'a9\.h1'"),
        (entry(edges={"m2->m0": {"score": 1}}), PlanError, "goes backwards"),
        (entry(edges={"input->m0": {"score": "big"}}), ConfigError, "must be a number"),
        (entry(nodes={"m77": {"in_graph": True}}), PlanError, "'m77' is none"),
        (entry(n_layers=12), PlanError, "n_layers=12, and this one has 3"),
        ({"nodes": {}}, ConfigError, "lacks cfg, nodes or edges"),
        ([1, 2], ConfigError, "lacks cfg, nodes or edges"),
    ],
)
def test_foreign_json_is_refused_by_name(
    tmp_path: Path, data: Any, error: type[PatchsweepError], words: str
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(error, match=words):
        ps.read_circuit(model(NAME), tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"blocks.9.hook_mlp_in": torch.ones(3)}, PlanError, "names 'blocks.9.hook_mlp_in'"),
        ({"blocks.0.hook_attn_in": torch.ones(4, 1)}, PlanError, "separate_qkv=True"),
        ({"blocks.0.hook_q_input": torch.ones(6, 4, 1)}, PlanError, "scores by position"),
        ({"blocks.0.hook_q_input": 3}, ConfigError, "no mapping of module names to tensors"),
        ({"blocks.0.hook_q_input": Path("x")}, ConfigError, "pathlib"),
    ],
)
def test_foreign_pickles_are_refused(
    tmp_path: Path, data: Any, error: type[PatchsweepError], words: str
) -> None:
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(error, match=words):
        ps.read_circuit(model(NAME), tmp_path / "bad.pkl")


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match="no pickle of tensors"):
        ps.read_circuit(model(NAME), tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()


def test_files_and_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, scores: xr.DataArray, node_scores: xr.DataArray
) -> None:
    bridge = model(NAME)
    for call, error, words in [
        (lambda: ps.read_circuit(bridge, tmp_path / "no.json"), ConfigError, "does not exist"),
        (lambda: ps.read_circuit(bridge, tmp_path / "no.txt"), ConfigError, "end with .json"),
        (lambda: ps.read_circuit(model("tiny:llama"), "x.json"), ModelError, "ungrouped"),
        (lambda: ps.write_circuit(bridge, scores, "/nowhere/x.json"), ConfigError, "make it first"),
        (
            lambda: ps.write_circuit(bridge, scores, tmp_path / "x.json", count=10**6),
            PlanError,
            "count=1000000",
        ),
        (
            lambda: ps.write_circuit(bridge, node_scores, tmp_path / "x.pkl"),
            ConfigError,
            "edges alone",
        ),
    ]:
        with pytest.raises(error, match=words):
            call()
    assert not list(tmp_path.iterdir())
