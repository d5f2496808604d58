"""What a lens found, in numbers: where the answer comes up, and which sublayers matter for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

MEASURES = ("log_prob", "logit_diff", "prob", "rank")


@dataclass(frozen=True)
class Place:
    """A place of the stream, in the order in which a token passes them."""

    layer: int
    point: str  # resid_pre (of the first layer alone), resid_mid or resid_post

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
    """What the prediction is without one sublayer, as means over pairs."""

    sublayer: str  # attn or mlp
    layer: int
    values: dict[str, float]  # of each of `MEASURES`
    changes: dict[str, float]  # against the whole run

    @property
    def words(self) -> str:
        return f"{'MLP' if self.sublayer == 'mlp' else 'attention'} of layer {self.layer}"


def places(ds: xr.Dataset) -> list[Place]:
    """Every place once, from the embedding up; without points that the model does not have."""
    layers = [int(layer) for layer in ds["layer"].values]
    found = [Place(layers[0], "resid_pre")]
    for layer in layers:
        for point in ("resid_mid", "resid_post"):
            if bool(ds["top_prob"].sel(layer=layer, point=point).notnull().any()):
                found.append(Place(layer, point))
    return found


def at_answer(ds: xr.Dataset, name: str, run: str, pair: int) -> np.ndarray:
    """`name` where the answer is expected `[place(, top)]`, for the places of `places`."""
    pos = int(ds["answer_pos"].sel(pair=pair))
    one = ds[name].sel(run=run, pair=pair, pos=pos)
    return np.stack([one.sel(layer=p.layer, point=p.point).values for p in places(ds)])


def comes_up(ds: xr.Dataset, run: str, pair: int) -> Place | None:
    """The place from which on the answer is the first guess, to the end; None: it is not at all."""
    first = at_answer(ds, "answer_rank", run, pair) == 0
    if not first[-1]:
        return None
    behind = np.flatnonzero(~first)
    return places(ds)[int(behind[-1]) + 1 if len(behind) else 0]


def removals(ds: xr.Dataset) -> list[Removal]:
    """Every sublayer, the one first whose removal costs the answer the most log-probability."""
    without, whole = (ds[name].mean("pair") for name in ("without", "whole"))
    found = []
    for kind in (str(kind) for kind in ds["sublayer"].values):
        for layer in (int(layer) for layer in ds["layer"].values):
            one = without.sel(sublayer=kind, layer=layer)
            values = {m: float(one.sel(metric=m)) for m in MEASURES}
            changes = {m: values[m] - float(whole.sel(metric=m)) for m in MEASURES}
            found.append(Removal(kind, layer, values, changes))
    return sorted(found, key=lambda r: r.changes["log_prob"])
