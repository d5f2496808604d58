"""`patchsweep run`: runs a sweep from a config and writes a store."""

from __future__ import annotations

from omegaconf import DictConfig
from transformers.utils import logging as transformers_logging

from patchsweep.cli.app import as_config, compose
from patchsweep.cli.console import stdout
from patchsweep.cli.progress import Bar
from patchsweep.cli.stop import STOPPER
from patchsweep.data.show import number
from patchsweep.models.compute import sentence
from patchsweep.results.rounding import noise_of
from patchsweep.results.stated import stated_errors
from patchsweep.results.tolerance import tolerance_notes
from patchsweep.store.attributes import attributes
from patchsweep.store.backends.credentials import scrub
from patchsweep.sweeps.api import sweep


def main(arguments: list[str]) -> int:
    """Run the sweep with these overrides; return 0 when all its units are done."""
    compose("run", arguments, job)
    return 0


def job(cfg: DictConfig) -> None:
    """Run one config and print a summary; Hydra calls this in this process or in a launcher's."""
    STOPPER.listen()
    STOPPER.check("before anything was run")
    config, console = as_config(cfg), stdout()
    transformers_logging.disable_progress_bar()
    model = config.model.load()
    pairs = config.task.load(model)
    with Bar(console) as bar:
        ds = sweep(
            model,
            pairs,
            config.spec(model),
            **config.settings(),
            config=config.identity(),
            progress=bar,
        )
    attrs = attributes(ds)
    provenance = attrs["provenance"]
    prefix = f"slice {config.slice} of {config.n_slices}: " if config.n_slices > 1 else ""
    console.print(
        f"{prefix}{bar.n_units} units, {bar.n_live} live patches, {bar.token_layers} token-layers "
        f"in {sum(bar.seconds.values()):.1f} s by the {provenance['runner']} runner "
        f"({provenance['runner_reason']}), computed in "
        + sentence(provenance["dtype"], provenance["compute_dtype"])
    )
    for note in (*tolerance_notes(ds), *(stated.words for stated in stated_errors(ds))):
        console.print(note)
    for noise in noise_of(ds):
        console.print(
            f"noise floor of {noise.site}: {number(noise.floor)} in {noise.metric}; "
            f"{noise.n_above} of {noise.n_cells} effects are above it, the others are rounding"
        )
    plan = attrs["plan"]
    live, patches = (sum(site[key] for site in plan.values()) for key in ("n_live", "n_patches"))
    console.print(f"{scrub(config.store.path)}: {patches} patches, {live} of them live")
