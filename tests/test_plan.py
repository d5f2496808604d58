"""The planner: every cell once, dead means no effect, packed batches hold each live patch once."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import patchsweep as ps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.errors import PlanError
from patchsweep.models.load import meta_model
from patchsweep.models.tiny import tiny_tokenizer
from patchsweep.runners.hooked import HookedRunner
from patchsweep.runners.packed.budget import GPU_TOKENS
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.runners.packed.schedule import make_packed_batches, pack
from patchsweep.spec.batch import make_batches
from patchsweep.spec.interventions import Resample
from patchsweep.spec.metrics import METRICS
from patchsweep.spec.plan import Axes, ModelShape, PairShape, PatchSet
from patchsweep.spec.planner import plan_site
from patchsweep.spec.shards import UNIT_TOKENS, blocks_of
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.sweeps.api import NO_RUNNER
from patchsweep.sweeps.cost import _count_batches
from patchsweep.sweeps.exact import ExactWork
from patchsweep.sweeps.executor import work_items_of
from patchsweep.sweeps.layout import make_layout
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from transformers import LlamaConfig

SHAPE = ModelShape(
    n_layers=4, n_heads=3, n_kv_heads=3, d_head=4, d_model=12, d_mlp=16, d_vocab=50,
    block_parameters=1000,
)  # fmt: skip


@st.composite
def pair_shapes(draw: st.DrawFn) -> PairShape:
    length = draw(st.integers(2, 9))
    differs = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    reads = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=2)))
    return PairShape(tuple(differs), tuple(reads), {"span": (1, 2)})


@st.composite
def site_plans(draw: st.DrawFn):
    site = SITES[draw(st.sampled_from(["resid_pre", "resid_post", "z", "k", "mlp_out"]))]
    pairs = draw(st.lists(pair_shapes(), min_size=1, max_size=3))
    longest = max(pair.length for pair in pairs)
    positions = draw(
        st.one_of(st.none(), st.sets(st.integers(0, longest - 1), min_size=1).map(sorted))
    )
    if positions is not None and all(p >= pair.length for pair in pairs for p in positions):
        positions = [0]
    layers = draw(st.sets(st.integers(0, 3), min_size=1).map(sorted))
    units = draw(st.sampled_from([None, ((0,), (1, 2))])) if site.unit else None
    axes = Axes(
        tuple((layer,) for layer in layers), None if positions is None else tuple(positions), units
    )
    return plan_site(site, axes, SHAPE, pairs, resample=draw(st.booleans())), pairs


def test_one_unit_fills_a_packed_batch_of_a_gpu() -> None:
    pair = PairShape((False, *[True] * 16), (16,), {})
    axes = Axes(tuple((layer,) for layer in range(4)), tuple(range(17)), None)
    plan = plan_site(SITES["resid_pre"], axes, SHAPE, [pair] * 64, resample=True)
    n_pairs, n_layers = blocks_of([plan])["resid_pre"]
    assert n_layers == 4
    tokens = plan.suffix[plan.live_patches(range(n_pairs))].sum()
    assert 0.9 * GPU_TOKENS < tokens <= UNIT_TOKENS


@given(site_plans())
@settings(max_examples=150, deadline=None)
def test_plan_covers_every_cell_once(drawn) -> None:
    plan, pairs = drawn
    assert len(np.unique(plan.cell[plan.patches()])) == plan.n_patches
    positions = plan.axes.positions
    n_cells = 0
    for pair in pairs:
        places = 1 if positions is None else sum(p < pair.length for p in positions)
        n_cells += places * plan.shape[1] * plan.shape[3]
    assert plan.n_patches == n_cells
    assert plan.loop_token_layers == sum(
        pairs[p].length * SHAPE.n_layers for p in plan.pair[plan.patches()].tolist()
    )


@given(site_plans(), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_packed_batches_hold_every_live_patch_once_and_cost_what_the_plan_says(
    drawn, max_tokens
) -> None:
    plan, _ = drawn
    live = plan.live_patches()
    if not len(live):
        return
    batches = list(make_packed_batches([PatchSet(plan, live)], max_tokens))
    assert sorted(p for packed in batches for p in packed.patch.tolist()) == live.tolist()
    passed = 0
    for packed in batches:
        for packing in pack(packed):
            if packing.layer < plan.n_layers:
                passed += packing.n_tokens
            assert packing.offsets[-1] == packing.n_tokens
    assert passed == plan.token_layers


@given(site_plans(), st.data())
@settings(max_examples=150, deadline=None)
def test_what_a_plan_counts_is_what_its_patches_are(drawn, data) -> None:
    plan, pairs = drawn

    def part(n: int) -> range:
        first = data.draw(st.integers(0, n))
        return range(first, data.draw(st.integers(first, n)))

    of_pairs, layers = part(len(pairs)), part(plan.shape[1])
    patches, live = plan.patches(of_pairs, layers), plan.live_patches(of_pairs, layers)
    totals = plan.totals(of_pairs, layers)
    assert totals.n_patches == len(patches)
    assert totals.n_live == len(live)
    assert totals.token_layers == plan.cost[live].sum()
    every = plan.live_patches()
    assert plan.nth_live(np.arange(len(every))).tolist() == every.tolist()
    counts, tokens = np.zeros((2, *plan.shape[:2]), np.int64)
    np.add.at(counts, (plan.pair[every], plan.layer_set[every]), 1)
    np.add.at(tokens, (plan.pair[every], plan.layer_set[every]), plan.suffix[every])
    assert np.array_equal(plan.live_by_layer(), (counts, tokens))


def test_a_plan_of_half_a_billion_patches_is_small() -> None:
    model = replace(SHAPE, n_layers=32, n_heads=32)
    differs = tuple(i >= 10 for i in range(1000))
    pairs = [PairShape(differs, (999,), {})] * 512
    axes = Axes(tuple((i,) for i in range(32)), tuple(range(1000)), tuple((i,) for i in range(32)))
    tracemalloc.start()
    plan = plan_site(SITES["z"], axes, model, pairs)
    assert plan.n_patches == 512 * 1000 * 32 * 32
    # in the last block only the last position is read
    assert plan.n_live == 512 * 32 * (31 * 990 + 1)
    assert plan.nth_live(np.array([plan.n_live - 1])).tolist() == [plan.n_patches - 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6


def _random_pairs(n: int, lengths: tuple[int, int], n_vocab: int) -> PromptPairs:
    rng, pairs = np.random.default_rng(0), []
    for length in rng.integers(*lengths, n).tolist():
        clean, corrupted = rng.integers(5, n_vocab, (2, length)).tolist()
        corrupted[:10] = clean[:10]
        words = (tuple(map(str, clean)), tuple(map(str, corrupted)))
        pairs.append(PromptPair(tuple(clean), tuple(corrupted), (3,), (4,), *words, "a", "b", {}))
    return PromptPairs(tuple(pairs))


def _cost_of_planning(*arguments: object) -> tuple[float, int]:
    """Seconds of the processor, and bytes more."""
    start = time.process_time()
    ps.plan(*arguments)
    seconds = time.process_time() - start
    tracemalloc.start()
    ps.plan(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak


# the bounds are those that users are told; an idle machine takes less than half
def test_a_sweep_of_an_8b_model_is_planned_in_seconds(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, vocab_size=128256, **sizes)
    config.max_position_embeddings = 8192
    settings = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    tiny_tokenizer().save_pretrained(tmp_path)
    bridge = meta_model(str(tmp_path))
    seconds, peak = _cost_of_planning(bridge, _random_pairs(512, (1000, 1001), 2000), "z")
    assert seconds < 5
    assert peak < 300e6


def test_4000_pairs_of_smollm2_are_planned_in_two_seconds(smollm2) -> None:
    seconds, peak = _cost_of_planning(smollm2, _random_pairs(4000, (14, 30), 40_000), "z")
    assert seconds < 2
    assert peak < 300e6


@pytest.mark.parametrize("site", ["pattern", "pattern_cell"])
def test_cells_of_patterns_of_512_pairs_take_little_memory(smollm2, site: str) -> None:
    seconds, peak = _cost_of_planning(smollm2, _random_pairs(512, (14, 30), 40_000), site)
    assert seconds < 5
    assert peak < 300e6


def test_a_plan_of_estimates_prices_no_exact_patch() -> None:
    cost = ps.plan(model("tiny:llama"), demo_pairs("tiny:llama"), "z", method="atp")
    assert [site.n_exact for site in cost.sites] == [0]
    (part,) = cost.parts
    assert part.name == "atp"
    assert 0 < cost.token_layers == part.token_layers < cost.loop_token_layers / 10


@pytest.mark.parametrize("max_tokens", [37, 150, 10_000])
def test_packed_batches_are_counted_without_being_made(max_tokens: int) -> None:
    bridge = model("tiny:llama")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[CLEAN, "She saw that John gave milk to", CLEAN],
        corrupted=[CORRUPTED, "She saw that Mary gave milk to", CORRUPTED],
        answers=[(" Mary", " John")] * 3,
    )
    request = make_request(bridge, pairs, SweepSpec(["resid_pre", "z", "pattern"]))
    counts = _count_batches(request, max_tokens)
    works = [ExactWork(request, PackedRunner(bridge, request.sites))]
    units = [unit for v in make_layout(request, NO_RUNNER, {}).variables for unit in v.units()]
    first = Counter()
    for bundle in work_items_of(works, units):
        sets = [
            PatchSet(plan, plan.live_patches(unit.pairs, unit.layers))
            for unit in bundle.units
            for plan in request.plans
            if plan.site.name == unit.variable
        ]
        if any(len(chosen.patches) for chosen in sets):
            first.update(
                int(packed.entry.min()) for packed in make_packed_batches(sets, max_tokens)
            )
    assert sum(counts.values()) == sum(first.values())
    assert counts == first


@pytest.mark.parametrize("name", ["resid_pre", "resid_post", "attn_out", "z", "k", "q"])
def test_every_patch_called_dead_has_no_effect(name: str) -> None:
    bridge = model("tiny:llama")
    rng = np.random.default_rng(0)
    for _ in range(3):
        length = int(rng.integers(3, 8))
        base = rng.integers(2, 300, size=length)
        source = np.where(rng.random(length) < 0.4, rng.integers(2, 300, size=length), base)
        source[0], source[-2] = base[0], base[-2] + 1
        pair = PromptPair(
            clean=tuple(source.tolist()), corrupted=tuple(base.tolist()),
            answer=(5,), wrong_answer=(6,), clean_tokens=("",) * length,
            corrupted_tokens=("",) * length, answer_text="a", wrong_answer_text="b", labels={},
        )  # fmt: skip
        request = make_request(
            bridge, PromptPairs((pair,)), SweepSpec(name, read=int(rng.integers(1, length)))
        )
        plan = request.plans[0]
        patches = plan.patches()
        dead = patches[~plan.live[patches]]
        assert 0 < len(dead) < plan.n_patches
        batch = make_batches(
            request.pairs, [0], request.direction, request.read, torch.device("cpu")
        )[0]
        runner = HookedRunner(bridge, request.sites)
        loaded = runner.load(batch, Resample())
        metrics = (METRICS["logit_diff"],)
        base_value = float(runner.references(loaded, metrics)[0])
        # the plan trims spans, so take the untrimmed patch: all of its cell's position
        first = plan.places.first
        plan = replace(plan, places=replace(plan.places, start=first, stop=first + 1))
        values = runner.run(loaded, plan, dead, metrics)[0].numpy()
        # the same rows in a batch of another size round differently
        assert np.abs(values - base_value).max() < 2e-5


def test_demo_plan_costs_what_the_design_says(smollm2) -> None:
    plan = make_request(smollm2, demo_pairs("smollm2-135m"), SweepSpec("resid_pre")).plans[0]
    assert (plan.n_patches, plan.n_live) == (510, 204)
    assert plan.token_layers == 12_390
    assert plan.loop_token_layers == 260_100


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"layers": [3]}, "layers has 3, past the last layer 2; use 0..2"),
        ({"positions": [17]}, "positions has 17, past the last position 16"),
        ({"positions": ["subject"]}, "label 'subject', which pair 0 does not carry"),
        ({"positions": []}, "positions is empty"),
        ({"positions": "every"}, "positions='every' is not known"),
        ({"heads": [4]}, "heads of z has 4, past the last one 3"),
        ({"layers": []}, "layers is empty"),
        ({"read": 17}, "read=17 lies outside a prompt of 17 tokens"),
    ],
)
def test_selection_out_of_range_is_refused(selection, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_request(model("tiny:llama"), demo_pairs("tiny:llama"), SweepSpec("z", **selection))


def test_neurons_must_be_chosen() -> None:
    with pytest.raises(PlanError, match="48 neurons a layer; choose some"):
        make_request(model("tiny:llama"), demo_pairs("tiny:llama"), SweepSpec("mlp_post"))


def test_prompts_are_the_demo_pair() -> None:
    from patchsweep.tasks import DEMO_PAIR

    assert (DEMO_PAIR.clean, DEMO_PAIR.corrupted) == (CLEAN, CORRUPTED)
