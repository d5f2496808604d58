"""Causal tracing: the subject's embeddings are noised, and clean states are restored one by one.

Meng et al., Locating and Editing Factual Associations in GPT (arXiv 2202.05262), section 2 and
appendix B. Every run is a set of joint patches on the clean prompt: noise on the embeddings, and
the clean run's own value at the restored places. The noised run is the same for all places of a
sample, so it runs once, and the restored runs continue it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from scipy import stats
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.joint.patches import run_variables
from patchsweep.analyses.stages import Stages
from patchsweep.arguments import check_runner, number, whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, PlanError
from patchsweep.forward.casting import cast_while
from patchsweep.models.compute import ComputeDtype
from patchsweep.models.running import runs_model
from patchsweep.runners.hook_points import forward, hooks_of, keeping, writing
from patchsweep.runners.select import RunnerName
from patchsweep.spec.interventions import Activations, Custom, Direction, Plain, Prompts, Spans
from patchsweep.spec.sites import SITES, Site
from patchsweep.spec.spec import MetricLike, SweepSpec, model_shape
from patchsweep.sweeps.identity import metric_words
from patchsweep.sweeps.joint import JointPatches, JointRequest, joint_request
from patchsweep.sweeps.layout import strings
from patchsweep.sweeps.patches import Patch

Kind = Literal["state", "mlp", "attn", "state without mlp", "state without attn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# what is restored, and what is held at the noised run's value meanwhile
_SITES = {"state": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}
_HELD = {"state without mlp": "mlp_out", "state without attn": "attn_out"}
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the token embeddings of a labelled span, which makes the base run.

    Raises:
        ConfigError: a number is out of range.
    """

    label: str  # of the pairs, such as "subject"
    scale: float = 3.0  # in standard deviations of the embeddings of all pairs' labelled tokens
    samples: int = 10  # independent draws
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.label, str) or not self.label:
            raise ConfigError(f"label={self.label!r} must name a span of the pairs, say 'subject'")
        number("scale", self.scale, above=0, error=ConfigError)
        whole_number("samples", self.samples, least=2, error=ConfigError)
        whole_number("seed", self.seed, least=0, error=ConfigError)


@dataclass
class _Sample(Plain):
    """The embeddings with one draw of the noise."""

    noise: Noise
    number: int
    deviation: dict[str, float] = field(repr=False)  # filled by the first sample's `prepare`
    pairs: PromptPairs = field(repr=False)  # over whose labelled tokens it is measured
    name: str = "noise"
    version: str = "1"
    from_source: bool = False
    default_direction: Direction = "noising"
    asks_pair_by_pair: bool = field(default=True, repr=False)

    def prepare(self, prompts: Sequence[Prompts], activations: Activations) -> None:
        """Measure the deviation of the labelled tokens' embeddings, once for all samples."""
        if "sigma" in self.deviation:
            return
        found = []
        for pair in self.pairs:
            tokens = torch.tensor([pair.clean], device=prompts[0].tokens.device)
            first, stop = pair.labels[self.noise.label]
            found.append(activations(tokens)["embed"][0][0, first:stop].flatten().double())
        self.deviation["sigma"] = float(torch.cat(found).std())

    def values(
        self, site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        """See `Intervention`."""
        values = base.clone()
        scale = self.noise.scale * self.deviation["sigma"]
        for row, labels in enumerate(spans):
            first, stop = labels[self.noise.label]
            generator = torch.Generator().manual_seed(1_000_003 * self.noise.seed + self.number)
            shape = (stop - first, base.shape[-1])
            drawn = torch.randn(shape, generator=generator, device="cpu")
            values[row, first:stop] += scale * drawn.to(base)
        return values


def _held(layers: Sequence[Tensor]) -> Custom:
    """Return what writes a noised run's own values, per layer `[1, pos, width]`."""

    def values(site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        return layers[layer].to(base)

    return Custom(values, name="held", version="1")


@runs_model
def trace(
    model: TransformerBridge,
    pairs: PromptPairs,
    corruption: Noise,
    metrics: MetricLike | Sequence[MetricLike] = "prob",
    *,
    kinds: Sequence[Kind] = ("state", "mlp", "attn"),
    window: int = 10,
    read: int = SweepSpec.read,
    compute_dtype: ComputeDtype = SweepSpec.compute_dtype,
    runner: RunnerName = "auto",
    max_tokens: int | None = None,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Trace where a fact's clean states bring the answer back (causal tracing).

    The clean prompt runs with noise on the labelled tokens' embeddings. Then the clean value is
    restored at one position: of one layer's output (`state`), or of the MLP or attention writes of
    `window` layers around one (`mlp`, `attn`). `state without mlp` and `state without attn` restore
    a state while the MLP or attention writes of later layers at that position keep the noised run's
    values (severed): what is lost then went through them.

    `restored` [metric, pair, kind, layer, pos] is the mean over samples of the raw metric of the
    restored runs, `effect` its difference from the noised runs (the indirect effect), and
    `effect_low`, `effect_high` a 95 % interval of that mean over the samples (Student's t). The
    total effect is `noised_metric` minus `clean_metric` [metric, pair]. The noise is drawn anew for
    each sample, and is the same for all restored places of it.

    Args:
        corruption: the noise, and the label that it is put on.
        window: layers restored together for `mlp` and `attn`, half of them
            below; the model's ends cut it.
        stages: as in `run_patches`; others are those of `sweep`.

    Raises:
        PlanError: a pair lacks the label, or a kind is not known.
        PatchsweepError: another argument breaks a rule; nothing has run then.
    """
    check_runner(runner, max_tokens)
    _check(pairs, corruption, kinds, window)
    deviation: dict[str, float] = {}
    samples = [_Sample(corruption, i, deviation, pairs) for i in range(corruption.samples)]
    noises = [Patch("embed", None, corruption.label, intervention=x) for x in samples]

    def ask(one: PromptPairs, sets: Sequence[Patch | Sequence[Patch]]) -> JointRequest:
        return joint_request(model, one, sets, metrics, "noising", read, None, compute_dtype)

    requests = [
        ask(pairs[i : i + 1], [*noises, *_places(model, pairs[i : i + 1], kinds, window)])
        for i in range(len(pairs))
    ]
    stages = Stages.of(stages)

    def compute() -> xr.Dataset:
        found = []
        for i, request in enumerate(requests):
            one = pairs[i : i + 1]
            sets: list[Patch | Sequence[Patch]] = [*noises]
            if any(kind in _HELD for kind in kinds):
                joint = JointPatches(request, runner, max_tokens)
                held = _noised_writes(request, joint, samples, kinds)
            else:
                held = [{} for _ in noises]
            for noise, writes in zip(noises, held, strict=True):
                places = _places(model, one, kinds, window, writes)
                sets += [[noise, *place] for place in places]
            joint = JointPatches(ask(one, sets), runner, max_tokens)
            values, references, _ = run_variables(joint, stages, {"traced": i})
            found.append((values["patched"][:, 0], references[0][:, 0]))
        return _dataset(requests, corruption, kinds, found).assign_attrs(
            deviation=deviation["sigma"]
        )

    settings = {
        "corruption": asdict(corruption),
        "kinds": [*kinds],
        "window": window,
        "metrics": [metric_words(metric) for metric in requests[0].metrics],
        "read": read,
        "compute_dtype": str(requests[0].compute_dtype).removeprefix("torch."),
    }
    return stages.analysis("trace", model, pairs, settings, compute, config)


def _check(pairs: Any, corruption: Any, kinds: Any, window: Any) -> None:
    if not isinstance(corruption, Noise):
        raise ConfigError(f"corruption={corruption!r} must be Noise(label='subject'), say")
    if isinstance(kinds, str) or not kinds or any(kind not in KINDS for kind in kinds):
        raise PlanError(f"kinds={kinds!r} must be a list of {', '.join(map(repr, KINDS))}")
    whole_number("window", window, least=1)
    for i, pair in enumerate(pairs if isinstance(pairs, PromptPairs) else ()):
        if corruption.label not in pair.labels:
            known = ", ".join(pair.labels)
            remedy = f"use one of {known}" if known else "label the pairs"
            raise PlanError(
                f"corruption has the label {corruption.label!r}, which pair {i} does "
                f"not carry; {remedy}"
            )


def _places(
    model: TransformerBridge,
    pairs: PromptPairs,
    kinds: Sequence[Kind],
    window: int,
    held: Mapping[str, Custom] | None = None,
) -> list[list[Patch]]:
    """Return the patches that restore each place of the one pair: kind, layer, position.

    `held`: kind -> a noised run's writes; None: those of no sample yet, for a check.
    """
    n_layers = model_shape(model).n_layers
    (pair,) = pairs
    n_pos = len(pair) + len(pair.answer) - 1
    places = []
    for kind in kinds:
        for layer in range(n_layers):
            if kind in ("mlp", "attn"):
                layers = range(max(0, layer - window // 2), min(n_layers, layer + -(-window // 2)))
            else:
                layers = range(layer, layer + 1)
            for pos in range(n_pos):
                site = _SITES[kind.partition(" ")[0]]
                patches = [Patch(site, layers, pos, intervention="base")]
                later = range(layer + 1, n_layers)
                if kind in _HELD and later and held is not None:
                    patches.append(Patch(_HELD[kind], later, pos, intervention=held[kind]))
                places.append(patches)
    return places


@torch.no_grad()
def _noised_writes(
    request: JointRequest, joint: JointPatches, samples: Sequence[_Sample], kinds: Sequence[Kind]
) -> list[dict[str, Custom]]:
    """Return, per sample, kind -> the writes of its noised run that are held."""
    bridge = request.bridge
    (batch,) = request.batches([0])
    embed = joint.choice.runner.activations(batch.base)["embed"][0]
    noised = torch.cat([x.values(SITES["embed"], 0, embed, embed, batch.spans) for x in samples])

    def write(x: Tensor) -> None:
        x.copy_(noised)

    names = {kind: hooks_of(bridge, SITES[_HELD[kind]]) for kind in kinds if kind in _HELD}
    kept, reads = keeping(name for every in names.values() for name in every)
    with cast_while(bridge, request.compute_dtype):
        tokens = batch.base.expand(len(samples), -1)
        forward(bridge, tokens, [writing(SITES["embed"].hook_name(0), write)], reads)
    return [
        {kind: _held([kept[name][i : i + 1] for name in every]) for kind, every in names.items()}
        for i in range(len(samples))
    ]


def _dataset(
    requests: Sequence[JointRequest],
    corruption: Noise,
    kinds: Sequence[Kind],
    found: Sequence[tuple[np.ndarray, np.ndarray]],
) -> xr.Dataset:
    n_metrics, n_samples = len(requests[0].metrics), corruption.samples
    n_layers = requests[0].shape.n_layers
    pairs = [request.pairs[0] for request in requests]
    lengths = [len(pair) + len(pair.answer) - 1 for pair in pairs]
    n_pos = max(lengths)
    shape = (n_metrics, len(pairs), len(kinds), n_layers, n_pos)
    restored, effect, low, high = (np.full(shape, np.nan, np.float32) for _ in range(4))
    noised = np.empty(shape[:2], np.float32)
    clean = np.empty(shape[:2], np.float32)
    factor = stats.t.ppf(0.5 + CONFIDENCE / 2, n_samples - 1) / np.sqrt(n_samples)
    for i, ((values, base), length) in enumerate(zip(found, lengths, strict=True)):
        cells = values[:, n_samples:].reshape(n_metrics, n_samples, len(kinds), n_layers, length)
        change = cells - values[:, :n_samples, None, None, None]
        noised[:, i], clean[:, i] = values[:, :n_samples].mean(axis=1), base
        part = (slice(None), i, slice(None), slice(None), slice(0, length))
        spread = factor * change.std(axis=1, ddof=1)
        restored[part], effect[part] = cells.mean(axis=1), change.mean(axis=1)
        low[part], high[part] = effect[part] - spread, effect[part] + spread
    dims = ("metric", "pair", "kind", "layer", "pos")
    tokens = np.full((len(pairs), n_pos), "", dtype=object)
    noisy = np.zeros((len(pairs), n_pos), bool)
    for i, pair in enumerate(pairs):
        tokens[i, : len(pair)] = pair.clean_tokens
        noisy[i, slice(*pair.labels[corruption.label])] = True
    return xr.Dataset(
        {
            "restored": (dims, restored),
            "effect": (dims, effect),
            "effect_low": (dims, low),
            "effect_high": (dims, high),
            "noised_metric": (dims[:2], noised),
            "clean_metric": (dims[:2], clean),
        },
        coords={
            "metric": strings([metric.name for metric in requests[0].metrics]),
            "metric_unit": ("metric", strings([metric.unit for metric in requests[0].metrics])),
            "pair": np.arange(len(pairs)),
            "answer": ("pair", strings([pair.answer_text for pair in pairs])),
            "kind": strings(kinds),
            "layer": np.arange(n_layers),
            "pos": np.arange(n_pos),
            "token": (("pair", "pos"), tokens),
            "noised": (("pair", "pos"), noisy),
        },
    )


@dataclass(frozen=True)
class Traced:
    """A restored place of one pair and its effect, in the metric's unit."""

    layer: int
    pos: int
    token: str
    effect: float
    low: float
    high: float


def largest_effects(
    ds: xr.Dataset, kind: str, metric: str | None = None, pair: int = 0, n: int = 5
) -> list[Traced]:
    """Return the `n` places of `kind` with the largest |effect| in one pair, largest first.

    `metric` defaults to the first.
    """
    name = str(ds["metric"].values[0]) if metric is None else metric
    one = ds.sel(metric=name, pair=pair, kind=kind)
    effect = one["effect"].transpose("layer", "pos").values
    order = np.argsort(-np.abs(np.nan_to_num(effect)), axis=None, kind="stable")[:n]
    places = [np.unravel_index(i, effect.shape) for i in order]
    return [
        Traced(
            layer=int(layer),
            pos=int(pos),
            token=str(one["token"].values[pos]),
            effect=float(effect[layer, pos]),
            low=float(one["effect_low"].isel(layer=layer, pos=pos)),
            high=float(one["effect_high"].isel(layer=layer, pos=pos)),
        )
        for layer, pos in places
    ]
