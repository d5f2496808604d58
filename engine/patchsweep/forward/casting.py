"""Weights of 16 bits in fp32: where their casts are made, and that none of them stays.

A block's weights are cast as its streamed module brings them together (see `stations`), an
embedding's row by row. Graphs of gradients keep no casts, and the bridge itself can be run in fp32
for a while.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from patchsweep.forward.weight_streaming import Away, StreamedModule, WeightTraffic, stream_modules
from patchsweep.models.offload import ACCELERATE, Home, home_of
from patchsweep.models.running import running


def looks_up(module: nn.Module, station: StreamedModule) -> TypeGuard[nn.Embedding]:
    """Whether `cast_rows` can serve the module: an embedding that is there, called with ids."""
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return (
        isinstance(module, nn.Embedding)
        and first in ("input", "input_ids")
        and [weight.placeholder.is_meta for weight in station.away] == [False]
    )


def cast_rows(embedding: nn.Embedding, weight: Away) -> None:
    """Let each call of `embedding` cast the rows that it looks up, not its whole table."""
    embedding.padding_idx = None  # of the whole table; it says something about gradients alone

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        ids, *rest = args or kwargs.values()
        chosen, numbers = ids.unique(return_inverse=True)
        rows = weight.stored[weight.name].detach()[chosen].to(weight.dtype)
        module._parameters[weight.name] = nn.Parameter(rows, requires_grad=False)
        return (numbers, *rest), {}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters[weight.name] = weight.placeholder

    embedding.register_forward_pre_hook(before, with_kwargs=True)
    embedding.register_forward_hook(after, always_call=True)


@contextmanager
def cast_while(
    bridge: TransformerBridge, dtype: torch.dtype, hold: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Inside, `bridge` itself computes in `dtype`; its modules are as they were at the end.

    Weights are cast while their module runs, those of `hold` all the time.
    """
    with running(bridge):
        if dtype == bridge.cfg.dtype:
            yield
        else:
            with _cast(bridge, dtype, hold):
                yield


@contextmanager
def _cast(
    bridge: TransformerBridge, dtype: torch.dtype, hold: Sequence[nn.Module]
) -> Iterator[None]:
    own, model = bridge.cfg.dtype, bridge.original_model
    # a wrapper around a module may ask for the dtype of its weights before it calls it
    wrappers = {
        m.original_component: m for m in model.modules() if isinstance(m, GeneralizedComponent)
    }
    tables = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    before = [table.copy() for table in tables]
    with ExitStack() as stack:
        homes = stack.enter_context(_without_accelerate(model))
        try:
            stations = stream_modules(model, tuple(bridge.blocks), homes, WeightTraffic(), dtype)
            for module, station in stations.items():
                outermost = wrappers.get(module, module)
                for handle in station.serve(outermost):
                    stack.callback(handle.remove)
                if outermost in hold:
                    station.fetch()
                    stack.callback(station.release)
            bridge.cfg.dtype = dtype  # in which it keeps activations
            yield
        finally:
            bridge.cfg.dtype = own
            for table, values in zip(tables, before, strict=True):
                table.update(values)


@contextmanager
def _without_accelerate(model: nn.Module) -> Iterator[dict[nn.Module, Home]]:
    """Inside, no module of `model` fetches its own weights; yields where each is at home."""
    homes = {m: home for m in model.modules() if (home := home_of(m)) is not None}
    taken = [
        (module, name, module.__dict__.pop(name))
        for module in homes
        for name in ACCELERATE
        if name in module.__dict__
    ]
    try:
        yield homes
    finally:
        for module, name, value in taken:
            module.__dict__[name] = value


@dataclass(frozen=True)
class _View:
    """A part of a weight that was cast, without its values."""

    weight: Away
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def values(self) -> Tensor:
        return self.weight.values().as_strided(self.size, self.stride, self.offset)


@contextmanager
def keep_no_casts(stations: Iterable[StreamedModule]) -> Iterator[None]:
    """A graph made inside keeps no cast weights of `stations`: they are cast again on the way back.

    Otherwise all of them would stay until the backward pass, a second copy of the model.
    """
    tables = [station.at_hand for station in stations if station.away]
    if not tables:
        yield
        return

    def pack(x: Tensor) -> Tensor | _View:
        place = x.untyped_storage().data_ptr()
        weight = next((table[place] for table in tables if place in table), None)
        return x if weight is None else _View(weight, x.shape, x.stride(), int(x.storage_offset()))

    def unpack(kept: Tensor | _View) -> Tensor:
        return kept.values() if isinstance(kept, _View) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
