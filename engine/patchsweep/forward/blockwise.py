"""Blockwise passes: what attention and MLP of one block read from and write to the stream.

Everything here calls the model's own modules (`forward.unwrapped`), so that norms, rotary tables,
fused projections, experts and multipliers are the model's:

- *reading*: a block runs on a given stream until it calls its attention (this gives q, k and v as
  functions of the stream) or until its MLP is done, with attention's output fixed;
- *writing*: a block runs with the outputs of attention and MLP fixed, and a forward-mode tangent on
  one of them; the tangent at the block's output is what the stream gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
    Done,
    argument_axes,
    first_of,
    split_hidden,
    with_first,
)
from patchsweep.forward.capture import watch
from patchsweep.forward.pattern import attention_pattern, weighted_values
from patchsweep.forward.site_locations import resolve_site
from patchsweep.forward.trace import Part, Trace, attend_rows
from patchsweep.forward.unwrapped import (
    Attend,
    HookLocation,
    Unsupported,
    UnwrappedModel,
    attention_settings,
)
from patchsweep.spec.sites import SITES


def unfit(bridge: TransformerBridge, reason: Exception) -> MethodError:
    """Return the error for a model whose blocks cannot run part by part, because of `reason`."""
    text = (
        reason.reason if isinstance(reason, Unsupported) else f"{type(reason).__name__}: {reason}"
    )
    return MethodError(
        f"edges cannot be taken apart in {bridge.cfg.model_name}: {text}; sweep its sites with "
        "method=exact instead"
    )


class Blocks:
    """The blocks of `bridge`, which run part by part and share every weight with it.

    16-bit weights are cast to `compute_dtype`; None: they are not cast.

    Raises:
        MethodError: the model's blocks cannot run part by part.
    """

    def __init__(self, bridge: TransformerBridge, compute_dtype: torch.dtype | None = None) -> None:
        try:
            self.unwrapped = UnwrappedModel(bridge, compute_dtype)
            self._has_mlp: list[bool] = []  # a module of its own, whose input the MLP reads
            self._o = [point.module for point in resolve_site(self.unwrapped, SITES["z"]).points]
            self._modules = self._find(bridge)
        except Unsupported as reason:
            raise unfit(bridge, reason) from reason

    def _find(self, bridge: TransformerBridge) -> dict[tuple[int, Part], nn.Module]:
        """Return the module whose output is each part's output."""
        modules: dict[tuple[int, Part], nn.Module] = {}
        outs = {name: self._outputs(name) for name in ("attn_out", "mlp_out")}
        for layer, block in enumerate(self.unwrapped.blocks):
            attn = self.unwrapped.module_of(bridge.blocks[layer].attn)
            mlp = self.unwrapped.module_of(getattr(bridge.blocks[layer], "mlp", None))
            self._has_mlp.append(mlp is not None and mlp is not block)
            if not self._has_mlp[-1]:  # the block itself calls the MLP's two matrices
                mlp = outs["mlp_out"][layer] if outs["mlp_out"] else None
            if attn is None or mlp is None:
                raise Unsupported(f"block {layer} has no module of its own for attention or MLP")
            modules[layer, "attn"], modules[layer, "mlp"] = attn, mlp
            modules[layer, "attn_out"] = outs["attn_out"][layer] if outs["attn_out"] else attn
            modules[layer, "mlp_out"] = outs["mlp_out"][layer] if outs["mlp_out"] else mlp
        return modules

    def _outputs(self, site: str) -> list[nn.Module]:
        """Return each layer's last module before the write `site`; []: only a factor follows."""
        try:
            points = resolve_site(self.unwrapped, SITES[site]).points
        except Unsupported:
            # these blocks scale their writes outside of any module
            if type(self.unwrapped.bridge.blocks[0]).__name__ == "ScaledResidualBlockBridge":
                return []
            raise
        if any(point.side == "in" for point in points):
            raise Unsupported(f"{site} leaves no module of its own")
        return [point.module for point in points]

    @property
    def n_layers(self) -> int:
        return self.unwrapped.n_layers

    @torch.no_grad()
    def trace(self, tokens: Int[Tensor, "pair pos"], reads: Sequence[int]) -> Trace:
        """Run one forward pass and return its activations, with fp32 logits at `reads`."""
        trace = Trace()
        axes = argument_axes(self.unwrapped)

        def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden, rest, named = split_hidden(args, kwargs)
            trace.resid.append(hidden)
            trace.calls.append(BlockArgs(rest, named, axes[len(trace.calls) % len(axes)]))

        def attention(layer: int) -> Attend:
            def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
                trace.q.append(q)
                trace.k.append(k)
                trace.v.append(v)
                trace.settings.append(attention_settings(module, q.shape[-1], kw))
                z = weighted_values(attention_pattern(q, k, **trace.settings[-1]), v)
                return z.transpose(1, 2).contiguous()  # models assume that it is contiguous

            return attend

        with ExitStack() as stack:
            for block in self.unwrapped.blocks:
                stack.enter_context(block.register_forward_pre_hook(entering, with_kwargs=True))
            for o in self._o:
                stack.enter_context(watch(HookLocation(o, "in"), trace.z.append))
            for key, module in self._modules.items():

                def leaving(module: nn.Module, args: Any, out: Any, key: Any = key) -> None:
                    trace.parts[key] = out

                stack.enter_context(module.register_forward_hook(leaving))
            last = HookLocation(self.unwrapped.blocks[-1], "out")
            stack.enter_context(watch(last, trace.resid.append))
            stack.enter_context(self.unwrapped.attending(attention))
            trace.logits = self.unwrapped.model(
                tokens,
                use_cache=False,
                logits_to_keep=torch.tensor(list(reads), device=tokens.device),
            ).logits.float()
        return trace

    @property
    def n_parts(self) -> int:
        """Number of outputs of parts that a trace of all blocks holds."""
        return len(self._modules)

    def write_points(self, layer: int) -> dict[str, HookLocation]:
        """Return where senders write: z before W_O, attention's output, the MLP's last output."""
        return {
            "z": HookLocation(self._o[layer], "in"),
            "attn": HookLocation(self._modules[layer, "attn"], "out"),
            "mlp_out": HookLocation(self._modules[layer, "mlp_out"], "out"),
        }

    def mlp_point(self, layer: int) -> HookLocation:
        """Return the MLP's input, or its output if it is no module with one input."""
        return HookLocation(self._modules[layer, "mlp"], "in" if self._has_mlp[layer] else "out")

    def norm_after_attention(self, layer: int) -> nn.Module | None:
        """Return the module between attention's output and the stream."""
        after = self._modules[layer, "attn_out"]
        return None if after is self._modules[layer, "attn"] else after

    def qkv_of(
        self,
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        trace: Trace,
        pair: Tensor,
        start: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k (after rotary) and v `[row, head, pos, d]` of a block with input `x`.

        Row i is a run of `pair[i]`, from position `start` on.
        """
        seen: list[Tensor] = []

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
            seen.extend(unpack(t, len(x)) for t in (q, k, v))
            raise Done

        with self.unwrapped.attending(lambda _: attend), suppress(Done):
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
        """Return the MLP's output for the block input `x`, with parts fixed at the outputs `held`.

        Default of `held`: attention's output in the trace.
        """
        if held is None:
            held = {"attn": trace.part(layer, "attn")[pair, start:].detach()}
        seen: list[Tensor] = []

        def stop(y: Tensor) -> None:
            seen.append(y.reshape(*x.shape[:2], -1))
            raise Done

        mlp = HookLocation(self._modules[layer, "mlp"], "out")
        with self._fixed(layer, held, trace), watch(mlp, stop), suppress(Done):
            self._call(layer, x, trace, pair, start)
        return seen[0]

    @torch.no_grad()
    def writes(
        self,
        layer: int,
        outputs: Mapping[Part, Float[Tensor, "row pos d_model"]],
        trace: Trace,
        pair: Tensor,
        start: int = 0,
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what the block writes into a zero stream when parts output `outputs`, others zero.

        Norms and factors between the parts and the stream are applied.
        """
        empty = torch.zeros_like(next(iter(outputs.values())))
        fixed: dict[Part, Tensor] = {"attn": empty, "mlp": empty}
        if "attn" not in outputs:
            fixed["attn_out"] = empty
        if "mlp" not in outputs:
            fixed["mlp_out"] = empty
        return self.finish(layer, empty, fixed | dict(outputs), trace, pair, start)

    @torch.no_grad()
    def attention_of(
        self, layer: int, z: Float[Tensor, "*tokens width"]
    ) -> Float[Tensor, "*tokens d_model"]:
        """Return attention's output for its heads' output `z`."""
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
        """Return the change of the block's output when `part` changes by `tangent`.

        To first order at `trace`. From `attn_out` and `mlp_out` the way to the stream is linear, so
        that the result is exact.
        """
        # if parts are one module, the last one's output is used
        names: tuple[Part, ...] = ("attn", "mlp", "mlp_out")
        fixed = {p: trace.part(layer, p)[pair].detach() for p in dict.fromkeys((*names, part))}
        with forward_ad.dual_level():
            fixed[part] = forward_ad.make_dual(fixed[part], tangent.to(fixed[part]))
            out = self.finish(layer, trace.resid[layer][pair].detach(), fixed, trace, pair)
            moved = forward_ad.unpack_dual(out).tangent
        assert moved is not None, "the part writes nothing into the stream"
        return moved

    @torch.no_grad()
    def head_writes(
        self, layer: int, delta_z: Float[Tensor, "pair pos width"], n_heads: int
    ) -> Float[Tensor, "head pair pos d_model"]:
        """Return the change of attention's output when each head's z alone changes by `delta_z`."""
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
        """Return the change of the block's output when attention's output changes by `gained`.

        A norm after attention is computed exactly, not to first order.
        """
        after = self.norm_after_attention(layer)
        if after is None:
            return self.push(layer, "attn_out", gained, trace, pair)
        base = trace.part(layer, "attn")[pair]
        seen: list[Tensor] = []
        point = HookLocation(after, "out")
        fixed: dict[Part, Tensor] = {"attn": base + gained}
        for part in ("mlp", "mlp_out"):
            fixed[part] = trace.part(layer, part)[pair]
        with watch(point, lambda x: seen.append(x.reshape(gained.shape))):
            self.finish(layer, trace.resid[layer][pair], fixed, trace, pair)
        change = seen[0] - trace.part(layer, "attn_out")[pair]
        return self.push(layer, "attn_out", change, trace, pair)

    def run(
        self,
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        trace: Trace,
        pair: Tensor,
        start: int,
        replace: Callable[[Literal["q", "k", "v", "mlp"], Tensor], None] | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """Return the block's output for `x`, whose rows begin at position `start`, without graph.

        Before `start` the rows read the trace's keys and values. `replace` may write into q, k, v
        `[row, head, pos, d]` and into the MLP's output `[row, pos, d_model]`.
        """

        def attend(module: nn.Module, *qkv: Tensor, **kw: Any) -> Tensor:
            q, k, v = (unpack(t, len(x)) for t in qkv)
            if replace is not None:
                q, k, v = q.clone(), k.clone(), v.clone()
                for name, t in (("q", q), ("k", k), ("v", v)):
                    replace(name, t)  # type: ignore[arg-type]
            return attend_rows(trace, layer, q, k, v, pair, start).flatten(0, 1).unsqueeze(0)

        def leave(y: Tensor) -> Tensor:
            assert replace is not None
            rows = y.reshape(*x.shape[:2], -1).clone()
            replace("mlp", rows)
            return rows.reshape(y.shape)

        with ExitStack() as stack:
            stack.enter_context(self.unwrapped.attending(lambda _: attend))
            if replace is not None:
                mlp = HookLocation(self._modules[layer, "mlp"], "out")
                stack.enter_context(watch(mlp, leave))
            return self._call(layer, x, trace, pair, start)

    @torch.no_grad()
    def finish(
        self,
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        given: Mapping[Part, Float[Tensor, "row pos d_model"]],
        trace: Trace,
        pair: Tensor,
        start: int = 0,
    ) -> Float[Tensor, "row pos d_model"]:
        """Return the block's output for input `x` when the parts `given` have these outputs."""
        with self._fixed(layer, given, trace):
            return self._call(layer, x, trace, pair, start)

    @torch.no_grad()
    def finish_tokens(
        self,
        layer: int,
        x: Float[Tensor, "token d_model"],
        given: Mapping[Part, Float[Tensor, "token d_model"]],
        trace: Trace,
        pair: Tensor,
        pos: Tensor,
    ) -> Float[Tensor, "token d_model"]:
        """Return what `finish` returns, for single tokens."""
        with self._fixed(layer, given, trace):
            return trace.calls[layer].at(pair, pos).run(self.unwrapped.blocks[layer], x)

    def _call(self, layer: int, x: Tensor, trace: Trace, pair: Tensor, start: int) -> Tensor:
        """Return the block's output for packed rows, with the block arguments of the trace."""
        rows, n_pos, _ = x.shape
        pos = torch.arange(start, start + n_pos, device=x.device).repeat(rows)
        call = trace.calls[layer].at(pair.repeat_interleave(n_pos), pos)
        out = call.run(self.unwrapped.blocks[layer], x.reshape(rows * n_pos, -1))
        return out.reshape(x.shape)

    @contextmanager
    def _fixed(self, layer: int, outputs: Mapping[Part, Tensor], trace: Trace) -> Iterator[None]:
        """Inside, the modules of the parts in `outputs` return these for any input."""
        modules = []
        for part, value in outputs.items():
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


def unpack(x: Tensor, rows: int) -> Float[Tensor, "row head pos d"]:
    """Return attention's q, k or v of packed rows, with an axis for rows."""
    return rearrange(x, "1 head (row pos) d -> row head pos d", row=rows)
