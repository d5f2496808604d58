"""`patchsweep attention`: stores patterns and attributions of the top-k heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.attention import attention, ranked_heads
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.console import table_of
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.data.show import number
from patchsweep.errors import ConfigError

N_SHOWN = 5  # number of next tokens to print


@dataclass
class AttentionRun(AnalysisRun):
    """Config of a ranking of heads, and of the patterns of the top-k heads."""

    uses: ClassVar = ("metric", "direction")
    subject: ClassVar = "attention views have"

    top: int = 16  # foremost heads whose patterns are kept
    heads: Any = None  # [layer, head] pairs to keep instead
    predictions: int = 10  # most probable next tokens kept of each run

    def __post_init__(self) -> None:
        for name, usual in (("top", 16), ("predictions", 10)):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)} must be at least 1; {usual} is usual"
                )
        self.chosen()

    def chosen(self) -> list[tuple[int, int] | str] | None:
        """Return the heads of the config, (layer, head) or `a23.h3`; None: the top-k heads.

        Raises:
            ConfigError: `heads` is not a list of pairs of whole numbers.
        """
        if self.heads is None:
            return None
        try:
            return [self._head(entry) for entry in self.heads]
        except (TypeError, ValueError):
            raise ConfigError(
                f"heads={self.heads} must be pairs of layer and head or names, such as "
                "[[24,4],[17,4]] or [a24.h4], or whole layers, such as [a24]"
            ) from None

    @staticmethod
    def _head(entry: Any) -> tuple[int, int] | str:
        if isinstance(entry, str):
            return entry
        layer, head = entry
        return int(layer), int(head)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "heads": self.chosen()}


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    for run in ("base", "source"):
        console.print(_guess(ds, run))
    console.print(_table(ds))


def _guess(ds: xr.Dataset, run: str) -> str:
    """Return a line with the first pair's most probable next tokens."""
    first_pair = ds.sel(run=run).isel(pair=0, top=slice(N_SHOWN))
    guesses = ", ".join(
        f"{str(token)!r} {number(float(prob))}"
        for token, prob in zip(
            first_pair["top_token"].values, first_pair["top_prob"].values, strict=True
        )
    )
    return f"{run} run of pair 0 goes on: {guesses}"


def _table(ds: xr.Dataset) -> Table:
    """Return a table of the heads with the largest cell of each in the first pair."""
    metric, unit = (str(ds[name].values[0]) for name in ("metric", "metric_unit"))
    n_pairs = ds.sizes["pair"]
    over = "" if n_pairs == 1 else f", mean of {n_pairs} pairs; cells of the first"
    texts = ("head", "which is", "probability")
    numbers = ("attribution", "exact", "sum of |cells|", "largest cell")
    title = f"attention attribution to {metric}, {unit}{over}"
    table = table_of((texts[0], *numbers, *texts[1:]), title, texts)
    tokens = ds["token"].sel(run="base").isel(pair=0).values
    for head in ranked_heads(ds):
        table.add_row(
            f"a{head.layer}.h{head.head}",
            number(head.attribution, sign=True),
            number(head.exact, sign=True),
            number(head.size),
            number(head.cell, sign=True),
            f"{tokens[head.dest]!r} {head.dest} looks at {tokens[head.src]!r} {head.src}",
            f"{number(head.base)} to {number(head.source)}",
        )
    return table


main = AnalysisVerb("attention", AttentionRun, attention, _show)
