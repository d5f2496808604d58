"""Effects, recovered fractions, intervals and the largest cells of a sweep's Dataset.

Every function takes the Dataset of one run (`xarray.open_zarr(store, consolidated=False)`) and
returns new arrays; the Dataset is not changed. Cells that have not run are NaN and stay NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from patchsweep.arguments import number, whole_number
from patchsweep.errors import MetricError, PlanError, SiteError, StoreError
from patchsweep.results.effects import Effect, Effects
from patchsweep.results.resampling import bootstrap, sign_flip, tested_q
from patchsweep.results.rounding import BF16, NOISE, floor_of_mean, noise_floor

# a pair is flagged when its |source - base| is below this fraction of the metric's median
SMALL_GAP = 0.1

# what a patch can be narrowed to inside one layer and position
UNIT_DIMS = ("head", "kv_head", "neuron")

SITE_WORDS = {
    "embed": "Token embedding",
    "resid_pre": "Residual stream entering a block",
    "resid_mid": "Residual stream between attention and MLP",
    "resid_post": "Residual stream leaving a block",
    "attn_out": "Attention output",
    "mlp_out": "MLP output",
    "z": "Attention heads",
    "q": "Queries, per head",
    "k": "Keys, per key head",
    "v": "Values, per key head",
    "rot_q": "Queries after rotary, per head",
    "rot_k": "Keys after rotary, per key head",
    "pattern": "Attention pattern, per head",
    "pattern_cell": "Attention pattern, per head and source",
    "mlp_post": "MLP neurons",
}
"""Site names and what they are, in words, in the order in which reports show them."""

_CELL_DIMS = {"metric", "pair", "intervention", "layer", "pos", *UNIT_DIMS}

ERROR = "_error"  # suffix of the variable with the errors that estimates state


def estimates(ds: xr.Dataset) -> dict[str, tuple[str, str]]:
    """Return the variables that hold attribution estimates: name -> (site, method).

    The attributes `role`, `site` and `method` decide. A variable without a role (of an old store,
    or after arithmetic) is an estimate if its name starts with a site's name and is not a site
    itself, such as `z_atp`.
    """
    variables = _cell_variables(ds)
    # shortest first: z_atp_star is atp_star of z, not star of z_atp
    bases = [*SITE_WORDS, *sorted(variables, key=len)]
    named = {}
    for name in sorted(variables):
        attrs = ds[name].attrs
        if "role" in attrs:
            if attrs["role"] == "estimate":
                named[name] = (str(attrs["site"]), str(attrs["method"]))
            continue
        site = next((b for b in bases if name.startswith(f"{b}_")), None)
        if site is not None and name not in SITE_WORDS:
            named[name] = (site, name[len(site) + 1 :])
    return named


def is_absolute(ds: xr.Dataset, name: str) -> bool:
    """Whether the estimates in variable `name` are absolute values, without a sign."""
    sign = ds[name].attrs.get("sign")
    return name.endswith("_drop") if sign is None else sign == "absolute"


def sites(ds: xr.Dataset) -> tuple[str, ...]:
    """Return the variables that hold exact patched metrics, in the order of `SITE_WORDS`."""
    estimated = estimates(ds)
    names = [name for name in _cell_variables(ds) if name not in estimated]
    order = [*SITE_WORDS, *sorted(set(names) - set(SITE_WORDS))]  # a folder lists in any order
    return tuple(sorted(names, key=order.index))


def unit_dim(array: xr.DataArray) -> str | None:
    """Return the dim of heads, key heads or neurons; None for a site without one."""
    return next((str(d) for d in array.dims if d in UNIT_DIMS), None)


def gap(ds: xr.Dataset) -> xr.DataArray:
    """Return source metric - base metric, [metric, pair]: the denominator of `recovered`."""
    return _metric_array(ds, "source_metric") - _metric_array(ds, "base_metric")


def small_gaps(ds: xr.Dataset, threshold: float = SMALL_GAP) -> xr.DataArray:
    """Flag pairs whose recovered fraction is unreliable, [metric, pair] bool.

    True where |source - base| is zero, NaN, or below `threshold` times the metric's median over
    pairs. Means include flagged pairs; in a ratio of means their weight is small.
    """
    size = abs(gap(ds))
    return ~((size > 0) & (size >= threshold * size.median("pair"))).rename("small_gap")


def value(ds: xr.Dataset, site: str) -> xr.DataArray:
    """Return the patched metric of `site`; for estimates (`z_atp`), base metric + estimate."""
    values = _variable(ds, site)
    if site in estimates(ds):
        values = (values + _metric_array(ds, "base_metric")).transpose(*values.dims)
    return values.rename(site)


def effect(ds: xr.Dataset, site: str) -> xr.DataArray:
    """Return patched metric - base metric, with the dims of `site`, in the metric's unit.

    Positive where the patch raises the metric. An estimate such as `z_atp` is already an effect.
    """
    values = _variable(ds, site)
    if site in estimates(ds):
        return values.rename("effect")
    return (values - _metric_array(ds, "base_metric")).transpose(*values.dims).rename("effect")


def recovered(ds: xr.Dataset, site: str) -> xr.DataArray:
    """Return effect / (source metric - base metric) per pair, with the dims of `site`; no unit.

    0: as the base run; 1: as the source run; NaN where source and base metric are equal.
    """
    effects, gaps = effect(ds, site), gap(ds)
    return (effects / gaps.where(gaps != 0)).transpose(*effects.dims).rename("recovered")


def effect_mean(ds: xr.Dataset, site: str) -> xr.DataArray:
    """Return the mean effect over the pairs in which the cell has run; NaN if in none."""
    return effect(ds, site).mean("pair", skipna=True)


def recovered_mean(ds: xr.Dataset, site: str) -> xr.DataArray:
    """Return sum of effects / sum of gaps over pairs: a ratio of means, not a mean of ratios.

    Both sums run over the pairs in which the cell has run, so pairs of different length and
    unfinished runs do not bias it. A pair with a small gap has a small weight.
    """
    effects, gaps = effect(ds, site), gap(ds)
    ran = effects.notnull() & gaps.notnull()
    effect_sum = effects.where(ran).sum("pair", min_count=1)
    gap_sum = gaps.where(ran).sum("pair", min_count=1)
    dims = [d for d in effects.dims if d != "pair"]
    return (effect_sum / gap_sum.where(gap_sum != 0)).transpose(*dims).rename("recovered")


def n_pairs(ds: xr.Dataset, site: str) -> xr.DataArray:
    """Return the number of pairs behind each cell's mean, with the dims of `site` without pair.

    Pairs whose prompts lack a position, and cells that have not run, do not count.
    """
    return effect(ds, site).notnull().sum("pair").rename("n_pairs")


def interval(
    ds: xr.Dataset, site: str, confidence: float = 0.95, n_resamples: int = 1000
) -> xr.DataArray:
    """Return the percentile bootstrap interval of the mean effect over pairs, [bound, ...].

    `bound` is "low" and "high"; values are in the metric's unit, and NaN where the cell has run
    in fewer than two pairs.

    Raises:
        SiteError, PlanError: `site` is not in the Dataset, or a number is out of range.
    """
    number("confidence", confidence, above=0, below=1)
    whole_number("n_resamples", n_resamples, least=1)
    effects = effect(ds, site)
    bounds = bootstrap(_pairs_first(effects), confidence=confidence, n_resamples=n_resamples)
    dims = [d for d in effects.dims if d != "pair"]
    ends = xr.DataArray(["low", "high"], dims="bound", name="bound")
    return xr.concat([_per_cell(b, effects) for b in bounds], ends).transpose("bound", *dims)


def p_value(ds: xr.Dataset, site: str, n_permutations: int = 1000) -> xr.DataArray:
    """Return per cell the two-sided sign-flip p-value of a zero mean effect over pairs.

    Exact up to 12 pairs. Not corrected for the number of cells. NaN below two pairs.

    Raises:
        SiteError, PlanError: `site` is not in the Dataset, or `n_permutations` is below 1.
    """
    whole_number("n_permutations", n_permutations, least=1)
    effects = effect(ds, site)
    p = sign_flip(_pairs_first(effects), n_permutations=n_permutations)
    return _per_cell(p, effects).rename("p_value")


def q_value(ds: xr.Dataset, site: str, n_permutations: int = 1000) -> xr.DataArray:
    """Return per cell the sign-flip p-value adjusted for all cells of the site and metric.

    See `benjamini_hochberg` and `p_value`. Cells whose effect is exactly 0 in
    every pair are known to do nothing, are not tested, and get 1. With few pairs p-values are
    coarse: n pairs that agree give 2^(1 - n) at best, so that 5 pairs never pass 0.05.

    Raises:
        SiteError, PlanError: as `p_value`.
    """
    p = p_value(ds, site, n_permutations)
    dead = (effect(ds, site).fillna(0) == 0).all("pair").transpose(*p.dims)
    adjusted = [tested_q(*one) for one in zip(p.values, dead.values, strict=True)]
    return p.copy(data=np.array(adjusted)).rename("q_value")


def control_level(placebo: xr.Dataset, site: str, level: float = 0.95) -> xr.DataArray:
    """Return the control level [metric]: that quantile of a placebo's |mean effect| over cells.

    A placebo is a sweep whose donor tells nothing of the pair: another pair's run
    (`intervention="shuffle"`), or noise of the same size (`spec.placebo.norm_matched_noise`).
    Cells that are exactly 0 (dead) do not count. An effect below the level is no larger than what
    such a donor does.

    Raises:
        StoreError: every cell of the placebo is 0.
        SiteError, PlanError: the site is not in the Dataset, or `level` is out of range.
    """
    number("level", level, above=0, below=1)
    size = abs(effect_mean(placebo, site))
    live = size.where(size > 0)
    if not bool(live.notnull().any()):
        raise StoreError(
            f"the placebo does nothing at {site}, so it gives no level; check its pairs"
        )
    dims = [dim for dim in live.dims if dim != "metric"]
    return live.quantile(level, dims, skipna=True).drop_vars("quantile").rename("control")


def shared_tokens(
    ds: xr.Dataset, pair: int | None = None, name: str = "base_token"
) -> list[str | None]:
    """Return the token at each position of `pair`; with pair=None, the token that all pairs share.

    An entry is None where the pairs differ, past the prompt's end, and where the store has no
    tokens by position. `name` is "base_token" or "source_token".
    """
    if name not in ds.variables or "pos" not in ds[name].dims:
        return [None] * ds.sizes.get("pos", 0)
    tokens = ds[name].transpose("pair", "pos")
    if pair is not None:
        return [str(t) or None for t in tokens.sel(pair=pair).values]
    columns = ({str(t) for t in column} - {""} for column in tokens.values.T)
    return [c.pop() if len(c) == 1 else None for c in columns]


def missing(ds: xr.Dataset, site: str) -> tuple[int, int]:
    """Return (cells of `site` that have not run, all its cells), without padding positions."""
    empty = _variable(ds, site).isnull()
    if "pos" in empty.dims and "base_token" in ds.variables and "pos" in ds["base_token"].dims:
        real = ds["base_token"] != ""
        if "align" in ds.attrs:  # positions without a partner have no patch
            real &= ds["source_token"] != ""
        real = real.reset_coords(drop=True)
        n_real = empty.size // (real.size or 1) * int(real.sum())
        return int((empty & real).sum()), n_real
    return int(empty.sum()), empty.size


def largest(
    ds: xr.Dataset,
    site: str,
    metric: str | None = None,
    n: int = 10,
    *,
    pair: int | None = None,
    placebo: xr.Dataset | None = None,
) -> Effects:
    """Return the `n` cells of `site` with the largest nonzero |effect|, largest first.

    If the run has a noise floor (`patchsweep.results.rounding`), cells below it are left out
    too, so there may be fewer than `n`. `metric` defaults to the first; `pair=None` ranks the
    mean over pairs, whose `recovered` is the ratio of means. Means of exact effects have a `q`, the
    sign-flip p-value adjusted for all cells of the site (`q_value`).
    With a `placebo`, means below its `control_level` are left
    out as well.

    Raises:
        SiteError, MetricError, PlanError: `site`, `metric` or `pair` is not in the Dataset, `n` is
            below 1, or a placebo is given for one pair.
    """
    whole_number("n", n, least=1)
    name = metric_name(ds, metric)
    control = control_of(placebo, site, name, pair)
    one = chosen(ds, name, pair)
    effects = effect_mean(one, site).squeeze("metric", drop=True)
    if "intervention" in effects.dims:
        raise PlanError(
            "ds holds several interventions; choose one, such as "
            f"ds.sel(intervention={str(ds['intervention'].values[0])!r})"
        )
    arrays = value(one, site).mean("pair"), recovered_mean(one, site), n_pairs(one, site)
    values, fractions, behind = (array.values.ravel() for array in arrays)
    unit = unit_dim(effects)
    tokens = shared_tokens(ds, pair)
    floor = noise_floor(one, site)
    noise = None if floor is None else floor_of_mean(effect(one, site), floor).values.ravel()
    errors = None
    if site + ERROR in one:  # of the mean: at most the mean of the errors
        mean = one[site + ERROR].mean("pair", skipna=True).squeeze("metric", drop=True)
        errors = mean.transpose(*effects.dims).values.ravel()

    q = None
    if one.sizes["pair"] > 1 and site not in estimates(ds):
        of_pairs = _pairs_first(effect(one, site).squeeze("metric", drop=True))
        q = tested_q(sign_flip(of_pairs), (np.nan_to_num(of_pairs) == 0).all(axis=0))
    sizes = np.abs(effects.values).ravel()
    order = np.argsort(-np.nan_to_num(sizes, nan=-1.0), kind="stable")
    order = order[sizes[order] > (0 if noise is None else noise[order])]
    order = order[sizes[order] > (control or 0)]
    top = Effects()
    for cell in order[:n]:
        at, token = place_of(effects, cell, tokens)
        top.append(
            Effect(
                site=site,
                pair=pair,
                layer=at.get("layer"),
                pos=at.get("pos"),
                token=token,
                head=at[unit] if unit else None,
                value=float(values[cell]),
                effect=float(effects.values.ravel()[cell]),
                recovered=float(fractions[cell]),
                noise=None if noise is None else float(noise[cell]),
                error=None if errors is None else float(errors[cell]),
                q=None if q is None else float(q[cell]),
                control=control,
                n_pairs=int(behind[cell]),
            )
        )
    return top


def place_of(
    array: xr.DataArray, cell: int, tokens: Sequence[str | None]
) -> tuple[dict[str, int | str], str | None]:
    """Return the coordinates of flat index `cell`, by dim, and the token at its position.

    The token is None where it is not known, and without positions.
    """
    index = dict(zip(map(str, array.dims), np.unravel_index(cell, array.shape), strict=True))
    labels = {dim: array[dim].values[i] for dim, i in index.items()}
    pos = int(index["pos"]) if "pos" in index else len(tokens)
    plain = {d: int(x) if isinstance(x, np.integer) else str(x) for d, x in labels.items()}
    return plain, (tokens[pos] or None) if pos < len(tokens) else None


def chosen(ds: xr.Dataset, metric: str, pair: int | None) -> xr.Dataset:
    """Return `ds` with one metric, and one pair if `pair` is not None; both keep their dim.

    Raises:
        PlanError: there is no such pair.
    """
    if pair is not None and pair not in ds["pair"].values:
        raise PlanError(f"pair={pair} is not in the store; it has {ds['pair'].values.tolist()}")
    one = ds.sel(metric=[metric])
    return one if pair is None else one.sel(pair=[pair])


def control_of(
    placebo: xr.Dataset | None, site: str, metric: str, pair: int | None
) -> float | None:
    """Return the control level of a placebo, which holds for means over pairs; None: there is none.

    Raises:
        PlanError: `pair` is one pair.
    """
    if placebo is None:
        return None
    if pair is not None:
        raise PlanError("a placebo gives a level for means over pairs; leave pair out")
    return float(control_level(placebo.sel(metric=[metric_name(placebo, metric)]), site).item())


def _cell_variables(ds: xr.Dataset) -> list[str]:
    """Return the data variables with one number per patch and no other axes."""
    if not isinstance(ds, xr.Dataset):
        raise StoreError(f"ds={ds!r} must be a Dataset; give what sweep or open_store returns")
    return [
        str(name)
        for name, array in ds.data_vars.items()
        if {"metric", "pair"} <= set(array.dims) <= _CELL_DIMS and _holds_cells(str(name), array)
    ]


def _holds_cells(name: str, array: xr.DataArray) -> bool:
    if "role" in array.attrs:
        return array.attrs["role"] in ("exact", "estimate")
    # a [metric, pair] variable is a baseline, unless it is named like a site (one patch)
    return not name.endswith((BF16, NOISE)) and (array.ndim > 2 or name in SITE_WORDS)


def _variable(ds: xr.Dataset, site: str) -> xr.DataArray:
    known = _cell_variables(ds)
    if site not in known:
        raise SiteError(f"site={site!r} is not in the store; it has {', '.join(known) or 'none'}")
    unit = unit_dim(ds[site])
    dims = ["metric", "pair", "intervention", "layer", "pos", *([unit] if unit else [])]
    return ds[site].transpose(*dims, missing_dims="ignore")


def _metric_array(ds: xr.Dataset, name: str) -> xr.DataArray:
    if name not in ds.variables:
        raise StoreError(f"the Dataset has no {name!r}; open a store written by a patchsweep run")
    return ds[name].transpose("metric", "pair")


def metric_name(ds: xr.Dataset, metric: str | None) -> str:
    """Return `metric`, or the first of `ds`.

    Raises:
        MetricError: it is not in the Dataset.
    """
    known = [str(m) for m in ds["metric"].values]
    if metric is None:
        return known[0]
    if metric not in known:
        raise MetricError(f"metric={metric!r} is not in the store; it has {', '.join(known)}")
    return metric


def _pairs_first(effects: xr.DataArray) -> np.ndarray:
    """Return `effects` as [pair, cell], contiguous float64."""
    values = effects.transpose("pair", ...).values
    return np.ascontiguousarray(values.reshape(values.shape[0], -1), dtype=np.float64)


def _per_cell(values: np.ndarray, effects: xr.DataArray) -> xr.DataArray:
    """Return `values` [cell] with the dims of `effects` without pair."""
    template = effects.isel(pair=0, drop=True)
    return template.copy(data=values.reshape(template.shape))
