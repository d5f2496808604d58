"""Effects of sublayers on the answer: each sublayer's output is removed, in packed batches."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.logit_lens.compute import Which, base_direction
from patchsweep.analyses.stages import Stages
from patchsweep.data.pairs import PromptPairs
from patchsweep.runners.select import RunnerName
from patchsweep.spec.interventions import Direction
from patchsweep.spec.spec import SweepSpec
from patchsweep.store.difference import IDENTITY

SUBLAYERS = ("attn", "mlp")
METRICS = ("prob", "log_prob", "rank", "logit_diff")


def sublayers(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    which: Which | None = None,
    direction: Direction | None = SweepSpec.direction,
    runner: RunnerName = "auto",
    max_tokens: int | None = None,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Return the metrics of the model without each sublayer, one at a time.

    `without` [metric, pair, sublayer, layer] is the metric with the output of a sublayer (`attn`
    or `mlp`) set to zero at every position; `whole` [metric, pair] is that of the full run.
    Metrics are those of sweeps: `prob`, `log_prob` (nats), `rank` (number of tokens above the
    answer) and `logit_diff`; an answer of several tokens counts with all of them.
    `without - whole` is negative where the sublayer helps the answer (for a rank: positive).

    One sweep zeroes `attn_out` and `mlp_out`: each row runs only what follows its sublayer.
    Arguments are those of `lens` and, for the runner, those of `sweep`; the stage is
    "sublayers".

    Raises:
        PatchsweepError: an argument breaks a rule, or the model has no such hooks.
    """
    sweep_direction, prompt = base_direction(which, direction, "noising")
    stages = Stages.of(stages)
    ds = stages.sweep(
        "sublayers",
        model,
        pairs,
        [f"{kind}_out" for kind in SUBLAYERS],
        list(METRICS),
        direction=sweep_direction,
        intervention="zero",
        positions="all",
        runner=runner,
        max_tokens=max_tokens,
        config=config,
    )
    stages.wait()
    without = np.stack([ds[f"{kind}_out"].values for kind in SUBLAYERS], axis=2)
    return xr.Dataset(
        {
            "without": (("metric", "pair", "sublayer", "layer"), without),
            "whole": (("metric", "pair"), ds["base_metric"].values),
        },
        coords={
            "metric": np.array(METRICS, dtype=object),
            "pair": ds["pair"].values,
            "sublayer": np.array(SUBLAYERS, dtype=object),
            "layer": ds["layer"].values,
            "answer": ds["answer"],
            "wrong_answer": ds["wrong_answer"],
        },
        attrs={
            "patchsweep_version": version("patchsweep"),
            "kind": "lens",
            "prompt": prompt,
            IDENTITY: ds.attrs[IDENTITY],  # flat, as it is
            "provenance": ds.attrs["provenance"],
        },
    )
