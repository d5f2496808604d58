"""`patchsweep lens`: stores the predictions after each layer, also of a patched run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.logit_lens import describe, lens, sublayers
from patchsweep.analyses.logit_lens import findings as lens_findings
from patchsweep.analyses.logit_lens.patches import Patch, Sublayer
from patchsweep.analyses.stages import Stages
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.console import table_of
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.show import number, rank
from patchsweep.errors import ConfigError
from patchsweep.store.attributes import attributes
from patchsweep.store.difference import IDENTITY
from patchsweep.sweeps.identity import sealed

N_SHOWN = 10


@dataclass
class PatchConfig:
    """A patch of the run that the lens reads, with values of `intervention`."""

    site: str | None = None  # such as z or mlp_out; null: no patch
    layer: Any = None  # a layer, or a list of layers that are patched together
    pos: Any = "all"  # a position, a label of the pairs, or all
    head: Any = None  # a head, key head or neuron, or a list of them; null: all


@dataclass
class LensRun(AnalysisRun):
    """One lens: a grid of predictions, optionally of a patched run and with sublayers' effects."""

    uses: ClassVar = ("runner", "intervention", "direction")
    subject: ClassVar = "a lens has"

    which: str | None = None  # clean, corrupted, base or source
    remove: str | None = None  # such as mlp:19 or attn:23; null: nothing
    patch: PatchConfig = field(default_factory=PatchConfig)
    top: int = 5  # most probable tokens kept at each place
    sublayers: bool = True  # what the prediction is without each sublayer

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"top={self.top} must be at least 1; 5 is usual")
        if self.remove is not None and not re.fullmatch(r"(attn|mlp):\d+", self.remove):
            raise ConfigError(f"remove={self.remove!r} is no sublayer; write mlp:19 or attn:23")
        if self.patch.site is None and self.patch != PatchConfig():
            raise ConfigError("patch needs a site; give patch.site=z, or leave the patch out")

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `lens` other than model, pairs and config, and `removals`.

        `removals`: the arguments of `sublayers`; None: sublayers are not removed.
        """
        removed: Sublayer | None = None
        if self.remove is not None:
            kind, _, layer = self.remove.partition(":")
            removed = cast(Sublayer, (kind, int(layer)))
        patches = []
        if self.patch.site is not None:
            patches = [Patch(**asdict(self.patch), intervention=self.intervention)]
        runner = {"runner": self.runner.name, "max_tokens": self.runner.max_tokens}
        return {
            "which": self.which,
            "direction": self.direction,
            "remove": removed,
            "patch": patches,
            "top": self.top,
            "removals": runner if self.sublayers else None,
        }


def _lens(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    removals: Mapping[str, Any] | None,
    stages: Stages,
    **settings: Any,
) -> xr.Dataset:
    """Return the lens, with `removals` (arguments of `sublayers`) also what each sublayer does."""

    def described() -> dict[str, Any]:
        attrs = {**describe(model, pairs, **settings), "sublayers": removals is not None}
        if removals is not None:  # a separate sweep, which the lens's identity does not cover
            attrs[IDENTITY] = sealed({**attrs[IDENTITY], "sublayers": dict(removals)})
        return attrs

    def compute() -> xr.Dataset:
        ds = lens(model, pairs, **settings, stages=stages)
        if removals is not None:
            removed = sublayers(model, pairs, which=ds.attrs["prompt"], **removals, stages=stages)
            ds = ds.merge(removed, compat="no_conflicts", combine_attrs="override")
            used = attributes(removed)["provenance"]
            ds.attrs |= {key: used[key] for key in ("runner", "runner_reason")}
        return ds

    return stages.results(model, described, compute)


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    for line in _ends(ds):
        console.print(line)
    console.print(_layers(ds))
    if "without" in ds:
        console.print(_removals(ds))


def _ends(ds: xr.Dataset) -> list[str]:
    """Return a line per run with the answer's final probability and rank."""
    pairs = [int(pair) for pair in ds["pair"].values]
    lines = []
    for run in (str(run) for run in ds["run"].values):
        ends = [lens_findings.at_answer(ds, "answer_prob", run, pair)[-1] for pair in pairs]
        up = [lens_findings.comes_up(ds, run, pair) for pair in pairs]
        name = f"{run}, {ds.attrs['prompt']} prompt"
        if len(pairs) == 1:
            rank = int(lens_findings.at_answer(ds, "answer_rank", run, pairs[0])[-1])
            where = f"the first guess from {up[0].words} on" if up[0] else f"rank {rank}"
            answer = str(ds["answer"].values[0])
            lines.append(f"{name}: {answer!r} ends at probability {number(ends[0])}, {where}")
        else:
            n_first = sum(place is not None for place in up)
            lines.append(
                f"{name}: the answer ends at a mean probability of {number(np.mean(ends))}, the "
                f"first guess in {n_first} of {len(pairs)} pairs"
            )
    return lines


def _layers(ds: xr.Dataset) -> Table:
    """Return a table of the last layers' predictions at the answer's position."""
    pairs, runs = [int(p) for p in ds["pair"].values], [str(r) for r in ds["run"].values]
    over = "" if len(pairs) == 1 else f", mean probability and median rank of {len(pairs)} pairs"
    columns = texts = ["after"]
    for run in runs:
        guess = [f"first guess, {run}"] if len(pairs) == 1 else []
        columns, texts = [*columns, *guess, "P(answer)", "rank"], [*texts, *guess]
    table = table_of(columns, f"what the last layers would say{over}", texts)
    places = lens_findings.places(ds)
    values = {
        (run, name): np.stack([lens_findings.at_answer(ds, name, run, pair) for pair in pairs])
        for run in runs
        for name in ("top_token", "top_prob", "answer_prob", "answer_rank")
    }
    for i in range(max(0, len(places) - N_SHOWN), len(places)):
        cells = []
        for run in runs:
            if len(pairs) == 1:
                token, prob = (values[run, name][0, i, 0] for name in ("top_token", "top_prob"))
                cells.append(f"{str(token)!r} {number(prob)}")
            cells.append(number(values[run, "answer_prob"][:, i].mean()))
            cells.append(rank(np.median(values[run, "answer_rank"][:, i])))
        table.add_row(places[i].words, *cells)
    return table


def _removals(ds: xr.Dataset) -> Table:
    """Return a table of the sublayers whose removal lowers the answer most."""
    unpatched = ds["whole"].mean("pair")
    prob, mean_rank = (float(unpatched.sel(metric=m)) for m in ("prob", "rank"))
    over = "" if ds.sizes["pair"] == 1 else f", means of {ds.sizes['pair']} pairs"
    title = f"without one sublayer (whole: P(answer) {number(prob)}, rank {rank(mean_rank)}){over}"
    columns = ("without", "P(answer)", "rank", "change of log P", "of logit_diff")
    table = table_of(columns, title, columns[:1])
    for removal in lens_findings.removals(ds)[:N_SHOWN]:
        table.add_row(
            removal.words,
            number(removal.values["prob"]),
            rank(removal.values["rank"]),
            number(removal.changes["log_prob"], sign=True),
            number(removal.changes["logit_diff"], sign=True),
        )
    return table


main = AnalysisVerb("lens", LensRun, _lens, _show)
