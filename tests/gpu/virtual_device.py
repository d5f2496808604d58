"""A virtual GPU: tensors that say they lie on it, and a mode that keeps CUDA's rules and counts.

A `Virtual` tensor says that it lies on `cuda:0`, to C++ too, and keeps its values in a CPU tensor.
The mode `Gpu` carries every aten operation out on those values, after it has checked what CUDA
would check: tensors of two devices in one operation are an error, but for 0-dim CPU tensors in
pointwise operations, and CPU indices of CUDA data (which are copied: a wait). It counts kernel
launches, copies between host and device, how often the host waits, and the bytes in use. Nothing
is faked but the device.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
CPU = torch.device("cpu")


def _ops(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


# the host waits for the device: the value, or the shape of the result, is needed
WAITS = _ops(
    "_local_scalar_dense _unique _unique2 bincount equal is_nonzero masked_select nonzero "
    "unique_consecutive unique_dim"
)
# no kernel is launched: allocations, views that the schema does not mark
FREE = _ops(
    "_has_same_storage_numel _reshape_alias _unsafe_view alias detach empty empty_like "
    "empty_strided is_same_size lift lift_fresh new_empty new_empty_strided resize_ set_ "
    "sym_size"
)
# outer metadata would go stale
METADATA = _ops("as_strided_ resize_ set_ squeeze_ swapaxes_ t_ transpose_ unsqueeze_")
# their second argument holds indices
INDEXED = _ops("_index_put_impl_ _unsafe_index _unsafe_index_put index index_put index_put_")


class DeviceMix(RuntimeError):
    """Tensors of several devices met."""


class Virtual(torch.Tensor):
    """A tensor on a virtual GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device, requires_grad: bool = False) -> Virtual:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=cls.backing or device,
            requires_grad=requires_grad,
        )
        self.inner = inner
        self.place = device
        return self

    # None: C++ too sees a CUDA tensor. "meta": Python alone does, and autograd, which looks for
    # streams of a CUDA tensor, is content.
    backing: str | None = None
    device = property(lambda self: self.place)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    __torch_function__ = torch._C._disabled_torch_function_impl

    def record_stream(self, stream: Any) -> None: ...  # type: ignore[override]

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:  # type: ignore[override]
        return self.cpu().tolist()

    # C++ makes a tensor of a list of indices, on the device that it sees: on meta it would be empty
    def __getitem__(self, index: Any) -> Any:
        return torch.Tensor.__getitem__(self, _without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _without_lists(index), value)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Virtual({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: Any) -> Virtual:
        new = Virtual(self.inner.detach().clone(), self.device, self.requires_grad)
        if isinstance(self, nn.Parameter):
            new._is_param = True  # type: ignore[attr-defined]
        return new

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu = Gpu.current
        assert gpu is not None, f"{func} on a virtual tensor outside virtual_cuda()"
        return gpu.run(func, args, kwargs or {})


def _without_lists(index: Any) -> Any:
    if isinstance(index, list):
        return torch.tensor(index, dtype=None if index else torch.long)
    return tuple(map(_without_lists, index)) if isinstance(index, tuple) else index


class Gpu(TorchDispatchMode):
    """Carries operations out, and counts."""

    current: Gpu | None = None

    def __init__(self, *, total_bytes: int = 80 * 10**9, n_devices: int = 1) -> None:
        super().__init__()
        self.total_bytes, self.n_devices = total_bytes, n_devices
        self.launches: Counter[tuple[str, str]] = Counter()  # (phase, op)
        self.syncs: Counter[tuple[str, str, str]] = Counter()  # (phase, why, where)
        self.copies: Counter[tuple[str, str, str]] = Counter()  # (phase, kind, where)
        self.copied_bytes: Counter[str] = Counter()
        self.wide: Counter[tuple[str, str, str]] = Counter()  # fp64 results: (phase, op, where)
        self.visits: Counter[str] = Counter()
        self.events = 0  # that the host waited for: of earlier work alone
        # pinned tensors of the CPU, and what a copy puts there once the host waits for it
        self.coming: list[tuple[Tensor, Tensor]] = []
        self.waited: list[tuple[int, int]] = []  # per result: launches when sent, when waited for
        self.phase = ["other"]
        self.suspended = 0
        self.live: dict[int, list[int]] = {}  # storage -> [bytes, wrappers]
        self.in_use = 0
        self.peak = 0
        self._serial = 0
        self.capture: VirtualGraph | None = None  # in progress
        self._recording: VirtualGraph | None = None  # the same, but inside an operation
        self.pinned: set[int] = set()
        self._kept_pinned: list[Tensor] = []

    # what happened where

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        self.phase.append(phase)
        self.visits[phase] += 1
        try:
            yield
        finally:
            self.phase.pop()

    def _where(self) -> str:
        frame = sys._getframe(2)
        inside = ""
        while frame is not None:
            path = frame.f_code.co_filename
            if "virtual_cuda" not in path:
                if "/patchsweep" in path and "/tests/" not in path:
                    short = path.split("/engine/")[-1].split("/kernels/")[-1]
                    return f"{short}:{frame.f_lineno}" + (f" ({inside})" if inside else "")
                if not inside and ("/transformers/" in path or "/transformer_lens/" in path):
                    inside = path.split("site-packages/")[-1] + f":{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return inside or "?"

    def launch(self, name: str, n: int = 1) -> None:
        if not self.suspended:
            self.launches[self.phase[-1], name] += n

    def sync(self, why: str) -> None:
        if self.capture is not None:
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing: {why} at "
                f"{self._where()}"
            )
        if not self.suspended:
            self.syncs[self.phase[-1], why, self._where()] += 1

    def arrive(self, coming: list[tuple[Tensor, Tensor]]) -> None:
        """Finish copies to pinned memory."""
        for here, values in coming:
            here.copy_(values)

    def _note_wide(self, name: str, result: Any) -> None:
        if not self.suspended and any(x.dtype == torch.float64 for x in tensors(result)):
            self.wide[self.phase[-1], name, self._where()] += 1

    def copy(self, kind: str, n_bytes: int) -> None:
        if self.capture is not None and "pageable" in kind:
            self.sync(kind)
        if not self.suspended:
            self.copies[self.phase[-1], kind, self._where()] += 1
            self.copied_bytes[kind] += n_bytes

    # memory

    def wrap(self, inner: Tensor, device: torch.device) -> Virtual:
        new = Virtual(inner.detach() if inner.requires_grad else inner, device)
        key = inner.untyped_storage()._cdata
        n_bytes = inner.untyped_storage().nbytes()
        if key in self.live:
            self.live[key][1] += 1
        else:
            self._serial += 1
            self.live[key] = [n_bytes, 1, self._serial]
            self.in_use += n_bytes
            self.peak = max(self.peak, self.in_use)
        weakref.finalize(new, self._forget, key)
        return new

    def _forget(self, key: int) -> None:
        entry = self.live.get(key)
        if entry is None:
            return
        entry[1] -= 1
        if entry[1] <= 0:
            self.in_use -= entry[0]
            del self.live[key]

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.recorded(self._run, func, args, kwargs)

    def recorded(self, call: Any, *args: Any) -> Any:
        """Return what `call` gives; a capture in progress keeps it, to call it again."""
        graph, self._recording = self._recording, None
        try:
            result = call(*args)
        finally:
            self._recording = graph
        if graph is not None:
            graph.keep(call, args, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        if name == "aten::is_pinned":
            return args[0].untyped_storage()._cdata in self.pinned
        if name in ("aten::pin_memory", "aten::_pin_memory"):
            result = args[0].clone()
            self.pinned.add(result.untyped_storage()._cdata)
            self._kept_pinned.append(result)  # its address is not used again
            return result
        if kwargs.get("pin_memory") and torch.device(kwargs.get("device") or CPU).type == "cpu":
            result = func(*args, **{**kwargs, "pin_memory": False})
            self.pinned.add(result.untyped_storage()._cdata)
            self._kept_pinned.append(result)
            return result
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        if wanted is not None and (
            (wanted.type == "cuda" and wanted.index is None)
            or (wanted.type == "meta" and Virtual.backing == "meta")  # C++ made options of a tensor
        ):
            wanted = torch.device("cuda", 0)
        found = list(tensors((args, kwargs)))
        mine = [x for x in found if isinstance(x, Virtual)]
        if not mine and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_", "aten::_copy_from"):
            return self._copy(func, name, args, kwargs, wanted)
        device = wanted if wanted is not None else mine[0].device
        if wanted is not None and wanted.type == "cpu" and mine:
            # x.new_zeros(..., device="cpu") and its like
            return func(*tree_map(bare, args), **tree_map(bare, kwargs))
        self._check(func, name, args, kwargs, found, device)
        if name in METADATA and mine:
            raise NotImplementedError(f"{name} on a virtual tensor")
        if name in WAITS or (
            name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        ):
            self.sync(name)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        bare_kwargs = tree_map(bare, kwargs)
        if name == "aten::_efficientzerotensor":  # has no storage; forward mode makes them
            if not args[0]:  # a zero that stands for a number
                return torch.zeros((), dtype=kwargs.get("dtype"))
            return self.wrap(torch.zeros(args[0], dtype=kwargs.get("dtype")), device)
        if name == "aten::histc" and not args[0].dtype.is_floating_point:
            args = (args[0].inner.float(), *args[1:])  # of integers on CUDA alone
        if wanted is not None:
            bare_kwargs["device"] = CPU
        result = func(*tree_map(bare, args), **bare_kwargs)
        returned = self._returned(func, args, kwargs, result, device)
        if not _is_view(func) and name not in FREE and name != "aten::_local_scalar_dense":
            self.launch(name)
            self._note_wide(name, result)
        return returned

    def _returned(self, func: Any, args: Any, kwargs: Any, result: Any, device: Any) -> Any:
        """Written arguments come back themselves; everything else is wrapped."""
        schema = func._schema
        named = {
            a.name: (args[i] if i < len(args) else kwargs.get(a.name))
            for i, a in enumerate(schema.arguments)
        }
        written = {}
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for alias in argument.alias_info.before_set:
                    written[alias] = named[argument.name]
        single = not isinstance(result, (tuple, list)) or len(schema.returns) == 1
        results = [result] if single else list(result)
        out = []
        for declared, value in zip(schema.returns, results, strict=True):
            info = declared.alias_info
            if info is not None and info.is_write:
                original = next(written[a] for a in info.before_set if a in written)
                if isinstance(original, Virtual) and original.inner.shape != original.shape:
                    raise NotImplementedError(f"{schema.name} resized its result")
                out.append(original)
            else:
                out.append(
                    tree_map(lambda x: self.wrap(x, device) if isinstance(x, Tensor) else x, value)
                )
        return out[0] if single else type(result)(out)

    def _check(
        self, func: Any, name: str, args: Any, kwargs: Any, found: list[Tensor], device: Any
    ) -> None:
        places = {x.device for x in found}
        if name in INDEXED:
            self._check_index(name, args, device)
            indices = [x for x in args[1] if isinstance(x, Tensor)]
            found = [x for x in found if not any(x is i for i in indices)]
            places = {x.device for x in found}
            if "put" in name:  # a single value may come from anywhere
                values = args[2]
                if values.numel() == 1 and values.dim() == 0:
                    places = {args[0].device}
        if len(places) <= 1:
            return
        pointwise = torch.Tag.pointwise in func.tags or name in (
            "aten::where",
            "aten::masked_fill",
            "aten::masked_fill_",
            "aten::lerp",
            "aten::lerp_",
        )
        rest = {
            x.device for x in found if not (pointwise and x.dim() == 0 and x.device.type == "cpu")
        }
        if len(rest) > 1:
            shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in found)
            raise DeviceMix(
                f"{name}: expected all tensors to be on the same device, found {shapes}; at "
                f"{self._where()}"
            )

    def _check_index(self, name: str, args: Any, device: Any) -> None:
        data = args[0]
        for index in args[1]:
            if not isinstance(index, Tensor):
                continue
            if isinstance(data, Virtual):
                if not isinstance(index, Virtual):
                    self.copy("H2D blocking", index.numel() * index.element_size())
                    self.sync("a CPU index of CUDA data is copied")
                elif index.device != data.device:
                    raise DeviceMix(
                        f"{name}: indices on {index.device}, data on {data.device}; at "
                        f"{self._where()}"
                    )
                if index.dtype in (torch.bool, torch.uint8):
                    self.sync("mask index: nonzero")
            elif isinstance(index, Virtual):
                raise DeviceMix(
                    f"{name}: indices should be on the CPU, as the data is; at {self._where()}"
                )

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any, wanted: Any) -> Any:
        if name == "aten::_to_copy":
            source = args[0]
            target = wanted if wanted is not None else source.device
            blocking = not kwargs.get("non_blocking", False)
        else:
            source, target = args[1], args[0].device
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        n_bytes = source.numel() * source.element_size()
        if (
            source.device.type == "cpu"
            and target.type == "cuda"
            and not blocking
            and (source.untyped_storage()._cdata in self.pinned)
        ):
            self.copy("H2D async (pinned)", n_bytes)
        elif source.device.type == "cpu" and target.type == "cuda":
            self.copy("H2D blocking" if blocking else "H2D staged (pageable)", n_bytes)
            if blocking:
                self.sync("blocking copy to the device")
            elif n_bytes > 64 * 1024:
                self.sync("pageable copy above 64 KB")
        elif (
            name != "aten::_to_copy"
            and source.device.type == "cuda"
            and not blocking
            and args[0].untyped_storage()._cdata in self.pinned
        ):
            self.copy("D2H async (pinned)", n_bytes)
            self.coming.append((args[0], bare(source).clone()))
            args[0].fill_(float("nan") if args[0].is_floating_point() else -1)
            return args[0]
        elif source.device.type == "cuda" and target.type == "cpu":
            self.copy("D2H", n_bytes)
            self.sync("copy to the host")
        else:
            self.launch(name)
            if source.device != target:
                self.copy("P2P", n_bytes)
        if (
            name == "aten::_to_copy"
            and source.device == target
            and source.dtype == kwargs.get("dtype", source.dtype)
            and kwargs.get("memory_format") is None
            and isinstance(source, Virtual)
        ):
            # a move to where it is: C++ did not see that, Python's device is not its own
            self.launches[self.phase[-1], name] -= 1
            return self.wrap(source.inner, target)
        if name != "aten::_to_copy":
            inner = args[0].inner if isinstance(args[0], Virtual) else args[0]
            inner.copy_(bare(source))
            return args[0]
        inside = {
            k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")
        }
        result = func(bare(source), device=CPU, **inside)
        if target.type == "cuda":
            self._note_wide(name, result)
        return self.wrap(result, target) if target.type == "cuda" else result

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, nothing is counted."""
        self.suspended += 1
        try:
            yield
        finally:
            self.suspended -= 1

    # totals

    def totals(self) -> dict[str, dict[str, int]]:
        table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for (phase, _), n in self.launches.items():
            table[phase]["launches"] += n
        for (phase, _, _), n in self.syncs.items():
            table[phase]["syncs"] += n
        for (phase, _, _), n in self.copies.items():
            table[phase]["copies"] += n
        for phase, n in self.visits.items():
            table[phase]["visits"] = n
        return {k: dict(v) for k, v in table.items()}


@dataclass(frozen=True)
class _Memory:
    """The memory of a tensor, which does not keep the tensor."""

    inner: Tensor
    device: torch.device


class VirtualGraph:
    """Stands for `torch.cuda.CUDAGraph`: calls the operations of the capture again.

    They read and write the memory that they had then. A replay fails if memory from outside of the
    capture was freed since.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any]] = []
        self.inside: set[int] = set()  # storages of results
        self.outside: dict[int, int] = {}  # storage -> its serial number

    @contextmanager
    def captured(self) -> Iterator[None]:
        gpu = Gpu.current
        assert gpu is not None
        gpu.capture = gpu._recording = self
        try:
            yield
        finally:
            gpu.capture = gpu._recording = None

    def keep(self, call: Any, args: Any, result: Any) -> None:
        gpu = Gpu.current
        assert gpu is not None
        read = [x for x in tensors(args) if isinstance(x, Virtual)]
        made = [x for x in tensors(result) if isinstance(x, Virtual)]
        if not read and not made:
            return  # of the CPU: done once
        for x in read:
            key = x.inner.untyped_storage()._cdata
            if key not in self.inside:
                self.outside[key] = gpu.live[key][2]
        self.inside.update(
            key
            for x in made
            for key in [x.inner.untyped_storage()._cdata]
            if key not in self.outside
        )
        self.calls.append((call, tree_map(_memory, args), tree_map(_memory, result)))

    def replay(self) -> None:
        gpu = Gpu.current
        assert gpu is not None
        for key, serial in self.outside.items():
            if key not in gpu.live or gpu.live[key][2] != serial:
                raise RuntimeError("a graph reads memory that was freed since its capture")
        gpu.launch("cuda::graph")
        with gpu.quiet():
            for call, args, result in self.calls:
                new = call(*tree_map(_tensor, args))
                for old, x in zip(_memories(result), tensors(new), strict=True):
                    old.inner.copy_(bare(x))


def _memory(x: Any) -> Any:
    return _Memory(x.inner, x.device) if isinstance(x, Virtual) else x


def _tensor(x: Any) -> Any:
    gpu = Gpu.current
    assert gpu is not None
    return gpu.wrap(x.inner, x.device) if isinstance(x, _Memory) else x


def _memories(tree: Any) -> Iterator[_Memory]:
    if isinstance(tree, _Memory):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from _memories(x)


def bare(x: Any) -> Any:
    if isinstance(x, Virtual):
        return x.inner
    if isinstance(x, torch.device) and x.type == "cuda":
        return CPU
    return x


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from tensors(x)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )
