"""What `patchsweep status` tells: counts, processes, rate, time to go, exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patchsweep.store.journal import Journal
from patchsweep.store.lease import Leases
from patchsweep.store.status import (
    EXIT_COMPLETE,
    EXIT_INCOMPLETE,
    SILENT_AFTER_S,
    StoreStatus,
    render,
    store_status,
)
from patchsweep.store.store import Store
from rich.console import Console
from store_faults.runs import run, small_layout, values_of

PLAN = {"z": {"token_layers": 900}, "embed": {"token_layers": 100}}
ELSEWHERE = "another_host.01234567-{}-1"  # a process that this machine cannot look at


def shown(status: StoreStatus) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(status))
    return console.export_text()


def write_journal(store: Path, process: str, *events: dict[str, Any]) -> None:
    folder = store.with_name(store.name + ".journal")
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / f"{process}.jsonl").write_text(text)


def unit_event(time: float, pair: int, layer: int, token_layers: int = 100) -> dict[str, Any]:
    return {
        **{"event": "unit", "time": time, "variable": "z", "pair_block": pair},
        **{"layer_block": layer, "seconds": 1.0, "token_layers": token_layers, "n_live": 5},
    }


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    """A store of which three of twelve units are done."""
    path = tmp_path / "run.zarr"
    store = Store.create_or_resume(path, small_layout(plan=PLAN))
    for unit in store.units()[:3]:
        store.write(unit, values_of(store.variables[unit.variable], unit))
    return path


def test_status_counts_done_running_stale_and_missing(half_done: Path) -> None:
    store = Store.open(half_done)
    fourth, fifth, sixth, *_ = store.pending()
    assert store.claim([fourth, fifth]) == [fourth, fifth]
    dead = Leases(store.folder.beside(".leases"))
    assert dead.claim([sixth.name]) == [sixth.name]
    store.folder.beside(".leases").delete(f"owners/{dead.owner}")  # its heart beats no more
    status = store_status(half_done)
    z, embed = status.variables
    assert (z.name, z.done, z.running, z.stale, z.missing, z.total) == ("z", 3, 2, 1, 3, 9)
    assert (embed.name, embed.done, embed.missing, embed.total) == ("embed", 0, 3, 3)
    assert (status.total.done, status.total.total) == (3, 12)
    assert status.missing_pairs == 5
    assert not status.complete
    assert status.exit_code == EXIT_INCOMPLETE == 3
    store.close()
    assert store_status(half_done).total.running == 0


def test_complete_store_has_exit_code_zero(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    run(path, journal=True)
    status = store_status(path)
    assert status.complete
    assert status.exit_code == EXIT_COMPLETE == 0
    assert status.eta_s is None
    assert [(p.state, p.units, p.token_layers) for p in status.processes] == [("finished", 12, 120)]
    assert "complete" in shown(status)


def test_unwritten_unpatched_metrics_are_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    run(path)
    (path / "base_metric" / "c.0.2").unlink()
    status = store_status(path)
    assert status.total.done == status.total.total
    assert status.exit_code == EXIT_INCOMPLETE
    assert "the unpatched metrics of 1 pairs are not" in shown(status)
    assert "damaged: base_metric/c.0.2 is lost" in shown(status)


def test_rate_and_time_to_go_follow_token_layers(half_done: Path) -> None:
    started = {"event": "started", "time": 1000.0, "n_units": 6}
    for i, layers in ((1, (0, 1)), (2, (2,))):
        write_journal(
            half_done,
            ELSEWHERE.format(i),
            started | {"slice": i, "n_slices": 8},
            *(unit_event(1010.0, 0, layer) for layer in layers),
        )
    status = store_status(half_done, now=1020.0)
    assert [(p.state, p.slice, p.units) for p in status.processes] == [
        ("running", "1 of 8", 2),
        ("running", "2 of 8", 1),
    ]
    # 200 and 100 token-layers in the 20 s until now; 1000 - 300 are to do
    assert status.rate_unit == "token-layers"
    assert status.rate == pytest.approx(10 + 5)
    assert status.eta_s == pytest.approx(700 / 15)
    text = shown(status)
    assert "3 of 12 units are done" in text
    assert "15 token-layers per second, 0 min 47 s to go" in text


def test_unit_done_twice_counts_once(half_done: Path) -> None:
    for i in (1, 2):
        write_journal(
            half_done,
            ELSEWHERE.format(i),
            {"event": "started", "time": 0.0},
            *(unit_event(10.0, 0, layer) for layer in range(3)),
        )
    status = store_status(half_done, now=10.0)
    assert status.eta_s == pytest.approx((1000 - 300) / (30 + 30))


def test_rate_is_in_units_where_the_journal_knows_no_more(half_done: Path) -> None:
    write_journal(
        half_done,
        ELSEWHERE.format(1),
        {"event": "started", "time": 0.0},
        unit_event(10.0, 0, 0),
    )
    status = store_status(half_done, now=10.0)  # two of the three done units are not in there
    assert (status.rate_unit, status.rate, status.eta_s) == ("units", 0.1, pytest.approx(90))


def test_silent_killed_and_interrupted_processes_are_told_apart(half_done: Path) -> None:
    ended = {"event": "interrupted", "time": 5.0, "reason": "SIGTERM"}
    write_journal(half_done, ELSEWHERE.format(1), {"event": "started", "time": 0.0}, ended)
    write_journal(half_done, ELSEWHERE.format(2), {"event": "started", "time": 1.0})
    states = [p.state for p in store_status(half_done, now=10.0).processes]
    assert states == ["interrupted", "running"]
    later = store_status(half_done, now=10.0 + SILENT_AFTER_S)
    assert [p.state for p in later.processes] == ["interrupted", "lost"]
    assert later.eta_s is None
    assert "nothing runs: start the same command again" in shown(later)
    with Journal(half_done) as mine:
        mine.started("now", n_units=1)
        assert store_status(half_done).processes[-1].state == "running"


def test_names_and_texts_are_shown_as_they_are(half_done: Path) -> None:
    evil = "[bold red]50%[/] \x1b[2J\x07 [link=file:///etc]x"
    write_journal(
        half_done,
        ELSEWHERE.format(1),
        {"event": "started", "time": 0.0, "slice": "[red]1", "n_slices": 2},
        {"event": "warning", "time": 1.0, "text": evil},
        {"event": "warning", "time": 2.0, "text": evil},
    )
    text = shown(store_status(half_done, now=3.0))
    assert text.count("warning: [bold red]50%[/] ") == 1
    assert "[link=file:///etc]x" in text
    assert "[red]1 of 2" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_status_changes_nothing(half_done: Path) -> None:
    def everything() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in half_done.parent.rglob("*")}

    before = everything()
    shown(store_status(half_done))
    assert everything() == before


def test_unpatched_metrics_alone_do_not_complete_a_store(tmp_path: Path) -> None:
    store = Store.create_or_resume(tmp_path / "run.zarr", small_layout())
    store.write_references(0, np.ones((2, 5)), np.ones((2, 5)))
    status = store_status(tmp_path / "run.zarr")
    assert status.missing_pairs == 0
    assert not status.complete
