"""Sweeps of every architecture equal plain hooks on the unwrapped Hugging Face modules.

The oracle knows neither TransformerLens nor this engine: it is the model as transformers builds it,
with one forward hook a patch. Its sites are what the plain modules have at their borders: inputs
and outputs of blocks, the input of attention's output projection (z), the outputs of the
projections q, k and v.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import PatchsweepError
from patchsweep.models.load import as_bridge
from patchsweep.models.tiny import draw_weights, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tools.architectures.configs import N_LAYERS, causal_architectures, tiny_config

SITES = ("resid_pre", "resid_post", "z", "q", "k", "v")
INTERVENTIONS = ("resample", "zero", "constant")
CONSTANT = 0.3
N_PATCHES = 2  # of each site and intervention and pair
# fp32 rounding of three blocks with large random weights, relative to the size of the metric
TOLERANCE = 1e-4
# the projections by the names that families give them
PROJECTIONS = {
    "z": ("o_proj", "out_proj", "c_proj", "dense", "wo", "o"),
    "q": ("q_proj", "wq"),
    "k": ("k_proj", "wk"),
    "v": ("v_proj", "wv"),
}
TEXTS = (
    (
        "When John and Mary went out, John gave milk to",
        "When John and Mary went out, Mary gave milk to",
    ),
    (
        "Then John and Mary came to the shops at noon, and John gave a bottle of milk to",
        "Then John and Mary came to the shops at noon, and Mary gave a bottle of milk to",
    ),
)


class Raw:
    """A plain Hugging Face model, patched by forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == N_LAYERS]
        if not lists:
            pytest.skip("its blocks are not one list of modules")
        self.blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))

    def place(self, site: str, layer: int) -> tuple[nn.Module, str] | None:
        """The module at whose input (`in`) or output (`out`) the site lies; None: nowhere."""
        block = self.blocks[layer]
        if site in ("resid_pre", "resid_post"):
            return block, "in" if site == "resid_pre" else "out"
        attention = [m for m in block.modules() if type(m).__name__.endswith("Attention")]
        if len(attention) != 1:
            return None
        named = dict(attention[0].named_children())
        found = [named[name] for name in PROJECTIONS[site] if name in named]
        return (found[0], "in" if site == "z" else "out") if found else None

    @contextmanager
    def hook(
        self, place: tuple[nn.Module, str], edit: Callable[[Tensor], Tensor]
    ) -> Iterator[None]:
        module, side = place

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        if side == "in":
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits[0, -1].float()

    def activation(self, tokens: Tensor, place: tuple[nn.Module, str]) -> Tensor:
        kept: list[Tensor] = []
        with self.hook(place, lambda x: kept.append(x.detach().clone()) or x):
            self.logits(tokens)
        return kept[0]


def build(architecture: str) -> tuple[Raw, Any]:
    """The same random weights twice: as transformers has them, and wrapped."""
    tokenizer = tiny_tokenizer()
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model_type = causal_architectures()[architecture]
    config = tiny_config(model_type, vocab_size=len(tokenizer), **special)
    if hasattr(config, "text_config"):
        pytest.skip("takes images or sound beside text")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.architectures = [architecture]
    draw_weights(model, 0)
    model.eval()
    raw = Raw(copy.deepcopy(model))
    return raw, as_bridge(f"tiny-{model_type}", model, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(causal_architectures()))
def test_sweep_equals_hooks_on_plain_modules(architecture: str, record_property: Any) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        worst, largest, n = compare(architecture)
    finally:
        logging.disable(logging.NOTSET)
    record_property("cells", n)
    record_property("largest_difference", worst)
    assert n > 0
    assert largest > 0.05  # effects are large enough to be missed
    assert worst < TOLERANCE


def compare(architecture: str) -> tuple[float, float, int]:
    """The largest difference relative to the metric's size, the largest effect, cells compared."""
    try:
        raw, bridge = build(architecture)
    except Exception as error:  # whatever transformers or TransformerLens raise
        pytest.skip(f"cannot be built: {type(error).__name__}: {str(error).splitlines()[0]}")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[clean for clean, _ in TEXTS],
        corrupted=[corrupted for _, corrupted in TEXTS],
        answers=[(" Mary", " John")] * len(TEXTS),
    )
    rng = np.random.default_rng(0)
    worst = largest = 0.0
    n = 0
    for site in SITES:
        for intervention in INTERVENTIONS:
            given: Any = CONSTANT if intervention == "constant" else intervention
            try:
                ds = ps.sweep(bridge, pairs, site, direction="denoising", intervention=given)
            except PatchsweepError:
                continue  # refused, and told so
            for i, pair in enumerate(pairs):
                base, source = torch.tensor([pair.corrupted]), torch.tensor([pair.clean])
                differs = [a != b for a, b in zip(pair.clean, pair.corrupted, strict=True)]
                first = differs.index(True) if intervention == "resample" else 0
                for _ in range(N_PATCHES):
                    layer = int(rng.integers(N_LAYERS))
                    pos = int(rng.integers(first, len(pair.clean)))
                    place = raw.place(site, layer)
                    if place is None:
                        continue
                    donor = raw.activation(source, place)
                    unit = [d for d in ("head", "kv_head") if d in ds[site].dims]
                    n_units = ds.sizes[unit[0]] if unit else 1
                    head = int(rng.integers(n_units))

                    def edit(
                        x: Tensor,
                        pos=pos,
                        head=head,
                        n_units=n_units,
                        donor=donor,
                        how=intervention,
                    ) -> Tensor:
                        new = donor
                        if how == "zero":
                            new = torch.zeros_like(x)
                        elif how == "constant":
                            new = torch.full_like(x, CONSTANT)
                        x = x.clone()
                        width = x.shape[-1] // n_units
                        cut = slice(head * width, (head + 1) * width)
                        x.view(*x.shape[:2], -1)[:, pos, cut] = new.view(*x.shape[:2], -1)[
                            :, pos, cut
                        ]
                        return x

                    with raw.hook(place, edit):
                        logits = raw.logits(base)
                    expected = float(logits[pair.answer[0]] - logits[pair.wrong_answer[0]])
                    cell = {"layer": layer, "pos": pos} | ({unit[0]: head} if unit else {})
                    value = float(ds[site].isel(metric=0, pair=i, **cell))
                    base_value = float(ds.base_metric[0, i])
                    size = max(1.0, abs(expected), abs(base_value))
                    worst = max(worst, abs(value - expected) / size)
                    largest = max(largest, abs(expected - base_value))
                    n += 1
    return worst, largest, n
