"""Findings of a lens: the place from which the answer is first, and the effects of sublayers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

MEASURES = ("log_prob", "logit_diff", "prob", "rank")


@dataclass(frozen=True)
class Place:
    """A place of the residual stream: a layer and a point in it."""

    layer: int
    point: str  # resid_pre (only of the first layer), resid_mid or resid_post

    @property
    def words(self) -> str:
        if self.point == "resid_pre":
            return "the embedding"
        part = "attention" if self.point == "resid_mid" else "MLP"
        return f"layer {self.layer}'s {part}"

    @property
    def depth(self) -> float:
        """Blocks passed: 0 after the embedding, 0.5 after the first attention."""
        return self.layer + {"resid_pre": 0.0, "resid_mid": 0.5, "resid_post": 1.0}[self.point]


@dataclass(frozen=True)
class Removal:
    """The prediction without one sublayer, as means over pairs."""

    sublayer: str  # attn or mlp
    layer: int
    values: dict[str, float]  # per measure of `MEASURES`
    changes: dict[str, float]  # value minus that of the full run

    @property
    def words(self) -> str:
        return f"{'MLP' if self.sublayer == 'mlp' else 'attention'} of layer {self.layer}"


def places(ds: xr.Dataset) -> list[Place]:
    """Return every place once, in forward order, without points that the model does not have."""
    layers = [int(layer) for layer in ds["layer"].values]
    result = [Place(layers[0], "resid_pre")]
    for layer in layers:
        for point in ("resid_mid", "resid_post"):
            if bool(ds["top_prob"].sel(layer=layer, point=point).notnull().any()):
                result.append(Place(layer, point))
    return result


def at_answer(ds: xr.Dataset, name: str, run: str, pair: int) -> np.ndarray:
    """Return `name` at the answer's position, `[place(, top)]`, for the places of `places`."""
    pos = int(ds["answer_pos"].sel(pair=pair))
    one = ds[name].sel(run=run, pair=pair, pos=pos)
    return np.stack([one.sel(layer=p.layer, point=p.point).values for p in places(ds)])


def comes_up(ds: xr.Dataset, run: str, pair: int) -> Place | None:
    """Return the place from which on the answer stays first; None if it is not first at the end."""
    first = at_answer(ds, "answer_rank", run, pair) == 0
    if not first[-1]:
        return None
    behind = np.flatnonzero(~first)
    return places(ds)[int(behind[-1]) + 1 if len(behind) else 0]


def removals(ds: xr.Dataset) -> list[Removal]:
    """Return every sublayer, sorted by the change of the answer's log-probability, lowest first."""
    without, unpatched = (ds[name].mean("pair") for name in ("without", "whole"))
    result = []
    for kind in (str(kind) for kind in ds["sublayer"].values):
        for layer in (int(layer) for layer in ds["layer"].values):
            one = without.sel(sublayer=kind, layer=layer)
            values = {m: float(one.sel(metric=m)) for m in MEASURES}
            changes = {m: values[m] - float(unpatched.sel(metric=m)) for m in MEASURES}
            result.append(Removal(kind, layer, values, changes))
    return sorted(result, key=lambda r: r.changes["log_prob"])
