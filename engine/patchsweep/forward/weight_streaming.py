"""Weight streaming: a module's weights are fetched while it runs and released afterwards.

`accelerate` fetches the weights of an offloaded module for each call of its smallest submodules.
Here a whole block is one streamed module: its weights are fetched once for all rows of a packed
batch, and its inputs are moved to the device where it runs. On a GPU the next block's weights are
on their way while this block runs. 16-bit weights that compute in fp32 are cast in the same way,
one block at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from patchsweep.models.arithmetic import SIXTEEN_BITS
from patchsweep.models.memory import give_memory_back
from patchsweep.models.offload import Home, Stored
from patchsweep.models.page_cache import extent_of, forget, overflows

# a weight begins at a multiple of so many bytes: buffers are viewed in every dtype
_ALIGNED = 256


class SplitBlock(Exception):
    """A block's weights are placed on several devices; the text names them."""


@dataclass
class WeightTraffic:
    """Counts of fetched weights."""

    n_bytes: int = 0


@dataclass(frozen=True)
class Away:
    """A weight that is stored elsewhere, or in another dtype, while its module does not run."""

    owner: nn.Module
    name: str
    stored: Stored  # holds the values under `name`
    placeholder: nn.Parameter  # the owner's parameter while it does not run
    device: torch.device  # where the owner runs
    dtype: torch.dtype  # that the owner computes in

    @property
    def n_bytes(self) -> int:
        """Bytes that one call fetches; 0 for a weight in memory, which is only cast."""
        if not self.placeholder.is_meta:
            return 0
        return self.placeholder.numel() * self.placeholder.element_size()

    def zeros(self) -> Tensor:
        """Return zeros of the weight's shape that take no memory; `values()` if it is offloaded."""
        if self.placeholder.is_meta:
            return self.values()
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return zero.expand(self.placeholder.shape)

    def values(self) -> Tensor:
        """Return the weight's values on `device` in `dtype`."""
        # on the CPU a weight of a safetensors file stays mapped and is not copied
        return self.stored[self.name].detach().to(self.device, self.dtype, non_blocking=True)


class WeightCopies:
    """Sends offloaded weights to one GPU, in a stream of its own, beside what the GPU computes.

    A copy from ordinary memory waits for the GPU, so weights go through pinned memory: two buffers
    that take turns, of which one is filled while the other one is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None  # made when the first weights go
        self._buffers: list[tuple[Tensor, Any]] = []  # and their events; the next to fill first

    def send(self, weights: Sequence[tuple[Tensor, torch.dtype]]) -> list[Tensor]:
        """Return tensors on the GPU to which `weights`, of the CPU, are copied and cast.

        Each comes with the dtype that it is cast to. The host waits for no kernel, only until its
        buffer, which the copies before the last ones read, is free. See `await_on_device`.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        places, total = [], 0
        for weight, _ in weights:
            places.append(total)
            total += -(-weight.numel() * weight.element_size() // _ALIGNED) * _ALIGNED
        buffer, copied = self._turn(total)
        there = []
        with torch.cuda.stream(self._stream):
            for place, (weight, dtype) in zip(places, weights, strict=True):
                n_bytes = weight.numel() * weight.element_size()
                pinned = buffer[place : place + n_bytes].view(weight.dtype).view(weight.shape)
                pinned.copy_(weight)
                there.append(pinned.to(self.device, non_blocking=True).to(dtype))
            copied.record(self._stream)
        self._buffers.append((buffer, copied))
        return there

    def await_on_device(self, there: Sequence[Tensor]) -> None:
        """Make what the GPU computes from now on wait for all copies; the host does not wait."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in there:
            tensor.record_stream(current)  # its memory is not used again before this work is done

    def _turn(self, n_bytes: int) -> tuple[Tensor, Any]:
        """Return a buffer that no copy reads any more, and its event."""
        if len(self._buffers) < 2:
            return self._pinned(n_bytes), torch.cuda.Event()
        buffer, copied = self._buffers.pop(0)
        copied.synchronize()
        return buffer if len(buffer) >= n_bytes else self._pinned(n_bytes), copied

    @staticmethod
    def _pinned(n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class StreamedModule:
    """A module whose weights, and those of its submodules, are fetched together."""

    def __init__(self, device: torch.device, away: Sequence[Away], traffic: WeightTraffic) -> None:
        self.device = device
        self.away = list(away)
        self._traffic = traffic
        self._n_users = 0
        maybe = (extent_of(w.stored, w.name) for w in self.away if w.placeholder.is_meta)
        self.extents = tuple(extent for extent in maybe if extent is not None)  # in its files
        self.forgetful = False  # whether the extents' pages leave the page cache after each call
        self.at_hand: dict[int, Away] = {}  # address of the values -> the weight, while it runs
        # on a GPU, for offloaded weights; None: each is copied when the module runs
        self.copies: WeightCopies | None = None
        self.follower: StreamedModule | None = None  # the next block
        self._arriving: list[Tensor] | None = None  # copies that were sent ahead

    @property
    def n_bytes(self) -> int:
        """Bytes that one call fetches."""
        return sum(weight.n_bytes for weight in self.away)

    def fetch(self, *, nothing_passes: bool = False) -> None:
        """Fetch the weights unless they are fetched already.

        `nothing_passes`: the inputs have no rows, so zeros of the right shapes suffice.
        """
        self._n_users += 1
        if self._n_users > 1 or not self.away:
            return
        for weight, values in zip(self.away, self._values(nothing_passes), strict=True):
            weight.owner._parameters[weight.name] = nn.Parameter(values, requires_grad=False)
            self.at_hand[values.untyped_storage().data_ptr()] = weight
        self._traffic.n_bytes += self.n_bytes
        # passes with gradients go back from block to block
        if self.follower is not None and not torch.is_grad_enabled():
            self.follower.send_ahead()

    def send_ahead(self) -> None:
        """Send the weights to the GPU, for a call that comes next; nothing waits for them."""
        if self.copies is not None and self._arriving is None and not self._n_users:
            self._arriving = self._sent(self.copies)

    def _sent(self, copies: WeightCopies) -> list[Tensor]:
        return copies.send([(w.stored[w.name].detach(), w.dtype) for w in self.away])

    def _values(self, nothing_passes: bool) -> Sequence[Tensor]:
        if self.copies is None:
            return [weight.zeros() if nothing_passes else weight.values() for weight in self.away]
        arriving, self._arriving = self._arriving or self._sent(self.copies), None
        self.copies.await_on_device(arriving)
        return arriving

    def release(self) -> None:
        """Release the weights after the last of several nested `fetch` calls."""
        self._n_users -= 1
        if self._n_users or not self.away:
            return
        for weight in self.away:
            weight.owner._parameters[weight.name] = weight.placeholder
        self.at_hand.clear()
        if self.forgetful:
            forget(self.extents)
        if self.device.type == "cpu" and self.n_bytes:
            give_memory_back()

    def leave(self, owners: Collection[nn.Module]) -> None:
        """Stop casting the in-memory weights of `owners`; they keep their dtype while they run."""
        self.away = [w for w in self.away if w.placeholder.is_meta or w.owner not in owners]

    def serve(self, module: nn.Module) -> list[RemovableHandle]:
        """Fetch and release around every call of `module`, and move its inputs to the device."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            passing = [x.numel() for x in args if isinstance(x, Tensor)]
            self.fetch(nothing_passes=bool(passing) and not any(passing))
            return send_to_device(args, self.device), send_to_device(kwargs, self.device)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.release()

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            # a failed call releases the weights too
            module.register_forward_hook(after, always_call=True),
        ]


def stream_modules(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    homes: Mapping[nn.Module, Home],
    traffic: WeightTraffic,
    dtype: torch.dtype | None,
) -> dict[nn.Module, StreamedModule]:
    """Return the streamed modules of `model`: `blocks`, and other modules that own weights.

    16-bit weights become `dtype` while their streamed module runs; None: they are not cast.
    Modules without such weights and without a home need no streaming and are left out.

    Raises:
        SplitBlock: a block has weights on several devices.
    """
    finder = _Finder(homes, dtype)
    finder.settle(model)
    streamed: dict[nn.Module, StreamedModule] = {}
    inside: set[nn.Module] = set()
    for layer, block in enumerate(blocks):
        members = [module for module in block.modules() if finder.cares_for(module)]
        inside.update(block.modules())
        devices = {finder.device_of(module) for module in members}
        if len(devices) > 1:
            names = " and ".join(sorted(str(device) for device in devices))
            raise SplitBlock(f"block {layer} is split over {names}")
        if devices:
            streamed[block] = StreamedModule(devices.pop(), finder.away(members), traffic)
    for module in model.modules():
        if module not in inside and finder.cares_for(module):
            streamed[module] = StreamedModule(
                finder.device_of(module), finder.away([module]), traffic
            )
    forgetful = overflows(
        extent for streamed_module in streamed.values() for extent in streamed_module.extents
    )
    for streamed_module in streamed.values():
        streamed_module.forgetful = forgetful
    _send_ahead([streamed[block] for block in blocks if block in streamed])
    return streamed


def _send_ahead(blocks: Sequence[StreamedModule]) -> None:
    """Let each of `blocks` that runs on a GPU send the weights of the one behind it there."""
    copies: dict[torch.device, WeightCopies] = {}
    for block, follower in itertools.zip_longest(blocks, blocks[1:]):
        if (
            block.device.type == "cuda"
            and block.away
            and all(weight.placeholder.is_meta for weight in block.away)
        ):
            if block.device not in copies:
                copies[block.device] = WeightCopies(block.device)
            block.copies = copies[block.device]
        block.follower = follower


class _Finder:
    """Finds the weights that are not on the device, or not in the dtype, that they are used in."""

    def __init__(self, homes: Mapping[nn.Module, Home], dtype: torch.dtype | None) -> None:
        self.homes, self.dtype = homes, dtype

    def cares_for(self, module: nn.Module) -> bool:
        """Whether the module needs streaming: it has a home, or weights to cast."""
        if module in self.homes:
            return bool(module._parameters) or bool(module._buffers)
        own = (p for p in module._parameters.values() if p is not None)
        return any(p.dtype != self._needed(p) for p in own)

    def device_of(self, module: nn.Module) -> torch.device:
        """Return the device where the module runs."""
        if module in self.homes:
            return self.homes[module].device
        return next(p.device for p in module._parameters.values() if p is not None)

    def settle(self, model: nn.Module) -> None:
        """Fetch vectors (norms, biases) and buffers for good; small, and read at any time."""
        for module in model.modules():
            for weight in self._weights(module):
                if weight.placeholder.ndim < 2:
                    module._parameters[weight.name] = nn.Parameter(
                        weight.values().clone(), requires_grad=False
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._needed(buffer))

    def away(self, members: Sequence[nn.Module]) -> list[Away]:
        """Return the weights that a streamed module of `members` fetches; vectors are left out."""
        return [
            weight
            for module in members
            for weight in self._weights(module)
            if weight.placeholder.ndim > 1
        ]

    def _weights(self, module: nn.Module) -> Iterator[Away]:
        home = self.homes.get(module)
        stored = None if home is None else home.away
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            dtype = self._needed(parameter)
            if stored is not None and parameter.is_meta:
                assert home is not None
                yield Away(module, name, stored, parameter, home.device, dtype)
            elif dtype != parameter.dtype:
                yield Away(module, name, {name: parameter}, parameter, parameter.device, dtype)

    def _needed(self, weight: Tensor) -> torch.dtype:
        """Return the dtype that `weight` is computed in."""
        cast = self.dtype is not None and weight.dtype in SIXTEEN_BITS
        return self.dtype if cast else weight.dtype  # type: ignore[return-value]
