"""Runs of the explorer: each sweeps its sites one after the other and keeps what the page shows."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, PatchsweepError
from patchsweep.explorer import cells
from patchsweep.explorer.question import CHOSEN, Question
from patchsweep.models.running import running
from patchsweep.report import question as words
from patchsweep.report.heatmap import draw_site
from patchsweep.report.page import build_page, figure_data, map_html, view_data
from patchsweep.report.views import choose_views
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.attributes import attributes, flat_attributes
from patchsweep.store.dataset import open_store
from patchsweep.store.layout import Unit
from patchsweep.sweeps.api import prepare_runner, sweep
from patchsweep.sweeps.identity import read_weights
from patchsweep.tasks import load_task

log = logging.getLogger("patchsweep")
Plans = Sequence[SitePlan]
Event = Mapping[str, Any]  # JSON data with the key "kind"

_OFTEN_S = 0.15  # between two events of the same map or bar
_KEPT = 8  # runs whose pages can still be asked for


class Cancelled(Exception):
    """Another question was asked; raised inside a sweep, whose finished shards are kept."""


class Run:
    """The run of one question, and the events that the page has to hear of it."""

    def __init__(self, number: int, question: Question, pairs: PromptPairs, plans: Plans) -> None:
        self.number, self.question, self.pairs = number, question, pairs
        self.cancelled = threading.Event()
        self.results: dict[str, xr.Dataset] = {}  # site -> its finished sweep
        self.pages: dict[Any, Future[str]] = {}  # of cells
        self._costs = {plan.site.name: plan.token_layers for plan in plans}
        self._swept = 0  # token-layers of finished sites
        self._events: list[Event | None] = []  # None: a later one says more
        self._last: dict[str, int] = {}  # key -> index of the event that it would replace
        self.closed = False
        self.tell({"kind": "start", "sites": question.sites, "token_layers": self.total})

    @property
    def total(self) -> int:
        return sum(self._costs.values())

    @property
    def order(self) -> list[str]:
        """The sites, the cheapest first."""
        return sorted(self.question.sites, key=lambda site: self._costs[site])

    def tell(self, event: Event, key: str = "") -> None:
        """Add an event; it replaces the last one of the same `key`."""
        if key in self._last:
            self._events[self._last[key]] = None
        self._events.append(event)
        if key:
            self._last[key] = len(self._events) - 1

    def after(self, seen: int) -> list[tuple[int, Event]]:
        """Return the events from number `seen` on, each with the number of the next."""
        numbered = enumerate(self._events[seen:], start=seen + 1)
        return [(number, event) for number, event in numbered if event is not None]

    def swept(self, site: str, ds: xr.Dataset) -> None:
        """Keep the results of a finished site."""
        self._swept += self._costs[site]
        self.results[site] = ds
        self.show(site, ds, done=True)
        self.bar(0)

    def bar(self, token_layers: int) -> None:
        """Tell how much is done, `token_layers` of it in the site that runs."""
        self.tell({"kind": "bar", "done": self._swept + token_layers, "all": self.total}, "bar")

    def show(self, site: str, ds: xr.Dataset, *, done: bool) -> None:
        """Tell the map of `site` as far as it is known."""
        (view,) = choose_views(ds, (site,))
        figure = draw_site(ds, site, (view,))
        (frame,) = figure.frames.values()
        index = self.question.sites.index(site)
        self.tell(
            {
                "kind": "map",
                "index": index,
                "done": done,
                "html": map_html(index, figure, frame.caption),
                "figure": figure_data(figure),
                "view": view_data(view),
                "prompts": words.prompts(ds, self.question.metric, view),
            },
            f"map-{index}",
        )

    def failed(self, site: str, message: str) -> None:
        """Tell that `site` has no map, and why."""
        self._swept += self._costs[site]
        index = self.question.sites.index(site)
        self.tell({"kind": "failed", "index": index, "message": message})

    def close(self, kind: str = "done") -> None:
        """Tell that nothing more will come."""
        if not self.closed:
            self.tell({"kind": kind})
            self.closed = True

    def report(self) -> str:
        """Return the report of the sites that have finished.

        Raises:
            ConfigError: none has.
        """
        found = [self.results[site] for site in self.question.sites if site in self.results]
        if not found:
            raise ConfigError("no map is finished yet; wait for one")
        plans: dict[str, Any] = {}
        for ds in found:
            plans |= attributes(ds)["plan"]
        merged = xr.merge(found, compat="override", combine_attrs="override")
        merged.attrs = flat_attributes({**attributes(found[0]), "plan": plans})
        return build_page(merged)


class Watch:
    """The `Progress` of one site: shows its map as shards land, and stops where it is cancelled."""

    def __init__(self, run: Run, site: str, store: Path) -> None:
        self._run, self._site, self._store = run, site, store
        self._done = 0
        self._told = self._shown = 0.0

    def begin(self, n_units: int, total: int, done: int) -> None:
        self._done = done
        self._check()

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None:
        self._done += token_layers

    def item_done(self) -> None:
        now = time.monotonic()
        if now - self._shown > _OFTEN_S:
            self._shown = now
            self._run.show(self._site, open_store(self._store), done=False)
        self._check()

    def waiting(self, n_units: int, holders: Mapping[str, int]) -> None:
        self._check()

    def stage(self, name: str) -> None: ...

    def within(self, token_layers: int) -> None:
        self._check()
        now = time.monotonic()
        if now - self._told > _OFTEN_S:
            self._told = now
            self._run.bar(self._done + token_layers)

    def end(self) -> None: ...

    def _check(self) -> None:
        if self._run.cancelled.is_set():
            raise Cancelled


class Explorer:
    """A model, the runs that were asked for, and the one thread in which the model runs."""

    def __init__(self, model: TransformerBridge, name: str) -> None:
        self.model, self.name = model, name
        self.runs: dict[int, Run] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="patchsweep-explore-"))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._asking = threading.Lock()
        self._n_asked = 0
        self._thread.submit(self._warm)

    def ask(self, question: Question) -> Run:
        """Start the run of `question`; a run before it is cancelled.

        Raises:
            PatchsweepError: the question does not fit the model; nothing has run then.
        """
        pairs = question.pairs(self.model)
        plans = question.request(self.model, pairs).plans
        with self._asking:
            for earlier in self.runs.values():
                earlier.cancelled.set()
            self._n_asked += 1
            run = self.runs[self._n_asked] = Run(self._n_asked, question, pairs, plans)
            for number in sorted(self.runs)[:-_KEPT]:
                del self.runs[number]
        self._next(run, run.order)
        return run

    def run_of(self, number: int) -> Run:
        """Return a run by its number.

        Raises:
            ConfigError: there is none, or it was long ago.
        """
        if number not in self.runs:
            raise ConfigError(f"run {number} is not known any more; ask again")
        return self.runs[number]

    def cell(self, run: Run, kind: str, place: cells.Place) -> str:
        """Return the page of a cell; it waits for the site that runs now.

        Raises:
            PatchsweepError: there is no such page for this cell.
        """
        with self._asking:
            key = kind, place
            if key not in run.pages:
                run.pages[key] = self._thread.submit(
                    cells.page_of, self.model, run.pairs, run.question, kind, place
                )
        return run.pages[key].result()

    def close(self) -> None:
        """Stop what runs and remove the stores."""
        for run in self.runs.values():
            run.cancelled.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _next(self, run: Run, sites: list[str]) -> None:
        """Run `sites` one after the other; a job each, so that a cell's page may come between."""

        def job() -> None:
            if run.cancelled.is_set():
                run.close("cancelled")
                return
            if sites:
                self._guarded(run, sites[0])
                self._next(run, sites[1:])
            else:
                run.close()

        self._thread.submit(job)

    def _guarded(self, run: Run, site: str) -> None:
        try:
            self._sweep(run, site)
        except Cancelled:
            pass  # the next job says so
        except PatchsweepError as error:
            run.failed(site, str(error))
        except Exception as error:
            log.exception("the sweep of %s failed", site)
            run.failed(site, f"{type(error).__name__}: {error}; the terminal shows more")

    def _sweep(self, run: Run, site: str) -> None:
        question = run.question
        same = repr(replace(question, sites=(site,))).encode()
        store = self._folder / f"{hashlib.sha256(same).hexdigest()[:24]}.zarr"
        watch = Watch(run, site, store)
        ds = sweep(self.model, run.pairs, site, **question.settings(), store=store, progress=watch)
        run.swept(site, ds.load())

    def _warm(self) -> None:
        """Do once what the first sweep would wait for: the self-test, and the weights' digests."""
        try:
            with running(self.model):
                read_weights(self.model)
                pairs = load_task(self.model, "ioi_demo")
                prepare_runner(make_request(self.model, pairs, SweepSpec(CHOSEN)), "auto", None)
        except PatchsweepError as error:  # the task may not fit; each sweep then tests by itself
            log.info("no self-test before the first question: %s", error)
