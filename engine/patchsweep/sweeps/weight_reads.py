"""Bytes of weights that a sweep fetches for a model that does not fit its devices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from patchsweep.forward.unwrapped import Unsupported, UnwrappedModel
from patchsweep.models.offload import device_of, is_offloaded, is_tied, main_device, place_of
from patchsweep.spec.shards import blocks_of
from patchsweep.spec.spec import Request


@dataclass(frozen=True)
class Weights:
    """Where the weights of a model are stored, and the bytes fetched when modules run."""

    places: dict[str, int]  # bytes on each GPU, on the `cpu` and on `disk`
    blocks: tuple[int, ...]  # bytes fetched each time a block runs
    around: int  # bytes fetched for the modules before and after the blocks

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.places.values())

    @property
    def fetched(self) -> int:
        """Bytes that one pass over the whole model fetches."""
        return sum(self.blocks) + self.around


def weights_of(request: Request) -> Weights:
    """Count the weights of the model of `request`; reads none of them."""
    model = request.bridge.original_model
    offloaded = is_offloaded(model)
    here = str(main_device(model)) if offloaded else ""
    blocks: Sequence[nn.Module] = ()
    try:
        # the plain modules, since the bridge may hold parts of a weight twice
        unwrapped = UnwrappedModel(request.bridge)
        plain, blocks = unwrapped.model, unwrapped.blocks
    except Unsupported:
        plain = model
    layer_of = {module: layer for layer, block in enumerate(blocks) for module in block.modules()}
    places: dict[str, int] = defaultdict(int)
    of_block = [0] * len(blocks)
    around = 0
    for path, module in plain.named_modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            n_bytes = weight.numel() * weight.element_size()
            place = _place(request, f"{path}.{name}")
            if not is_tied(model, f"{path}.{name}"):  # a tied weight is stored once, fetched twice
                places[place] += n_bytes
            remote = place == "disk" or (place == "cpu" and here != "cpu")
            if not offloaded or not remote or weight.ndim < 2:  # UnwrappedModel keeps vectors
                continue
            if module in layer_of:
                of_block[layer_of[module]] += n_bytes
            else:
                around += n_bytes
    return Weights(dict(places), tuple(of_block), around)


def _place(request: Request, name: str) -> str:
    """Return where the weight called `name` is stored."""
    device_map = getattr(request.bridge.original_model, "hf_device_map", None)
    if device_map is None:
        return str(device_of(request.bridge))
    return place_of(device_map, name.replace("_original_component.", ""))


def count_captures(request: Request) -> int:
    """Count the passes over unpatched prompts: one per length of the prompts and block of pairs."""
    n_pairs = min(pairs for pairs, _ in blocks_of(request.plans).values())
    lengths = [(len(p.clean), len(p.corrupted), len(p.answer)) for p in request.pairs]
    return sum(
        len(set(lengths[first : first + n_pairs])) for first in range(0, len(lengths), n_pairs)
    )


def bytes_read(
    weights: Weights, request: Request, n_captures: int, batches: Mapping[int, int]
) -> int:
    """Return the bytes that all captures and packed batches fetch; `batches`: first block -> number
    of packed batches that begin there."""
    needs_vocab = any(metric.needs != "answers" for metric in request.metrics)
    # answers alone need only a few rows of the unembedding
    around = weights.around if needs_vocab else 0
    total = n_captures * (weights.fetched + 2 * around)  # 2: the metrics of base and source
    return total + sum(n * (sum(weights.blocks[first:]) + around) for first, n in batches.items())
