"""Attention of the heads that matter: their patterns in both runs, and what each cell does.

Heads are ranked by their attention attribution: (source pattern - base pattern) * gradient, the
first-order estimate of what each cell (head, query, key) of the source run's pattern would change
in the base run's metric (see `attribution.patterns`). Patterns are kept of the foremost heads
alone, with the sizes of the values they move: attention to a key whose value is small moves
little, however much of it there is (Kobayashi et al., arXiv 2004.10102).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import is_whole, whole_number
from patchsweep.attribution.atp import Atp
from patchsweep.attribution.check import check_request
from patchsweep.attribution.patterns import visit_cells, work_of
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.tokenize import token_strings
from patchsweep.errors import PlanError
from patchsweep.forward.grad import GradientModel, Heads, Place
from patchsweep.models.running import runs_model
from patchsweep.spec.batch import Batch, base_and_source
from patchsweep.spec.interventions import Direction
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import MetricLike, Request, SweepSpec, make_request
from patchsweep.store.attributes import flat_attributes
from patchsweep.sweeps.api import sweep
from patchsweep.sweeps.identity import identity_of, question_settings, read_weights
from patchsweep.sweeps.layout import analysis_attrs

KIND = "attention"
RUNS = ("base", "source")
# tokens of prompts that run together
MAX_TOKENS = 1024
Head = tuple[int, int]  # layer, head
Floats = NDArray[np.float32]


@runs_model
def attention(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    direction: Direction | None = SweepSpec.direction,
    read: int = SweepSpec.read,
    heads: Sequence[Head] | None = None,
    top: int = 16,
    predictions: int = 10,
    config: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Patterns and attention attribution of the foremost heads, and what both runs predict.

    Of every head: `head_attribution` and `head_size` [metric, pair, layer, head], the sum over
    the cells of its attribution and of its absolute value, in the metric's unit. Of the heads
    `rank` (with their `rank_layer` and `rank_head`): `pattern` [run, pair, rank, dest, src],
    probabilities; `value_norm` [run, pair, rank, src], the lengths of the values attended to;
    `attribution` [metric, pair, rank, dest, src], signed; `exact` [metric, pair, rank], the
    effect of replacing a head's whole pattern by the source run's, run and not estimated.
    `top_token`, `top_prob`, `top_logit` [run, pair, top] are the most probable next tokens where
    the metric is read, `answer_prob` and `wrong_prob` [run, pair] the probabilities of the two
    answers; of answers of several tokens, both after the tokens that they share, and of the first
    token that tells them apart. `base_metric` and `source_metric` [metric, pair] the metric
    itself. NaN, and "", beyond the length of a pair.

    A cell of positive attribution would raise the metric of the base run if its probability were
    the source run's. Sums are first-order estimates of replacing the whole pattern of a head, and
    may have the wrong sign: `exact` tells.

    Args:
        metrics: heads are ranked by the first one.
        direction: `denoising` (default): the corrupted prompt is the base.
        read: prompt position whose logits are read; default the last.
        heads: (layer, head) of those to keep, in this order. Default: the heads with the
            largest mean over pairs of `head_size`, `top` of them if there are so many.
        predictions: how many next tokens to keep.
        config: what a command line was told, kept in the provenance.

    Raises:
        PatchsweepError: an argument breaks a rule, or the model has no gradient at its patterns;
            nothing has run then.
    """
    request = make_request(
        model, pairs, SweepSpec("pattern", metrics, direction=direction, read=read)
    )
    check_request(request, [Atp()])
    _check(request, heads, top, predictions)
    attrs = _attrs(request, heads, top, predictions, config)
    tape = GradientModel(model, [SITES["pattern"]], compute_dtype=request.compute_dtype)
    views = _Views(request, tape, predictions)
    if heads is None:
        views.run(keep=())  # patterns of all heads at once would not fit for long prompts
        heads = views.foremost(top)
    views.run(keep=heads)
    ds = views.dataset(heads).assign(exact=_exact(request, heads))
    ds.attrs = flat_attributes(
        {
            **attrs,
            "direction": request.direction,
            "intervention": request.intervention.name,
            "method": "atp",
        }
    )
    return ds


def describe(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    direction: Direction | None = SweepSpec.direction,
    read: int = SweepSpec.read,
    heads: Sequence[Head] | None = None,
    top: int = 16,
    predictions: int = 10,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Attributes by which a store knows what `attention` gives for these arguments; runs nothing.

    Raises:
        PatchsweepError: an argument breaks a rule.
    """
    request = make_request(
        model, pairs, SweepSpec("pattern", metrics, direction=direction, read=read)
    )
    _check(request, heads, top, predictions)
    read_weights(model)
    return _attrs(request, heads, top, predictions, config)


def _attrs(
    request: Request,
    heads: Sequence[Head] | None,
    top: int,
    predictions: int,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    settings = {
        **question_settings(request),
        "heads": None if heads is None else [list(head) for head in heads],
        "top": top if heads is None else None,
        "predictions": predictions,
    }
    identity = identity_of(KIND, request.bridge, request.pairs, settings)
    return analysis_attrs(request.bridge, identity, config)


@dataclass(frozen=True)
class RankedHead:
    """A head of the ranking, in numbers and words; what one cell does is of one pair."""

    layer: int
    head: int
    attribution: float  # mean over pairs of the sum over cells, signed
    exact: float  # mean over pairs of the effect of the whole pattern, run
    size: float  # mean over pairs of the sum over cells of the absolute values
    dest: int  # its largest cell: the query's position
    src: int  # and the key's
    cell: float  # that cell's attribution
    base: float  # that cell's probability in the base run
    source: float  # and in the source run


def ranked_heads(ds: xr.Dataset, metric: str | None = None, pair: int = 0) -> list[RankedHead]:
    """The heads whose patterns `attention` kept, in their order; cells are those of `pair`."""
    name = str(ds["metric"].values[0]) if metric is None else metric
    totals = ds[["head_attribution", "head_size"]].sel(metric=name).mean("pair")
    found = []
    for rank in range(ds.sizes["rank"]):
        layer, head = int(ds["rank_layer"][rank]), int(ds["rank_head"][rank])
        cells = ds["attribution"].sel(metric=name).isel(pair=pair, rank=rank)
        values = cells.transpose("dest", "src").values
        dest, src = np.unravel_index(np.nan_to_num(np.abs(values)).argmax(), values.shape)
        pattern = ds["pattern"].isel(pair=pair, rank=rank, dest=dest, src=src)
        found.append(
            RankedHead(
                layer=layer,
                head=head,
                exact=float(ds["exact"].sel(metric=name).isel(rank=rank).mean("pair")),
                attribution=float(totals["head_attribution"].isel(layer=layer, head=head)),
                size=float(totals["head_size"].isel(layer=layer, head=head)),
                dest=int(dest),
                src=int(src),
                cell=float(values[dest, src]),
                base=float(pattern.sel(run="base")),
                source=float(pattern.sel(run="source")),
            )
        )
    return found


def _check(request: Request, heads: Sequence[Head] | None, top: int, predictions: int) -> None:
    shape = request.shape
    whole_number("top", top, least=1)
    whole_number("predictions", predictions, least=1, most=shape.d_vocab)
    if heads is not None and not heads:
        raise PlanError("heads is empty; give (layer, head) pairs, or leave it out")
    for entry in heads or ():
        if not (isinstance(entry, Sequence) and len(entry) == 2 and all(map(is_whole, entry))):
            raise PlanError(f"heads has {entry!r}; give (layer, head) pairs, such as (3, 1)")
        layer, head = entry
        if not (0 <= layer < shape.n_layers and 0 <= head < shape.n_heads):
            raise PlanError(
                f"heads: ({layer}, {head}) is no head of {shape.n_layers} layers of "
                f"{shape.n_heads}; layers and heads count from 0"
            )
    if heads is not None and len(set(map(tuple, heads))) < len(heads):
        raise PlanError(f"heads={list(heads)} names a head twice; name each once")


def _exact(request: Request, heads: Sequence[Head]) -> xr.DataArray:
    """Effects [metric, pair, rank] of patching the heads' whole patterns."""
    layers, units = (sorted({head[i] for head in heads}) for i in (0, 1))
    ds = sweep(
        request.bridge,
        request.pairs,
        "pattern",
        request.metrics,
        direction=request.direction,
        layers=layers,
        heads=units,
        positions="all",
        read=request.read,
    )
    effect = (ds["pattern"] - ds["base_metric"]).transpose("metric", "pair", "layer", "head")
    rows, columns = (
        [axis.index(head[i]) for head in heads] for i, axis in ((0, layers), (1, units))
    )
    return xr.DataArray(effect.values[:, :, rows, columns], dims=("metric", "pair", "rank"))


class _Views:
    """The arrays, filled batch by batch."""

    def __init__(self, request: Request, tape: GradientModel, predictions: int) -> None:
        self.request, self.tape, self.k = request, tape, predictions
        shape, n_metrics, n_pairs = request.shape, len(request.metrics), len(request.pairs)
        self.length = int(request.plans[0].full_lengths.max())
        every = (n_metrics, n_pairs, shape.n_layers, shape.n_heads)
        self.signed, self.size = np.zeros(every, np.float32), np.zeros(every, np.float32)
        self.ids = np.zeros((2, n_pairs, predictions), np.int64)
        self.prob, self.logit = np.zeros((2, 2, n_pairs, predictions), np.float32)
        self.answers = np.zeros((2, 2, n_pairs), np.float32)  # answer, wrong answer
        self.references = np.zeros((2, n_metrics, n_pairs), np.float32)

    def run(self, keep: Sequence[Head]) -> None:
        """Fill everything, with the patterns of the heads `keep`."""
        n_metrics, n_pairs, n = *self.signed.shape[:2], self.length
        self.keep: dict[int, list[tuple[int, int]]] = {}  # layer -> (rank, head)
        for rank, (layer, head) in enumerate(keep):
            self.keep.setdefault(layer, []).append((rank, head))
        self.pattern = np.full((2, n_pairs, len(keep), n, n), np.nan, np.float32)
        self.norm = np.full((2, n_pairs, len(keep), n), np.nan, np.float32)
        self.cells = np.full((n_metrics, n_pairs, len(keep), n, n), np.nan, np.float32)
        for batch in _parts(self.request):
            with self.tape.frozen():
                self._batch(batch)

    def foremost(self, top: int) -> list[Head]:
        """The heads with the largest mean size by the first metric."""
        size = self.size[0].mean(axis=0)
        order = np.argsort(-size, axis=None, kind="stable")[:top]
        return [(int(i) // size.shape[1], int(i) % size.shape[1]) for i in order]

    def _batch(self, batch: Batch) -> None:
        rows, n = list(batch.pairs), batch.length

        def keep_heads(run: int, layer: int, heads: Heads) -> None:
            norm = heads.v.detach().float().norm(dim=-1)  # [pair, kv_head, src]
            group = heads.pattern.shape[1] // norm.shape[1]
            for rank, head in self.keep.get(layer, ()):
                pattern = heads.pattern[:, head].detach()
                self.pattern[run, rows, rank, :n, :n] = pattern.float().cpu().numpy()
                self.norm[run, rows, rank, :n] = norm[:, head // group].cpu().numpy()

        def visit(metric: int, layer: int, base: Tensor, values: Tensor, grad: Tensor) -> None:
            cells = ((values - base) * grad).float()
            self.signed[metric, rows, layer] = cells.sum(dim=(-2, -1)).cpu().numpy()
            self.size[metric, rows, layer] = cells.abs().sum(dim=(-2, -1)).cpu().numpy()
            for rank, head in self.keep.get(layer, ()):
                self.cells[metric, rows, rank, :n, :n] = cells[:, head].cpu().numpy()

        source: dict[str, list[Tensor]] = {"pattern": []}

        def keep_source(place: Place, x: Tensor) -> None:
            source["pattern"].append(x)

        with torch.no_grad():
            source_logits = self.tape.forward(
                batch.source,
                keep_source,
                batch.reads,
                on_attention=lambda layer, heads: keep_heads(1, layer, heads),
            )
        work = work_of(self.request, self.tape, batch, source, source_logits)
        base_logits = visit_cells(work, visit, lambda layer, heads: keep_heads(0, layer, heads))
        self.references[:, :, rows] = work.references(base_logits)
        for run, logits in enumerate((base_logits, source_logits)):
            row = torch.arange(len(rows), device=logits.device)
            self._predict(run, batch, logits[row, batch.differ].float())

    def _predict(self, run: int, batch: Batch, logits: Tensor) -> None:
        """Keep the most probable tokens of `logits` [pair, d_vocab]."""
        rows = list(batch.pairs)
        prob = logits.softmax(dim=-1)
        best, ids = logits.topk(self.k, dim=-1)
        self.ids[run, rows] = ids.cpu().numpy()
        self.logit[run, rows] = best.cpu().numpy()
        self.prob[run, rows] = prob.gather(1, ids).cpu().numpy()
        for which, answer in enumerate((batch.answer, batch.wrong)):
            own = prob.gather(1, answer.gather(1, batch.differ.unsqueeze(1)))
            self.answers[which, run, rows] = own[:, 0].cpu().numpy()

    def dataset(self, heads: Sequence[Head]) -> xr.Dataset:
        """All arrays with their names."""
        request = self.request
        model, pairs = request.bridge, request.pairs
        ids, where = np.unique(self.ids, return_inverse=True)
        names = np.array(token_strings(model, tuple(ids.tolist())), dtype=object)
        every = ("metric", "pair", "layer", "head")
        tokens = np.full((2, len(pairs), self.length), "", dtype=object)
        for row, pair in enumerate(pairs):
            for run, members in enumerate(base_and_source(pair, request.direction)):
                tokens[run, row, : len(members)] = token_strings(model, tuple(members))
        return xr.Dataset(
            {
                "head_attribution": (every, self.signed),
                "head_size": (every, self.size),
                "pattern": (("run", "pair", "rank", "dest", "src"), self.pattern),
                "value_norm": (("run", "pair", "rank", "src"), self.norm),
                "attribution": (("metric", "pair", "rank", "dest", "src"), self.cells),
                "top_token": (("run", "pair", "top"), names[where.reshape(self.ids.shape)]),
                "top_prob": (("run", "pair", "top"), self.prob),
                "top_logit": (("run", "pair", "top"), self.logit),
                "answer_prob": (("run", "pair"), self.answers[0]),
                "wrong_prob": (("run", "pair"), self.answers[1]),
                "base_metric": (("metric", "pair"), self.references[0]),
                "source_metric": (("metric", "pair"), self.references[1]),
            },
            coords={
                "metric": _texts([metric.name for metric in request.metrics]),
                "metric_unit": ("metric", _texts([metric.unit for metric in request.metrics])),
                "run": _texts(RUNS),
                "pair": np.arange(len(pairs)),
                "layer": np.arange(request.shape.n_layers),
                "head": np.arange(request.shape.n_heads),
                "rank_layer": ("rank", np.array([layer for layer, _ in heads])),
                "rank_head": ("rank", np.array([head for _, head in heads])),
                "token": (("run", "pair", "pos"), tokens),
                "answer": ("pair", _texts([pair.answer_text for pair in pairs])),
                "wrong_answer": ("pair", _texts([pair.wrong_answer_text for pair in pairs])),
            },
        )


def _parts(request: Request) -> Iterator[Batch]:
    """All pairs, in batches of one length that are not too large."""
    for whole in request.batches(range(len(request.pairs))):
        size = max(1, MAX_TOKENS // whole.length)
        for start in range(0, len(whole.pairs), size):
            yield request.batches(whole.pairs[start : start + size])[0]


def _texts(values: Sequence[str]) -> NDArray[Any]:
    return np.array(list(values), dtype=object)
