"""Compile every kernel for GPUs that need not be present, as its launcher would launch it.

Run as a script, for all launches or for those whose name begins as given. Prints a JSON object,
launch name -> target -> registers, shared memory, spills. Exits with 1 if a kernel does not
compile, asks for more shared memory than the GPU has, or spills more than a few registers.

The launchers run on CPU tensors with the kernel replaced by a recorder, so types, tile sizes and
options are the real ones.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from naive import make_rows
from patchsweep_kernels import (
    answer_logits,
    attention,
    attention_change,
    attribution,
    base_attention,
    gate,
    replaced,
    rms_norm,
    rotary,
    scatter,
    split,
    vocab,
)
from patchsweep_kernels.tokens import Tokens
from patchsweep_kernels.unembedding import FinalNorm, Unembedding
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Target, and the bytes of shared memory that one block may use there.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
# Bytes per thread. fp32 heads of 256 spill about 200; a lost tile of sums would be thousands.
SPILL_LIMIT = 512
OPTIONS = ("num_warps", "num_stages")


class Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments, self.keywords = arguments, keywords


def launches() -> Iterator[tuple[str, Any, str, Callable[[], object]]]:
    """Name, module, kernel and launch of every variant that users meet."""
    fp32, bf16 = torch.float32, torch.bfloat16
    token, head = torch.arange(40), torch.arange(40) % 12
    for mode, dtype in (("set", bf16), ("add", bf16), ("add", fp32)):
        x, cells = torch.zeros(64, 12, 64, dtype=dtype), torch.zeros(40, 64, dtype=dtype)
        yield (
            f"scatter-{mode}-{_short(dtype)}",
            scatter,
            "_scatter_kernel",
            partial(scatter._triton, x, cells, token, token, head, mode),
        )
    for dtype in (bf16, fp32):
        rows = torch.zeros(512, 768, dtype=dtype)
        yield (
            f"attribution-{_short(dtype)}",
            attribution,
            "_dot_kernel",
            partial(attribution._triton, rows, rows, rows, torch.zeros(512)),
        )
    variants: tuple[tuple[torch.dtype, int, int, dict[str, Any]], ...] = (
        (fp32, 3, 64, {}),
        (fp32, 1, 128, {"softcap": 50.0}),
        (fp32, 2, 256, {"window": 4}),
        (bf16, 1, 64, {}),
        (bf16, 4, 128, {}),
        (bf16, 2, 256, {"window": 4, "softcap": 50.0}),
        (bf16, 8, 64, {"window": 4, "sinks": torch.zeros(16)}),
        (fp32, 71, 64, {}),
        (bf16, 48, 128, {}),
    )
    for dtype, share, d, variant in variants:
        yield (
            f"attention-share{share}-d{d}-{'-'.join(variant) or 'plain'}-{_short(dtype)}",
            attention,
            "_prefix_kernel",
            partial(_attention, share, d, dtype, **variant),
        )
    for dtype, share, d, variant in (variants[0], variants[2], *variants[4:7]):
        yield (
            f"attention_split-share{share}-d{d}-{'-'.join(variant) or 'plain'}-{_short(dtype)}",
            attention,
            "_prefix_kernel",
            partial(_attention, share, d, dtype, n_parts=4, **variant),
        )
    for dtype in (fp32, bf16):
        parts, out = torch.zeros(4, 56, 12, 64), torch.zeros(56, 12, 64, dtype=dtype)
        yield (
            f"merge-{_short(dtype)}",
            split,
            "_merge_kernel",
            partial(split.merge, parts, parts[..., 0], out),
        )
    adaptive: tuple[tuple[torch.dtype, int, int, dict[str, Any]], ...] = (
        (fp32, 3, 64, {}),
        (fp32, 2, 256, {"window": 4}),
        (bf16, 4, 128, {}),
        (bf16, 8, 64, {"window": 4, "softcap": 50.0, "sinks": torch.zeros(16)}),
    )
    for dtype, share, d, variant in adaptive:
        name = f"share{share}-d{d}-{'-'.join(variant) or 'plain'}-{_short(dtype)}"
        arguments = (share, d, dtype)
        yield (
            f"replaced-{name}",
            replaced,
            "_replaced_kernel",
            partial(_replaced, *arguments, **variant),
        )
        yield (
            f"base_attention-{name}",
            base_attention,
            "_base_kernel",
            partial(_base, *arguments, **variant),
        )
        if d == 64:  # its tiles are the same for every size
            yield (
                f"attention_change-{name}",
                attention_change,
                "_change_kernel",
                partial(_change, *arguments, **variant),
            )
    for dtype, what, key in (
        (fp32, "kl", vocab._KL),
        (bf16, "kl", vocab._KL),
        (bf16, "log_z", vocab._LOG_Z),
        (bf16, "total_variation", vocab._DISTANCE),
    ):
        rows, w_u = torch.zeros(512, 768, dtype=dtype), torch.zeros(2048, 768, dtype=dtype)
        capped = Unembedding(w_u, bias=torch.zeros(2048, dtype=dtype), scale=0.5, softcap=30.0)
        z = torch.zeros(2, 512) if key == vocab._DISTANCE else None
        yield (
            f"vocab-{what}-{_short(dtype)}",
            vocab,
            "_vocab_kernel",
            partial(vocab._triton, rows, rows if key else None, capped, key, z),
        )
        if what == "kl":
            vector = torch.zeros(768, dtype=dtype)
            norm = FinalNorm("layer", 1e-5, vector, vector)
            answers = torch.zeros(512, 2, dtype=torch.int64)
            yield (
                f"answer_logits-{_short(dtype)}",
                answer_logits,
                "_answer_kernel",
                partial(answer_logits._triton, rows, capped, answers, norm),
            )
    for dtype in (fp32, bf16):
        x, table = torch.zeros(1, 40, 4096, dtype=dtype), torch.zeros(1, 40, 128, dtype=dtype)
        heads = [torch.zeros(1, n, 40, 128, dtype=dtype) for n in (32, 8)]
        for name, module, kernel, launch in (
            ("rms_norm", rms_norm, "_norm_kernel", (x, x[0, 0], 1e-5, 0.0, True)),
            ("gate", gate, "_gate_kernel", (x, x, "silu")),
            ("rotary", rotary, "_rotary_kernel", (*heads, table, table)),
        ):
            yield f"{name}-{_short(dtype)}", module, kernel, partial(module._triton, *launch)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(share: int, d: int, dtype: torch.dtype, n_parts: int = 1, **variant: Any) -> None:
    rows = make_rows([7] * 8, [0] * 8, [10] * 8)
    q = torch.zeros(56, 2 * share, d, dtype=dtype)
    k = torch.zeros(56, 2, d, dtype=dtype)
    prefix = torch.zeros(1, 2, 16, d, dtype=dtype)
    settings: dict[str, Any] = {"window": None, "softcap": None, "sinks": None} | variant
    with (
        patch.object(split, "n_parts", return_value=n_parts),
        patch.object(split, "merge"),
    ):
        attention._triton(q, k, k, prefix, prefix, rows, 0.125, **settings)


def _replaced(share: int, d: int, dtype: torch.dtype, **variant: Any) -> None:
    tokens = Tokens(*torch.zeros(3, 56, dtype=torch.int64))
    q = torch.zeros(56, 2 * share, d, dtype=dtype)
    k = torch.zeros(56, 2, d, dtype=dtype)
    base = torch.zeros(1, 2, 16, d, dtype=dtype)
    settings: dict[str, Any] = {"window": None, "softcap": None, "sinks": None} | variant
    replaced._triton(q, tokens, k, k, tokens, base, base, 0.125, **settings)


def _base(share: int, d: int, dtype: torch.dtype, **variant: Any) -> None:
    q, k = (torch.zeros(2, heads, 16, d, dtype=dtype) for heads in (2 * share, 2))
    settings: dict[str, Any] = {"window": None, "softcap": None, "sinks": None} | variant
    base_attention.base_tables(q, k, k, q.unsqueeze(0), 0.125, **settings)


def _change(share: int, d: int, dtype: torch.dtype, **variant: Any) -> None:
    tokens = Tokens(*torch.zeros(3, 56, dtype=torch.int64))
    q, k = (torch.zeros(2, heads, 16, d, dtype=dtype) for heads in (2 * share, 2))
    own, offsets = torch.zeros(56, 2, d, dtype=dtype), torch.zeros(41, dtype=torch.int64)
    small = torch.zeros(2, 2 * share, 16)
    tables = base_attention.BaseTables(small, q.float(), small, small.unsqueeze(0))
    given = (q, k, k, q.unsqueeze(0), own, own, tokens, offsets, tables, small[:, 0])
    window, softcap = variant.get("window"), variant.get("softcap")
    attention_change._change(*given, 0, 40, 0.125, window, softcap)


def source_of(
    kernel: Any, recorder: Recorder, target: GPUTarget
) -> tuple[ASTSource, dict[str, int]]:
    """What to compile for a recorded launch, specialised as Triton does at run time."""
    options = {key: recorder.keywords[key] for key in OPTIONS if key in recorder.keywords}
    given = dict(zip(kernel.arg_names, recorder.arguments, strict=False)) | recorder.keywords
    if target.backend == "hip" and "PRECISION" in given:
        given["PRECISION"] = "ieee"  # as dispatch.dot_settings chooses there
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        is_constant = kernel.params[place].is_constexpr
        specialised = not kernel.params[place].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif is_constant or (type(value) is int and value == 1 and specialised):
            signature[name] = "constexpr"
            constants[(place,)] = value
        elif type(value) is int:
            signature[name] = "i32"
            if value % 16 == 0 and specialised:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            assert type(value) is float, (name, value)
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes), options


def resources(compiled: Any) -> dict[str, int]:
    """Registers, bytes of shared memory, and bytes of stack that spilled registers take."""
    if "cubin" in compiled.asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [tool, "--dump-resource-usage", file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        registers, spilled = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    else:
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
        spilled = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
    assert registers is not None
    assert spilled is not None
    return {
        "registers": int(registers[1]),
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": int(spilled[1]),
    }


def record(
    launch: Callable[[], object], module: Any, kernel_name: str, target: GPUTarget
) -> Recorder:
    """Return what `launch` hands to the kernel on a GPU like `target`."""
    kernel, recorder = getattr(module, kernel_name), Recorder()
    capability = attention.capability_of
    setattr(module, kernel_name, recorder)
    if target.backend == "cuda":
        attention.capability_of = lambda device: divmod(target.arch, 10)
    try:
        launch()
    finally:
        setattr(module, kernel_name, kernel)
        attention.capability_of = capability
    return recorder


def main() -> int:
    chosen = sys.argv[1] if len(sys.argv) > 1 else ""  # beginning of the launches' names
    report: dict[str, dict[str, Any]] = {}
    failed = False
    for name, module, kernel_name, launch in launches():
        if not name.startswith(chosen):
            continue
        kernel = getattr(module, kernel_name)
        report[name] = {}
        for target_name, (target, shared_limit) in TARGETS.items():
            recorder = record(launch, module, kernel_name, target)
            try:
                source, options = source_of(kernel, recorder, target)
                used = resources(triton.compile(source, target=target, options=options))
                if used["shared_bytes"] > shared_limit:
                    raise RuntimeError(
                        f"{used['shared_bytes']} bytes of shared memory, {target_name} has "
                        f"{shared_limit}"
                    )
                if used["spilled_bytes"] > SPILL_LIMIT:
                    raise RuntimeError(f"spills {used['spilled_bytes']} bytes a thread")
                report[name][target_name] = used
            except Exception as error:
                failed = True
                report[name][target_name] = {"error": f"{type(error).__name__}: {error}"}
                traceback.print_exc(file=sys.stderr)
    print(json.dumps(report, indent=1))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
