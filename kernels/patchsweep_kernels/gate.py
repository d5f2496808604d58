"""The gate of a gated MLP: the activation of one product times another, in one pass.

    y = act(gate) * up,    act: silu, or gelu with its tanh

Activation and product are fp32; 16-bit results are rounded after each, as in two torch calls.
"""

from __future__ import annotations

from typing import Literal, get_args, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels.checks import check_alike, check_shapes
from patchsweep_kernels.dispatch import device_of, jit, tl, triton, use_triton

Activation = Literal["silu", "gelu_tanh"]
_BLOCK = 1024


@torch.no_grad()
def gated(
    gate: Float[Tensor, "... d"], up: Float[Tensor, "... d"], activation: Activation
) -> Float[Tensor, "... d"]:
    """Return the activation of `gate` times `up`, in their dtype. Both may be halves of one tensor.

    Raises:
        ValueError: devices, dtypes or shapes do not fit, or the activation is another one.
    """
    check_alike(("gate", gate), ("up", up))
    check_shapes(("up", up, tuple(gate.shape)))
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {get_args(Activation)}, got {activation!r}")
    compute = _triton if use_triton(gate) else _reference
    return compute(gate, up, activation)


def _reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


def _triton(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    d = gate.shape[-1]
    flat = [x.reshape(-1, d) for x in (gate, up)]
    flat = [x if x.stride(-1) == 1 else x.contiguous() for x in flat]
    out = torch.empty(flat[0].shape, dtype=gate.dtype, device=gate.device)
    n_rows = len(out)
    if out.numel():
        with device_of(gate):
            _gate_kernel[(n_rows, triton.cdiv(d, _BLOCK))](
                *flat,
                out,
                d,
                flat[0].stride(0),
                flat[1].stride(0),
                SILU=activation == "silu",
                BLOCK=_BLOCK,
                num_warps=4,
            )
    return out.view(gate.shape)


# Grid (row, d / BLOCK). A program owns a part of a row: it reads both products and stores theirs.
@jit
@no_type_check
def _gate_kernel(
    gate,
    up,
    out,
    d,
    stride_gate,
    stride_up,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = element < d
    x = tl.load(gate + row * stride_gate + element, mask=real, other=0.0).to(tl.float32)
    y = tl.load(up + row * stride_up + element, mask=real, other=0.0).to(tl.float32)
    if SILU:
        x = x / (1.0 + tl.exp(-x))
    else:
        # x * (1 + tanh(u)) / 2 = x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    x = x.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * d + element, (x * y).to(out.dtype.element_ty), mask=real)
