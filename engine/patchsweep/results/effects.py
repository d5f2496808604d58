"""`Effect`: one cell of a sweep with its numbers, and a list of them that a notebook shows."""

from __future__ import annotations

from dataclasses import dataclass, fields

from patchsweep.data.show import esc, number, table_html, token_html


@dataclass(frozen=True)
class Effect:
    """The effect of one patch on the metric, for one pair or averaged over pairs."""

    site: str  # variable of the Dataset, e.g. "z" or "z_atp"
    pair: int | None  # pair coordinate; None for the mean over pairs
    layer: int | str | None  # layer coordinate; None for the embedding
    pos: int | str | None  # position, or a span's name; None when a patch covered all positions
    token: str | None  # base token at `pos`; None where the pairs disagree
    head: int | str | None  # head, key head or neuron, "0+1" for two together; None without one
    value: float  # patched metric
    effect: float  # value - base metric
    recovered: float  # effect / (source metric - base metric); NaN where that gap is zero
    noise: float | None = None  # noise floor of the effect; None: not measured
    error: float | None = None  # error that an estimate states; None: it states none
    # adjusted for all cells of the site, see `accessor.q_value`; None: of one pair, or estimated
    q: float | None = None
    control: float | None = None  # control level of a placebo; None: none was given
    n_pairs: int = 1  # pairs behind a mean: those in which the cell has run


class Effects(list[Effect]):
    """A list of effects that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        always = ("site", "layer", "value", "effect", "recovered")
        optional = ("pos", "token", "head", "noise", "error", "q", "control")
        kept = {*always, *(f for f in optional if any(getattr(e, f) is not None for e in self))}
        kept |= {"n_pairs"} if any(e.pair is None for e in self) else set()
        names = [f.name for f in fields(Effect) if f.name in kept]
        rows = [[_shown(name, getattr(e, name)) for name in names] for e in self]
        return table_html([name.replace("n_pairs", "pairs") for name in names], rows)


def _shown(name: str, x: object) -> str:
    """Return a field of an effect as HTML."""
    if name == "token":
        return token_html(str(x)) if x else ""
    if isinstance(x, float):
        return number(x, sign=name == "effect")
    return "" if x is None else esc(x)
