"""Pages of one cell of a map: its lens, its attention and its edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.attention import attention
from patchsweep.analyses.circuits import edges, exact_edges
from patchsweep.analyses.logit_lens import lens
from patchsweep.analyses.stages import Stages
from patchsweep.arguments import is_whole, one_of
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.explorer.question import CHOICES, Question
from patchsweep.report import page_of as report_of
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import model_shape
from patchsweep.sweeps.patches import Patch

N_EDGES = 30  # edges of a component that run exactly


@dataclass(frozen=True)
class Place:
    """The patch that a cell of a map shows.

    Raises:
        ConfigError: a number is missing or is none.
    """

    site: str
    layer: int
    pos: int | None = None  # None: all positions
    unit: int | None = None  # head or key head

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Place:
        """Return the place that the page's query names."""
        one_of("site", given.get("site"), CHOICES)
        numbers: dict[str, int | None] = {}
        for name in ("layer", "pos", "unit"):
            text = given.get(name)
            if text is not None and not text.removeprefix("-").isdecimal():
                raise ConfigError(f"{name}={text!r} must be a whole number")
            numbers[name] = None if text is None else int(text)
        if not is_whole(numbers["layer"]):
            raise ConfigError("a cell needs its layer")
        return cls(given["site"], **numbers)  # type: ignore[arg-type]


def page_of(
    model: TransformerBridge, pairs: PromptPairs, question: Question, kind: str, place: Place
) -> str:
    """Return the page of `place`: `lens`, `attention` or `edges`.

    Raises:
        PatchsweepError: the model has no such place, or the analysis does not fit it.
    """
    one_of("kind", kind, tuple(_PAGES))
    shape = model_shape(model)
    if not 0 <= place.layer < shape.n_layers:
        raise ConfigError(f"layer={place.layer} is not known; use 0..{shape.n_layers - 1}")
    return report_of(_PAGES[kind](model, pairs, question, place), kind)


def _lens(model: TransformerBridge, pairs: PromptPairs, question: Question, place: Place) -> Any:
    """Return the lens of the base run and of the run with the cell's patch."""
    patch = Patch(
        place.site,
        place.layer,
        pos="all" if place.pos is None else place.pos,
        head=place.unit,
        intervention=question.intervention,
    )
    direction: Any = question.direction
    return lens(model, pairs, direction=direction, patch=patch, stages=_quiet())


def _attention(
    model: TransformerBridge, pairs: PromptPairs, question: Question, place: Place
) -> Any:
    """Return the patterns of the cell's head, or of all heads of its layer."""
    heads = [(place.layer, head) for head in _heads(model, place)]
    direction: Any = question.direction
    return attention(
        model, pairs, question.metric, direction=direction, heads=heads, stages=_quiet()
    )


def _edges(model: TransformerBridge, pairs: PromptPairs, question: Question, place: Place) -> Any:
    """Return the foremost edges of the cell's component, run exactly.

    Of a head or a sublayer: those from it and to it. Of the residual stream: those that pass
    there, written before and read after.
    """
    settings = question.settings()
    del settings["tolerance"]  # the foremost run exactly
    scores = edges(model, pairs, **settings, stages=_quiet())
    of_place = _edge_test(model, place)
    senders, readers = ([str(x) for x in scores[end].values] for end in ("sender", "reader"))
    mine = np.array([[of_place(sender, reader) for reader in readers] for sender in senders])
    values = scores["edge_eap"].values[0, 0]
    size = np.where(mine & np.isfinite(values), np.abs(values), -1.0)
    order = np.argsort(-size, axis=None, kind="stable")[:N_EDGES]
    at = [divmod(int(i), len(readers)) for i in order if size.flat[i] >= 0]
    if not at:
        raise ConfigError(f"no edge leads to or from layer {place.layer} there; choose a later one")
    chosen = [(senders[i], readers[j]) for i, j in at]
    ran = exact_edges(model, pairs, chosen, **settings, stages=_quiet())
    rows, columns = zip(*at, strict=True)
    estimate = scores["edge_eap"].values[:, :, list(rows), list(columns)]
    return ran.assign(edge_estimate=(("metric", "pair", "chosen"), estimate))


def _edge_test(model: TransformerBridge, place: Place) -> Callable[[str, str], bool]:
    """Return whether an edge (sender, reader) belongs to the cell's component."""
    layer, heads = place.layer, _heads(model, place)
    if place.site.startswith("resid"):
        # resid_mid lies after the layer's attention, resid_post after its MLP
        border = (layer, {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}[place.site])
        return lambda sender, reader: _order(sender) < border <= _order(reader)
    if place.site == "mlp_out":
        return lambda sender, reader: f"m{layer}" in (sender, reader)
    out = {f"a{layer}.h{head}" for head in heads}
    group = _group(model)
    into = {f"a{layer}.h{head}.q" for head in heads}
    into |= {f"a{layer}.h{head // group}.{kind}" for head in heads for kind in "kv"}
    side = SITES[place.site].side
    if side is not None:  # q, k or v: what they read
        return lambda sender, reader: reader in into and reader.endswith(f".{side[0]}")
    return lambda sender, reader: sender in out or reader in into


def _order(name: str) -> tuple[int, int]:
    """Return the place of a component in the model: (layer, 0 for attention or 1 for the MLP)."""
    if name in ("embed", "logits"):
        return (-1, 0) if name == "embed" else (1 << 30, 0)
    layer = int(name[1:].partition(".")[0])
    return layer, int(name[0] == "m")


def _heads(model: TransformerBridge, place: Place) -> list[int]:
    """Return the query heads that belong to the cell: one, a key head's group, or the layer's."""
    if place.unit is None:
        return list(range(model_shape(model).n_heads))
    if SITES[place.site].unit == "head":
        return [place.unit]
    group = _group(model)
    return list(range(place.unit * group, (place.unit + 1) * group))


def _group(model: TransformerBridge) -> int:
    """Return the number of query heads per key head."""
    shape = model_shape(model)
    return shape.n_heads // shape.n_kv_heads


def _quiet() -> Stages:
    return Stages(progress=False)


_PAGES: dict[str, Callable[[TransformerBridge, PromptPairs, Question, Place], Any]] = {
    "lens": _lens,
    "attention": _attention,
    "edges": _edges,
}
