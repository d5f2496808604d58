"""`patchsweep attention`: stores patterns and attributions of the top-k heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import xarray as xr
from omegaconf import DictConfig
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patchsweep.analyses.attention import attention, ranked_heads
from patchsweep.cli.analysis import refuse_unused, say_where, stored
from patchsweep.cli.app import as_config, compose
from patchsweep.cli.console import stdout
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.errors import ConfigError

N_SHOWN = 5  # number of next tokens to print


@dataclass
class AttentionRun(AnalysisRun):
    """Config of a ranking of heads, and of the patterns of the top-k heads."""

    # keys of a sweep that say nothing about attention views
    unused: ClassVar[tuple[str, ...]] = (
        "sites",
        "method",
        "intervention",
        "runner",
        "precision",
        "compute_dtype",
        "tolerance",
        "means_from",
    )

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
                "[[24,4],[17,4]] or [a24.h4]"
            ) from None

    @staticmethod
    def _head(entry: Any) -> tuple[int, int] | str:
        if isinstance(entry, str):
            return entry
        layer, head = entry
        return int(layer), int(head)


def main(arguments: list[str]) -> int:
    """Run the analysis with these overrides; return 0 when the results are in the store.

    Raises:
        ConfigError: an override sets a key that only sweeps use.
    """
    refuse_unused("attention", "attention views have", arguments, AttentionRun.unused)
    compose("attention", arguments, job, schema=AttentionRun)
    return 0


def job(cfg: DictConfig) -> None:
    """Run one config; Hydra calls this in this process or in a launcher's."""
    execute(cast(AttentionRun, as_config(cfg)))


def execute(config: AttentionRun) -> None:
    """Run the analysis and print its results; stored results are not computed again."""
    console = stdout()
    transformers_logging.disable_progress_bar()
    model = config.model.load()
    pairs = config.task.load(model)

    settings: dict[str, Any] = {
        "metrics": config.metric.metrics(),
        "direction": config.direction,
        "read": config.metric.read,
        "heads": config.chosen(),
        "top": config.top,
        "predictions": config.predictions,
        "config": config.identity(),
    }

    results = stored(
        console, config, lambda stages: attention(model, pairs, **settings, stages=stages)
    )
    if results is None:
        return
    ds, known = results
    for run in ("base", "source"):
        console.print(_guess(ds, run))
    console.print(_table(ds))
    say_where(console, config.store, known)


def _guess(ds: xr.Dataset, run: str) -> str:
    """Return a line with the first pair's most probable next tokens."""
    first_pair = ds.sel(run=run).isel(pair=0, top=slice(N_SHOWN))
    guesses = ", ".join(
        f"{str(token)!r} {float(prob):.3f}"
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
    table = Table(title=f"attention attribution to {metric}, {unit}{over}", title_justify="left")
    table.add_column("head")
    for name in ("attribution", "exact", "sum of |cells|", "largest cell"):
        table.add_column(name, justify="right")
    table.add_column("which is")
    table.add_column("probability")
    tokens = ds["token"].sel(run="base").isel(pair=0).values
    for head in ranked_heads(ds):
        table.add_row(
            f"a{head.layer}.h{head.head}",
            f"{head.attribution:+.3f}",
            f"{head.exact:+.3f}",
            f"{head.size:.3f}",
            f"{head.cell:+.3f}",
            f"{tokens[head.dest]!r} {head.dest} looks at {tokens[head.src]!r} {head.src}",
            f"{head.base:.3f} to {head.source:.3f}",
        )
    return table
