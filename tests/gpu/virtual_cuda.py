"""A machine with virtual GPUs: what `torch.cuda` says there, and what runs in place of kernels.

    with virtual_cuda() as gpu:
        move(bridge)  # parameters and buffers -> cuda:0
        ds = ps.sweep(bridge, ...)

Triton kernels take virtual tensors alone. Where Triton interprets (TRITON_INTERPRET=1 before
import) they run in its interpreter, with the arguments that their launcher really passed; elsewhere
their torch references stand in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from patchsweep.forward import fused_layers
from patchsweep_kernels import (
    answer_logits,
    attention,
    attention_change,
    attribution,
    base_attention,
    dispatch,
    gate,
    replaced,
    replaced_torch,
    rms_norm,
    rotary,
    scatter,
    split,
    vocab,
)
from patchsweep_kernels.rows import Rows
from patchsweep_kernels.tokens import Tokens
from patchsweep_kernels.unembedding import Unembedding
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from visible_gpu import CUDA, META, device_guards

from gpu.virtual_device import DeviceMix, Gpu, Virtual, VirtualGraph, bare, tensors

MODULES = (
    attention,
    scatter,
    answer_logits,
    vocab,
    attribution,
    replaced,
    attention_change,
    rms_norm,
    gate,
    rotary,
    fused_layers,
)


class Kernel:
    """A Triton kernel that takes virtual tensors alone, and runs in the interpreter."""

    def __init__(self, kernel: Any, name: str) -> None:
        self.kernel, self.name = kernel, name

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            gpu = Gpu.current
            assert gpu is not None
            for x in tensors((args, kwargs)):
                if not isinstance(x, Virtual):
                    raise DeviceMix(
                        f"{self.name}: Pointer argument cannot be accessed from Triton (cpu "
                        f"tensor?), {tuple(x.shape)}; at {gpu._where()}"
                    )
            gpu.launch(f"triton::{self.name}")

            def interpret(args: Any, kwargs: Any) -> None:
                with gpu.quiet():
                    self.kernel[grid](*tree_map(bare, args), **tree_map(bare, kwargs))

            gpu.recorded(interpret, args, kwargs)

        return launch


def guard_cuda() -> None:
    """Let C++ guard a CUDA device in a build without CUDA: with the meta device's guard, a no-op.

    Indexing, `torch.tensor` and autograd look guards up.
    """
    guards = device_guards()
    assert guards[META]
    if not guards[CUDA]:
        guards[CUDA] = guards[META]


KERNELS = (
    (attention, "_prefix_kernel"),
    (split, "_merge_kernel"),
    (scatter, "_scatter_kernel"),
    (answer_logits, "_answer_kernel"),
    (vocab, "_vocab_kernel"),
    (attribution, "_dot_kernel"),
    (replaced, "_replaced_kernel"),
    (base_attention, "_base_kernel"),
    (attention_change, "_change_kernel"),
    (rms_norm, "_norm_kernel"),
    (gate, "_gate_kernel"),
    (rotary, "_rotary_kernel"),
)

H100 = {"multi_processor_count": 132}

# launches of one call, those of its tables included; other kernels launch once
LAUNCHES = {"replaced": 3, "attention_change": 9}


class Stream:
    """torch.cuda.Stream: what runs in it is done at once, so there is nothing to wait for."""

    here: ClassVar[list[Stream]] = []

    def __init__(self, device: Any = None) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...

    @classmethod
    @contextmanager
    def current(cls, stream: Stream) -> Iterator[None]:
        cls.here.append(stream)
        try:
            yield
        finally:
            cls.here.pop()


class Event:
    """torch.cuda.Event; copies to the host have arrived when one that was recorded later is."""

    coming: Any = ()

    def record(self, stream: Any = None) -> None:
        gpu = Gpu.current
        assert gpu is not None
        self.coming, gpu.coming = gpu.coming, []
        self.recorded = gpu.launches.total()

    def synchronize(self) -> None:
        gpu = Gpu.current
        assert gpu is not None
        gpu.events += 1
        if self.coming:
            gpu.sync("a result is awaited")
            gpu.waited.append((self.recorded, gpu.launches.total()))
            with gpu.quiet():
                gpu.arrive(self.coming)
            self.coming = ()


Stream.here.append(Stream())


class _Device:
    """torch.cuda.device"""

    def __init__(self, device: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


def _references(stack: ExitStack) -> None:
    """Torch references in place of the kernels, as fast as they are; tables still go to the GPU."""

    def attend(q, k, v, prefix_k, prefix_v, rows, *rest):  # type: ignore[no-untyped-def]
        gpu = Gpu.current
        assert gpu is not None
        settings = attention.launch_settings(
            q.shape[1] // k.shape[1], q.shape[2], v.shape[2], q.dtype, q.device
        )
        blocks = rows.block_table(settings["BLOCK_TOKENS"], q.device)
        tokens = rows.token_table(q.device)
        gpu.launch("triton::attention")

        def reference(given: Any, blocks: Any, tokens: Any, rest: Any) -> Any:
            with gpu.quiet():
                rest = tuple(bare(x) for x in rest)
                rows = _rows_of(bare(blocks), bare(tokens))
                out = attention.attention_torch.attend(*map(bare, given), rows, *rest)
            return gpu.wrap(out, q.device)

        return gpu.recorded(reference, (q, k, v, prefix_k, prefix_v), blocks, tokens, rest)

    def plain(reference: Any, name: str) -> Any:
        def run(*args: Any) -> Any:
            gpu = Gpu.current
            assert gpu is not None
            gpu.launch(f"triton::{name}", LAUNCHES.get(name, 1))
            return gpu.recorded(quietly, *args)

        def quietly(*args: Any) -> Any:
            gpu = Gpu.current
            assert gpu is not None
            device = args[0].device
            with gpu.quiet():
                out = reference(*tree_map(_inner, args))
            return tree_map(lambda x: gpu.wrap(x, device) if isinstance(x, Tensor) else x, out)

        return run

    stack.enter_context(mock.patch.object(attention, "_triton", attend))
    for module, run in (
        (scatter, plain(scatter._reference, "scatter")),
        (attribution, plain(attribution._reference, "attribution")),
        (rms_norm, plain(rms_norm._reference, "rms_norm")),
        (gate, plain(gate._reference, "gate")),
        (rotary, plain(rotary._reference, "rotary")),
        (replaced, plain(replaced_torch.attend, "replaced")),
        (attention_change, plain(replaced_torch.change_of_output, "attention_change")),
    ):
        stack.enter_context(mock.patch.object(module, "_triton", run))
    stack.enter_context(mock.patch.object(answer_logits, "_triton", _answer(answer_logits)))
    # sums over the vocabulary: torch operations, on the virtual GPU
    stack.enter_context(mock.patch.object(vocab, "use_triton", return_value=False))


def _rows_of(blocks: Tensor, tokens: Tensor) -> Rows:
    """The rows that the kernel's tables say, and nothing else."""
    first, start = tokens
    pair = torch.full_like(first, -1)
    for begin, stop, of_block, *_ in blocks.tolist():
        pair[begin:stop] = of_block
    rows = first.unique()
    return Rows(torch.cat((rows, rows.new_tensor([len(first)]))), pair[rows], start[rows])


def _inner(x: Any) -> Any:
    if isinstance(x, Tokens):
        return Tokens(bare(x.row), bare(x.pos), bare(x.pair))
    return bare(x)


def _answer(module: Any) -> Any:
    def run(resid: Any, unembedding: Any, tokens: Any, norm: Any) -> Any:
        gpu = Gpu.current
        assert gpu is not None
        gpu.launch("triton::answer_logits")
        assert norm is None
        with gpu.quiet():
            inner = Unembedding(
                bare(unembedding.w_u),
                bare(unembedding.bias),
                unembedding.scale,
                unembedding.softcap,
            )
            out = module._reference(bare(resid), inner, bare(tokens), None)
        return gpu.wrap(out, resid.device)

    return run


@contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, the CPU takes the kernels' references, also where Triton interprets."""
    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "use_triton", return_value=False))
        yield


@contextmanager
def virtual_cuda(
    *, gradients: bool = False, graphs: bool = False, **settings: Any
) -> Iterator[Gpu]:
    """A machine with virtual GPUs, inside.

    `graphs`: CUDA graphs are available.

    `gradients`: backward passes run too. C++ then sees meta tensors, since autograd takes those of
    CUDA in a build with CUDA alone.
    """
    guard_cuda()
    Virtual.backing = "meta" if gradients else None
    gpu = Gpu(**settings)

    def use_triton(x: Tensor) -> bool:
        return x.is_cuda and x.dtype != torch.float64

    with ExitStack() as stack:

        def patch(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value, create=True))

        patch(torch.cuda, "_lazy_init", lambda: None)
        patch(torch.cuda, "is_available", lambda: True)
        patch(torch.cuda, "is_initialized", lambda: True)
        patch(torch.cuda, "device_count", lambda: gpu.n_devices)
        patch(torch.cuda, "current_device", lambda: 0)
        patch(
            torch.cuda,
            "mem_get_info",
            lambda device=None: (gpu.total_bytes - gpu.in_use, gpu.total_bytes),
        )
        patch(torch.cuda, "memory_reserved", lambda device=None: gpu.in_use)
        patch(torch.cuda, "memory_allocated", lambda device=None: gpu.in_use)
        patch(torch.cuda, "max_memory_allocated", lambda device=None: gpu.peak)
        patch(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
        patch(torch.cuda, "empty_cache", lambda: None)
        patch(torch.cuda, "synchronize", lambda device=None: gpu.sync("synchronize"))
        patch(torch.cuda, "device", _Device)
        patch(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(**H100))
        patch(torch.cuda, "get_device_name", lambda device=None: "Virtual H100")
        patch(torch.cuda, "Stream", Stream)
        patch(torch.cuda, "Event", Event)
        patch(torch.cuda, "stream", Stream.current)
        patch(torch.cuda, "current_stream", lambda device=None: Stream.here[-1])
        if graphs:
            patch(torch.backends.cuda, "is_built", lambda: True)
            patch(torch.cuda, "CUDAGraph", VirtualGraph)
            patch(torch.cuda, "graph", lambda graph, **_: graph.captured())
            patch(torch.cuda, "graph_pool_handle", object)
        for module in MODULES:
            patch(module, "use_triton", use_triton)
        for module, kernel in KERNELS:
            name = module.__name__.rpartition(".")[2]
            patch(module, kernel, Kernel(getattr(module, kernel), name))
        patch(dispatch, "use_triton", use_triton)
        if not dispatch.INTERPRETED:
            _references(stack)
        _phases(stack, gpu)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # torch.tensor(list, device=...) makes a CPU tensor, and shows the mode how it is moved
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        Gpu.current = gpu
        try:
            with gpu:
                yield gpu
        finally:
            Gpu.current = None
            torch._C._set_only_lift_cpu_tensors(before)


def _phases(stack: ExitStack, gpu: Gpu) -> None:
    """Tell the parts of a sweep apart."""
    from patchsweep.runners.packed import adaptive, adaptive_runner, joint
    from patchsweep.runners.packed import forward as replay
    from patchsweep.runners.packed import runner as batches

    def within(target: Any, name: str, phase: str) -> None:
        original = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with gpu.during(phase):
                return original(*args, **kwargs)

        stack.enter_context(mock.patch.object(target, name, call))

    within(batches.PackedRunner, "load", "load (capture)")
    within(batches.PackedRunner, "references", "references")
    within(batches.PackedRunner, "start_together", "packed batches: before and after")
    within(batches.PackedRunner, "_run_packed_batch", "packed batch: around the blocks")
    within(batches.PackedRunner, "metrics_of", "packed batch: unembedding")
    within(replay.PackedBlocks, "enter", "packed batch: enter a block")
    within(replay.PackedBlocks, "replay", "packed batch: the block itself")
    within(joint.PackedJoint, "_run", "joint batches")
    within(joint.PackedJoint, "kept", "joint batches: runs that rows continue")
    within(joint.PackedJoint, "_run_rows", "joint batch: rows")
    within(adaptive_runner.AdaptiveRunner, "_run_batch", "adaptive batch: around the blocks")
    within(adaptive.AdaptiveBlocks, "run_block", "adaptive batch: around a block")


def move(
    model: nn.Module, device: str = "cuda:0", parts: dict[nn.Module, str] | None = None
) -> None:
    """Put every parameter and buffer of `model` on the virtual GPU, ties kept."""
    gpu = Gpu.current
    assert gpu is not None
    memo: dict[int, Any] = {}

    def moved(x: Tensor, place: torch.device) -> Any:
        if x is None or isinstance(x, Virtual):
            return x
        if id(x) not in memo:
            new = gpu.wrap(x.detach(), place)
            if isinstance(x, nn.Parameter):
                new = nn.Parameter(new, requires_grad=x.requires_grad)
            memo[id(x)] = (new, x)
        return memo[id(x)][0]

    places = {}
    for module, place in (parts or {}).items():
        for inner in module.modules():
            places.setdefault(id(inner), torch.device(place))
    for module in model.modules():
        place = places.get(id(module), torch.device(device))
        for table in (module._parameters, module._buffers):
            for name, x in table.items():
                table[name] = moved(x, place)
        for name, x in list(module.__dict__.items()):
            if isinstance(x, Tensor) and not isinstance(x, Virtual) and x.ndim:
                module.__dict__[name] = moved(x, place)
