"""Scatter: write many patch values into a packed batch at once.

    set:  x[token_i, head_i] = values[source_i]
    add:  x[token_i, head_i] += values[source_i]

Resample, constant and mean patches use `set`, with different `values`; a steering vector uses
`add`. Vectors of `x` that are no target stay as they are, NaN included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchsweep_kernels.checks import check_alike
from patchsweep_kernels.dispatch import device_of, jit, next_power_of_2, tl, triton, use_triton

Mode = Literal["set", "add"]


@dataclass(frozen=True, eq=False)
class Targets:
    """Checked tables of one scatter: target i is `x[token[i]]`, or `x[token[i], head[i]]`.

    Tables are checked where they lie, so make `Targets` of tables on the CPU and move the checked
    ones: that waits for no device.
    """

    token: Int[Tensor, " target"]
    source: Int[Tensor, " target"] | None  # cell of the values; None: target i takes cell i
    head: Int[Tensor, " target"] | None
    n_tokens: int  # fewest tokens that `x` must have
    n_cells: int  # fewest cells that the values must have
    n_heads: int  # fewest heads that `x` must have

    @classmethod
    def of(
        cls,
        token: Int[Tensor, " target"],
        source: Int[Tensor, " target"] | None = None,
        head: Int[Tensor, " target"] | None = None,
    ) -> Targets:
        """Check int64 tables.

        Raises:
            ValueError: dtypes or lengths do not fit, an index is negative, or a target is named
                twice.
        """
        n_targets = len(token)
        for name, table in (("source", source), ("head", head)):
            if table is not None and table.shape != (n_targets,):
                raise ValueError(f"{name} must have {n_targets} entries, got {tuple(table.shape)}")
        n_tokens = _reach("token", token)
        n_cells = n_targets if source is None else _reach("source", source)
        n_heads = 1 if head is None else max(1, _reach("head", head))
        target = token if head is None else token * n_heads + head
        ordered = target.sort().values
        repeated = (ordered[1:] == ordered[:-1]).nonzero()
        if len(repeated):
            at = int(ordered[repeated[0, 0]])
            where = f"token {at}" if head is None else f"token {at // n_heads}, head {at % n_heads}"
            raise ValueError(
                f"token names the same vector of x twice ({where}); targets must not overlap"
            )
        return cls(token, source, head, n_tokens, n_cells, n_heads)

    def __len__(self) -> int:
        return len(self.token)


def _reach(name: str, table: Tensor) -> int:
    """Return one past the highest index of `table`, after checks of its dtype and lowest."""
    if table.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {table.dtype}")
    if not table.numel():
        return 0
    low, high = (int(bound) for bound in table.aminmax())
    if low < 0:
        raise ValueError(f"{name} holds {low}; indices count from 0")
    return high + 1


def scatter_patch(
    x: Float[Tensor, "token ..."],
    values: Float[Tensor, "cell ..."],
    token: Int[Tensor, " target"],
    *,
    source: Int[Tensor, " target"] | None = None,
    head: Int[Tensor, " target"] | None = None,
    mode: Mode = "set",
) -> None:
    """Write `values[source[i]]` into `x[token[i]]`, or into `x[token[i], head[i]]`, in place.

    Without `source`, target i takes `values[i]`. With `head`, `x` is `[token, head, d]` and
    `values` is `[cell, d]`; without it both have the same axes after the first. Tables are int64;
    keep them on the CPU, where checking them does not wait for the GPU. They are moved to the
    device of `x`, which waits; `scatter_targets` takes tables that are there.

    Raises:
        ValueError: devices, dtypes or shapes do not fit, an index is out of range, a vector of `x`
            is targeted twice, or vectors of `x` or `values` are not contiguous.
    """
    if source is None and len(values) != len(token):
        raise ValueError(f"values has {len(values)} cells for {len(token)} targets; give source")
    scatter_targets(x, values, Targets.of(token, source, head), mode)


@torch.no_grad()
def scatter_targets(
    x: Float[Tensor, "token ..."],
    values: Float[Tensor, "cell ..."],
    targets: Targets,
    mode: Mode = "set",
) -> None:
    """Write `values` at `targets`, as `scatter_patch` does with their tables, in place.

    Waits for no device if the tables lie where `x` does.

    Raises:
        ValueError: devices, dtypes or shapes do not fit, a table reaches past `x` or `values`, or
            vectors of `x` or `values` are not contiguous.
    """
    check_alike(("x", x), ("values", values))
    if mode not in ("set", "add"):
        raise ValueError(f"mode must be 'set' or 'add', got {mode!r}")
    if targets.head is None:
        x, values = _as_vectors("x", x).unsqueeze(1), _as_vectors("values", values)
    elif x.dim() != 3 or values.dim() != 2:
        raise ValueError(
            f"with head, x must be [token, head, d] and values [cell, d], "
            f"got {tuple(x.shape)} and {tuple(values.shape)}"
        )
    if x.shape[-1] != values.shape[-1]:
        raise ValueError(f"values has vectors of {values.shape[-1]}, x of {x.shape[-1]}")
    for name, tensor in (("x", x), ("values", values)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} must be contiguous along d, its stride is {tensor.stride(-1)}"
            )
    for name, reach, limit in (
        ("token", targets.n_tokens, len(x)),
        ("source", targets.n_cells, len(values)),
        ("head", targets.n_heads, x.shape[1]),
    ):
        if reach > limit:
            raise ValueError(f"{name} holds {reach - 1}, outside 0..{limit - 1}")
    if not len(targets):
        return
    # the kernel assumes stride 1: a column of a larger table would be read wrongly
    token, source, head = (
        None if table is None else table.to(x.device).contiguous()
        for table in (targets.token, targets.source, targets.head)
    )
    assert token is not None
    write = _triton if use_triton(x) else _reference
    write(x, values, token, source, head, mode)


def _as_vectors(name: str, x: Tensor) -> Tensor:
    """Return `x` as `[token, d]` with all other axes flattened, since a target covers them all."""
    try:
        return x.view(len(x), -1) if len(x) else x.flatten(1)
    except RuntimeError:
        raise ValueError(
            f"{name} must be contiguous in all axes after the first, its strides are {x.stride()}"
        ) from None


def _reference(
    x: Tensor,
    values: Tensor,
    token: Tensor,
    source: Tensor | None,
    head: Tensor | None,
    mode: str,
) -> None:
    """Scatter in torch; `x` is `[token, head, d]`, with one head if `head` is None."""
    at = (token, torch.zeros_like(token) if head is None else head)
    cells = values if source is None else values[source]
    x.index_put_(at, cells, accumulate=mode == "add")


def _triton(
    x: Tensor,
    values: Tensor,
    token: Tensor,
    source: Tensor | None,
    head: Tensor | None,
    mode: str,
) -> None:
    n_targets, d = len(token), x.shape[-1]
    block_d = min(1024, next_power_of_2(d))
    # Short vectors share a program, so that each program moves some kilobytes.
    block_targets = min(max(1, 2048 // block_d), next_power_of_2(n_targets))
    grid = (triton.cdiv(n_targets, block_targets), triton.cdiv(d, block_d))
    with device_of(x):
        _scatter_kernel[grid](
            x,
            values,
            token,
            token if source is None else source,
            token if head is None else head,
            n_targets,
            d,
            x.stride(0),
            x.stride(1),
            values.stride(0),
            HAS_SOURCE=source is not None,
            HAS_HEAD=head is not None,
            ADD=mode == "add",
            BLOCK_TARGETS=block_targets,
            BLOCK_D=block_d,
            num_warps=4,
        )


# Grid (targets / BLOCK_TARGETS, d / BLOCK_D). A program owns a tile of targets by elements: it
# reads the tables' entries for these targets, loads the tile from `values` (and from `x` to add in
# fp32), and stores it. Targets are distinct, so no two programs write one address.
@jit
@no_type_check
def _scatter_kernel(
    x,
    values,
    token,
    source,
    head,
    n_targets,
    d,
    stride_token,
    stride_head,
    stride_cell,
    HAS_SOURCE: tl.constexpr,
    HAS_HEAD: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_TARGETS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64) * BLOCK_TARGETS + tl.arange(0, BLOCK_TARGETS)
    element = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = target < n_targets
    tile = real[:, None] & (element < d)[None, :]
    place = tl.load(token + target, mask=real, other=0).to(tl.int64) * stride_token
    if HAS_HEAD:
        place += tl.load(head + target, mask=real, other=0).to(tl.int64) * stride_head
    cell = target
    if HAS_SOURCE:
        cell = tl.load(source + target, mask=real, other=0).to(tl.int64)
    value = tl.load(values + (cell * stride_cell)[:, None] + element[None, :], mask=tile)
    address = x + place[:, None] + element[None, :]
    if ADD:
        value = tl.load(address, mask=tile).to(tl.float32) + value.to(tl.float32)
    tl.store(address, value.to(x.dtype.element_ty), mask=tile)
