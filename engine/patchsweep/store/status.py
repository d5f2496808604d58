"""Progress of a run: its shards, processes and rate; for people and for scripts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from patchsweep.errors import printable
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.process import is_gone
from patchsweep.store.contents import ROOT
from patchsweep.store.journal import FINISHED, INTERRUPTED, UNIT, WARNING, read_journal
from patchsweep.store.layout import PARTS
from patchsweep.store.lease import process_of, read_leases
from patchsweep.store.store import Store

EXIT_COMPLETE = 0  # all shards are done
EXIT_INCOMPLETE = 3  # shards are missing, running or stale

N_PROBLEMS = 20  # shown at most
SILENT_AFTER_S = 600.0  # a process without a journal entry or a lease for this long is lost


@dataclass(frozen=True)
class VariableStatus:
    """Numbers of shards of one variable; done, running, stale and missing add up to all."""

    name: str
    done: int
    running: int  # leased by a live process
    stale: int  # leased by a process that died or hangs; the next process takes them over
    missing: int  # not leased

    @property
    def total(self) -> int:
        return self.done + self.running + self.stale + self.missing


@dataclass(frozen=True)
class ProcessStatus:
    """One run of one process, from its journal."""

    name: str
    state: str  # "running", "finished", "interrupted" or "lost" (killed, or silent too long)
    slice: str  # such as "2 of 8"; "" if the run was not sliced
    units: int  # shards written
    token_layers: int
    seconds: float  # from its start to its last journal entry
    last_word: float  # unix time of its last journal entry


@dataclass(frozen=True)
class StoreStatus:
    """Progress of the run of one store."""

    url: str  # without credentials
    variables: tuple[VariableStatus, ...]
    missing_pairs: int  # pairs whose unpatched metrics are not written yet
    problems: tuple[str, ...]  # a line per damaged file
    processes: tuple[ProcessStatus, ...]  # in order of start
    warnings: tuple[str, ...]  # from the journals, each text once
    rate: float | None  # token-layers (or shards, see `rate_unit`) per second; None if unknown
    rate_unit: str  # "token-layers" if the store's plan and journals count them, else "units"
    eta_s: float | None  # seconds until completion at this rate; None if nothing runs

    @property
    def total(self) -> VariableStatus:
        """Sums over all variables."""
        sums = (sum(getattr(v, k) for v in self.variables) for k in _KINDS)
        return VariableStatus("all", *sums)

    @property
    def complete(self) -> bool:
        return self.total.done == self.total.total and not self.missing_pairs

    @property
    def exit_code(self) -> int:
        """`EXIT_COMPLETE` or `EXIT_INCOMPLETE`."""
        return EXIT_COMPLETE if self.complete else EXIT_INCOMPLETE


_KINDS = ("done", "running", "stale", "missing")


def store_status(
    url: str | Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    now: float | None = None,
) -> StoreStatus:
    """Return the progress of the store at `url`; reads only. `now`: unix time of this machine.

    Raises:
        StoreError: there is no store, or it cannot be read.
    """
    now = time.time() if now is None else now
    store = Store.open(url, storage_options=storage_options)
    survey = store.survey()
    pending = {unit.name for unit in survey.to_do}
    leases = read_leases(store.folder.beside(".leases"))
    variables = []
    for variable in store.variables.values():
        counts = Counter(
            "done"
            if unit.name not in pending
            else "missing"
            if (lease := leases.get(unit.name)) is None
            else "running"
            if lease.live
            else "stale"
            for unit in variable.units()
        )
        variables.append(VariableStatus(variable.name, *(counts[kind] for kind in _KINDS)))
    events = read_journal(url, storage_options=storage_options)
    working = {process_of(lease.owner) for lease in leases.values() if lease.live}
    processes = _processes(events, working, now)
    rate, unit, eta = _rate(store, variables, events, processes, now)
    warnings = dict.fromkeys(str(e.get("text", "")) for e in events if e["event"] == WARNING)
    return StoreStatus(
        url=store.folder.shown,
        variables=tuple(variables),
        missing_pairs=len(survey.pairs_to_do),
        problems=tuple(survey.problems),
        processes=processes,
        warnings=tuple(warnings),
        rate=rate,
        rate_unit=unit,
        eta_s=eta,
    )


def stages_of(url: str | Path) -> list[str]:
    """Return the addresses of the stages' stores of an unfinished analysis at `url`, in order."""
    parts = f"{url}".rstrip("/") + PARTS
    keys = [key.split("/") for key in open_folder(parts).list()]
    return [f"{parts}/{key[0]}" for key in keys if key[1:] == [ROOT]]


def render(status: StoreStatus) -> RenderableType:
    """Render the status as tables; names and texts are never parsed as markup."""
    units = Table(title=_text(status.url), title_justify="left")
    units.add_column("units of")
    for kind in (*_KINDS, "total"):
        units.add_column(kind, justify="right")
    for row in (*status.variables, status.total):
        counts = (getattr(row, kind) for kind in (*_KINDS, "total"))
        units.add_row(_text(row.name), *(Text(f"{count:,}") for count in counts))
    parts: list[RenderableType] = [units]
    if status.processes:
        parts.append(_process_table(status.processes))
    parts += [_text(f"warning: {warning}", "yellow") for warning in status.warnings]
    parts += [_text(f"damaged: {problem}", "red") for problem in status.problems[:N_PROBLEMS]]
    if (more := len(status.problems) - N_PROBLEMS) > 0:
        parts.append(_text(f"and {more:,} more are damaged", "red"))
    parts.append(_verdict(status))
    return Group(*parts)


def _process_table(processes: Sequence[ProcessStatus]) -> Table:
    table = Table(title="processes", title_justify="left")
    for column in ("process", "slice", "state"):
        table.add_column(column)
    for column in ("units", "token-layers", "seconds"):
        table.add_column(column, justify="right")
    colours = {"running": "green", "interrupted": "yellow", "lost": "red"}
    for process in processes:
        table.add_row(
            _text(process.name),
            _text(process.slice),
            _text(process.state, colours.get(process.state, "")),
            Text(f"{process.units:,}"),
            Text(f"{process.token_layers:,}"),
            Text(f"{process.seconds:,.1f}"),
        )
    return table


def _verdict(status: StoreStatus) -> Text:
    total = status.total
    if status.complete:
        return Text(
            "complete: all files are there, as long as they were (`patchsweep verify` reads them)",
            "green",
        )
    words = f"{total.done:,} of {total.total:,} units are done"
    if status.missing_pairs:
        words += f", the unpatched metrics of {status.missing_pairs:,} pairs are not"
    if status.rate is not None:
        words += f"; {status.rate:,.3g} {status.rate_unit} per second"
    if status.eta_s is not None:
        words += f", {_duration(status.eta_s)} to go"
    elif not total.running:
        words += "; nothing runs: start the same command again to go on"
    return Text(words)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _text(words: str, style: str = "") -> Text:
    """Return printable text that is not parsed as markup."""
    return Text(printable(words), style)


def _processes(
    events: Sequence[Mapping[str, Any]], working: set[str], now: float
) -> tuple[ProcessStatus, ...]:
    by_run: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        by_run.setdefault(event["process"], []).append(event)
    processes = []
    for name, run_events in by_run.items():
        first, last = run_events[0], run_events[-1]
        process = name.partition("-run")[0]
        state = {FINISHED: "finished", INTERRUPTED: "interrupted"}.get(last["event"], "running")
        if state == "running" and process not in working:
            silent = now - last["time"] > SILENT_AFTER_S
            state = "lost" if is_gone(process) or silent else state
        done = [entry for entry in run_events if entry["event"] == UNIT]
        processes.append(
            ProcessStatus(
                name=name,
                state=state,
                slice=_slice(first),
                units=len(done),
                token_layers=sum(entry["token_layers"] for entry in done),
                seconds=last["time"] - first["time"],
                last_word=last["time"],
            )
        )
    return tuple(processes)


def _slice(started: Mapping[str, Any]) -> str:
    index, n = started.get("slice"), started.get("n_slices")
    return "" if index is None or n in (None, 1) else f"{index} of {n}"


def _rate(
    store: Store,
    variables: Sequence[VariableStatus],
    events: Sequence[Mapping[str, Any]],
    processes: Sequence[ProcessStatus],
    now: float,
) -> tuple[float | None, str, float | None]:
    """Return rate, rate unit and seconds to go; the rate sums running processes, or else all."""
    total = sum(variable.total for variable in variables)
    done = sum(variable.done for variable in variables)
    running = [p for p in processes if p.state == "running"]
    unit = "units"
    todo = float(total - done)
    planned = _planned(store, variables)
    # a shard that was done twice counts once
    counted = {
        (e["variable"], e["pair_block"], e["layer_block"]): e["token_layers"]
        for e in events
        if e["event"] == UNIT
    }
    if planned is not None and len(counted) >= done and any(counted.values()):
        unit, todo = "token-layers", max(0.0, planned - sum(counted.values()))
    rate = 0.0
    for process in running or processes:
        amount = process.units if unit == "units" else process.token_layers
        seconds = process.seconds + (now - process.last_word if process in running else 0.0)
        rate += amount / seconds if seconds > 0 else 0.0
    if not rate:
        return None, unit, None
    return rate, unit, todo / rate if running and done < total else None


def _planned(store: Store, variables: Sequence[VariableStatus]) -> float | None:
    """Return the token-layers of the run; None unless the store's plan has them per variable."""
    plan = store.attrs.get("plan")
    if not isinstance(plan, Mapping):
        return None
    sites = [plan.get(variable.name) for variable in variables]
    counts = [site.get("token_layers") if isinstance(site, Mapping) else None for site in sites]
    numbers = [n for n in counts if isinstance(n, int)]
    return float(sum(numbers)) if len(numbers) == len(counts) else None
