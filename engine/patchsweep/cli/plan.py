"""`patchsweep plan`: prints the cost of a run without running it, or after a few of its patches."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig
from rich.console import Console
from transformers.utils import logging as transformers_logging

from patchsweep.cli.app import as_config, compose
from patchsweep.cli.console import stdout, table_of
from patchsweep.cli.schema.run import RunConfig
from patchsweep.data.pairs import PromptPair
from patchsweep.data.show import number
from patchsweep.errors import ConfigError
from patchsweep.sweeps.api import plan
from patchsweep.sweeps.cost import Cost, Weights
from patchsweep.sweeps.saving import Saving

SHOWN_TOKENS = 12  # tokens of the first prompt to print: its start and its end


@dataclass
class PlanRun(RunConfig):
    """The config of a run, and whether a few of its patches run now."""

    sample: bool = False  # run a few patches, to estimate what the tolerance saves


def main(arguments: list[str]) -> int:
    """Print the cost of a run with these overrides; return 0."""
    compose("plan", arguments, job, schema=PlanRun)
    return 0


def job(cfg: DictConfig) -> None:
    """Print the plan of one config; Hydra calls this."""
    config = as_config(cfg)
    assert isinstance(config, PlanRun)
    if config.has_several:
        raise ConfigError(
            f"intervention={config.intervention!r} are several, and a plan counts one: the sweep "
            "takes the sum of theirs; give one of them"
        )
    transformers_logging.disable_progress_bar()
    model = config.model.load() if config.sample else config.model.sketch()
    pairs = config.task.load(model)
    cost = plan(model, pairs, config.spec(model), sample=config.sample, **config.settings())
    console = stdout()
    show(cost, console)
    if cost.n_slices > 1:
        n = cost.token_layers / cost.n_slices
        tell("slice", f"{config.slice} of {cost.n_slices}: about {n:,.0f} token-layers", console)
    if config.tolerance is not None:
        tell("tolerance", f"{config.tolerance}: {within(cost.saving)}", console)
    tell("first prompt", prompt(pairs[0]), console)


def show(cost: Cost, console: Console) -> None:
    """Print the cost as a table and a few lines."""
    heads = ("patches", "live", "run exactly", "units", "token-layers", "a loop needs", "ratio")
    table = table_of(("site", *heads), texts=("site",))
    counts = ("n_patches", "n_live", "n_exact", "n_units", "token_layers", "loop_token_layers")
    for site in cost.sites:
        ratio = f"{site.loop_token_layers / site.token_layers:,.0f}" if site.token_layers else ""
        table.add_row(site.site, *(f"{getattr(site, name):,}" for name in counts), ratio)
    for part in cost.parts:
        table.add_row(part.name, "", "", "", "", f"{part.token_layers:,}", "", "")
    n_exact, n_units = (sum(getattr(site, name) for site in cost.sites) for name in counts[2:4])
    ends = cost.token_layers, cost.loop_token_layers
    totals = (cost.n_patches, cost.n_live, n_exact, n_units, *ends)
    ratio = f"{cost.loop_token_layers / max(1, cost.token_layers):,.0f}"
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in totals), ratio)
    console.print(table)
    for name, value in (
        ("packed batches", f"{cost.n_batches:,}"),
        ("FLOPs", f"{number(cost.flops / 1e12)} T"),
        ("seconds", f"{cost.seconds:.1f} at this device's matrix-product rate, attention left out"),
        ("values written", size(cost.result_bytes)),
        ("arithmetic", arithmetic(cost)),
        ("weights", weights(cost.weights)),
        ("weights read", reading(cost)),
        (
            "activations",
            f"{size(cost.cache_bytes)} per pair; more than {size(cost.cache_budget)} goes to disk",
        ),
    ):
        tell(name, value, console)


def tell(name: str, value: str, console: Console) -> None:
    """Print one line with `name` in a column of 15 characters."""
    console.print(f"{name:15} {value}")


def within(saving: Saving | None) -> str:
    """Return text on the token-layers and seconds that a tolerance leaves."""
    if saving is None:
        return (
            "a sample decides how much of these token-layers is run; they are the most that it can "
            "take, and sample=true estimates how much it takes"
        )
    sites = ", ".join(
        f"{name} {n / max(1, saving.exact_token_layers[name]):.1%}"
        for name, n in saving.token_layers.items()
    )
    return (
        f"estimate from {saving.n_patches} patches run both ways: about {saving.share:.1%} of the "
        f"exact token-layers ({sites}); {saving.seconds:.1f} s where the exact batches take "
        f"{saving.exact_seconds:.1f} s"
    )


def prompt(pair: PromptPair) -> str:
    """Return the first and last tokens of the pair's clean prompt, and its answers."""
    tokens = [repr(token) for token in pair.clean_tokens]
    if len(tokens) > SHOWN_TOKENS:
        half = SHOWN_TOKENS // 2
        tokens = [*tokens[:half], "...", *tokens[-half:]]
    answer, wrong = pair.answer_text, pair.wrong_answer_text
    return f"{' '.join(tokens)}, then {answer!r} or {wrong!r} ({len(pair)} tokens)"


def arithmetic(cost: Cost) -> str:
    """Return text such as `float32`, with the cost of a cast if weights have another dtype."""
    if not cost.cast_bytes:
        return cost.arithmetic
    return (
        f"{cost.arithmetic}, {size(cost.cast_bytes)} at a time; products take "
        f"{cost.slowdown:.1f} times as long here as with compute_dtype=model"
    )


def weights(weights: Weights) -> str:
    """Return text such as `16.1 GB: 9.2 GB on cuda:0, 6.9 GB on disk`."""
    places = ", ".join(f"{size(n)} on {place}" for place, n in sorted(weights.places.items()))
    return f"{size(weights.n_bytes)}: {places}"


def reading(cost: Cost) -> str:
    """Return text on the bytes of offloaded weights that a run fetches, and in how many passes."""
    if not cost.weights.fetched:
        return "once: all of them stay where they run"
    if not cost.n_captures:
        return f"{size(cost.weights.fetched)} are offloaded, and fetched in each pass"
    n_passes = cost.n_captures + cost.n_batches
    return (
        f"{size(cost.read_bytes)}: {size(cost.weights.fetched)} are offloaded, and fetched in "
        f"{n_passes} passes ({cost.n_captures} captures, {cost.n_batches} packed batches)"
    )


def size(n_bytes: float) -> str:
    """Return text such as `24.5 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"
