"""Patches of dictionary latents equal a model with the dictionary spliced in, run by hooks."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import patchsweep as ps
import pytest
import torch
from attribution_setup import pairs_of
from patchsweep.analyses.latents import agreement, largest_latents
from patchsweep.analyses.stages import Stages
from patchsweep.cli import main
from patchsweep.cli.main import EXIT_DONE, EXIT_MISTAKE
from patchsweep.errors import PatchsweepError
from patchsweep.report import page_of
from patchsweep.results.tolerance import allowed_error, tolerance_notes
from patchsweep.spec.batch import base_and_source
from patchsweep.spec.sites import SITES
from patchsweep.store.attributes import attributes
from safetensors.torch import save_file
from subjects import model

TOLERANCE = 1e-4  # of logits of order 10, as in test_joint
N_LATENTS = 48
READS = "blocks.{layer}.ln2.hook_normalized"


@cache
def dictionary(name: str, site: str, layer: int, kind: str = "jumprelu", seed: int = 0):
    """Random directions, of which about a third are active on a token."""
    cfg = model(name).cfg
    width = cfg.n_heads * cfg.d_head if site == "z" else cfg.d_model
    reads = READS if kind == "transcoder" else None
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.randn(cfg.d_model if reads else width, N_LATENTS, generator=generator)
    encoder /= encoder.norm(dim=0)
    decoder = torch.randn(N_LATENTS, width, generator=generator)
    probe = ps.Dictionary(encoder, decoder, torch.zeros(N_LATENTS), torch.zeros(width), site, layer)
    scale = float(acts(name, probe, pairs_of(name, 1)[0].clean, reads)[0].std())
    return ps.Dictionary(
        encoder=encoder / scale,
        decoder=4 * decoder * scale,
        encoder_bias=0.1 * torch.randn(N_LATENTS, generator=generator),
        decoder_bias=torch.randn(width, generator=generator),
        site=site,
        layer=layer,
        reads=reads,
        threshold=torch.full((N_LATENTS,), 0.3) if kind == "jumprelu" else None,
        k=12 if kind == "topk" else None,
    )


def acts(name, one, tokens, reads=None) -> torch.Tensor:
    """What the encoder reads `[1, pos, width]`."""
    bridge = model(name)
    hook = (reads or one.reads or SITES[one.site].hook_name(one.layer)).format(layer=one.layer)
    kept = {}
    with torch.no_grad():
        bridge.run_with_hooks(
            torch.tensor([tokens]), fwd_hooks=[(hook, lambda x, hook: kept.update(x=x.clone()))]
        )
    return kept["x"].reshape(1, len(tokens), -1)


def encode(one, x: torch.Tensor) -> torch.Tensor:
    """The latents, as the layouts' own code computes them."""
    before = x @ one.encoder + one.encoder_bias
    if one.k is not None:
        smallest = before.sort(dim=-1, descending=True).values[..., one.k - 1 : one.k]
        return before.relu() * (before >= smallest)
    return before.relu() * (before > (0 if one.threshold is None else one.threshold))


class Spliced:
    """One pair's base run with a dictionary in it: reconstruction from latents, plus the error."""

    def __init__(self, name: str, one, pair, direction: str = "denoising") -> None:
        self.bridge, self.one, self.pair = model(name), one, pair
        self.base, self.source = base_and_source(pair, direction)
        self.f_base, self.f_source = (
            encode(one, acts(name, one, x)) for x in (self.base, self.source)
        )

    def metric(self, latents: torch.Tensor) -> torch.Tensor:
        """logit_diff with these latents in place of the base run's."""
        one = self.one

        def splice(x, hook):
            flat = x.reshape(*x.shape[:2], -1)
            error = (flat - (self.f_base @ one.decoder + one.decoder_bias)).detach()
            return (latents @ one.decoder + one.decoder_bias + error).reshape(x.shape)

        logits = self.bridge.run_with_hooks(
            torch.tensor([self.base]), fwd_hooks=[(SITES[one.site].hook_name(one.layer), splice)]
        )[0, -1]
        return logits[self.pair.answer[0]] - logits[self.pair.wrong_answer[0]]

    def patched(self, pos: int, latent: int, value: float | None = None) -> float:
        """The metric with one latent's activation changed: to the source's, or to `value`."""
        f = self.f_base.clone()
        f[0, pos, latent] = self.f_source[0, pos, latent] if value is None else value
        with torch.no_grad():
            return float(self.metric(f))


def column(ds, one, latent: int) -> int:
    return [*ds["latent"].values].index(f"{one.name}/{latent}")


PLACES = [
    ("tiny:llama", "resid_post", "jumprelu"),
    ("tiny:gpt2", "z", "topk"),
    ("tiny:gemma2", "mlp_out", "transcoder"),
    *(
        pytest.param(*place, marks=pytest.mark.slow)
        for place in (
            ("tiny:llama", "mlp_out", "transcoder"),
            ("tiny:gpt2", "resid_pre", "relu"),
            ("tiny:gemma2", "mlp_out", "topk"),
            ("tiny:mixtral", "attn_out", "jumprelu"),
            ("tiny:gpt_neox", "resid_post", "topk"),
        )
    ),
]


@pytest.mark.parametrize(("name", "site", "kind"), PLACES)
def test_latents_equal_a_spliced_dictionary(name: str, site: str, kind: str) -> None:
    pairs = pairs_of(name, 2)
    one = dictionary(name, site, 1, kind)
    by_runner = {
        runner: ps.latents(model(name), pairs, one, runner=runner)
        for runner in ("packed", "hooked")
    }
    ds = by_runner["packed"]
    rng = np.random.default_rng(0)
    largest = 0.0
    for i, pair in enumerate(pairs):
        spliced = Spliced(name, one, pair)
        changed = np.argwhere((spliced.f_base != spliced.f_source)[0].numpy())
        changed = [*rng.permutation(changed[changed[:, 0] >= differs(pair)])[:12]]
        for pos, latent in changed:
            expected = spliced.patched(pos, latent)
            for runner, found in by_runner.items():
                cell = found["patched"].values[0, i, pos, column(found, one, latent)]
                assert abs(cell - expected) < TOLERANCE, runner
            largest = max(largest, abs(expected - float(ds["base_metric"][0, i])))
        # atp: the gradient with respect to the latents of the splice
        f = spliced.f_base.clone().requires_grad_()
        spliced.metric(f).backward()
        atp = ((spliced.f_source - spliced.f_base) * f.grad)[0].detach().numpy()
        for pos, latent in changed:
            found = ds["atp"].values[0, i, pos, column(ds, one, latent)]
            assert abs(found - atp[pos, latent]) < TOLERANCE
    assert largest > 0.1  # a comparison of zeros would show nothing


def differs(pair) -> int:
    return next(
        i for i, (a, b) in enumerate(zip(pair.clean, pair.corrupted, strict=True)) if a != b
    )


def test_every_live_latent_runs_and_silent_ones_are_dead() -> None:
    name = "tiny:llama"
    pairs, one = pairs_of(name, 1), dictionary("tiny:llama", "resid_post", 0)
    ds = ps.latents(model(name), pairs, one)
    spliced = Spliced(name, one, pairs[0])
    change = (spliced.f_source - spliced.f_base)[0].numpy()
    change[: differs(pairs[0])] = 0  # equal tokens so far
    assert ds.attrs["n_live"] == (change != 0).sum()
    columns = [*ds["latent_number"].values]
    assert set(columns) == set(np.flatnonzero((change != 0).any(axis=0)))
    np.testing.assert_allclose(ds["change"].values[0], change[:, columns], atol=1e-4)
    dead = ds["change"].values[0] == 0
    assert dead.any()
    base = float(ds["base_metric"][0, 0])
    assert (ds["patched"].values[0, 0][dead] == np.float32(base)).all()
    assert (ds["atp"].values[0, 0][dead] == 0).all()


def test_ig_adds_up_to_all_latents_of_a_layer_together() -> None:
    name = "tiny:llama"
    pairs = pairs_of(name, 2)
    both = [dictionary(name, "resid_post", 0), dictionary(name, "mlp_out", 1, "topk", 3)]
    ds = ps.latents(
        model(name), pairs, both, estimates=[ps.attribution.IntegratedSite(200), "relp"], top=0
    )
    assert np.isnan(ds["patched"].values).all()
    for i, pair in enumerate(pairs):
        for one in both:
            spliced = Spliced(name, one, pair)
            with torch.no_grad():
                together = float(spliced.metric(spliced.f_source))
            mine = ds["dictionary"].values == one.name
            total = float(ds["ig"].values[0, i][:, mine].sum())
            effect = together - float(ds["base_metric"][0, i])
            assert abs(effect) > 0.1
            assert abs(total - effect) < 0.02 * abs(effect) + 1e-3
    assert float(np.abs(ds["relp"]).max()) > 0.01


@pytest.mark.parametrize("given", ["zero", 0.7, "mean_all", "shuffle", ps.Scale(0.5)])
def test_latents_take_other_values(given) -> None:
    name = "tiny:gpt2"
    pairs, one = pairs_of(name, 4), dictionary("tiny:gpt2", "resid_post", 1, "topk")
    ds = ps.latents(model(name), pairs, one, intervention=given, direction="noising")
    all_spliced = [Spliced(name, one, pair, "noising") for pair in pairs]
    mean = torch.cat([x.f_base[0] for x in all_spliced]).mean(dim=0)
    tried = 0
    for i, spliced in enumerate(all_spliced):
        other = all_spliced[(i + 1) % len(pairs)].f_source
        for pos, latent in np.random.default_rng(i).integers([0, 0], [17, N_LATENTS], (12, 2)):
            f = float(spliced.f_base[0, pos, latent])
            values = {"zero": 0.0, "mean_all": float(mean[latent]),
                      "shuffle": float(other[0, pos, latent]), "0.7": 0.7}  # fmt: skip
            value = values.get(str(given), 0.5 * f)
            if f"{one.name}/{latent}" not in ds["latent"].values:
                assert abs(value - f) < 1e-6
                continue
            found = float(ds["patched"].values[0, i, pos, column(ds, one, latent)])
            assert abs(found - spliced.patched(pos, latent, value)) < TOLERANCE
            tried += abs(value - f) > 1e-3
    assert tried > 4


def test_top_runs_the_largest_estimates_alone() -> None:
    name = "tiny:llama"
    pairs, one = pairs_of(name, 2), dictionary("tiny:llama", "resid_post", 0)
    full = ps.latents(model(name), pairs, one)
    ds = ps.latents(model(name), pairs, one, top=10)
    size = np.abs(full["atp"].values[0]).sum(axis=0)
    ran = np.isfinite(ds["patched"].values[0]) & (ds["change"].values != 0)
    assert ran.any(axis=0).sum() == 10
    assert size[ran.any(axis=0)].min() >= np.sort(size, axis=None)[-10]
    # other rows in the batch round otherwise
    np.testing.assert_allclose(ds["patched"].values[0][ran], full["patched"].values[0][ran], 1e-5)
    best = largest_latents(full, n=3)
    assert abs(best[0].effect) >= abs(best[1].effect) >= abs(best[2].effect) > 0
    (found,) = agreement(full)
    live = full["change"].values != 0
    effects = (full["patched"] - full["base_metric"]).transpose(*full["patched"].dims).values[0]
    expected = np.corrcoef(full["atp"].values[0][live], effects[live])[0, 1]
    assert abs(found.pearson - expected) < 1e-6


@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gemma2"])
@pytest.mark.parametrize("tolerance", [0.1, "3%"])
def test_latents_with_a_tolerance_are_within_it(name: str, tolerance) -> None:
    pairs = pairs_of(name, 2)
    both = [dictionary(name, "resid_post", 0), dictionary(name, "mlp_out", 1, "topk", 3)]
    exact = ps.latents(model(name), pairs, both)
    ds = ps.latents(model(name), pairs, both, tolerance=tolerance)
    effects = (exact["patched"] - exact["base_metric"]).transpose(*exact["patched"].dims).values
    assert np.nanmax(np.abs(effects)) > 0.5, "effects of order one, or the test shows nothing"
    allowed = allowed_error(ds)[:, :, None, None]
    assert (allowed > 0).all()
    error = np.abs(ds["patched"].values - exact["patched"].values)
    live = exact["change"].values != 0
    # held on a sample: of hundreds of other patches one or two may miss it, by little
    assert (error <= allowed)[:, live].mean() > 0.99
    assert (error <= 2 * allowed)[:, live].all()
    assert np.quantile(error[:, live], 0.9) > 1e-6, "nothing was left asleep"
    dead = ds["change"].values == 0
    assert (ds["patched"].values[:, dead] == exact["patched"].values[:, dead]).all()
    assert (ds["patched_token_layers"].values[:, dead] == 0).all()
    told = attributes(ds)["adaptive"]["sites"]
    assert set(told) == {one.name for one in both}
    for site in told.values():
        assert site["n"] > 10
        assert site["token_layers"] < site["exact_token_layers"]
    notes = tolerance_notes(ds)
    assert len(notes) == 2
    assert "run both ways: largest error" in notes[0]


@pytest.mark.slow
def test_latents_of_smollm2_equal_a_splice_in_the_plain_modules() -> None:
    from benchmarks.latents import spliced

    name = "smollm2-135m"
    pairs = pairs_of(name, 1)
    both = [dictionary(name, "resid_post", 10), dictionary(name, "resid_post", 20, "topk", 1)]
    ds = ps.latents(model(name), pairs, both, estimates=())
    expected, values = spliced(model(name), pairs[0], both, ds, 30)
    assert np.abs(values - expected).max() < TOLERANCE
    assert np.abs(expected - float(ds["base_metric"][0, 0])).max() > 0.1


# --- files ---------------------------------------------------------------------------------------


def weights(width: int = 16, out: int | None = None, n: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    out = out or width
    shapes = {"W_enc": (width, n), "W_dec": (n, out), "b_enc": (n,), "b_dec": (out,)}
    return {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def saelens(folder, config: dict, arrays: dict):
    folder.mkdir()
    save_file(arrays, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_saelens_files_are_read(tmp_path) -> None:
    w = weights()
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    centred = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    hook = {"hook_name": "blocks.3.hook_resid_post"}
    # release 6: the place is in the metadata
    one = ps.Dictionary.from_safetensors(
        saelens(tmp_path / "a", {"architecture": "standard", "apply_b_dec_to_input": True,
                                 "normalize_activations": "none", "metadata": hook}, w)
    )  # fmt: skip
    assert (one.site, one.layer, one.is_transcoder) == ("resid_post", 3, False)
    torch.testing.assert_close(one.encode(x), centred.relu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.decode(one.encode(x)), centred.relu() @ w["W_dec"] + w["b_dec"],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    # before it: at the top level, top-k by its activation function, b_dec always subtracted
    old = {"hook_point": "blocks.0.attn.hook_z", "activation_fn_str": "topk",
           "activation_fn_kwargs": {"k": 4}}  # fmt: skip
    one = ps.Dictionary.from_safetensors(saelens(tmp_path / "b", old, w))
    assert (one.site, one.layer, one.k) == ("z", 0, 4)
    assert ((one.encode(x) > 0).sum(dim=-1) <= 4).all()
    largest = centred.relu().topk(4).values
    torch.testing.assert_close(one.encode(x).topk(4).values, largest, rtol=1e-4, atol=1e-5)
    # latents that count by their decoder's norm
    norm = w["W_dec"].norm(dim=-1)
    rescaled = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True,
                "apply_b_dec_to_input": False, "metadata": hook}  # fmt: skip
    one = ps.Dictionary.from_safetensors(saelens(tmp_path / "c", rescaled, w))
    before = (x @ w["W_enc"] + w["b_enc"]) * norm
    largest = before.topk(4, dim=-1)
    latents = torch.zeros_like(before).scatter_(-1, largest.indices, largest.values.relu())
    torch.testing.assert_close(one.encode(x), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.decode(latents), (latents / norm) @ w["W_dec"] + w["b_dec"],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    # a JumpReLU transcoder with a skip connection
    t = {**weights(16, 24), "threshold": torch.full((32,), 0.5), "W_skip": torch.zeros(24, 16)}
    config = {"architecture": "jumprelu_skip_transcoder",
              "metadata": {"hook_name": "blocks.2.ln2.hook_normalized",
                           "hook_name_out": "blocks.2.hook_mlp_out"}}  # fmt: skip
    file = saelens(tmp_path / "d", config, t) / "sae_weights.safetensors"
    one = ps.Dictionary.from_safetensors(file)
    assert (one.site, one.layer, one.hook) == ("mlp_out", 2, "blocks.2.ln2.hook_normalized")
    assert one.is_transcoder
    before = x @ t["W_enc"] + t["b_enc"]
    expected = before.relu() * (before > 0.5)
    torch.testing.assert_close(one.encode(x), expected, rtol=1e-4, atol=1e-5)


def test_gemma_scope_files_are_read(tmp_path) -> None:
    w = {**weights(), "threshold": torch.full((32,), 0.4)}
    np.savez(tmp_path / "params.npz", **{k: v.numpy() for k, v in w.items()})
    second = tmp_path / "second"
    second.mkdir()
    save_file({k.lower(): v for k, v in w.items()}, second / "params.safetensors")
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    before = x @ w["W_enc"] + w["b_enc"]  # the bias of the decoder stays in the input
    for path in (tmp_path / "params.npz", tmp_path, second):
        one = ps.Dictionary.from_safetensors(path, site="resid_post", layer=12)
        assert one.name == "resid_post.12"
        expected = before.relu() * (before > 0.4)
        torch.testing.assert_close(one.encode(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.decoder, w["W_dec"])
    one = ps.Dictionary.from_safetensors(second, site="mlp_out", layer=1, reads=READS)
    assert one.hook == "blocks.1.ln2.hook_normalized"


REFUSED = {
    "gated": ({"architecture": "gated"}, {"b_gate": torch.zeros(32)}, "b_gate"),
    "normalised": ({"normalize_activations": "layer_norm"}, {}, "fold"),
    "batch top-k": ({"architecture": "batchtopk"}, {}, "use standard, jumprelu, topk"),
    "no k": ({"architecture": "topk"}, {}, "give k"),
    "no threshold": ({"architecture": "jumprelu"}, {}, "lacks a threshold"),
    "one head": ({"hook_head_index": 3}, {}, "all heads"),
    "no place": ({"hook_name": "hook_embed"}, {}, "give site and layer"),
    "bad shape": ({}, {"b_enc": torch.zeros(9)}, "must have [32]"),
    "not finite": ({}, {"b_enc": torch.full((32,), torch.nan)}, "must be finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_be_patched_are_refused(case: str, tmp_path) -> None:
    config, arrays, words = REFUSED[case]
    hook = {"hook_name": "blocks.0.hook_resid_post"}
    folder = saelens(tmp_path / "x", {**hook, **config}, {**weights(), **arrays})
    with pytest.raises(PatchsweepError) as error:
        ps.Dictionary.from_safetensors(folder)
    assert words in str(error.value)


def test_dictionaries_of_other_models_are_refused_before_a_forward() -> None:
    name = "tiny:llama"
    pairs, one = pairs_of(name, 1), dictionary(name, "resid_post", 0)
    narrow = ps.Dictionary(*weights().values(), site="resid_post", layer=0)
    high = ps.Dictionary(one.encoder, one.decoder, one.encoder_bias, one.decoder_bias,
                         "resid_post", 99)  # fmt: skip
    astray = ps.Dictionary(one.encoder, one.decoder, one.encoder_bias, one.decoder_bias,
                           "mlp_out", 0, reads="blocks.{layer}.nothing")  # fmt: skip
    wrong = {
        "has the width 16": {"dictionaries": narrow},
        "past the last layer": {"dictionaries": high},
        "no hook point": {"dictionaries": astray},
        "each its own": {"dictionaries": [one, one]},
        "from_safetensors": {"dictionaries": "sae.safetensors"},
        "no estimate for latents": {"dictionaries": one, "estimates": ["atp_star"]},
        "none of latents": {"dictionaries": one, "intervention": ps.Add(torch.ones(4))},
        "ranks latents": {"dictionaries": one, "estimates": (), "top": 3},
    }
    ran = []
    count = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: ran.append(1))
    for words, given in wrong.items():
        with pytest.raises(PatchsweepError) as error:
            ps.latents(model(name), pairs, **given)
        assert words in str(error.value)
    count.remove()
    assert not ran


# --- stores, the page, the command line ----------------------------------------------------------


def test_latents_are_stored_and_reported(tmp_path) -> None:
    name = "tiny:llama"
    pairs, place = pairs_of(name, 2), tmp_path / "l.zarr"
    both = [dictionary(name, "resid_post", 0), dictionary(name, "mlp_out", 1, "topk", 3)]
    ds = ps.latents(model(name), pairs, both, estimates=["atp", "ig"], stages=Stages(place))
    again = Stages(place)
    stored = ps.latents(model(name), pairs, both, estimates=["atp", "ig"], stages=again)
    assert again.known
    for variable in ("patched", "atp", "ig", "change"):
        np.testing.assert_array_equal(stored[variable].values, ds[variable].values)
    page = page_of(ps.open_store(place), "l")
    assert "resid_post.0" in page
    with pytest.raises(PatchsweepError):  # other weights are other results
        ps.latents(model(name), pairs, both[:1], stages=Stages(place))


def test_the_verb_patches_stores_and_shows(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PATCHSWEEP_DEBUG", raising=False)
    one = dictionary("tiny:llama", "resid_post", 0)
    arrays = {"W_enc": one.encoder, "W_dec": one.decoder, "b_enc": one.encoder_bias,
              "b_dec": one.decoder_bias, "threshold": one.threshold}  # fmt: skip
    save_file(arrays, tmp_path / "params.safetensors")
    file = "dictionaries=[{path: params.safetensors, site: resid_post, layer: 0}]"
    words = ["latents", "model=tiny", "task=ioi_demo", file, "estimates=[atp,relp]"]
    assert main([*words, "store=l.zarr"]) == EXIT_DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "latents and positions change" in said
    assert "relp: r = " in said
    pairs = ps.load_task(model("tiny:llama"), "ioi_demo")
    expected = ps.latents(model("tiny:llama"), pairs, one)
    ds = ps.open_store("l.zarr")
    np.testing.assert_array_equal(ds["patched"], expected["patched"])
    assert main(["report", "l.zarr"]) == EXIT_DONE
    assert "resid_post.0" in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    assert main([*words, "store=m.zarr", "tolerance=0.1", "top=20"]) == EXIT_DONE
    assert "resid_post.0: tolerance 0.1; on a sample of" in " ".join(
        capsys.readouterr().out.split()
    )
    near = ps.open_store("m.zarr")
    ran = np.isfinite(near["patched"].values)
    assert 0 < (~ran).sum() < ran.sum()
    np.testing.assert_allclose(near["patched"].values[ran], ds["patched"].values[ran], atol=0.1)
    assert main(["report", "m.zarr", "-o", "m.html"]) == EXIT_DONE
    assert "run both ways" in (tmp_path / "m.html").read_text()
    capsys.readouterr()
    assert main([*words, "store=n.zarr", "tolerance=-1"]) == EXIT_MISTAKE
    assert "tolerance=-1 must be a positive number" in capsys.readouterr().err
    assert main(["latents", "model=tiny", "store=m.zarr"]) == EXIT_MISTAKE
    assert "latents need dictionaries" in capsys.readouterr().err
    assert main([*words[:3], "dictionaries=[params.safetensors]"]) == EXIT_MISTAKE
    assert "give site and layer" in capsys.readouterr().err
