"""Classes of heads, from what was measured of them; every threshold is in `Thresholds`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.analyses.heads.behaviour import METRIC, Behaviour
from patchsweep.analyses.heads.optimal import Head
from patchsweep.analyses.heads.scores import DETECTED
from patchsweep.arguments import number, whole_number
from patchsweep.errors import ConfigError
from patchsweep.store.attributes import flat_attributes

Mask = NDArray[np.bool_]  # [layer, head]
# classes that need a task with names, in the order in which they are found
ON_TASK = ("name_mover", "negative", "s_inhibition", "backup")
OTHER = "other"
CLASSES = (*DETECTED, *ON_TASK, OTHER)


@dataclass  # Hydra fills it, which a frozen one does not allow
class Thresholds:
    """From where on a head counts as one of a class; a head may be of several."""

    induction: float = 0.3  # detect_head's score on repeated words, half of which can have it
    previous_token: float = 0.4  # likewise, of all words
    duplicate_token: float = 0.15  # likewise; half of the words can have it
    attention: float = 0.1  # of what `end` attends to: IO (movers) or S2 (S-inhibition)
    direct: float = 0.02  # direct effect on the logits, as a share of the gap
    queries: float = 0.02  # effect through the name movers' queries, as a share of the gap
    rise: float = 0.02  # by how much the direct effect of a backup rises, as a share of the gap
    movers: int = 8  # name movers, the strongest, whose queries are patched and that are held

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = f"thresholds.{field.name}", getattr(self, field.name)
            number(name, value, above=0, error=ConfigError)
        whole_number("thresholds.movers", self.movers, error=ConfigError)


def detected_classes(scores: xr.DataArray, thresholds: Thresholds) -> dict[str, Mask]:
    """Heads by how they attend on repeated words; `scores` [pattern, layer, head]."""
    return {
        name: scores.sel(pattern=name).transpose("layer", "head").values
        >= getattr(thresholds, name)
        for name in DETECTED
    }


def task_classes(
    behaviour: Behaviour, thresholds: Thresholds
) -> tuple[dict[str, Mask], xr.Dataset]:
    """Heads by what they do on a task with names, and the measurements that say so.

    Means over pairs are compared with the thresholds. With the gap = clean minus corrupted logit
    difference, a share of an effect is effect / |gap|:

    - name_mover: `end` attends to IO, and the direct path to the logits gives a share upwards;
    - negative: the same attention, and the direct path takes a share away;
    - s_inhibition: `end` attends to S2, and the queries of later name movers give a share, more
      than the direct path gives or takes;
    - backup: it gives no mover's share directly until the name movers are held at their means;
      then it does, and more than before by `rise`.

    Variables: `attention` [place, pair, layer, head], a share; `direct`,
    `direct_without_movers` and `through_queries` [pair, layer, head], logits, NaN where not
    measured.
    """
    attention = behaviour.attention()
    direct, metric = behaviour.direct()
    gap = float(np.mean(metric[0] - metric[1]))
    to_io, to_s2 = attention.mean(axis=1)
    share = direct.mean(axis=0) / abs(gap)
    looks = to_io >= thresholds.attention
    mover, negative = looks & (share >= thresholds.direct), looks & (share <= -thresholds.direct)
    strongest = _strongest(share, mover, thresholds.movers)

    suspects = to_s2 >= thresholds.attention
    through = behaviour.through_queries(_heads(suspects), strongest)
    queried = np.nan_to_num(through.mean(axis=0)) / abs(gap)
    inhibition = suspects & (queried >= thresholds.queries) & (queried > np.abs(share))

    held = np.full_like(direct, np.nan)
    backup = np.zeros_like(mover)
    if strongest:
        held, _ = behaviour.direct(without=strongest)
        after = held.mean(axis=0) / abs(gap)
        backup = (share < thresholds.direct) & (after >= thresholds.direct)
        backup &= after - share >= thresholds.rise
    dims = ("pair", "layer", "head")
    measured = xr.Dataset(
        {
            "attention": (("place", *dims), attention, {"long_name": "attention from end"}),
            "direct": (dims, direct, {"long_name": "direct effect on the logit difference"}),
            "direct_without_movers": (dims, held),
            "through_queries": (dims, through),
        },
        attrs=flat_attributes(
            {
                "gap": gap,
                "task_metric": METRIC,
                "movers": [f"a{layer}.h{head}" for layer, head in strongest],
            }
        ),
    )
    masks = (mover, negative, inhibition, backup)
    return dict(zip(ON_TASK, masks, strict=True)), measured


def member_table(masks: dict[str, Mask]) -> xr.DataArray:
    """[head_class, layer, head] whether a head is of a class; `other`: of none."""
    names = [name for name in CLASSES if name in masks or name == OTHER]
    other = ~np.any(list(masks.values()), axis=0)
    table = np.stack([masks.get(name, other) for name in names])
    return xr.DataArray(
        table,
        dims=("head_class", "layer", "head"),
        coords={"head_class": np.array(names, dtype=object)},
    )


def _heads(mask: Mask) -> list[Head]:
    return [(int(layer), int(head)) for layer, head in np.argwhere(mask)]


def _strongest(share: NDArray[np.floating], mask: Mask, n: int) -> list[Head]:
    """The `n` heads of `mask` with the largest share."""
    return sorted(_heads(mask), key=lambda at: -share[at])[:n]
