"""Attention views: patterns of the top-k heads in both runs, and the attribution of each cell.

Heads are ranked by attention attribution, (source pattern - base pattern) * gradient: the
first-order effect on the base run's metric of taking a cell (head, query, key) from the source
run's pattern (see `attribution.patterns`). Patterns are kept only for the top-k heads, together
with the norms of their values: attention to a key with a small value has a small effect, whatever
its probability (Kobayashi et al., arXiv 2004.10102).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.stages import Computed, Stages, empty
from patchsweep.arguments import head_places, whole_number
from patchsweep.attribution.atp import Atp
from patchsweep.attribution.check import check_request
from patchsweep.attribution.estimates import Work
from patchsweep.attribution.patterns import visit_cells
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.tokenize import token_strings
from patchsweep.errors import PlanError
from patchsweep.forward.grad import Activations, GradientModel, Heads, Place
from patchsweep.models.running import runs_model
from patchsweep.spec.batch import Batch, base_and_source
from patchsweep.spec.interventions import Direction
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import MetricLike, Request, SweepSpec, make_request
from patchsweep.sweeps.identity import question_settings
from patchsweep.sweeps.layout import metric_and_pair_coords, strings
from patchsweep.tasks.plain import is_text, pairs_of

KIND = "attention"
RUNS = ("base", "source")
# most prompt tokens of one batch
MAX_TOKENS = 1024
Head = tuple[int, int]  # layer, head
Floats = NDArray[np.float32]


@runs_model
def attention(
    model: TransformerBridge,
    pairs: PromptPairs | str | Sequence[str],
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    direction: Direction | None = SweepSpec.direction,
    read: int = SweepSpec.read,
    heads: Sequence[Head | str] | None = None,
    top: int = 16,
    predictions: int = 10,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Return patterns and attention attribution of the top-k heads, and both runs' predictions.

    For every head: `head_attribution` and `head_size` [metric, pair, layer, head], the sum over
    cells of the attribution and of its absolute value, in the metric's unit. For the kept heads
    `rank` (with coordinates `rank_layer` and `rank_head`): `pattern` [run, pair, rank, dest, src],
    probabilities; `value_norm` [run, pair, rank, src], norms of the values attended to;
    `attribution` [metric, pair, rank, dest, src], signed; `exact` [metric, pair, rank], the exact
    effect of replacing a head's pattern by the source run's.
    `top_token`, `top_prob`, `top_logit` [run, pair, top] are the most probable next tokens at the
    position read; `answer_prob` and `wrong_prob` [run, pair] are the probabilities of the two
    answers. For answers of several tokens, all of these refer to the first token that differs,
    after the tokens that the answers share. `base_metric` and `source_metric` are [metric, pair].
    Entries are NaN, or "", beyond the length of a pair.

    A cell has positive attribution if the source run's probability there would raise the base
    run's metric. Sums are first-order estimates of replacing a head's pattern and may have the
    wrong sign; compare them with `exact`.

    Args:
        pairs: prompt pairs, or plain texts with `heads`: their patterns, without attributions.
        metrics: the first one ranks the heads.
        direction: `denoising` (default): the corrupted prompt is the base.
        read: prompt position whose logits are read; default the last.
        heads: the heads to keep, in this order: (layer, head), of which a negative layer counts
            from the end, or names such as `a23.h3`, or `a23` for all heads of layer 23.
            Default: the `top` heads with the largest mean `head_size` over pairs.
        predictions: number of next tokens to keep.
        config: config of the command line, kept in the provenance.
        stages: where and how the stages "ranks" (without `heads`), "views" and "exact" run, see
            `patchsweep.analyses.stages`. Default: in memory.

    Raises:
        PatchsweepError: an argument breaks a rule, or the model has no gradient at its patterns;
            raised before any forward pass.
    """
    if heads is None and is_text(pairs):
        raise PlanError(
            "a plain text has one run, and no attributions to rank heads by; name heads=[...], "
            "such as ['a3.h1']"
        )
    pairs = pairs_of(model, pairs)
    request = make_request(
        model, pairs, SweepSpec("pattern", metrics, direction=direction, read=read)
    )
    check_request(request, [Atp()])
    chosen = _check(request, heads, top, predictions)
    stages = Stages.of(stages)

    def compute() -> xr.Dataset:
        gradients = GradientModel(model, [SITES["pattern"]], compute_dtype=request.compute_dtype)
        views = _Views(request, gradients, predictions)
        keep: Sequence[Head] | None = chosen
        if keep is None:  # ranks first: the patterns of all heads may not fit in memory
            keep = _top_heads(views.run("ranks", (), stages)["head_size"].values, top)
        results = views.run("views", keep, stages)
        ds = views.dataset(results, keep).assign(exact=_exact(request, keep, stages))
        return ds.assign_attrs(
            direction=request.direction, intervention=request.intervention.name, method="atp"
        )

    settings = {
        **question_settings(request),
        "heads": None if chosen is None else [list(head) for head in chosen],
        "top": top if chosen is None else None,
        "predictions": predictions,
    }
    return stages.analysis(KIND, model, pairs, settings, compute, config)


@dataclass(frozen=True)
class RankedHead:
    """A ranked head: its means over pairs, and its largest cell in one pair."""

    layer: int
    head: int
    attribution: float  # mean over pairs of the sum over cells, signed
    exact: float  # mean over pairs of the exact effect of the whole pattern
    size: float  # mean over pairs of the sum over cells of the absolute values
    dest: int  # query position of the largest cell
    src: int  # key position of the largest cell
    cell: float  # attribution of that cell
    base: float  # probability of that cell in the base run
    source: float  # probability of that cell in the source run


def ranked_heads(ds: xr.Dataset, metric: str | None = None, pair: int = 0) -> list[RankedHead]:
    """Return the heads whose patterns `attention` kept, in order, with their cells of `pair`."""
    name = str(ds["metric"].values[0]) if metric is None else metric
    totals = ds[["head_attribution", "head_size"]].sel(metric=name).mean("pair")
    ranked = []
    for rank in range(ds.sizes["rank"]):
        layer, head = int(ds["rank_layer"][rank]), int(ds["rank_head"][rank])
        cells = ds["attribution"].sel(metric=name).isel(pair=pair, rank=rank)
        values = cells.transpose("dest", "src").values
        dest, src = np.unravel_index(np.nan_to_num(np.abs(values)).argmax(), values.shape)
        pattern = ds["pattern"].isel(pair=pair, rank=rank, dest=dest, src=src)
        ranked.append(
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
    return ranked


def _check(request: Request, heads: Any, top: int, predictions: int) -> tuple[Head, ...] | None:
    """Check the arguments and return the heads to keep; None: the top-k heads."""
    shape = request.shape
    whole_number("top", top, least=1)
    whole_number("predictions", predictions, least=1, most=shape.d_vocab)
    if heads is None:
        return None
    if isinstance(heads, str) or not isinstance(heads, Sequence) or not heads:
        raise PlanError("heads is empty; give (layer, head) pairs, or leave it out")
    return head_places(heads, shape.n_layers, shape.n_heads)


def _top_heads(head_size: Floats, top: int) -> list[Head]:
    """Return the `top` heads with the largest mean size by the first metric."""
    size = head_size[0].mean(axis=0)
    order = np.argsort(-size, axis=None, kind="stable")[:top]
    return [(int(i) // size.shape[1], int(i) % size.shape[1]) for i in order]


def _exact(request: Request, heads: Sequence[Head], stages: Stages) -> xr.DataArray:
    """Return the exact effects [metric, pair, rank] of patching the heads' whole patterns."""
    layers, units = (sorted({head[i] for head in heads}) for i in (0, 1))
    ds = stages.sweep(
        "exact",
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
    stages.wait()
    effect = (ds["pattern"] - ds["base_metric"]).transpose("metric", "pair", "layer", "head")
    rows, columns = (
        [axis.index(head[i]) for head in heads] for i, axis in ((0, layers), (1, units))
    )
    return xr.DataArray(effect.values[:, :, rows, columns], dims=("metric", "pair", "rank"))


class _Views:
    """The arrays of the result, computed in batches of one length."""

    def __init__(self, request: Request, gradients: GradientModel, predictions: int) -> None:
        self.request, self.gradients, self.k = request, gradients, predictions
        self.length = int(request.plans[0].full_lengths.max())
        self.cells: dict[str, Floats] = {}  # of the block of pairs that is computed
        self.keep: dict[int, list[tuple[int, int]]] = {}  # layer -> (rank, head)

    def run(self, stage: str, keep: Sequence[Head], stages: Stages) -> xr.Dataset:
        """Run `stage`, which gives the sizes of all heads and all views of the heads `keep`."""
        request, n = self.request, self.length
        shape = request.shape
        by_run, by_metric = (
            {dim: size, "pair": len(request.pairs)}
            for dim, size in (("run", 2), ("metric", len(request.metrics)))
        )
        heads = {**by_metric, "layer": shape.n_layers, "head": shape.n_heads}
        shapes = {"head_attribution": heads, "head_size": heads}
        if keep:
            rank, cells = {"rank": len(keep)}, {"dest": n, "src": n}
            shapes |= {
                "pattern": {**by_run, **rank, **cells},
                "value_norm": {**by_run, **rank, "src": n},
                "attribution": {**by_metric, **rank, **cells},
                **{f"top_{key}": {**by_run, "top": self.k} for key in ("id", "prob", "logit")},
                **dict.fromkeys(("answer_prob", "wrong_prob"), by_run),
            }
        self.keep = {}
        for number, (layer, head) in enumerate(keep):
            self.keep.setdefault(layer, []).append((number, head))

        def block(pairs: range) -> Computed:
            self.cells = empty(shapes, pairs)
            references = np.zeros((2, len(request.metrics), len(pairs)), np.float32)
            for batch in request.batches(pairs):
                rows = [pair - pairs.start for pair in batch.pairs]
                with self.gradients.frozen():
                    references[:, :, rows] = self._batch(batch, rows)
            return self.cells, references

        results = stages.run(
            stage,
            shapes,
            max(1, MAX_TOKENS // n),
            block,
            cost=n * shape.n_layers,
            metrics=[metric.name for metric in request.metrics],
            attrs={"keep": [list(head) for head in keep]},
        )
        stages.wait()
        return results

    def _batch(self, batch: Batch, rows: list[int]) -> Floats:
        """Fill `rows` of the cells; return base and source metrics [2, metric, pair]."""
        n = batch.length

        def keep_heads(run: int, layer: int, heads: Heads) -> None:
            norm = heads.v.detach().float().norm(dim=-1)  # [pair, kv_head, src]
            group = heads.pattern.shape[1] // norm.shape[1]
            for rank, head in self.keep.get(layer, ()):
                pattern = heads.pattern[:, head].detach()
                self.cells["pattern"][run, rows, rank, :n, :n] = pattern.float().cpu().numpy()
                self.cells["value_norm"][run, rows, rank, :n] = norm[:, head // group].cpu().numpy()

        def visit(metric: int, layer: int, base: Tensor, values: Tensor, grad: Tensor) -> None:
            cells = ((values - base) * grad).float()
            signed, size = (x.sum(dim=(-2, -1)).cpu().numpy() for x in (cells, cells.abs()))
            self.cells["head_attribution"][metric, rows, layer] = signed
            self.cells["head_size"][metric, rows, layer] = size
            for rank, head in self.keep.get(layer, ()):
                by_cell = cells[:, head].cpu().numpy()
                self.cells["attribution"][metric, rows, rank, :n, :n] = by_cell

        source: dict[str, list[Tensor]] = {"pattern": []}

        def keep_source(place: Place, x: Tensor) -> None:
            source["pattern"].append(x)

        with torch.no_grad():
            source_logits = self.gradients.forward(
                batch.source,
                keep_source,
                batch.reads,
                on_attention=lambda layer, heads: keep_heads(1, layer, heads),
            )
        request = self.request
        work = Work(
            self.gradients,
            batch,
            request.plans,
            request.metrics,
            request.intervention,
            Activations(source, source_logits, None),
        )
        base_logits = visit_cells(work, visit, lambda layer, heads: keep_heads(0, layer, heads))
        for run, logits in enumerate((base_logits, source_logits) if self.keep else ()):
            row = torch.arange(len(rows), device=logits.device)
            self._predict(run, batch, rows, logits[row, batch.differ].float())
        return np.stack(work.references(base_logits))

    def _predict(self, run: int, batch: Batch, rows: list[int], logits: Tensor) -> None:
        """Store the most probable tokens of `logits` [pair, d_vocab], and the answers'."""
        prob = logits.softmax(dim=-1)
        best, ids = logits.topk(self.k, dim=-1)
        results = {"top_id": ids, "top_logit": best, "top_prob": prob.gather(1, ids)}
        for name, answer in (("answer_prob", batch.answer), ("wrong_prob", batch.wrong)):
            results[name] = prob.gather(1, answer.gather(1, batch.differ.unsqueeze(1)))[:, 0]
        for name, values in results.items():
            self.cells[name][run, rows] = values.cpu().numpy()

    def dataset(self, results: xr.Dataset, heads: Sequence[Head]) -> xr.Dataset:
        """Return the Dataset of all arrays."""
        request = self.request
        model, pairs = request.bridge, request.pairs
        top_ids = results["top_id"].values.astype(np.int64)
        ids, inverse = np.unique(top_ids, return_inverse=True)
        names = np.array(token_strings(model, tuple(ids.tolist())), dtype=object)
        tokens = np.full((2, len(pairs), self.length), "", dtype=object)
        for row, pair in enumerate(pairs):
            for run, members in enumerate(base_and_source(pair, request.direction)):
                tokens[run, row, : len(members)] = token_strings(model, tuple(members))
        return xr.Dataset(
            {
                "top_token": (results["top_id"].dims, names[inverse.reshape(top_ids.shape)]),
                **{
                    name: (results[name].dims, results[name].values)
                    for name in results.data_vars
                    if name != "top_id"
                },
            },
            coords={
                **metric_and_pair_coords(request.metrics, pairs),
                "run": strings(RUNS),
                "layer": np.arange(request.shape.n_layers),
                "head": np.arange(request.shape.n_heads),
                "rank_layer": ("rank", np.array([layer for layer, _ in heads])),
                "rank_head": ("rank", np.array([head for _, head in heads])),
                "token": (("run", "pair", "pos"), tokens),
            },
        )
