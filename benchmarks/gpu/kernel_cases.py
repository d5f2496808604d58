"""What is measured: each kernel at large sizes, with its exact result and its rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from patchsweep_kernels import (
    answer_logits,
    attention,
    attribution,
    replaced_torch,
    scatter,
    split,
    vocab,
)
from patchsweep_kernels.attention import Rows
from patchsweep_kernels.attention_change import attention_change
from patchsweep_kernels.dispatch import use_triton
from patchsweep_kernels.replaced import replaced_attention
from patchsweep_kernels.tokens import Tokens
from patchsweep_kernels.unembedding import FinalNorm, Unembedding
from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """One case with its inputs on the device."""

    run: Callable[[], Tensor]  # the kernel alone, tables already on the device
    exact: Callable[[], Tensor]  # the same result in fp64
    n_bytes: int  # read and written at least
    n_flops: int  # of the products; 0 where memory is what counts
    rivals: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # other ways, same result


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    kernel: str
    dtype: torch.dtype
    # Device, and the factor by which sizes shrink for a trial run (1 on a GPU).
    prepare: Callable[[torch.device, int], Prepared]


def _scatter(mode: str, with_heads: bool, dtype: torch.dtype) -> Case:
    def prepare(device: torch.device, shrink: int) -> Prepared:
        n, n_heads, d = (32768 // shrink, 32, 128) if with_heads else (65536 // shrink, 1, 4096)
        x = torch.randn(n, n_heads, d, device=device).to(dtype)
        target = torch.randperm(n * n_heads)[: n * n_heads // 2]
        token, head = (t.to(device) for t in (target // n_heads, target % n_heads))
        source = torch.randint(0, len(target), target.shape).to(device)
        values = torch.randn(len(target), d, device=device).to(dtype)
        before = x.clone()
        write = scatter._triton if use_triton(x) else scatter._reference

        def run() -> Tensor:
            write(x, values, token, source, head, mode)
            return x

        def exact() -> Tensor:
            expected = before.double()
            new = values[source].double()
            expected[token, head] = new + expected[token, head] * (mode == "add")
            x.copy_(before)
            return expected

        moved = len(target) * d * x.element_size()
        return Prepared(run, exact, moved * (3 if mode == "add" else 2), 0)

    shape = "heads of 128" if with_heads else "tokens of 4096"
    return Case(f"{mode} half of the {shape}", "scatter_patch", dtype, prepare)


def _attribution(dtype: torch.dtype) -> Case:
    def prepare(device: torch.device, shrink: int) -> Prepared:
        shape = (32768 // shrink, 32, 128)
        s, b, g = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        return Prepared(
            lambda: attribution.attribution_dot(s, b, g),
            lambda: ((s.double() - b.double()) * g.double()).sum(-1),
            3 * s.numel() * s.element_size(),
            0,
            {"torch": lambda: ((s.float() - b.float()) * g.float()).sum(-1)},
        )

    return Case("32768 tokens, 32 heads of 128", "attribution_dot", dtype, prepare)


def _answer_logits(dtype: torch.dtype) -> Case:
    def prepare(device: torch.device, shrink: int) -> Prepared:
        n, d, d_vocab = 16384 // shrink, 4096 // shrink, 128256 // shrink
        resid = torch.randn(n, d, device=device).to(dtype)
        unembedding = Unembedding((torch.randn(d_vocab, d, device=device) / d**0.5).to(dtype))
        norm = FinalNorm("rms", 1e-5, torch.rand(d, device=device).to(dtype))
        tokens = torch.randint(0, d_vocab, (n, 2)).to(device)
        launch = answer_logits._triton if use_triton(resid) else answer_logits._reference

        def exact() -> Tensor:
            assert norm.weight is not None
            norm64 = FinalNorm("rms", 1e-5, norm.weight.double())
            columns = unembedding.w_u[tokens].double()
            return torch.einsum("rd,rad->ra", norm64(resid.double()), columns)

        return Prepared(
            lambda: launch(resid, unembedding, tokens, norm),
            exact,
            3 * resid.numel() * resid.element_size(),
            0,
            {"torch": lambda: answer_logits._reference(resid, unembedding, tokens, norm)},
        )

    return Case("16384 rows, d 4096, two answers", "answer_logits", dtype, prepare)


def _vocab_kl(dtype: torch.dtype) -> Case:
    def prepare(device: torch.device, shrink: int) -> Prepared:
        n, d, d_vocab = max(2, 512 // shrink), 4096 // shrink, 128256 // shrink
        base, patched = (torch.randn(n, d, device=device).to(dtype) for _ in range(2))
        unembedding = Unembedding((torch.randn(d_vocab, d, device=device) / d**0.5).to(dtype))
        unembedding64 = Unembedding(unembedding.w_u.double())
        return Prepared(
            lambda: vocab.vocab_kl(base, patched, unembedding),
            lambda: vocab.vocab_kl(base.double(), patched.double(), unembedding64),
            unembedding.w_u.numel() * base.element_size(),
            2 * 2 * n * d * d_vocab,
            {"torch in blocks": lambda: vocab._reference_kl(base, None, patched, unembedding)},
        )

    return Case("512 rows, d 4096, 128256 tokens", "vocab_kl", dtype, prepare)


def _attention(
    n_rows: int, prefix: int, suffix: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> Case:
    n_heads, kv_heads, d = heads

    def prepare(device: torch.device, shrink: int) -> Prepared:
        count = max(2, n_rows // shrink)
        n_tokens, scale = count * suffix, d**-0.5
        rows = Rows(
            torch.arange(0, n_tokens + 1, suffix),
            torch.zeros(count, dtype=torch.int64),
            torch.full((count,), prefix),
        )
        q, k, v = (
            torch.randn(h, n_tokens, d, device=device).to(dtype).transpose(0, 1)
            for h in (n_heads, kv_heads, kv_heads)
        )
        p_k, p_v = (torch.randn(1, kv_heads, prefix, d, device=device).to(dtype) for _ in range(2))

        def run() -> Tensor:
            return attention.prefix_attention(q, k, v, p_k, p_v, rows, scale=scale)

        def exact() -> Tensor:
            q64, k64, v64, p_k64, p_v64 = (x.double() for x in (q, k, v, p_k, p_v))
            return attention.prefix_attention(q64, k64, v64, p_k64, p_v64, rows, scale=scale)

        mask = torch.ones(suffix, prefix + suffix, dtype=torch.bool, device=device).tril(prefix)
        by_row = (count, suffix, -1, d)

        def expanded(shared: Tensor, own: Tensor) -> Tensor:
            # heads too: with a mask and grouped heads SDPA has no fused kernel to choose
            own = own.reshape(by_row).transpose(1, 2)
            whole = torch.cat([shared.expand(count, -1, -1, -1), own], 2)
            return whole.repeat_interleave(n_heads // kv_heads, 1)

        def sdpa(keys: Tensor, values: Tensor) -> Tensor:
            queries = q.reshape(by_row).transpose(1, 2)
            z = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
            return z.transpose(1, 2).reshape(n_tokens, n_heads, d)

        keys, values = expanded(p_k, k), expanded(p_v, v)
        rivals = {
            "SDPA, K/V expanded each call": lambda: sdpa(expanded(p_k, k), expanded(p_v, v)),
            "SDPA, K/V expanded before": lambda: sdpa(keys, values),
        }
        if n_tokens < 64:
            rivals["not split over the prefix"] = lambda: _whole(run)
        if device.type == "cuda":
            rivals["FlexAttention"] = _flex(q, k, v, p_k, p_v, suffix, scale)
        seen = count * sum(prefix + i + 1 for i in range(suffix))
        packed = sum(x.numel() for x in (q, q, k, v, p_k, p_v))
        return Prepared(run, exact, packed * q.element_size(), 4 * n_heads * d * seen, rivals)

    name = f"{n_rows} rows, prefix {prefix}, suffix {suffix}, heads {n_heads}/{kv_heads}x{d}"
    return Case(name, "prefix_attention", dtype, prepare)


def _whole(run: Callable[[], Tensor]) -> Tensor:
    """Run attention without splitting it, whatever the device leaves idle."""
    with mock.patch.object(split, "n_parts", return_value=1):
        return run()


def _flex(
    q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor, suffix: int, scale: float
) -> Callable[[], Tensor]:
    """FlexAttention over the prefix and all packed keys, with the rows as its block mask."""
    n_tokens, prefix = len(q), p_k.shape[2]

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = j - prefix
        return (own < 0) | ((own // suffix == i // suffix) & (own <= i))

    @cache
    def compiled() -> tuple[Any, Any]:
        # at the first call: what fails here is FlexAttention's failure
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        make_mask = torch.compile(create_block_mask)  # in eager mode it needs gigabytes
        mask = make_mask(seen, None, None, n_tokens, prefix + n_tokens, device=str(q.device))
        return torch.compile(flex_attention), mask

    def run() -> Tensor:
        keys = torch.cat([p_k, k.transpose(0, 1)[None]], 2)
        values = torch.cat([p_v, v.transpose(0, 1)[None]], 2)
        queries = q.transpose(0, 1)[None]
        attend, mask = compiled()
        z = attend(queries, keys, values, block_mask=mask, scale=scale, enable_gqa=True)
        return z[0].transpose(0, 1)

    return run


def _replaced(
    n_rows: int, length: int, n_own: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Case, Case]:
    """Attention of replaced tokens, and the change of all others', in the same rows of one pair."""
    n_heads, kv_heads, d = heads
    settings = (d**-0.5, None, None, None)  # scale, window, softcap, sinks

    def inputs(device: torch.device, shrink: int) -> tuple[Tokens, int, int, list[Tensor]]:
        count, positions = max(2, n_rows // shrink), max(n_own + 2, length // shrink)
        # position 0 reads itself alone, which leaves the change's bound there to rounding
        pos = 1 + torch.rand(count, positions - 1).argsort(1)[:, :n_own].sort(1).values
        row = torch.arange(count).repeat_interleave(n_own)
        tokens = Tokens(*(x.to(device) for x in (row, pos.flatten(), torch.zeros_like(row))))
        own = [(len(tokens), h, d) for h in (n_heads, kv_heads, kv_heads)]
        base = [(1, h, positions, d) for h in (n_heads, kv_heads, kv_heads)]
        shapes = [*own, *base, (1, *base[0])]
        return tokens, count, positions, [torch.randn(x, device=device).to(dtype) for x in shapes]

    def attend(device: torch.device, shrink: int) -> Prepared:
        tokens, _, _, (q, k, v, _, base_k, base_v, _) = inputs(device, shrink)
        given = (q, tokens, k, v, tokens, base_k, base_v)
        given64 = [x if isinstance(x, Tokens) else x.double() for x in given]
        return Prepared(
            lambda: replaced_attention(*given, scale=settings[0]),
            lambda: replaced_torch.attend(*given64, *settings),
            sum(x.numel() for x in (q, q, k, v, base_k, base_v)) * q.element_size(),
            4 * n_heads * d * int((tokens.pos + 1).sum()),
            {"torch": lambda: replaced_torch.attend(*given, *settings)},
        )

    def change(device: torch.device, shrink: int) -> Prepared:
        tokens, count, positions, (_, k, v, *base) = inputs(device, shrink)
        given = (*base, k, v, tokens, count)
        given64 = [x.double() if isinstance(x, Tensor) else x for x in given]

        def both(results: tuple[Tensor, Tensor]) -> Tensor:
            return torch.cat([results[0], results[1][None]])

        return Prepared(
            lambda: both(attention_change(*given, scale=settings[0])),
            lambda: both(replaced_torch.change_of_output(*given64, *settings)),
            sum(x.numel() for x in (k, v, *base)) * k.element_size() + 8 * count * positions,
            # products of queries with two keys, of gradients with two values, of outputs with one
            10 * n_heads * d * int((positions - tokens.pos).sum()),
            {"torch": lambda: both(replaced_torch.change_of_output(*given, *settings))},
        )

    name = f"{n_rows} rows, {n_own} of {length} tokens, heads {n_heads}/{kv_heads}x{d}"
    return (
        Case(name, "replaced_attention", dtype, attend),
        Case(name, "attention_change", dtype, change),
    )


CASES = (
    _scatter("set", False, torch.bfloat16),
    _scatter("set", True, torch.bfloat16),
    _scatter("add", True, torch.float32),
    _attribution(torch.bfloat16),
    _attribution(torch.float32),
    _answer_logits(torch.bfloat16),
    _vocab_kl(torch.bfloat16),
    _vocab_kl(torch.float32),
    _attention(512, 192, 32, (32, 8, 128), torch.bfloat16),
    _attention(512, 192, 32, (12, 12, 64), torch.float32),
    _attention(512, 1024, 1, (32, 8, 128), torch.bfloat16),
    _attention(16, 4096, 1, (32, 8, 128), torch.bfloat16),
    _attention(512, 16, 7, (9, 3, 64), torch.float32),
    *_replaced(2048, 320, 8, (32, 8, 128), torch.bfloat16),
    *_replaced(2048, 320, 8, (12, 12, 64), torch.float32),
    *_replaced(2048, 17, 4, (9, 3, 64), torch.float32),
)
