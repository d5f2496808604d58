"""Circuits that hold: bootstraps of a circuit over pairs, and faithfulness on held-out pairs.

Both start from the scores of each pair (`circuit_scores(by_pair=True)`) and never score again. A
bootstrap draws pairs with replacement and selects from the mean score of each draw, so it does not
run the model at all. Cross-validation selects from some pairs and runs the circuits on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.circuits import circuit
from patchsweep.analyses.circuits.scores import Ablation
from patchsweep.analyses.circuits.selection import (
    Growth,
    Level,
    RankBy,
    areas,
    check_rank_by,
    sizes_of,
    strength_of,
)
from patchsweep.arguments import whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import PlanError
from patchsweep.models.running import runs_model
from patchsweep.spec.interventions import Mean, get_intervention
from patchsweep.spec.reference import MeansFrom
from patchsweep.spec.spec import MetricLike, SweepSpec

# resamples whose mean scores are held at a time
_BLOCK = 64
# edges looked at for each edge of the circuit, if the others are proved too weak
_CANDIDATES = 8


def bootstrap_circuit(
    scores: xr.DataArray,
    *,
    sizes: Sequence[float] | None = None,
    rank_by: RankBy = "size",
    n_resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Return how far circuits of each size depend on the pairs that chose them.

    `share` [size, node] or [size, sender, reader] is the share of resamples whose circuit holds a
    node or edge, NaN where there is none. `jaccard` [size, resample] is |A and B| / |A or B| of the
    resample's circuit and that of all pairs. A resample draws as many pairs as there are, with
    replacement; its circuit holds the strongest mean scores (`growth=top`; ties go to the earlier).

    Args:
        scores: per pair, from `circuit_scores(by_pair=True)`.
        sizes, rank_by: as in `circuit`.

    Raises:
        PlanError: the scores are not per pair, are of fewer than two pairs, or are NaN for some
            pairs only; or another argument breaks a rule.
    """
    given, known, dims = _by_pair(scores)
    whole_number("n_resamples", n_resamples, least=1)
    whole_number("seed", seed, least=0)
    check_rank_by(rank_by, "")
    plan = sizes_of(sizes, int(known.sum()), "edges" if "sender" in dims else "nodes")
    values = given[:, known]
    drawn, jaccard = _draw(values, plan.counts, rank_by, n_resamples, seed)
    share = np.full((len(plan.counts), *known.shape), np.nan)
    share[:, known] = drawn / n_resamples
    coords = {dim: scores[dim].values for dim in dims}
    return xr.Dataset(
        {
            "share": (("size", *dims), share, {"long_name": "share of resamples that hold it"}),
            "jaccard": (
                ("size", "resample"), jaccard, {"long_name": "overlap with that of all pairs"}
            ),
        },
        coords={**coords, "size": list(plan.shares), "count": ("size", list(plan.counts))},
        attrs={
            "kind": "circuit bootstrap",
            "rank_by": rank_by,
            "n_resamples": n_resamples,
            "n_pairs": len(values),
            "seed": seed,
            "method": str(scores.attrs.get("method", "given")),
        },
    )  # fmt: skip


def _draw(
    values: NDArray[np.float32],
    counts: Sequence[int],
    rank_by: RankBy,
    n_resamples: int,
    seed: int,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return how many resamples hold an edge [size, edge], and the overlaps [size, resample].

    The mean of a draw is at most the largest of its pairs. So edges are taken in the order of the
    largest strength of any pair, and a circuit of few edges looks at the first ones alone: those
    behind are too weak in every draw whose weakest member is above their bound.
    """
    n_pairs, n = values.shape
    bound = strength_of(values, rank_by).max(axis=0)
    order = np.argsort(-bound, kind="stable")
    bound = bound[order] + np.float32(1e-6) * np.abs(bound[order])  # rounding of a mean
    reach = [min(n, _CANDIDATES * count) if count < n else n for count in counts]
    n_near = max([m for m, count in zip(reach, counts, strict=True) if 0 < count < n], default=0)
    near = np.ascontiguousarray(values[:, order[:n_near]])
    whole = _members(strength_of(values.mean(axis=0), rank_by), counts)[:, order]
    jaccard = np.ones((len(counts), n_resamples))
    tally = np.zeros((len(counts), n), dtype=np.int32)
    small = np.zeros((len(counts), n), dtype=np.uint8)  # of up to _BLOCK resamples
    inside = np.empty(n, dtype=bool)
    rng = np.random.default_rng(seed)
    for first in range(0, n_resamples, _BLOCK):
        block = min(_BLOCK, n_resamples - first)
        draws = rng.multinomial(n_pairs, [1 / n_pairs] * n_pairs, size=block)
        weights = draws.astype(np.float32) / np.float32(n_pairs)
        strengths = strength_of(weights @ near, rank_by)
        small[:] = 0
        for i, strength in enumerate(strengths):
            ordered = np.sort(strength)  # faster than a partition at several places
            for row, (count, m) in enumerate(zip(counts, reach, strict=True)):
                if not 0 < count < n:
                    small[row] += count > 0
                    continue
                least = ordered[n_near - count] if count < n_near else -np.inf
                member = np.greater_equal(strength[:m], least, out=inside[:m])
                if m < n_near and (np.count_nonzero(member) != count or not least > bound[m]):
                    reach[row] = m = n_near  # later draws too
                    member = np.greater_equal(strength, least, out=inside[:m])
                beyond = bound[m] if m < n else -np.inf
                if np.count_nonzero(member) != count or not least > beyond:
                    # ties, or an edge that was left out might belong to it
                    m = n
                    member = _members(strength_of(weights[i] @ values, rank_by), [count])[0][order]
                small[row, :m] += member
                both = np.count_nonzero(member & whole[row, :m])
                jaccard[row, first + i] = both / (2 * count - both)
        tally += small
    drawn = np.empty_like(tally)
    drawn[:, order] = tally
    return drawn, jaccard


@runs_model
def cross_validate_circuit(
    model: TransformerBridge,
    pairs: PromptPairs,
    scores: xr.DataArray,
    metric: MetricLike = "logit_diff",
    *,
    folds: int = 4,
    level: Level = "edges",
    growth: Growth = "top",
    sizes: Sequence[float] | None = None,
    rank_by: RankBy = "size",
    ablation: Ablation = "resample",
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    seed: int = 0,
) -> xr.Dataset:
    """Return the faithfulness of circuits on pairs that did not choose them, beside in-sample.

    `in_sample` [size] is the faithfulness on all pairs of the circuit that all pairs chose.
    `held_out` [size] takes for each pair the circuit that the other folds chose, and
    `held_out_fold` [fold, size] is that of each fold alone; `fold` [pair] says who belongs to
    which. The attributes `cpr`, `cmd` (in-sample), `held_out_cpr`, `held_out_cmd` are the areas of
    the curves. `chosen_size` is the cross-validated size: the smallest share whose mean distance
    |1 - faithfulness| over folds is within one standard error of the least one.

    Scores are not computed again: a fold costs the runs of its own pairs. Means (`ablation=mean`)
    are taken over all pairs unless `means_from` gives others.

    Raises:
        PlanError: `scores` are not those of these pairs, or `folds` is out of range.
        PatchsweepError: another argument breaks a rule, see `circuit`.
    """
    given, _, _ = _by_pair(scores)
    if len(given) != len(pairs):
        raise PlanError(
            f"scores are of {len(given)} pairs, and there are {len(pairs)}; give those of "
            "circuit_scores(model, pairs, by_pair=True)"
        )
    whole_number("folds", folds, least=2, most=len(pairs))
    whole_number("seed", seed, least=0)
    if means_from is None and isinstance(get_intervention(ablation), Mean):
        means_from = pairs
    settings: dict[str, Any] = {
        "level": level,
        "growth": growth,
        "sizes": sizes,
        "rank_by": rank_by,
        "ablation": ablation,
        "read": read,
        "means_from": means_from,
    }
    # balanced folds: a shuffled deck of fold numbers
    fold = np.random.default_rng(seed).permutation(np.arange(len(pairs)) % folds)
    whole = circuit(model, pairs, metric, scores=scores, **settings)
    parts = {}
    for number in range(folds):
        held = PromptPairs(tuple(pairs[int(i)] for i in np.flatnonzero(fold == number)))
        rest = scores.isel(pair=np.flatnonzero(fold != number)).mean("pair")
        parts[number] = circuit(model, held, metric, scores=rest, **settings)
    return _validation(whole, parts, fold)


def _validation(
    whole: xr.Dataset, parts: Mapping[int, xr.Dataset], fold: NDArray[np.integer]
) -> xr.Dataset:
    """Return the Dataset of `cross_validate_circuit`."""
    shares = whole["size"].values.tolist()
    base, empty = (
        np.concatenate([part[name].values[0] for part in parts.values()])
        for name in ("base_metric", "empty_metric")
    )
    kept = np.concatenate([part["circuit_metric"].values[0] for part in parts.values()])
    span = base.mean(dtype=np.float64) - empty.mean(dtype=np.float64)
    defined = np.isfinite(whole["faithfulness"].values[0]).all()
    held_out = (kept.mean(axis=0, dtype=np.float64) - empty.mean(dtype=np.float64)) / (
        span if defined else np.nan
    )
    by_fold = np.stack([part["faithfulness"].values[0] for part in parts.values()])
    in_sample = whole["faithfulness"].values[0]
    attrs: dict[str, Any] = {
        "kind": "circuit validation",
        **{name: whole.attrs[name] for name in ("level", "growth", "rank_by", "intervention")},
        "folds": len(parts),
    }
    for name, curve in (("", in_sample), ("held_out_", held_out)):
        if np.isfinite(curve).all():
            attrs[f"{name}cpr"], attrs[f"{name}cmd"] = areas(shares, curve.tolist())
    parts_of_it = np.array(shares) < 1  # the whole model is faithful to itself
    distance = np.abs(1 - by_fold[np.isfinite(by_fold).all(axis=1)])[:, parts_of_it]
    if len(distance) > 1 and parts_of_it.any():
        mean = distance.mean(axis=0)
        error = distance.std(axis=0, ddof=1) / np.sqrt(len(distance))
        least = int(mean.argmin())
        attrs["chosen_size"] = shares[int(np.argmax(mean <= mean[least] + error[least]))]
    return xr.Dataset(
        {
            "in_sample": ("size", in_sample),
            "held_out": ("size", held_out),
            "held_out_fold": (("fold_number", "size"), by_fold),
        },
        coords={
            "size": shares,
            "count": ("size", whole["count"].values),
            "fold": ("pair", fold),
            "fold_number": list(parts),
        },
        attrs=attrs,
    )


def _by_pair(
    scores: xr.DataArray,
) -> tuple[NDArray[np.float32], NDArray[np.bool_], tuple[str, ...]]:
    """Return the scores [pair, ...], which of them are known, and the dims after `pair`."""
    if not isinstance(scores, xr.DataArray) or "pair" not in scores.dims:
        raise PlanError("scores must be those of each pair; take circuit_scores(..., by_pair=True)")
    dims = tuple(str(dim) for dim in scores.dims if dim != "pair")
    if set(dims) not in ({"node"}, {"sender", "reader"}):
        raise PlanError(f"scores have the dims {', '.join(dims)}, and want node, or sender, reader")
    values = scores.transpose("pair", *dims).values.astype(np.float32)
    if len(values) < 2:
        raise PlanError(f"scores are of {len(values)} pair; a spread over pairs needs 2 or more")
    unknown = np.isnan(values)
    if (unknown.any(axis=0) != unknown.all(axis=0)).any():
        raise PlanError("some scores are NaN for some of the pairs only; give each a number")
    return values, ~unknown[0], dims


def _members(strength: NDArray[np.floating], counts: Sequence[int]) -> NDArray[np.bool_]:
    """Return the members [size, ...] of the circuits of the `counts` strongest.

    Ties go to the earlier, as in `selection.rank_top`, without a sort of all.
    """
    n = len(strength)
    inner = sorted({n - count for count in counts if 0 < count < n})
    parted = np.partition(strength, inner) if inner else strength
    members = np.empty((len(counts), n), dtype=bool)
    for row, count in zip(members, counts, strict=True):
        if not 0 < count < n:
            row[:] = count >= n
            continue
        least = parted[n - count]
        np.greater_equal(strength, least, out=row)
        surplus = int(np.count_nonzero(row)) - count
        if surplus:
            ties = np.flatnonzero(strength == least)
            row[ties[len(ties) - surplus :]] = False
    return members
