"""The config of `patchsweep plan`."""

from __future__ import annotations

from dataclasses import dataclass

from patchsweep.cli.schema.run import RunConfig


@dataclass
class PlanRun(RunConfig):
    """The config of a run, and whether a few of its patches run now."""

    sample: bool = False  # run a few patches, to estimate what the tolerance saves
