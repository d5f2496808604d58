"""The gradient model: differentiable forward passes through the plain modules, hooked at sites.

Attribution runs the same plain modules as packed batches (`forward.unwrapped`), with a
differentiable attention function. Gradients are those of the metric with respect to activations.
Weights take no gradients, which are most of the cost of a plain backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import MethodError
from patchsweep.forward.block_args import Axes, BlockArgs, argument_axes, dry_run, split_hidden
from patchsweep.forward.capture import check_attention_sites, watch
from patchsweep.forward.pattern import Prefix, attention_pattern, weighted_values
from patchsweep.forward.site_locations import resolve_site
from patchsweep.forward.unwrapped import (
    Attend,
    HookLocation,
    Unsupported,
    UnwrappedModel,
    attention_settings,
)
from patchsweep.spec.sites import SITES, Site


@dataclass(frozen=True)
class Place:
    """The site, layer and axes of a visited activation. Holds no tensor."""

    site: Site
    layer: int
    n_rows: int
    n_pos: int
    heads_first: bool  # [row, head, pos, d] as in attention; False: [row, pos, width]
    carries_on: bool = False  # read by later modules too than the one whose input is visited

    @property
    def is_pattern(self) -> bool:
        """Whether the tensor is `[row, head, dest, src]`."""
        return self.site.is_pattern

    def flat(self, x: Tensor) -> Tensor:
        """Return `x` (or its gradient) as `[row, pos, width]`; a pattern stays as it is."""
        if self.is_pattern:
            return x
        if self.heads_first:
            return rearrange(x, "row head pos d -> row pos (head d)")
        return x.reshape(self.n_rows, self.n_pos, -1)

    def write(self, x: Tensor, values: Tensor) -> None:
        """Write `values`, shaped as `flat` returns them, into `x` in place."""
        x.copy_(self._shaped(values, x))

    def replaced(self, x: Tensor, values: Tensor, first: int) -> Tensor:
        """Return `x` with `values`, shaped as `flat` returns them, in the rows from `first` on."""
        per_row = x.shape[0] // self.n_rows  # rows and positions may be one axis
        rows = slice(first * per_row, (first + len(values)) * per_row)
        if self.carries_on:  # in place, for whatever reads it later
            x[rows] = self._shaped(values, x)
            return x
        return torch.cat([x[: rows.start], self._shaped(values, x), x[rows.stop :]])

    def _shaped(self, values: Tensor, x: Tensor) -> Tensor:
        if self.heads_first and not self.is_pattern:
            values = rearrange(values, "row pos (head d) -> row head pos d", head=x.shape[1])
        return values.to(x.dtype).reshape(-1, *x.shape[1:])


@dataclass(frozen=True)
class Heads:
    """One layer's queries and keys after rotary, values, and attention pattern."""

    q: Float[Tensor, "row head dest d"]
    k: Float[Tensor, "row kv_head src d"]  # of all tokens; the last query is at the last key
    v: Float[Tensor, "row kv_head src d"]
    pattern: Float[Tensor, "row head dest src"]  # fp32, part of the graph
    settings: dict[str, Any]  # scale, window, softcap, sinks


@dataclass(frozen=True)
class Activations:
    """What a run of prompts leaves behind."""

    sites: dict[str, list[Tensor]]  # site -> per layer, in the form of `Place.flat`
    logits: Float[Tensor, "row read d_vocab"]
    prefix: Prefix | None  # its first tokens, if they are to be shared


@dataclass(frozen=True)
class Gradients:
    """Gradients of each metric on the base run, one batch of prompts."""

    stream: list[Float[Tensor, "metric pair pos d_model"]]  # at each block's input; + final
    z: list[Float[Tensor, "metric pair head pos d_v"]]  # at each block's attention output


# called with every watched activation; may return a tensor that replaces it, or write into it if
# nothing before it takes a gradient
Visit = Callable[[Place, Tensor], Tensor | None]


class GradientModel:
    """Differentiable forward passes over plain modules that share every weight with `bridge`.

    Raises:
        MethodError: the plain modules cannot run the model, or do not have a site.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        sites: Sequence[Site],
        own: Sequence[Site] = (),
        longest: int = 1,
        compute_dtype: torch.dtype | None = None,
        unwrapped: UnwrappedModel | None = None,
    ) -> None:
        """Unwrap the model, unless it is `unwrapped` already, and locate its sites.

        Args:
            own: a method's additional sites, which are not compared with the bridge's hooks.
            longest: tokens of the longest prompt, since longer prompts may have another mask.
            compute_dtype: dtype that 16-bit weights are cast to; None: they are not cast.
        """
        self.bridge = bridge
        try:
            self.unwrapped = unwrapped or UnwrappedModel(bridge, compute_dtype)
            self.points = {site.name: resolve_site(self.unwrapped, site) for site in (*sites, *own)}
            check_attention_sites(self.unwrapped, [self.points[site.name] for site in sites])
            dry_run(self.unwrapped, 1, longest)
            self._embed = resolve_site(self.unwrapped, SITES["embed"]).points[0]
        except Unsupported as error:
            raise MethodError(
                f"attribution cannot run on {bridge.cfg.model_name}: {error.reason}; "
                "use method=exact, whose hooked runner takes every model"
            ) from error

    @property
    def n_layers(self) -> int:
        return self.unwrapped.n_layers

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, weights take no gradient; on exit they are restored."""
        return _frozen(self.unwrapped.model)

    @property
    def takes_positions(self) -> bool:
        """Whether the model can run tokens after others that are not run again."""
        return "position_ids" in inspect.signature(self.unwrapped.model.forward).parameters

    def forward(
        self,
        tokens: Int[Tensor, "row pos"],
        visit: Visit,
        reads: Sequence[int],
        *,
        sites: Sequence[Site] | None = None,
        gradient: bool = False,
        embeds: Float[Tensor, "row own d_model"] | None = None,
        entries: Mapping[int, Float[Tensor, "_ own d_model"]] | None = None,
        fixed_pattern: bool = False,
        prefix: Prefix | None = None,
        on_attention: Callable[[int, Heads], None] | None = None,
        on_output: Callable[[int, Tensor], Tensor | None] | None = None,
        after: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Float[Tensor, "_ read d_vocab"]:
        """Return fp32 logits at the positions `reads`; call `visit` at every site and layer.

        Args:
            sites: the watched sites, of the gradient model's; default all.
            gradient: start a graph at the token embeddings.
            embeds: replace the token embeddings.
            entries: block -> residual streams of rows that enter there. The rows of the first
                entry replace those of `tokens`, and earlier blocks do not run; later ones are
                added after the rows that are present. Each entry holds a multiple of the rows of
                `tokens`.
            fixed_pattern: treat attention patterns as constants in the backward pass.
            prefix: run only the tokens after it; `reads` are among them.
            on_attention: called with each layer's queries, keys, values and pattern.
            on_output: called with each layer's attention output `[row, head, pos, d]`.
            after: a context entered once all sites are hooked, for hooks that run after these.
        """
        watched = (
            [self.points[s.name] for s in sites] if sites is not None else [*self.points.values()]
        )
        skipped = 0 if prefix is None else prefix.length
        tokens = tokens[:, skipped:]
        inside = {p.site.name: p.site for p in watched if p.in_attention}
        n_rows = [len(tokens)]  # that the running block has

        def visit_site(site: Site, layer: int, x: Tensor, **axes: bool) -> Tensor | None:
            place = Place(site, layer, n_rows[0], tokens.shape[1], **{"heads_first": False, **axes})
            return visit(place, x)

        def seen(x: Tensor, layer: int, *names: str) -> Tensor:
            for name in names:
                if name in inside:
                    new = visit_site(inside[name], layer, x, heads_first=True)
                    x = x if new is None else new
            return x

        def attention(layer: int) -> Attend:
            def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
                if inside and not gradient:
                    q, k, v = q.clone(), k.clone(), v.clone()  # views of one tensor: not writable
                q = seen(q, layer, "q", "rot_q")
                k = seen(k, layer, "k", "rot_k")
                v = seen(v, layer, "v")
                settings = attention_settings(module, q.shape[-1], kw)
                before_k = None if prefix is None else prefix.keys[layer]
                before_v = None if prefix is None else prefix.values[layer]
                pattern = attention_pattern(q, k, shared=before_k, **settings)
                if fixed_pattern:
                    pattern = pattern.detach().requires_grad_(torch.is_grad_enabled())
                if on_attention is not None:
                    all_k, all_v = _after(before_k, k.detach()), _after(before_v, v.detach())
                    on_attention(layer, Heads(q.detach(), all_k, all_v, pattern, settings))
                pattern = seen(pattern, layer, *(s.name for s in inside.values() if s.is_pattern))
                output = weighted_values(pattern, v, before_v)
                if on_output is not None:
                    new = on_output(layer, output)
                    output = output if new is None else new
                return output.transpose(1, 2)

            return attend

        def start(x: Tensor) -> None:
            if embeds is not None:
                x.copy_(embeds)
            if gradient:
                x.requires_grad_()

        axes = argument_axes(self.unwrapped) if entries else []
        with ExitStack() as stack:
            stack.enter_context(self.unwrapped.graph())
            if gradient or embeds is not None:
                stack.enter_context(watch(self._embed, start))
            if entries:
                self._enter(stack, entries, axes, n_rows)
            for point in watched:
                site = point.site
                for layer, location in enumerate(point.points):
                    more = location.side == "in" and site.unit is None
                    see = partial(visit_site, site, layer, carries_on=more)
                    stack.enter_context(watch(location, see))
                for layer, block in enumerate(self.unwrapped.blocks if site.in_stream else ()):
                    if site.layered:
                        border = HookLocation(block, "out" if site.shift else "in")
                        stack.enter_context(watch(border, partial(visit_site, site, layer)))
            stack.enter_context(after())
            stack.enter_context(self.unwrapped.attending(attention))
            kept = torch.tensor(
                [read - skipped * (read >= 0) for read in reads], device=tokens.device
            )
            positions = torch.arange(skipped, skipped + tokens.shape[1], device=tokens.device)
            output = self.unwrapped.model(
                tokens,
                use_cache=False,
                logits_to_keep=kept,
                **({} if prefix is None else {"position_ids": positions.unsqueeze(0)}),
            )
        logits: Tensor = output.logits.float()
        return logits

    def _enter(
        self,
        stack: ExitStack,
        entries: Mapping[int, Tensor],
        axes: Sequence[tuple[Axes | None, ...]],
        n_rows: list[int],
    ) -> None:
        """Make rows enter at their blocks, see `forward`; `n_rows` follows their number."""
        first, n_prompts = min(entries), n_rows[0]
        for block in self.unwrapped.blocks[:first]:
            block.__dict__["forward"] = lambda hidden_states, *args, **kwargs: hidden_states
            stack.callback(block.__dict__.pop, "forward")

        def entering(layer: int) -> Callable[..., Any]:
            def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
                hidden, rest, named = split_hidden(args, kwargs)
                new = entries.get(layer)
                if new is not None:
                    hidden = new if layer == first else torch.cat([hidden, new])
                n_rows[0] = len(hidden)
                block_args = BlockArgs(rest, named, axes[layer % len(axes)])
                block_args = block_args.repeated(len(hidden) // n_prompts)
                return (hidden, *block_args.args), block_args.kwargs

            return enter

        for layer in range(first, self.n_layers):
            block = self.unwrapped.blocks[layer]
            stack.enter_context(block.register_forward_pre_hook(entering(layer), with_kwargs=True))

    @torch.no_grad()
    def activations(
        self,
        tokens: Int[Tensor, "row pos"],
        reads: Sequence[int] = (-1,),
        sites: Sequence[Site] | None = None,
        *,
        prefix: Prefix | None = None,
        keep_from: int = 0,
        after: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Activations:
        """Run `tokens`; return activations by site and layer, and the logits at `reads`.

        With `prefix`, only tokens after it run. With `keep_from`, activations are of the tokens
        from there on, and the tokens before are returned as a prefix.
        """
        kept: dict[str, list[Tensor]] = {}
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def keep(place: Place, x: Tensor) -> None:
            flat = place.flat(x)
            if keep_from:
                flat = flat[:, :, keep_from:] if place.is_pattern else flat[:, keep_from:]
                flat = flat.clone()  # not a view: the other tokens' activations are let go
            kept.setdefault(place.site.name, []).append(flat)

        def keep_heads(layer: int, heads: Heads) -> None:
            keys.append(heads.k[:, :, :keep_from].clone())
            values.append(heads.v[:, :, :keep_from].clone())

        logits = self.forward(
            tokens,
            keep,
            reads,
            sites=sites,
            prefix=prefix,
            on_attention=keep_heads if keep_from else None,
            after=after,
        )
        return Activations(kept, logits, Prefix(keep_from, keys, values) if keep_from else None)


def _after(before: Tensor | None, own: Tensor) -> Tensor:
    """Return `own` `[row, kv_head, pos, d]` after the tokens that all rows share."""
    if before is None:
        return own
    return torch.cat([before.repeat(len(own) // len(before), 1, 1, 1), own], dim=2)


def frozen(bridge: TransformerBridge) -> AbstractContextManager[None]:
    """Inside, weights of the bridge's model take no gradient; on exit they are restored."""
    return _frozen(bridge.original_model)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
