"""Metrics of answers of several tokens, token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.cli import main
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, MetricError
from subjects import CLEAN, CORRUPTED, model

RIGHT, WRONG = " Mary John", " John Mary"


def pairs_of(name: str) -> PromptPairs:
    return PromptPairs.from_strings(
        model(name), [CLEAN], [CORRUPTED], [(RIGHT, WRONG)], multi_token=True
    )


@pytest.mark.parametrize("runner", ["packed", "hooked"])
@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gpt2", "tiny:gemma2"])
def test_each_token_is_read_after_the_right_answers_tokens_before_it(
    name: str, runner: str
) -> None:
    bridge, pairs = model(name), pairs_of(name)
    (pair,) = pairs
    n = len(pair.answer)
    assert n == len(pair.wrong_answer) > 1
    ds = ps.sweep(
        bridge,
        pairs,
        "resid_pre",
        ["logit_diff", "log_prob"],
        positions=[9, 16],
        per_token=True,
        runner=runner,  # type: ignore[arg-type]
    )
    assert list(ds["metric"].values) == [
        "logit_diff",
        "log_prob",
        *(f"{metric}@{i}" for metric in ("logit_diff", "log_prob") for i in range(n)),
    ]
    forced = list(pair.answer[:-1])
    clean, base = (torch.tensor([[*ids, *forced]]) for ids in (pair.clean, pair.corrupted))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        for layer in (0, 1):
            for pos in (9, 16):

                def patch(x, hook, layer=layer, pos=pos):  # type: ignore[no-untyped-def]
                    x = x.clone()
                    x[:, pos] = cache["resid_pre", layer][:, pos]
                    return x

                logits = bridge.run_with_hooks(
                    base, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)]
                )[0]
                for i in range(n):
                    row = logits[len(pair) - 1 + i]
                    right, wrong = row[pair.answer[i]], row[pair.wrong_answer[i]]
                    cell = ds["resid_pre"].sel(layer=layer, pos=pos).squeeze("pair")
                    assert float(cell.sel(metric=f"logit_diff@{i}")) == pytest.approx(
                        float(right - wrong), abs=1e-4
                    )
                    assert float(cell.sel(metric=f"log_prob@{i}")) == pytest.approx(
                        float(row.log_softmax(-1)[pair.answer[i]]), abs=1e-4
                    )


def test_tokens_add_up_to_the_answer_for_values_and_estimates() -> None:
    pairs = pairs_of("tiny:llama")
    ds = ps.sweep(
        model("tiny:llama"), pairs, "z", ["logit_diff"], method=["exact", "atp"], per_token=True
    )
    whole, parts = ds.sel(metric="logit_diff"), ds.isel(metric=slice(1, None))
    for name in ("z", "z_atp", "base_metric", "source_metric"):
        np.testing.assert_allclose(parts[name].sum("metric"), whole[name], atol=1e-5)
    effects = parts["z"] - parts["base_metric"]
    assert (abs(effects).max(["pair", "layer", "pos", "head"]) > 1e-3).all()


def test_a_token_is_named_anywhere_and_on_the_command_line(tmp_path: Path) -> None:
    bridge, pairs = model("tiny:llama"), pairs_of("tiny:llama")
    expected = ps.sweep(bridge, pairs, "resid_pre", "logit_diff@1")
    words = ["task=strings", f"task.clean={CLEAN}", f"task.corrupted={CORRUPTED}"]
    words += [f"task.answer={RIGHT}", f"task.wrong_answer={WRONG}", "task.multi_token=true"]
    store = tmp_path / "a.zarr"
    assert (
        main(
            [
                "run",
                "model=tiny:llama",
                *words,
                "sites=resid_pre",
                "metric=logit_diff@1",
                f"store={store}",
            ]
        )
        == 0
    )
    np.testing.assert_array_equal(ps.open_store(store)["resid_pre"], expected["resid_pre"])
    scores = ps.edges(bridge, pairs, ["logit_diff@0", "logit_diff@1"])
    both = ps.edges(bridge, pairs, "logit_diff")
    np.testing.assert_allclose(
        scores["edge_eap"].sum("metric", skipna=False),
        both["edge_eap"].squeeze("metric"),
        atol=1e-5,
    )


def test_a_token_that_an_answer_lacks_is_refused() -> None:
    bridge = model("tiny:llama")
    pairs = PromptPairs.from_strings(
        bridge,
        [CLEAN] * 2,
        [CORRUPTED] * 2,
        [(RIGHT, WRONG), (" Mary", " John")],
        multi_token=True,
    )
    for metrics, per_token in (("logit_diff@1", False), ("logit_diff", True)):
        with pytest.raises(MetricError, match="reads token 1 of the answers, and those of pair 1"):
            ps.sweep(bridge, pairs, "z", metrics, per_token=per_token)
    for name in ("logit_diff@", "logit_diff@-1", "logit_diff@x", "x@0", "@0"):
        with pytest.raises(MetricError, match="is not known"):
            ps.plan(bridge, pairs, "z", name)
    with pytest.raises(ConfigError, match="per_token"):
        ps.plan(bridge, pairs, "z", per_token="yes")
