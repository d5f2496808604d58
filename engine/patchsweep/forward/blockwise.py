"""Blocks taken apart at the residual stream: what each part reads there and what it writes.

Everything here calls the model's own modules (`forward.unwrapped`), so that norms, rotary tables,
fused projections, experts and multipliers come out as the model has them:

- *reading*: a block is run on a stream of its own until its attention is called (that gives q, k
  and v as functions of the stream) or until its MLP is done, attention held fixed;
- *writing*: a block is run with its attention and MLP replaced by fixed outputs, and a tangent is
  sent along; what arrives at the block's output is what the stream gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import MethodError
from patchsweep.forward.block_args import (
    BlockArgs,
    argument_axes,
    first_of,
    split_hidden,
    with_first,
)
from patchsweep.forward.capture import attention_pattern, watch
from patchsweep.forward.site_locations import resolve_site
from patchsweep.forward.unwrapped import (
    Attend,
    HookLocation,
    Unsupported,
    UnwrappedModel,
    attention_settings,
)
from patchsweep.spec.sites import SITES

# places on the way from a part of a block to the residual stream
Part = Literal["attn", "attn_out", "mlp", "mlp_out"]


@dataclass
class Trace:
    """One batch of runs, kept at every place where parts meet; part of a graph if asked for."""

    resid: list[Float[Tensor, "pair pos d_model"]] = field(default_factory=list)  # and the last
    q: list[Float[Tensor, "pair head pos d"]] = field(default_factory=list)  # after rotary
    k: list[Float[Tensor, "pair kv_head pos d"]] = field(default_factory=list)  # after rotary
    v: list[Float[Tensor, "pair kv_head pos d"]] = field(default_factory=list)
    z: list[Float[Tensor, "pair pos width"]] = field(default_factory=list)  # before W_O
    parts: dict[tuple[int, Part], Any] = field(default_factory=dict)  # as the module returned it
    calls: list[BlockArgs] = field(default_factory=list)  # per block
    logits: Float[Tensor, "pair read d_vocab"] = field(default_factory=lambda: torch.empty(0))

    @property
    def n_pairs(self) -> int:
        return self.resid[0].shape[0]

    @property
    def length(self) -> int:
        return self.resid[0].shape[1]

    def part(self, layer: int, name: Part) -> Float[Tensor, "pair pos d_model"]:
        """What left a part of a block."""
        return first_of(self.parts[layer, name]).reshape(self.n_pairs, self.length, -1)


def unfit(bridge: TransformerBridge, reason: Exception) -> MethodError:
    """The error for a model whose blocks cannot be taken apart."""
    text = (
        reason.reason if isinstance(reason, Unsupported) else f"{type(reason).__name__}: {reason}"
    )
    return MethodError(
        f"edges cannot be taken apart in {bridge.cfg.model_name}: {text}; sweep its sites with "
        "method=exact instead"
    )


class _Stop(Exception):
    """All that was wanted of a block has been seen."""


class Blocks:
    """The blocks of `bridge`, sharing every weight with it.

    Weights of 16 bits are cast to `compute_dtype`; None: they stay as they are.

    Raises:
        MethodError: the model's blocks cannot be taken apart.
    """

    def __init__(self, bridge: TransformerBridge, compute_dtype: torch.dtype | None = None) -> None:
        try:
            self.unwrapped = UnwrappedModel(bridge, compute_dtype)
            self._o = [point.module for point in resolve_site(self.unwrapped, SITES["z"]).points]
            self._modules = self._find(bridge)
        except Unsupported as reason:
            raise unfit(bridge, reason) from reason

    def _find(self, bridge: TransformerBridge) -> dict[tuple[int, Part], nn.Module]:
        """The modules at whose output each part ends.

        Raises:
            Unsupported: there is none.
        """
        found: dict[tuple[int, Part], nn.Module] = {}
        outs = {name: self._outputs(name) for name in ("attn_out", "mlp_out")}
        for layer, block in enumerate(self.unwrapped.blocks):
            attn = self.unwrapped.module_of(bridge.blocks[layer].attn)
            mlp = self.unwrapped.module_of(getattr(bridge.blocks[layer], "mlp", None))
            if mlp is None or mlp is block:  # the block itself calls the MLP's two matrices
                mlp = outs["mlp_out"][layer] if outs["mlp_out"] else None
            if attn is None or mlp is None:
                raise Unsupported(f"block {layer} has no module of its own for attention or MLP")
            found[layer, "attn"], found[layer, "mlp"] = attn, mlp
            found[layer, "attn_out"] = outs["attn_out"][layer] if outs["attn_out"] else attn
            found[layer, "mlp_out"] = outs["mlp_out"][layer] if outs["mlp_out"] else mlp
        return found

    def _outputs(self, site: str) -> list[nn.Module]:
        """Where the writes called `site` leave their last module; none: only a factor follows.

        Raises:
            Unsupported: what follows the part is not known to be linear.
        """
        try:
            points = resolve_site(self.unwrapped, SITES[site]).points
        except Unsupported:
            # blocks that scale their writes do so outside of any module
            if type(self.unwrapped.bridge.blocks[0]).__name__ == "ScaledResidualBlockBridge":
                return []
            raise
        if any(point.side == "in" for point in points):
            raise Unsupported(f"{site} leaves no module of its own")
        return [point.module for point in points]

    @property
    def n_layers(self) -> int:
        return self.unwrapped.n_layers

    def trace(
        self,
        tokens: Int[Tensor, "pair pos"],
        reads: Sequence[int],
        *,
        stream: Float[Tensor, "pair pos d_model"] | None = None,
        gradient: bool = False,
    ) -> Trace:
        """One forward pass; fp32 logits at `reads`.

        `stream` takes the place of what enters the first block; with `gradient` a graph starts
        there.
        """
        trace = Trace()
        axes = argument_axes(self.unwrapped)

        def entering(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden, rest, named = split_hidden(args, kwargs)
            first = not trace.resid
            if first and stream is not None:
                hidden = stream
            if first:
                hidden = hidden.detach().requires_grad_(gradient)
            trace.resid.append(hidden)
            trace.calls.append(BlockArgs(rest, named, axes[len(trace.calls) % len(axes)]))
            return ((hidden, *rest), named) if first else None

        def attention(layer: int) -> Attend:
            def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
                trace.q.append(q)
                trace.k.append(k)
                trace.v.append(v)
                # models take it for contiguous
                return _attended(module, q, k, v, kw).transpose(1, 2).contiguous()

            return attend

        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradient))
            stack.enter_context(self.unwrapped.graph())
            for block in self.unwrapped.blocks:
                stack.callback(block.register_forward_pre_hook(entering, with_kwargs=True).remove)
            for o in self._o:
                stack.enter_context(watch(HookLocation(o, "in"), lambda z: trace.z.append(z)))
            for key, module in self._modules.items():

                def leaving(module: nn.Module, args: Any, out: Any, key: Any = key) -> None:
                    trace.parts[key] = out

                stack.callback(module.register_forward_hook(leaving).remove)
            last = HookLocation(self.unwrapped.blocks[-1], "out")
            stack.enter_context(watch(last, lambda x: trace.resid.append(x)))
            stack.enter_context(self._attending(attention))
            trace.logits = self.unwrapped.model(
                tokens,
                use_cache=False,
                logits_to_keep=torch.tensor(list(reads), device=tokens.device),
            ).logits.float()
        return trace

    @torch.no_grad()
    def parallel(self) -> tuple[bool, ...]:
        """Per layer whether the MLP reads the stream before attention has written into it.

        Raises:
            Unsupported: the model does not call every block's attention once.
        """
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self._device)
        trace = self.trace(tokens, [-1])
        if not len(trace.q) == len(trace.z) == len(trace.resid) - 1 == self.n_layers:
            raise Unsupported(
                "its attention does not go through the attention interface of transformers"
            )
        if len(trace.parts) < len(self._modules):
            raise Unsupported("a block does not call its attention or its MLP as a module")
        pair = torch.zeros(1, dtype=torch.long, device=self._device)
        found = []
        for layer in range(self.n_layers):
            # NaN passes weights that are zero and activations that are off; a number may not
            nothing = torch.full_like(trace.resid[layer], float("nan"))
            seen = self.mlp_of(layer, trace.resid[layer], trace, pair, held={"attn": nothing})
            found.append(not bool(seen.isnan().any()))
        return tuple(found)

    def qkv_of(
        self,
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        trace: Trace,
        pair: Tensor,
        start: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (after rotary) and v `[row, head, pos, d]` of a block that reads the stream `x`.

        Row i is a run of `pair[i]`, from position `start` on.
        """
        seen: list[Tensor] = []

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
            seen.extend(unpack(t, len(x)) for t in (q, k, v))
            raise _Stop

        with self._attending(lambda _: attend), suppress(_Stop):
            self._call(layer, x, trace, pair, start)
        q, k, v = seen
        return q, k, v

    def mlp_of(
        self,
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        trace: Trace,
        pair: Tensor,
        start: int = 0,
        *,
        held: Mapping[Part, Float[Tensor, "row pos d_model"]] | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """What the MLP gives when the stream entering the block is `x`, and the parts before it
        are `held` at these outputs (default: attention at the trace's)."""
        if held is None:
            held = {"attn": trace.part(layer, "attn")[pair, start:].detach()}
        seen: list[Tensor] = []

        def stop(y: Tensor) -> None:
            seen.append(y.reshape(*x.shape[:2], -1))
            raise _Stop

        with ExitStack() as stack:
            stack.enter_context(self._fixed(layer, held, trace))
            stack.enter_context(watch(HookLocation(self._modules[layer, "mlp"], "out"), stop))
            stack.enter_context(suppress(_Stop))
            self._call(layer, x, trace, pair, start)
        return seen[0]

    @torch.no_grad()
    def writes(
        self,
        layer: int,
        given: Mapping[Part, Float[Tensor, "row pos d_model"]],
        trace: Trace,
        pair: Tensor,
        start: int = 0,
    ) -> Float[Tensor, "row pos d_model"]:
        """What the block writes into an empty stream when these parts give what is `given`, and
        all others nothing: norms and factors on the way are passed as they are."""
        empty = torch.zeros_like(next(iter(given.values())))
        fixed: dict[Part, Tensor] = {"attn": empty, "mlp": empty}
        if "attn" not in given:
            fixed["attn_out"] = empty
        if "mlp" not in given:
            fixed["mlp_out"] = empty
        with self._fixed(layer, fixed | dict(given), trace):
            return self._call(layer, empty, trace, pair, start)

    @torch.no_grad()
    def attention_of(
        self, layer: int, z: Float[Tensor, "row pos width"]
    ) -> Float[Tensor, "row pos d_model"]:
        """What the attention gives when its heads give `z`."""
        with self.unwrapped.block_at_hand(layer):
            return first_of(self._o[layer](z))

    @torch.no_grad()
    def push(
        self,
        layer: int,
        part: Part,
        tangent: Float[Tensor, "row pos d_model"],
        trace: Trace,
        pair: Tensor,
    ) -> Float[Tensor, "row pos d_model"]:
        """What the stream gains, to first order at `trace`, when `part` gains `tangent`.

        From `attn_out` and `mlp_out` on the way is linear, so that the first order is all.
        """
        # of parts that are one module the last one counts
        names: tuple[Part, ...] = ("attn", "mlp", "mlp_out")
        fixed = {p: trace.part(layer, p)[pair].detach() for p in dict.fromkeys((*names, part))}
        with forward_ad.dual_level():
            fixed[part] = forward_ad.make_dual(fixed[part], tangent.to(fixed[part]))
            with self._fixed(layer, fixed, trace):
                out = self._call(layer, trace.resid[layer][pair].detach(), trace, pair, 0)
            moved = forward_ad.unpack_dual(out).tangent
        assert moved is not None, "the part writes nothing into the stream"
        return moved

    @torch.no_grad()
    def head_writes(
        self, layer: int, delta_z: Float[Tensor, "pair pos width"], n_heads: int
    ) -> Float[Tensor, "head pair pos d_model"]:
        """What the attention's output gains when one head's z at a time gains its `delta_z`."""
        heads = rearrange(delta_z, "pair pos (head d) -> pair pos head d", head=n_heads)
        single = torch.eye(n_heads, dtype=heads.dtype, device=heads.device)
        rows = torch.einsum("bphd,hg->gbphd", heads, single).flatten(-2)
        o = self._o[layer]
        with self.unwrapped.block_at_hand(layer):
            return first_of(o(rows)) - first_of(o(torch.zeros_like(rows[:1, :1, :1])))

    @torch.no_grad()
    def exact_head_writes(
        self, layer: int, gained: Float[Tensor, "row pos d_model"], trace: Trace, pair: Tensor
    ) -> Float[Tensor, "row pos d_model"]:
        """What the stream gains when the attention's output gains `gained`: through a norm after
        attention exactly, not to first order."""
        if self._modules[layer, "attn_out"] is self._modules[layer, "attn"]:
            return self.push(layer, "attn_out", gained, trace, pair)
        base = trace.part(layer, "attn")[pair]
        seen: list[Tensor] = []
        point = HookLocation(self._modules[layer, "attn_out"], "out")
        with watch(point, lambda x: seen.append(x.reshape(gained.shape))):
            x = trace.resid[layer][pair]
            fixed: dict[Part, Tensor] = {"attn": base + gained}
            for part in ("mlp", "mlp_out"):
                fixed[part] = trace.part(layer, part)[pair]
            with self._fixed(layer, fixed, trace):
                self._call(layer, x, trace, pair, 0)
        change = seen[0] - trace.part(layer, "attn_out")[pair]
        return self.push(layer, "attn_out", change, trace, pair)

    def run(
        self,
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        trace: Trace,
        pair: Tensor,
        start: int,
        replace: Callable[[Literal["q", "k", "v", "mlp"], Tensor], None],
    ) -> Float[Tensor, "row pos d_model"]:
        """The block's output on `x`, whose rows run from `start` on and read the trace's keys and
        values before that; `replace` may write into q, k, v `[row, head, pos, d]` and into the
        MLP's output `[row, pos, d_model]`."""

        def attend(module: nn.Module, *qkv: Tensor, **kw: Any) -> Tensor:
            q, k, v = (unpack(t, len(x)).clone() for t in qkv)
            for name, t in (("q", q), ("k", k), ("v", v)):
                replace(name, t)  # type: ignore[arg-type]
            if start:
                k = torch.cat([trace.k[layer][pair, :, :start], k], dim=2)
                v = torch.cat([trace.v[layer][pair, :, :start], v], dim=2)
                q = nn.functional.pad(q, (0, 0, start, 0))  # so that it stands at its position
            z = _attended(module, q, k, v, kw)[:, :, start:]
            return rearrange(z, "row head pos d -> 1 (row pos) head d")

        def leave(y: Tensor) -> Tensor:
            rows = y.reshape(*x.shape[:2], -1).clone()
            replace("mlp", rows)
            return rows.reshape(y.shape)

        mlp = HookLocation(self._modules[layer, "mlp"], "out")
        with self._attending(lambda _: attend), watch(mlp, leave):
            return self._call(layer, x, trace, pair, start)

    def _call(self, layer: int, x: Tensor, trace: Trace, pair: Tensor, start: int) -> Tensor:
        """The block on packed rows, with the arguments that it had in the trace."""
        rows, n_pos, _ = x.shape
        call = trace.calls[layer].at(
            pair.repeat_interleave(n_pos),
            torch.arange(start, start + n_pos, device=x.device).repeat(rows),
        )
        out = self.unwrapped.blocks[layer](
            x.reshape(1, rows * n_pos, -1), *call.args, **call.kwargs
        )
        return first_of(out).reshape(x.shape)

    @contextmanager
    def _fixed(self, layer: int, given: Mapping[Part, Tensor], trace: Trace) -> Iterator[None]:
        """The modules of the parts `given` return these, whatever they are called with."""
        modules = []
        for part, value in given.items():
            raw = trace.parts[layer, part]
            flat = value.reshape(1, -1, value.shape[-1])
            output = with_first(raw, flat[0] if first_of(raw).ndim == 2 else flat)
            module = self._modules[layer, part]
            module.__dict__["forward"] = lambda *args, output=output, **kwargs: output
            modules.append(module)
        try:
            yield
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)

    @contextmanager
    def _attending(self, functions: Callable[[int], Attend]) -> Iterator[None]:
        self.unwrapped.attend_with(functions)
        try:
            yield
        finally:
            self.unwrapped.attend_with(None)

    @property
    def _device(self) -> torch.device:
        return next(self.unwrapped.model.parameters()).device


def unpack(x: Tensor, rows: int) -> Float[Tensor, "row head pos d"]:
    """What attention got of packed rows, row by row."""
    return rearrange(x, "1 head (row pos) d -> row head pos d", row=rows)


def _attended(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, kw: dict[str, Any]) -> Tensor:
    """Causal attention over whole prompts, `[row, head, pos, d]`."""
    pattern = attention_pattern(q, k, **attention_settings(module, q.shape[-1], kw))
    return pattern.to(v) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
