"""Sweeps as a user calls them: several pairs, metrics, positions and sites at once."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, MetricError, ModelError, PromptError, SiteError
from patchsweep.results.rounding import bf16_error
from patchsweep.store.attributes import attributes
from subjects import demo_pairs, model

NAME = "tiny:llama"
PROMPTS = [
    ("When John and Mary went to the shops, {} gave a bottle of milk to", " Mary", " John"),
    ("Then Paul and Anna went to the park, {} gave a ring to", " Anna", " Paul"),
    ("Then Tom and Lucy went to the store and {} gave a ball to", " Lucy", " Tom"),
    ("Then Mark and Emma went to the park, {} gave a ring to", " Emma", " Mark"),
]


def mixed_pairs(name: str = NAME) -> PromptPairs:
    return PromptPairs.from_strings(
        model(name),
        clean=[text.format(wrong.strip()) for text, _, wrong in PROMPTS],
        corrupted=[text.format(right.strip()) for text, right, _ in PROMPTS],
        answers=[(right, wrong) for _, right, wrong in PROMPTS],
    )


def test_pairs_of_mixed_length_equal_their_own_sweeps() -> None:
    pairs = mixed_pairs()
    lengths = [len(pair) for pair in pairs]
    assert len(set(lengths)) > 1
    together = ps.sweep(model(NAME), pairs, ["resid_pre", "z"], max_tokens=50)
    assert together.sizes["pos"] == max(lengths)
    for i, pair in enumerate(pairs):
        alone = ps.sweep(model(NAME), PromptPairs((pair,)), ["resid_pre", "z"])
        for site in ("resid_pre", "z"):
            row = together[site].values[0, i][:, -lengths[i] :]  # aligned at the end
            # another batch shape rounds differently; logits of order 10
            np.testing.assert_allclose(row, alone[site].values[0, 0], atol=1e-4)
            assert np.isnan(together[site].values[0, i][:, : -lengths[i]]).all()
        np.testing.assert_allclose(together.base_metric[0, i], alone.base_metric[0, 0], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_runners_agree_on_every_metric(family: str) -> None:
    name = f"tiny:{family}"
    metrics = list(ps.metrics.METRICS)
    found = [
        ps.sweep(model(name), demo_pairs(name), "resid_pre", metrics, layers=[1, 2], runner=runner)
        for runner in ("packed", "hooked")
    ]
    for metric in metrics:
        a, b = (ds["resid_pre"].sel(metric=metric).values for ds in found)
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=metric)
    assert attributes(found[0])["provenance"]["runner"] == "packed"
    assert float(np.ptp(found[0]["resid_pre"].sel(metric="kl_base").values)) > 1e-3


def test_kl_of_base_with_itself_is_zero_and_probabilities_are_consistent() -> None:
    ds = ps.sweep(
        model(NAME), demo_pairs(NAME), "z", ["kl_base", "prob", "log_prob", "top1_change"]
    )
    assert abs(float(ds.base_metric.sel(metric="kl_base")[0])) < 1e-6
    assert float(ds.base_metric.sel(metric="top1_change")[0]) == 0
    z = ds["z"]
    np.testing.assert_allclose(np.exp(z.sel(metric="log_prob")), z.sel(metric="prob"), rtol=1e-4)
    assert float(z.sel(metric="kl_base").min()) > -1e-6


def test_callable_metric_sees_logits_of_the_position_read() -> None:
    pairs = demo_pairs(NAME)
    answer, wrong = pairs[0].answer[0], pairs[0].wrong_answer[0]

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0, answer] - logits[:, 0, wrong]

    ds = ps.sweep(model(NAME), pairs, "resid_pre", ["logit_diff", difference])
    np.testing.assert_allclose(
        ds["resid_pre"].sel(metric="difference"),
        ds["resid_pre"].sel(metric="logit_diff"),
        atol=1e-5,
    )


def test_callable_metric_of_wrong_shape_is_refused() -> None:
    with pytest.raises(MetricError, match="return one number per row"):
        ps.sweep(model(NAME), demo_pairs(NAME), "resid_pre", lambda logits: logits.sum())


def test_metrics_read_at_another_position() -> None:
    found = [
        ps.sweep(model(NAME), demo_pairs(NAME), "resid_pre", read=12, runner=runner)
        for runner in ("packed", "hooked")
    ]
    np.testing.assert_allclose(found[0]["resid_pre"], found[1]["resid_pre"], atol=1e-4)
    after = found[0]["resid_pre"].values[0, 0][:, 13:]
    assert (after == found[0].base_metric.values[0, 0]).all()  # causality


def test_multi_token_answers_are_teacher_forced() -> None:
    bridge = model(NAME)
    pairs = PromptPairs.from_strings(
        bridge,
        clean=["Then John and Mary went to the shops, John gave a ring to"],
        corrupted=["Then John and Mary went to the shops, Mary gave a ring to"],
        answers=[(" Mary and", " John and")],
        multi_token=True,
    )
    assert len(pairs[0].answer) == 2
    ds = ps.sweep(bridge, pairs, "z", ["log_prob", "logit_diff"], heads="all")
    hooked = ps.sweep(bridge, pairs, "z", ["log_prob", "logit_diff"], heads="all", runner="hooked")
    np.testing.assert_allclose(ds["z"], hooked["z"], atol=1e-4)
    # the unpatched base by hand: log-prob of " Mary" then of " and", each given what precedes
    prompt = [*pairs[0].corrupted, pairs[0].answer[0]]
    with torch.no_grad():
        log_probs = bridge(torch.tensor([prompt])).log_softmax(dim=-1)[0]
    expected = sum(
        float(log_probs[len(prompt) - 2 + i, token]) for i, token in enumerate(pairs[0].answer)
    )
    assert float(ds.base_metric.sel(metric="log_prob")[0]) == pytest.approx(expected, abs=1e-4)


def test_labelled_spans_are_one_patch() -> None:
    bridge = model(NAME)
    pair = demo_pairs(NAME)[0]
    labelled = PromptPairs((type(pair)(**{**vars(pair), "labels": {"S2": (10, 12)}}),))
    ds = ps.sweep(bridge, labelled, "mlp_out", positions=["S2", 16])
    hooked = ps.sweep(bridge, labelled, "mlp_out", positions=["S2", 16], runner="hooked")
    np.testing.assert_allclose(ds["mlp_out"], hooked["mlp_out"], atol=1e-4)
    assert list(ds.pos.values) == ["S2", "16"]


@pytest.mark.parametrize("intervention", ["shuffle", 0.5, lambda site, layer, b, s: 0.5 * (b + s)])
def test_other_interventions_agree_between_runners(intervention) -> None:
    bridge = model(NAME)
    pairs = PromptPairs((*mixed_pairs()[1:2], *mixed_pairs()[3:4]))
    found = [
        ps.sweep(bridge, pairs, ["z", "resid_mid"], intervention=intervention, runner=runner)
        for runner in ("packed", "hooked")
    ]
    for site in ("z", "resid_mid"):
        np.testing.assert_allclose(found[0][site], found[1][site], atol=1e-4)
        assert float(np.abs(found[0][site] - found[0].base_metric).max()) > 1e-2


def test_kv_sites_have_kv_heads_and_no_padding() -> None:
    ds = ps.sweep(model(NAME), demo_pairs(NAME), ["k", "q"])
    assert ds["k"].dims == ("metric", "pair", "layer", "pos", "kv_head")
    assert ds.sizes["kv_head"] == 2
    assert ds.sizes["head"] == 4
    assert not np.isnan(ds["k"]).any()


def test_plan_and_sweep_agree_on_cost() -> None:
    cost = ps.plan(model(NAME), demo_pairs(NAME), ["resid_pre", "z"])
    ds = ps.sweep(model(NAME), demo_pairs(NAME), ["resid_pre", "z"])
    assert cost.token_layers == sum(p["token_layers"] for p in attributes(ds)["plan"].values())
    assert cost.n_live == sum(p["n_live"] for p in attributes(ds)["plan"].values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sites": "resid"}, SiteError, "site 'resid' is not known; use one of resid_pre"),
        ({"metrics": "logits"}, MetricError, "metric 'logits' is not known; use one of logit_diff"),
        ({"direction": "forwards"}, ConfigError, "direction='forwards' is not known"),
        ({"intervention": "noise"}, ConfigError, "intervention 'noise' is not known"),
        ({"intervention": "shuffle"}, PromptError, "only pair 0 has 17 tokens"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        ps.sweep(model(NAME), demo_pairs(NAME), **{"sites": "z", **arguments})


def test_training_mode_is_refused() -> None:
    bridge = ps.load_model(NAME)
    bridge.train()
    with pytest.raises(ModelError, match="training mode"):
        ps.sweep(bridge, demo_pairs(NAME), "z")


def test_out_of_memory_halves_the_packed_and_loses_nothing(monkeypatch, caplog) -> None:
    from patchsweep.runners.packed import runner as packed_runner

    sites = ["resid_pre", "mlp_out", "z"]
    whole = ps.sweep(model(NAME), demo_pairs(NAME), sites, runner="packed")
    run_packed_batch = packed_runner.run_packed_batch

    def scarce(unwrapped, packed, given, *rest):
        if packed.n_tokens > 60:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return run_packed_batch(unwrapped, packed, given, *rest)

    monkeypatch.setattr(packed_runner, "run_packed_batch", scarce)
    halved = ps.sweep(model(NAME), demo_pairs(NAME), sites, runner="packed")
    for site in sites:  # packed batches of another size round differently
        np.testing.assert_allclose(halved[site], whole[site], atol=1e-5)
    assert "halved" in caplog.text


def test_nan_in_activations_is_reported_with_its_first_place() -> None:
    bridge = ps.load_model(NAME)
    weight = dict(bridge.original_model.named_parameters())
    name = next(n for n in weight if "layers.1." in n and "down_proj" in n)
    with torch.no_grad():
        weight[name].fill_(float("nan"))
    with pytest.raises(ModelError, match="first in block 2's input at position 0"):
        ps.sweep(bridge, demo_pairs(NAME), "z", runner="packed")


def test_any_hook_point_can_be_swept_by_its_full_name() -> None:
    found = ps.sweep(model(NAME), demo_pairs(NAME), ["blocks.{layer}.mlp.hook_pre", "mlp_out"])
    assert attributes(found)["provenance"]["runner"] == "hooked"
    assert found["blocks_layer_mlp_hook_pre"].dims == ("metric", "pair", "layer", "pos")
    one = ps.sweep(model(NAME), demo_pairs(NAME), "blocks.1.hook_mlp_out")
    np.testing.assert_allclose(
        one["blocks_1_hook_mlp_out"], found["mlp_out"].sel(layer=1), atol=1e-4
    )
    with pytest.raises(SiteError, match=r"no hook blocks\.9"):
        ps.sweep(model(NAME), demo_pairs(NAME), "blocks.9.hook_mlp_out")
    with pytest.raises(SiteError, match=r"not \[batch, pos"):
        ps.sweep(model(NAME), demo_pairs(NAME), "blocks.1.attn.hook_attn_scores")


@pytest.mark.parametrize("intervention", ["resample", "zero"])
def test_result_of_a_head_is_patched_as_its_z(intervention: str) -> None:
    ds = ps.sweep(model(NAME), demo_pairs(NAME), ["result", "z"], intervention=intervention)
    assert attributes(ds)["provenance"]["runner"] == "packed"
    np.testing.assert_allclose(ds["result"], ds["z"], atol=1e-5)
    hooked = ps.sweep(
        model(NAME), demo_pairs(NAME), "result", intervention=intervention, runner="hooked"
    )
    np.testing.assert_allclose(hooked["result"], ds["z"], atol=1e-4)


@pytest.mark.parametrize("intervention", ["resample", "zero"])
def test_single_cells_of_the_pattern(intervention: str) -> None:
    arguments = {"intervention": intervention, "layers": [1, 2], "positions": [3, 11, 16]}
    found = [
        ps.sweep(model(NAME), demo_pairs(NAME), "pattern_cell", runner=runner, **arguments)
        for runner in ("packed", "hooked")
    ]
    assert found[0]["pattern_cell"].dims == ("metric", "pair", "layer", "pos", "head", "src")
    np.testing.assert_allclose(found[0]["pattern_cell"], found[1]["pattern_cell"], atol=1e-4)
    effect = found[0]["pattern_cell"] - found[0].base_metric
    assert float(abs(effect).max()) > 1e-2
    assert float(abs(effect.sel(pos=3, src=slice(4, None))).max()) == 0  # causality


@pytest.mark.parametrize("runner", ["packed", "hooked"])
def test_sources_past_a_shorter_prompt_s_end_are_nan(runner: str) -> None:
    """They are no cells: the base metric there would count as an effect of 0 in every mean."""
    pairs = mixed_pairs()
    lengths = [len(pair) for pair in pairs]
    arguments = {"layers": [1], "positions": [4, 12], "heads": [2]}
    found = ps.sweep(model(NAME), pairs, "pattern_cell", runner=runner, **arguments)
    cells = found.pattern_cell.values[0, :, 0, :, 0]  # [pair, pos, src]
    for i, (pair, length) in enumerate(zip(pairs, lengths, strict=True)):
        assert np.isnan(cells[i, :, length:]).all()
        alone = ps.sweep(
            model(NAME), PromptPairs((pair,)), "pattern_cell", runner=runner, **arguments
        )
        one = alone.pattern_cell.values[0, 0, 0, :, 0]
        np.testing.assert_allclose(cells[i, :, :length], one, atol=1e-4)
    effect = found.pattern_cell - found.base_metric
    longest = int(np.argmax(lengths))
    last = effect.isel(metric=0, layer=0, head=0, src=max(lengths) - 1)
    np.testing.assert_allclose(last.mean("pair"), last.isel(pair=longest), atol=1e-6)
    planned = ps.plan(model(NAME), pairs, "pattern_cell", **arguments)
    assert planned.n_patches == int(found.pattern_cell.notnull().sum())


@pytest.mark.parametrize("site", ["pattern", "pattern_cell"])
def test_patterns_of_several_layers_at_once_are_left_to_the_hooked_runner(site: str) -> None:
    asked = {"layers": [[0, 1], 2], "positions": [12, 16]}
    with pytest.raises(ConfigError, match=f"{site} is patched in several layers at once"):
        ps.sweep(model(NAME), demo_pairs(NAME), site, runner="packed", **asked)
    auto = ps.sweep(model(NAME), demo_pairs(NAME), site, **asked)
    assert attributes(auto)["provenance"]["runner"] == "hooked"
    hooked = ps.sweep(model(NAME), demo_pairs(NAME), site, runner="hooked", **asked)
    np.testing.assert_array_equal(auto[site], hooked[site])


def test_bf16_sweep_proves_itself() -> None:
    exact = ps.sweep(model(NAME), demo_pairs(NAME), "z")
    fast = ps.sweep(model(NAME), demo_pairs(NAME), "z", precision="bf16")
    error = abs(fast["z_bf16"] - exact["z"])
    assert 1e-6 < float(error.max()) < 0.5  # bf16 has 8 bits; logits of order 10
    again = fast["z"] != fast["z_bf16"]
    assert 8 <= int(again.sum()) <= 40
    np.testing.assert_allclose(fast["z"].values[again], exact["z"].values[again], atol=1e-5)
    assert 0 <= float(fast["z_noise"].max()) < 0.5
    largest = np.argsort(-abs(exact["z"] - exact.base_metric).values.ravel())[:10]
    top = np.argsort(-abs(fast["z"] - fast.base_metric).values.ravel())[:10]
    assert set(largest) == set(top)


def test_a_unit_has_one_proof_however_many_lengths_its_prompts_have() -> None:
    exact = ps.sweep(model(NAME), mixed_pairs(), "z")
    fast = ps.sweep(model(NAME), mixed_pairs(), "z", precision="bf16")
    again = (fast["z"] != fast["z_bf16"]).values & fast["z"].notnull().values
    assert 12 <= int(again.sum()) <= 24 + 8  # the largest and the sample of the whole unit
    np.testing.assert_allclose(fast["z"].values[again], exact["z"].values[again], atol=1e-5)
    effect = np.nan_to_num(abs(exact["z"] - exact.base_metric).values).ravel()
    assert again.ravel()[np.argsort(-effect)[:10]].all()


def test_bf16_needs_the_packed_runner() -> None:
    with pytest.raises(ConfigError, match="precision=bf16 is done by the packed runner alone"):
        ps.sweep(model(NAME), demo_pairs(NAME), "z", precision="bf16", runner="hooked")
    with pytest.raises(ConfigError, match="precision='fp8' is not known"):
        ps.sweep(model(NAME), demo_pairs(NAME), "z", precision="fp8")


def test_report_tells_the_measured_error_of_bf16(tmp_path) -> None:
    from patchsweep.report import write_report

    store = tmp_path / "bf16.zarr"
    ds = ps.sweep(model(NAME), demo_pairs(NAME), "z", precision="bf16", store=store)
    (error,) = bf16_error(ds)
    assert error.site == "z"
    assert 0 < error.median <= error.quantile_99 <= error.worst < 0.5
    assert ps.summary.sites(ds) == ("z",)
    assert not ps.summary.estimates(ds)
    page = write_report(store, tmp_path / "report.html").read_text()
    assert "How exact bf16 was here" in page


def test_means_by_label_average_a_role_over_prompts_of_any_length() -> None:
    bridge = model(NAME)
    labels = [{"S2": (10, 11)}, {"S2": (9, 10)}, {"S2": (11, 12)}, {"S2": (9, 10)}]
    pairs = PromptPairs(
        tuple(
            type(pair)(**{**vars(pair), "labels": spans})
            for pair, spans in zip(mixed_pairs(), labels, strict=True)
        )
    )
    found = [
        ps.sweep(bridge, pairs, "z", positions=["S2"], intervention="mean_label", runner=runner)
        for runner in ("packed", "hooked")
    ]
    np.testing.assert_allclose(found[0]["z"], found[1]["z"], atol=1e-4)
    # by hand: the mean of one head at S2 over the clean prompts, patched into the first of them
    values = []
    for pair, spans in zip(pairs, labels, strict=True):
        _, cache = bridge.run_with_cache(torch.tensor([pair.clean]))
        values.append(cache["blocks.1.attn.hook_z"][0, spans["S2"][0], 2])
    mean = torch.stack(values).mean(dim=0)

    def patch(z: torch.Tensor, hook: object) -> torch.Tensor:
        z[0, 10, 2] = mean
        return z

    with torch.no_grad():
        logits = bridge.run_with_hooks(
            torch.tensor([pairs[0].clean]), fwd_hooks=[("blocks.1.attn.hook_z", patch)]
        )[0, -1]
    expected = float(logits[pairs[0].answer[0]] - logits[pairs[0].wrong_answer[0]])
    assert float(found[0]["z"].values[0, 0, 1, 0, 2]) == pytest.approx(expected, abs=1e-4)


def test_means_by_label_need_labels() -> None:
    with pytest.raises(ConfigError, match="no pair has labels"):
        ps.sweep(model(NAME), mixed_pairs(), "z", intervention="mean_label")


def test_shuffle_takes_the_next_pair_whatever_shares_its_unit(monkeypatch) -> None:
    from patchsweep.spec import shards

    pairs = PromptPairs((*mixed_pairs()[1:2], *mixed_pairs()[3:4]))
    together = ps.sweep(model(NAME), pairs, "z", intervention="shuffle")
    monkeypatch.setattr(shards, "UNIT_TOKENS", 1)  # every pair is a unit of its own
    apart = ps.sweep(model(NAME), pairs, "z", intervention="shuffle")
    np.testing.assert_allclose(together["z"], apart["z"], atol=1e-4)
    resampled = ps.sweep(model(NAME), pairs, "z")
    assert float(abs(resampled["z"] - together["z"]).max()) > 1e-2
