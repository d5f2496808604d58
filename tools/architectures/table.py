"""Which runner each architecture gets, and how far it is from a loop of hooked passes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ModelError, PatchsweepError, SiteError
from patchsweep.models.load import as_bridge
from patchsweep.models.tiny import draw_weights, tiny_tokenizer
from patchsweep.runners.base import Runner
from patchsweep.runners.hooked import HookedRunner
from patchsweep.runners.select import select_runner
from patchsweep.spec.batch import Batch
from patchsweep.spec.metrics import METRICS
from patchsweep.spec.spec import Request, SweepSpec, make_request
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tools.architectures.configs import causal_architectures, tiny_config

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")
N_PATCHES = 6
# a tiny configuration that grows beyond this has a size by another name
MOST_PARAMETERS = 5_000_000
# architectures that are also tried in compatibility mode
COMPATIBLE = (
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "MixtralForCausalLM",
)
CLEAN = "When John and Mary went to the shops, John gave a bottle of milk to"
CORRUPTED = "When John and Mary went to the shops, Mary gave a bottle of milk to"


@dataclass(frozen=True)
class Cell:
    """One site of one architecture."""

    runner: Literal["packed", "hooked", "none"]  # none: the site cannot be swept
    difference: float | None  # largest difference in logit_diff from a loop of hooked passes
    reason: str  # why this runner


@dataclass(frozen=True)
class Row:
    """One architecture."""

    architecture: str
    model_type: str
    cells: dict[str, Cell] = field(default_factory=dict)  # by site
    refused: str = ""  # why nothing runs; empty: something does

    @property
    def runner(self) -> str:
        """`packed`, `hooked`, `packed and hooked` (by site), or `refused`."""
        found = {cell.runner for cell in self.cells.values()} - {"none"}
        return " and ".join(sorted(found, reverse=True)) if found else "refused"

    @property
    def reason(self) -> str:
        """Why some of it does not run in packed batches; empty where all of it does."""
        if self.refused:
            return self.refused
        reasons: dict[str, list[str]] = {}
        for site, cell in self.cells.items():
            if cell.runner != "packed" or cell.difference is None:
                reasons.setdefault(cell.reason, []).append(site)
        return "; ".join(f"{', '.join(sites)}: {why}" for why, sites in reasons.items())


def families_table(architectures: Iterable[str] | None = None) -> list[Row]:
    """A row for each architecture that TransformerBridge and transformers know as causal.

    Models are tiny with random weights; nothing is downloaded.
    """
    known = causal_architectures()
    return [_row(name, known[name]) for name in architectures or known]


def compatibility_table(
    architectures: Iterable[str] = COMPATIBLE,
) -> list[Row]:
    """The rows of a few architectures in TransformerBridge's compatibility mode."""
    known = causal_architectures()
    return [_row(name, known[name], compatible=True) for name in architectures]


def tiny_bridge(architecture: str, seed: int = 0) -> TransformerBridge:
    """A tiny random model of `architecture`, wrapped.

    Raises:
        Exception: what transformers or TransformerLens raises, where they cannot build it.
    """
    model, tokenizer = tiny_model(architecture, seed)
    return as_bridge(f"tiny-{model.config.model_type}", model, tokenizer)


def tiny_model(architecture: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A tiny random model of `architecture` as transformers builds it, and its tokenizer.

    Raises:
        ModelError: it takes images or sound beside text.
        Exception: what transformers raises, where it cannot build it.
    """
    tokenizer = tiny_tokenizer()
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = tiny_config(causal_architectures()[architecture], vocab_size=len(tokenizer), **special)
    if hasattr(config, "text_config"):
        raise ModelError("takes images or sound beside text; see the row of its text model")
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > MOST_PARAMETERS:
        raise ValueError(f"the tiny configuration has {size:,} parameters")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.architectures = [architecture]
    draw_weights(model, seed)
    return model.eval(), tokenizer


def _row(architecture: str, model_type: str, *, compatible: bool = False) -> Row:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # slow paths that transformers points out
    try:
        bridge = tiny_bridge(architecture)
        if compatible:
            bridge.enable_compatibility_mode(disable_warnings=True)
        with torch.no_grad():
            if not bool(torch.isfinite(bridge(torch.arange(9).unsqueeze(0))).all()):
                return Row(architecture, model_type, refused="random weights give no finite logits")
        return measure(architecture, model_type, bridge)
    except Exception as error:  # whatever the two libraries raise belongs in the table
        return Row(architecture, model_type, refused=one_line(error))
    finally:
        logging.disable(level)


def measure(architecture: str, model_type: str, bridge: TransformerBridge) -> Row:
    """The row of `bridge`.

    Raises:
        PatchsweepError: the model cannot be swept at all.
    """
    pairs = PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )
    return Row(architecture, model_type, {site: _cell(bridge, pairs, site) for site in SITES})


def _cell(bridge: TransformerBridge, pairs: PromptPairs, site: str) -> Cell:
    request = make_request(bridge, pairs, SweepSpec(site))
    batch = request.batches([0])[0]
    try:
        choice = select_runner(bridge, request.plans, request.intervention)
        found = _values(choice.runner, request, batch, at_once=True)
    except SiteError as error:
        return Cell("none", None, one_line(error))
    reason = choice.reason.removeprefix("the packed runner cannot: ")
    runner: Literal["packed", "hooked"] = "packed" if choice.runner.name == "packed" else "hooked"
    try:
        expected = _values(HookedRunner(bridge, request.sites), request, batch, at_once=False)
    except SiteError as error:  # the packed batches patch what the bridge's hook cannot
        return Cell(runner, None, f"no loop to compare with: {one_line(error)}")
    return Cell(runner, float((found - expected).abs().max()), reason)


def _values(runner: Runner, request: Request, batch: Batch, *, at_once: bool) -> Tensor:
    """logit_diff of a sample of live patches, run at once or one a forward pass."""
    plan = request.plans[0]
    live = plan.live_patches()
    rng = np.random.default_rng(1)
    chosen = np.sort(rng.choice(live, size=min(N_PATCHES, len(live)), replace=False))
    loaded = runner.load(batch, request.intervention)
    parts = [chosen] if at_once else np.split(chosen, len(chosen))
    return torch.cat(
        [runner.run(loaded, plan, part, (METRICS["logit_diff"],)) for part in parts], dim=1
    )


def one_line(error: Exception) -> str:
    """Why, in one line, without the site's name and the remedy that a sweep would be told."""
    lines = str(error).strip().splitlines() or [""]
    if not isinstance(error, PatchsweepError):
        return f"{type(error).__name__}: {lines[0]}"
    text = re.split("; (leave the site out|patch a)", lines[0])[0]
    text = re.sub(r"^site \w+: |^tiny-\S+ ", "", text)
    return re.sub(r"this model has no hook .*", "no such hook", text)
