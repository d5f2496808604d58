"""Classes of heads by measured behaviour; `Thresholds` holds all thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.analyses.heads.behaviour import METRIC, Behaviour
from patchsweep.analyses.heads.optimal import Head
from patchsweep.analyses.heads.scores import DETECTED
from patchsweep.arguments import head_places, number, whole_number
from patchsweep.errors import ConfigError
from patchsweep.spec.plan import ModelShape
from patchsweep.store.attributes import flat_attributes

Mask = NDArray[np.bool_]  # [layer, head]
# classes that need a task with names, in the order of their measurement
ON_TASK = ("name_mover", "negative", "s_inhibition", "backup")
OTHER = "other"
CLASSES = (*DETECTED, *ON_TASK, OTHER)


@dataclass  # Hydra fills it, which a frozen one does not allow
class Thresholds:
    """Minimal scores for membership in a class; a head may belong to several classes."""

    induction: float = 0.3  # detect_head's score on repeated words; only half of them can score
    previous_token: float = 0.4  # likewise; all words can score
    duplicate_token: float = 0.15  # likewise; half of the words can score
    attention: float = 0.1  # attention from `end` to IO (movers) or S2 (S-inhibition)
    direct: float = 0.02  # direct effect on the logits, as a share of the gap
    queries: float = 0.02  # effect through the name movers' queries, as a share of the gap
    rise: float = 0.02  # rise of a backup's direct effect, as a share of the gap
    movers: int = 8  # number of strongest name movers to patch at queries and to hold at means

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = f"thresholds.{field.name}", getattr(self, field.name)
            number(name, value, above=0, error=ConfigError)
        whole_number("thresholds.movers", self.movers, error=ConfigError)


def detected_classes(scores: xr.DataArray, thresholds: Thresholds) -> dict[str, Mask]:
    """Return the classes by attention on repeated words; `scores` is [pattern, layer, head]."""
    return {
        name: scores.sel(pattern=name).transpose("layer", "head").values
        >= getattr(thresholds, name)
        for name in DETECTED
    }


def task_classes(
    behaviour: Behaviour, thresholds: Thresholds
) -> tuple[dict[str, Mask], xr.Dataset]:
    """Return the classes by behaviour on a task with names, and the measurements.

    The thresholds apply to means over pairs. The gap is the clean minus the corrupted logit
    difference; the share of an effect is effect / |gap|. Attention is from `end`:

    - name_mover: attends to IO, and its direct share is at least `direct`;
    - negative: attends to IO, and its direct share is at most -`direct`;
    - s_inhibition: attends to S2, and its share through the queries of later name movers is at
      least `queries` and larger than its |direct share|;
    - backup: its direct share is below `direct`, and reaches `direct` and rises by `rise` when
      the name movers are held at their means.

    Variables: `attention` [place, pair, layer, head], a probability; `direct`,
    `direct_without_movers` and `through_queries` [pair, layer, head], logits, NaN where not
    measured.
    """
    attention = behaviour.attention()
    direct, metric = behaviour.direct()
    gap = float(np.mean(metric[0] - metric[1]))
    to_io, to_s2 = attention.mean(axis=1)
    share = direct.mean(axis=0) / abs(gap)
    attends_to_io = to_io >= thresholds.attention
    mover, negative = (
        attends_to_io & (share >= thresholds.direct),
        attends_to_io & (share <= -thresholds.direct),
    )
    strongest = _strongest(share, mover, thresholds.movers)

    attends_to_s2 = to_s2 >= thresholds.attention
    through = behaviour.through_queries(_heads(attends_to_s2), strongest)
    queried = np.nan_to_num(through.mean(axis=0)) / abs(gap)
    inhibition = attends_to_s2 & (queried >= thresholds.queries) & (queried > np.abs(share))

    held = np.full_like(direct, np.nan)
    backup = np.zeros_like(mover)
    if strongest:
        held, _ = behaviour.direct(without=strongest)
        held_share = held.mean(axis=0) / abs(gap)
        backup = (share < thresholds.direct) & (held_share >= thresholds.direct)
        backup &= held_share - share >= thresholds.rise
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


def own_classes(
    given: Mapping[str, Sequence[Any]] | None, shape: ModelShape
) -> dict[str, tuple[Head, ...]]:
    """Return a user's own classes, name -> heads.

    Raises:
        ConfigError: a name is that of a measured class, or no text.
        PlanError: an entry names no head of the model.
    """
    if not isinstance(given, Mapping | None):
        raise ConfigError(f"classes={given!r} must map names to heads, {{'mine': [(9, 9)]}}")
    found = {}
    for name, heads in (given or {}).items():
        if not isinstance(name, str) or not name.strip() or name in CLASSES:
            raise ConfigError(
                f"classes has {name!r}; give a name of your own, none of {', '.join(CLASSES)}"
            )
        places = [heads] if isinstance(heads, str) else list(heads)
        found[name] = head_places(places, shape.n_layers, shape.n_heads, f"classes[{name!r}]")
    return found


def own_masks(own: Mapping[str, Sequence[Head]], scores: xr.DataArray) -> dict[str, Mask]:
    """Return the masks of a user's own classes, of the size of `scores` [.., layer, head]."""
    masks = {}
    for name, heads in own.items():
        masks[name] = np.zeros((scores.sizes["layer"], scores.sizes["head"]), dtype=bool)
        for layer, head in heads:
            masks[name][layer, head] = True
    return masks


def member_table(masks: dict[str, Mask]) -> xr.DataArray:
    """Return membership [head_class, layer, head]; `other` holds heads without a class."""
    own = [name for name in masks if name not in CLASSES]
    names = [*(name for name in CLASSES[:-1] if name in masks), *own, OTHER]
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
    """Return the `n` heads of `mask` with the largest share."""
    return sorted(_heads(mask), key=lambda at: -share[at])[:n]
