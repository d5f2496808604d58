"""Casts of 16-bit weights to fp32, made while a module runs and freed afterwards.

A block's weights are cast when its streamed module fetches them (see `weight_streaming`), an
embedding's row by row. Autograd graphs keep no casts. The bridge itself can run in fp32 inside a
context.
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
    """Whether `cast_rows` works for the module: an embedding in memory that is called with ids."""
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return (
        isinstance(module, nn.Embedding)
        and first in ("input", "input_ids")
        and [weight.placeholder.is_meta for weight in station.away] == [False]
    )


def cast_rows(embedding: nn.Embedding, weight: Away) -> None:
    """Make each call of `embedding` cast only the rows that it looks up."""
    embedding.padding_idx = None  # an index into the full table; it matters for gradients only

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        ids, *rest = args or kwargs.values()
        row_ids, numbers = ids.unique(return_inverse=True)
        rows = weight.stored[weight.name].detach()[row_ids].to(weight.dtype)
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
    """Inside, `bridge` computes in `dtype`; on exit its modules are restored.

    Weights are cast while their module runs, those of `hold` for the whole context.
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
    # a wrapper may read the dtype of a module's weights before it calls the module
    wrappers = {
        m.original_component: m for m in model.modules() if isinstance(m, GeneralizedComponent)
    }
    tables = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    before = [table.copy() for table in tables]
    with ExitStack() as stack:
        homes = stack.enter_context(_without_accelerate(model))
        try:
            streamed = stream_modules(model, tuple(bridge.blocks), homes, WeightTraffic(), dtype)
            for module, streamed_module in streamed.items():
                outermost = wrappers.get(module, module)
                for handle in streamed_module.serve(outermost):
                    stack.callback(handle.remove)
                if outermost in hold:
                    streamed_module.fetch()
                    stack.callback(streamed_module.release)
            bridge.cfg.dtype = dtype  # the bridge's dtype of activations
            yield
        finally:
            bridge.cfg.dtype = own
            for table, values in zip(tables, before, strict=True):
                table.update(values)


@contextmanager
def _without_accelerate(model: nn.Module) -> Iterator[dict[nn.Module, Home]]:
    """Inside, accelerate fetches no weights of `model`; yields each offloaded module's home."""
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
    """A view of a cast weight, stored as shape and stride instead of values."""

    weight: Away
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def values(self) -> Tensor:
        return self.weight.values().as_strided(self.size, self.stride, self.offset)


@contextmanager
def keep_no_casts(stations: Iterable[StreamedModule]) -> Iterator[None]:
    """Inside, autograd graphs save no cast weights of `stations`; the backward pass casts again.

    Otherwise all casts would stay until the backward pass, a second copy of the model.
    """
    tables = [station.at_hand for station in stations if station.away]
    if not tables:
        yield
        return

    def pack(x: Tensor) -> Tensor | _View:
        address = x.untyped_storage().data_ptr()
        weight = next((table[address] for table in tables if address in table), None)
        return x if weight is None else _View(weight, x.shape, x.stride(), int(x.storage_offset()))

    def unpack(kept: Tensor | _View) -> Tensor:
        return kept.values() if isinstance(kept, _View) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
