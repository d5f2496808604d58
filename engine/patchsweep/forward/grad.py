"""The gradient model: differentiable forward passes through the plain modules, hooked at sites.

Attribution runs the same plain modules as packed batches (`forward.unwrapped`), with a
differentiable attention function. Gradients are those of the metric with respect to activations.
Weights take no gradients, which are most of the cost of a plain backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import MethodError
from patchsweep.forward.block_args import dry_run, split_hidden
from patchsweep.forward.capture import attention_pattern, check_attention_sites, watch
from patchsweep.forward.site_locations import resolve_site
from patchsweep.forward.unwrapped import Attend, Unsupported, UnwrappedModel, attention_settings
from patchsweep.spec.sites import SITES, Site


@dataclass(frozen=True)
class Place:
    """The site, layer and axes of a visited activation. Holds no tensor."""

    site: Site
    layer: int
    n_rows: int
    n_pos: int
    heads_first: bool  # [row, head, pos, d] as in attention; False: [row, pos, width]

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
        if self.heads_first and not self.is_pattern:
            values = rearrange(values, "row pos (head d) -> row head pos d", head=x.shape[1])
        x.copy_(values.reshape(x.shape))


@dataclass(frozen=True)
class Heads:
    """One layer's queries and keys after rotary, values, and attention pattern."""

    q: Float[Tensor, "row head pos d"]
    k: Float[Tensor, "row kv_head pos d"]
    v: Float[Tensor, "row kv_head pos d"]
    pattern: Float[Tensor, "row head dest src"]  # fp32, part of the graph
    settings: dict[str, Any]  # scale, window, softcap, sinks


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a run whose first tokens other runs share."""

    start: int  # number of shared tokens
    keys: list[Float[Tensor, "row kv_head pos d"]]  # per layer; one row per row of the run's tokens
    values: list[Float[Tensor, "row kv_head pos d"]]


@dataclass(frozen=True)
class Gradients:
    """Gradients of each metric on the base run, one batch of prompts."""

    stream: list[Float[Tensor, "metric pair pos d_model"]]  # at each block's input; + final
    z: list[Float[Tensor, "metric pair head pos d_v"]]  # at each block's attention output


# called with every watched activation; may write into it if nothing before it takes a gradient
Visit = Callable[[Place, Tensor], None]


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
    ) -> None:
        """Unwrap the model and locate its sites.

        Args:
            own: a method's additional sites, which are not compared with the bridge's hooks.
            longest: tokens of the longest prompt, since longer prompts may have another mask.
            compute_dtype: dtype that 16-bit weights are cast to; None: they are not cast.
        """
        try:
            self.unwrapped = UnwrappedModel(bridge, compute_dtype)
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

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, weights take no gradient; on exit they are restored."""
        trainable = [p for p in self.unwrapped.model.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def forward(
        self,
        tokens: Int[Tensor, "row pos"],
        visit: Visit,
        reads: Sequence[int],
        *,
        sites: Sequence[Site] | None = None,
        gradient: bool = False,
        embeds: Float[Tensor, "row pos d_model"] | None = None,
        first_layer: int = 0,
        stream: Float[Tensor, "row pos d_model"] | None = None,
        fixed_pattern: bool = False,
        prefix: Prefix | None = None,
        on_attention: Callable[[int, Heads], None] | None = None,
        on_output: Callable[[int, Tensor], None] | None = None,
        after: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Float[Tensor, "row read d_vocab"]:
        """Return fp32 logits at the positions `reads`; call `visit` at every site and layer.

        Args:
            sites: the watched sites, of the gradient model's; default all.
            gradient: start a graph at the token embeddings.
            embeds: replace the token embeddings.
            first_layer, stream: start at this block, with this residual stream as its input.
            fixed_pattern: treat attention patterns as constants in the backward pass.
            prefix: run only the tokens from `prefix.start` on; `reads` are among them.
            on_attention: called with each layer's queries, keys, values and pattern.
            on_output: called with each layer's attention output `[row, head, pos, d]`.
            after: a context entered once all sites are hooked, for hooks that run after these.
        """
        watched = (
            [self.points[s.name] for s in sites] if sites is not None else [*self.points.values()]
        )
        skipped = 0 if prefix is None else prefix.start
        tokens = tokens[:, skipped:]
        inside = {p.site.name: p.site for p in watched if p.in_attention}

        def visit_site(site: Site, layer: int, x: Tensor, *, heads_first: bool = False) -> None:
            visit(Place(site, layer, tokens.shape[0], tokens.shape[1], heads_first), x)

        def attention(layer: int) -> Attend:
            def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
                if inside and not gradient:
                    q, k, v = q.clone(), k.clone(), v.clone()  # views of one tensor: not writable
                for name, x in (("q", q), ("rot_q", q), ("k", k), ("rot_k", k), ("v", v)):
                    if name in inside:
                        visit_site(inside[name], layer, x, heads_first=True)
                settings = attention_settings(module, q.shape[-1], kw)
                if prefix is not None:
                    k = torch.cat([prefix.keys[layer][:, :, :skipped], k], dim=2)
                    v = torch.cat([prefix.values[layer][:, :, :skipped], v], dim=2)
                    q = nn.functional.pad(q, (0, 0, skipped, 0))  # aligns queries with positions
                pattern = attention_pattern(q, k, **settings)[:, :, skipped:]
                if fixed_pattern:
                    pattern = pattern.detach().requires_grad_(torch.is_grad_enabled())
                if on_attention is not None:
                    on_attention(
                        layer, Heads(q.detach(), k.detach(), v.detach(), pattern, settings)
                    )
                for site in inside.values():
                    if site.is_pattern:
                        visit_site(site, layer, pattern, heads_first=True)
                values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
                output = pattern.to(v) @ values
                if on_output is not None:
                    on_output(layer, output)
                return output.transpose(1, 2)

            return attend

        def start(x: Tensor) -> None:
            if embeds is not None:
                x.copy_(embeds)
            if gradient:
                x.requires_grad_()

        with ExitStack() as stack:
            stack.enter_context(self.unwrapped.graph())
            if gradient or embeds is not None:
                stack.enter_context(watch(self._embed, start))
            for point in watched:
                for layer, location in enumerate(point.points):
                    stack.enter_context(
                        watch(location, lambda x, s=point.site, i=layer: visit_site(s, i, x))  # type: ignore[misc]
                    )
                if point.site.in_stream and point.site.layered:
                    self._watch_stream(stack, point.site, visit_site)
            stack.enter_context(after())
            self.unwrapped.attend_with(attention)
            stack.callback(self.unwrapped.attend_with, None)
            if stream is not None:
                stack.enter_context(self._starting_at(first_layer, stream))
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

    def _watch_stream(self, stack: ExitStack, site: Site, see: Callable[..., None]) -> None:
        """Call `see` at the input of every block, or at its output if the site has a shift."""
        for layer, block in enumerate(self.unwrapped.blocks):
            if not site.shift:

                def before(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                    see(site, layer, split_hidden(args, kwargs)[0])

                handle = block.register_forward_pre_hook(before, with_kwargs=True)
            else:

                def leaving(module: nn.Module, args: Any, out: Any, layer: int = layer) -> None:
                    see(site, layer, out[0] if isinstance(out, tuple) else out)

                handle = block.register_forward_hook(leaving)
            stack.callback(handle.remove)

    @contextmanager
    def _starting_at(self, layer: int, stream: Tensor) -> Iterator[None]:
        """Inside, blocks below `layer` are skipped and the block at `layer` gets `stream`."""
        skipped = self.unwrapped.blocks[:layer]
        for block in skipped:
            block.__dict__["forward"] = lambda hidden_states, *args, **kwargs: hidden_states

        def replace(module: nn.Module, args: Any, kwargs: Any) -> Any:
            _, rest, named = split_hidden(args, kwargs)
            return (stream, *rest), named

        # prepended to the other hooks, so that sites see the stream
        handle = self.unwrapped.blocks[layer].register_forward_pre_hook(
            replace, with_kwargs=True, prepend=True
        )
        try:
            yield
        finally:
            handle.remove()
            for block in skipped:
                del block.__dict__["forward"]

    @torch.no_grad()
    def activations(
        self,
        tokens: Int[Tensor, "row pos"],
        reads: Sequence[int] = (-1,),
        sites: Sequence[Site] | None = None,
    ) -> tuple[dict[str, list[Tensor]], Tensor]:
        """Return activations by site and layer, in `Place.flat` form, and the logits at `reads`."""
        kept: dict[str, list[Tensor]] = {}

        def keep(place: Place, x: Tensor) -> None:
            kept.setdefault(place.site.name, []).append(place.flat(x))

        logits = self.forward(tokens, keep, reads, sites=sites)
        return kept, logits


@contextmanager
def frozen(bridge: TransformerBridge) -> Iterator[None]:
    """Inside, weights of the bridge's model take no gradient; on exit they are restored."""
    trainable = [p for p in bridge.original_model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
