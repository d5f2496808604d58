"""`patchsweep demo`: sweeps one prompt pair on a real model, checks it and writes a report."""

from __future__ import annotations

import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging as transformers_logging

from patchsweep.cli import parsers
from patchsweep.cli.console import stdout, table_of
from patchsweep.cli.parsers import N_CELLS
from patchsweep.cli.progress import Bar
from patchsweep.cli.schema.run import (
    BuiltinTask,
    MetricConfig,
    ModelConfig,
    NamedMethods,
    RunConfig,
    RunnerConfig,
    SitesConfig,
    StoreConfig,
)
from patchsweep.data.pairs import PromptPair
from patchsweep.data.show import number
from patchsweep.models.offload import device_of
from patchsweep.report import write_report
from patchsweep.results import accessor as summary
from patchsweep.store.attributes import attributes
from patchsweep.sweeps.api import sweep

SITES = ("resid_pre", "attn_out", "mlp_out", "z")
TOLERANCE = 1e-4  # in logits, fp32: more than another order of summation can change
EXIT_WRONG = 4  # a cell differs from TransformerLens


def main(arguments: list[str]) -> int:
    """Sweep, check and report; return 0 if all checked cells agree, else EXIT_WRONG."""
    options = parsers.demo(arguments)
    transformers_logging.disable_progress_bar()
    console = stdout()
    out = Path(options.out)
    store = out / "demo.zarr"
    for old in (store, Path(f"{store}.journal"), Path(f"{store}.leases")):
        shutil.rmtree(old, ignore_errors=True)  # a complete store would run nothing

    config = RunConfig(
        model=ModelConfig(name=options.model),
        task=BuiltinTask(name="ioi_demo"),
        sites=SitesConfig(names=list(SITES)),
        method=NamedMethods(names=["exact"]),
        metric=MetricConfig(names=["logit_diff"]),
        store=StoreConfig(path=str(store)),
        runner=RunnerConfig(name="auto"),
    )
    console.print(f"loading {options.model}")
    model = config.model.load()
    pairs = config.task.load(model)
    pair = pairs[0]
    console.print(f"clean:     {''.join(pair.clean_tokens[1:])} ->{pair.answer_text}")
    console.print(f"corrupted: {''.join(pair.corrupted_tokens[1:])} ->{pair.wrong_answer_text}")
    with Bar(console) as bar:
        ds = sweep(
            model, pairs, SITES, "logit_diff", store=store, config=config.identity(), progress=bar
        )
    console.print(_cost(ds, bar.seconds))
    console.print(_largest(ds))
    report = write_report(store, out / "report.html")
    console.print(f"store:  {store}\nreport: {report}")
    worst = largest_difference(model, pair, ds, N_CELLS, options.seed, console)
    if not worst <= TOLERANCE:
        console.print(f"NOT well: a cell differs from TransformerLens by {number(worst)} in logits")
        return EXIT_WRONG
    console.print(
        f"All is well: {N_CELLS} random cells equal the TransformerLens loop, largest difference "
        f"{number(worst)} in logits."
    )
    return 0


def largest_difference(
    model: TransformerBridge,
    pair: PromptPair,
    ds: xr.Dataset,
    n_cells: int,
    seed: int | None,
    console: Console,
) -> float:
    """Return the largest |difference| in logits of random cells to `transformer_lens.patching`.

    The cells are `n_cells` / 4 of each site, live or dead. NaN if a value is NaN.
    """
    rng = np.random.default_rng(seed)
    device = device_of(model)
    clean, corrupted = (torch.tensor([ids], device=device) for ids in (pair.clean, pair.corrupted))
    right, wrong = pair.answer[0], pair.wrong_answer[0]
    _, cache = model.run_with_cache(clean)
    differences = []
    for site in SITES:
        values = ds[site].isel(metric=0, pair=0)
        cells = rng.choice(values.size, size=n_cells // len(SITES), replace=False)
        index = np.stack(np.unravel_index(cells, values.shape), axis=1)
        columns = ["layer", "pos", "head"][: index.shape[1]]
        console.print(f"{len(cells)} cells of {site} by a TransformerLens loop")
        with torch.no_grad(), redirect_stderr(StringIO()):  # hides TransformerLens's progress bar
            theirs = patching.generic_activation_patch(
                model,
                corrupted,
                cache,
                lambda logits: logits[0, -1, right] - logits[0, -1, wrong],
                patching.layer_pos_head_vector_patch_setter
                if "head" in columns
                else patching.layer_pos_patch_setter,
                site,
                index_df=pd.DataFrame(index, columns=columns),
            )
        ours = values.values.ravel()[cells]
        differences.append(np.abs(ours - theirs.cpu().numpy()))
    return float(np.max(differences))  # np.max propagates NaN


def _cost(ds: xr.Dataset, seconds: dict[str, float]) -> Table:
    heads = ("site", "patches", "live", "token-layers", "a loop needs", "ratio", "seconds")
    table = table_of(heads, "what the sweep cost", ("site",))
    keys = ("n_patches", "n_live", "token_layers", "loop_token_layers")
    plan = attributes(ds)["plan"]
    rows = {site: [plan[site][key] for key in keys] for site in SITES}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    seconds = {**seconds, "all": sum(seconds.values())}
    for site, numbers in rows.items():
        if site == "all":
            table.add_section()
        table.add_row(
            site,
            *(f"{n:,}" for n in numbers),
            f"{numbers[3] / numbers[2]:.1f}",
            f"{seconds[site]:.2f}",
        )
    return table


def _largest(ds: xr.Dataset) -> Table:
    effects = [effect for site in SITES for effect in summary.largest(ds, site, n=10)]
    effects.sort(key=lambda effect: -abs(effect.effect))
    columns = ("site", "layer", "head", "pos", "token", "effect", "recovered")
    table = table_of(columns, "the ten largest effects on logit_diff", ("site", "token"))
    for effect in effects[:10]:
        table.add_row(
            effect.site,
            str(effect.layer),
            "" if effect.head is None else str(effect.head),
            str(effect.pos),
            Text(repr(effect.token)),
            number(effect.effect, sign=True),
            f"{effect.recovered:+.0%}",
        )
    return table
