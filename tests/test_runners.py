"""Both runners give what one hooked forward pass per patch gives, on every family and site."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import donors, hook_of, loop_logit_diff, oracle_activations
from patchsweep.errors import SiteError
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models import TINY_FAMILIES
from patchsweep.runners.hooked import HookedRunner
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.spec.batch import make_batches
from patchsweep.spec.interventions import Prompts, get_intervention
from patchsweep.spec.metrics import METRICS
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import SweepSpec, make_request
from subjects import demo_pairs, model, reference_pairs

# fp32 logits of order 10 carry about 1e-6 each; a dozen products and norms stay far below this
TOLERANCE = 1e-4
SWEPT = [n for n in SITES if n not in ("result", "pattern_cell")]  # these are in test_sweep


def _setup(family: str, site: str, intervention: str, direction: str | None, **selection):
    bridge = model(f"tiny:{family}")
    hooks = bridge.hook_dict
    if SITES[site].hook_name(0) not in hooks and not SITES[site].in_attention:
        pytest.skip(f"{family} has no {site}")
    if site == "mlp_post":
        if family == "mixtral":
            pytest.skip("experts have no single layer of neurons")
        selection.setdefault("neurons", [0, 7, 31])
    request = make_request(
        bridge,
        demo_pairs(f"tiny:{family}"),
        SweepSpec(
            site,
            direction=direction,
            intervention=intervention,
            means_from=reference_pairs(f"tiny:{family}") if intervention == "mean" else None,
            **selection,
        ),
    )
    batch = make_batches(request.pairs, [0], request.direction, request.read, torch.device("cpu"))[
        0
    ]
    return request, batch


def _compare(request, batch, sample: int = 24) -> float:
    """Largest effect that was compared."""
    plan = request.plans[0]
    bridge = request.bridge
    chosen = get_intervention(request.intervention.name)
    clean = batch.source if request.direction == "denoising" else batch.base
    runners = [PackedRunner(bridge, request.sites, max_tokens=64)]
    if hook_of(bridge, plan.site, 0) == plan.site.hook_name(0):
        try:
            runner = HookedRunner(bridge, request.sites)
            runner.check(batch.base)
            runners.append(runner)
        except SiteError as error:  # such as GPT-NeoX's hook_rot_q, OPT's hook_pattern
            pytest.skip(str(error))
    rng = np.random.default_rng(0)
    # dead cells are part of the claim: their value is the base metric
    patches = np.sort(rng.choice(plan.n_patches, size=min(sample, plan.n_patches), replace=False))
    # each side takes its means from its own activations
    clean = [Prompts(clean, batch.spans)]
    chosen.prepare(clean, oracle_activations(bridge, plan.site))
    expected = loop_logit_diff(
        bridge, plan, batch, donors(bridge, plan.site, batch, chosen), patches
    )
    metrics = (METRICS["logit_diff"],)
    for runner in runners:
        chosen.prepare(clean, runner.activations)
        loaded = runner.load(batch, chosen)
        base = float(runner.references(loaded, metrics)[0])
        values = np.full(plan.n_patches, base)
        live = patches[plan.live[patches]]
        if len(live):
            values[live] = runner.run(loaded, plan, live, metrics).numpy()
        difference = np.abs(values[patches] - expected).max()
        assert difference < TOLERANCE, f"{runner.name} differs by {difference:.2g}"
    return float(np.abs(expected - base).max())


@pytest.mark.parametrize("site", SWEPT)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_both_runners_equal_hook_loop(family: str, site: str) -> None:
    request, batch = _setup(family, site, "resample", "denoising")
    assert _compare(request, batch, sample=40) > 1e-3  # else equality would prove nothing


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "k"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_both_runners_equal_hook_loop_noising(family: str, site: str) -> None:
    request, batch = _setup(family, site, "resample", "noising")
    assert _compare(request, batch) > 1e-3


# every family with every site; both interventions in each family and at each site
ABLATING = [
    (family, site, ("zero", "mean")[(i + j) % 2])
    for i, family in enumerate(TINY_FAMILIES)
    for j, site in enumerate(SWEPT)
]


@pytest.mark.parametrize(("family", "site", "intervention"), ABLATING)
def test_both_runners_equal_hook_loop_ablating(family: str, site: str, intervention: str) -> None:
    request, batch = _setup(family, site, intervention, None)
    _compare(request, batch)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "z", "q", "v"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_both_runners_equal_hook_loop_all_positions(family: str, site: str) -> None:
    request, batch = _setup(family, site, "resample", "denoising", positions="all")
    assert _compare(request, batch) > 1e-3


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "z", "k"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_both_runners_equal_hook_loop_sets(family: str, site: str) -> None:
    heads = [(0, 1)] if SITES[site].unit else None
    request, batch = _setup(
        family, site, "zero", None, layers=[(0, 2), (1, 2)], heads=heads, positions=[0, 3, 11, 15]
    )
    assert _compare(request, batch) > 1e-3


def test_packed_refuses_what_it_cannot_place() -> None:
    bridge = model("tiny:gpt_neox")  # attention and MLP in parallel: there is no resid_mid
    with pytest.raises(Unsupported, match="hook_resid_mid"):
        PackedRunner(bridge, [SITES["resid_mid"]])


def test_hook_that_never_fires_is_an_error() -> None:
    bridge = model("tiny:gpt_neox")
    runner = HookedRunner(bridge, [SITES["rot_q"]])
    with pytest.raises(SiteError, match="never fired"):
        runner.activations(demo_tokens(bridge))


def demo_tokens(bridge):
    return bridge.to_tokens("John and Mary")


@torch.no_grad()
def test_hooked_runs_hold_few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes stay within `LOGIT_BYTES`, and only logits at positions that are read are kept."""
    from patchsweep.runners import hooked
    from patchsweep.spec.batch import Batch

    bridge = model("tiny:llama")
    pair = demo_pairs("tiny:llama")[0]
    tokens = torch.tensor([pair.clean, pair.corrupted] * 4)
    answers = torch.zeros(8, 1, dtype=torch.long)
    batch = Batch(
        tuple(range(8)), tokens, tokens.flip(0), (16,), (16,), answers, answers, ({},) * 8
    )
    runner = HookedRunner(bridge, [SITES["z"], SITES["result"]])
    runner.check(tokens)
    whole = runner.load(batch, get_intervention("resample"))
    seen: list[int] = []
    forward = hooked.forward

    def noting(bridge, tokens, *hooks):
        seen.append(tokens.shape[0])
        return forward(bridge, tokens, *hooks)

    monkeypatch.setattr(hooked, "forward", noting)
    monkeypatch.setattr(hooked, "LOGIT_BYTES", 3 * 4 * 17 * bridge.cfg.d_vocab)
    parts = runner.load(batch, get_intervention("resample"))
    assert max(seen) == 3
    assert parts.base_logits.shape == (8, 1, bridge.cfg.d_vocab)
    torch.testing.assert_close(parts.base_logits, whole.base_logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(parts.source_logits, whole.source_logits, atol=TOLERANCE, rtol=0)
    for site in ("z", "result"):
        for found, expected in zip(parts.patch_values[site], whole.patch_values[site], strict=True):
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert parts.base_logits.untyped_storage().nbytes() == 4 * 2 * 8 * bridge.cfg.d_vocab
