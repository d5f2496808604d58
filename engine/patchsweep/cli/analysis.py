"""What the verbs of analyses share: one of them is an `AnalysisVerb`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr
from omegaconf import DictConfig
from rich.console import Console
from transformers.utils import logging as transformers_logging

from patchsweep.analyses.stages import Stages, Unfinished
from patchsweep.cli.app import as_config, compose
from patchsweep.cli.console import stdout
from patchsweep.cli.progress import Bar
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.cli.stop import STOPPER
from patchsweep.store.backends.credentials import scrub


@dataclass(frozen=True)
class AnalysisVerb:
    """A verb that runs one analysis into a store and shows the results.

    Call it with overrides: it returns 0 when the results are in the store.
    """

    name: str
    schema: type[AnalysisRun]
    # called with model, pairs, the config's `settings`, means_from if it is used, config and stages
    analyse: Callable[..., xr.Dataset]
    show: Callable[[Console, xr.Dataset, bool], None]  # the flag: nothing was run

    def __call__(self, arguments: list[str]) -> int:
        """Run with these overrides; `cli.early` has refused keys that only sweeps use."""
        compose(self.name, arguments, self.job, schema=self.schema)
        return 0

    def job(self, cfg: DictConfig) -> None:
        """Run one config; Hydra calls this in this process or in a launcher's.

        Stored results are shown and not computed again. What remains may need units of other
        slices; then a line says so.
        """
        config, console = as_config(cfg), stdout()
        assert isinstance(config, AnalysisRun)
        store = scrub(config.store.path)
        transformers_logging.disable_progress_bar()
        settings = {**config.settings(), "config": config.identity()}
        model = config.model.load()
        pairs = config.task.load(model)
        if "means_from" in self.schema.uses:
            settings["means_from"] = config.reference(model)
        STOPPER.listen()
        with Bar(console) as bar:
            stages = Stages(
                config.store.path,
                storage_options=config.store.storage_options,
                slice_index=config.slice,
                n_slices=config.n_slices,
                progress=bar,
            )
            try:
                ds = self.analyse(model, pairs, **settings, stages=stages)
            except Unfinished as told:
                console.print(f"{store}: {told}")
                return
        self.show(console, ds, stages.known)
        console.print(f"{store}: {'already there, nothing was run' if stages.known else 'written'}")
        console.print(f"patchsweep report {store}")
