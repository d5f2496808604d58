"""`patchsweep plan`: what a run will cost."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patchsweep.attribution import check_request
from patchsweep.attribution.run import token_layers
from patchsweep.cli.app import as_config, compose
from patchsweep.cli.console import stdout
from patchsweep.estimate import Cost, estimate
from patchsweep.pairs import PromptPair
from patchsweep.reading import Weights
from patchsweep.request import make_request
from patchsweep.screening.asked import get_asked

SHOWN_TOKENS = 12  # of the first prompt: enough to see its start token and its end


def main(arguments: list[str]) -> int:
    """Print the cost of the run of these overrides."""
    compose("plan", arguments, job)
    return 0


def job(cfg: DictConfig) -> None:
    """One plan."""
    config = as_config(cfg)
    transformers_logging.disable_progress_bar()
    model = config.model.sketch()
    pairs = config.task.load(model)
    request = make_request(
        model,
        pairs,
        config.sites.names,
        config.metric.metrics(),
        **config.selection(),
        means_from=config.reference(model),
    )
    asked = get_asked(config.method.asked())
    if asked.methods:
        check_request(request, asked.methods)
    console = stdout()
    show(estimate(request, config.runner.max_tokens, config.runner.cache_bytes), console)
    console.print(f"{'first prompt':15} {prompt(pairs[0])}")
    for method in asked.methods:
        console.print(f"{method.name:15} {token_layers(request, method):,} token-layers besides")


def show(cost: Cost, console: Console) -> None:
    """The cost as a table and a few lines."""
    table = Table()
    table.add_column("site")
    heads = ("patches", "live", "units", "token-layers", "a loop needs", "ratio")
    for head in heads:
        table.add_column(head, justify="right")
    for site in cost.sites:
        ratio = site.loop_token_layers / max(1, site.token_layers)
        numbers = (
            site.n_patches,
            site.n_live,
            site.n_units,
            site.token_layers,
            site.loop_token_layers,
        )
        table.add_row(site.site, *(f"{n:,}" for n in numbers), f"{ratio:,.0f}")
    totals = (
        cost.n_patches,
        cost.n_live,
        sum(site.n_units for site in cost.sites),
        cost.token_layers,
        cost.loop_token_layers,
    )
    ratio = cost.loop_token_layers / max(1, cost.token_layers)
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in totals), f"{ratio:,.0f}")
    console.print(table)
    for name, value in (
        ("waves", f"{cost.n_waves:,}"),
        ("FLOPs", f"{cost.flops:.3g}"),
        ("seconds", f"{cost.seconds:.1f} at this device's matrix-product rate, attention left out"),
        ("values written", size(cost.result_bytes)),
        ("weights", weights(cost.weights)),
        ("weights read", reading(cost)),
        (
            "activations",
            f"{size(cost.cache_bytes)} per pair; more than {size(cost.cache_budget)} goes to disk",
        ),
    ):
        console.print(f"{name:15} {value}")


def prompt(pair: PromptPair) -> str:
    """Its clean prompt in tokens, the first and the last of them, and the answers after it."""
    tokens = [repr(token) for token in pair.clean_tokens]
    if len(tokens) > SHOWN_TOKENS:
        half = SHOWN_TOKENS // 2
        tokens = [*tokens[:half], "...", *tokens[-half:]]
    answer, wrong = pair.answer_text, pair.wrong_answer_text
    return f"{' '.join(tokens)}, then {answer!r} or {wrong!r} ({len(pair)} tokens)"


def weights(found: Weights) -> str:
    """Such as `16.1 GB: 9.2 GB on cuda:0, 6.9 GB on disk`."""
    places = ", ".join(f"{size(n)} on {place}" for place, n in sorted(found.places.items()))
    return f"{size(found.n_bytes)}: {places}"


def reading(cost: Cost) -> str:
    """What is fetched, and how often."""
    if not cost.weights.fetched:
        return "once: all of them stay where they run"
    n_passes = cost.n_captures + cost.n_waves
    return (
        f"{size(cost.read_bytes)}: {size(cost.weights.fetched)} are offloaded, and fetched in "
        f"{n_passes} passes ({cost.n_captures} captures, {cost.n_waves} waves)"
    )


def size(n_bytes: float) -> str:
    """Such as `24.5 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
