"""Capture: runs prompts once through the plain model and caches what packed batches need.

The cache holds the input of every block, post-rotary keys and values, each block's arguments, and
the activations of the swept sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from patchsweep_kernels.attention import Rows, prefix_attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from patchsweep.forward.activation_store import ActivationStore
from patchsweep.forward.block_args import (
    BlockArgs,
    Done,
    are_known,
    argument_axes,
    first_of,
    split_hidden,
    with_first,
)
from patchsweep.forward.casting import cast_while
from patchsweep.forward.pattern import Prefix, attention_pattern
from patchsweep.forward.site_locations import SiteLocation, resolve_site
from patchsweep.forward.unwrapped import (
    OWN_ATTENTION,
    HookLocation,
    Unsupported,
    UnwrappedModel,
    attention_settings,
)
from patchsweep.models.offload import device_of
from patchsweep.spec.sites import SITES

_NO_LOGITS = torch.empty(0, dtype=torch.long, device="cpu")  # positions whose logits are computed


@dataclass
class ActivationCache:
    """The activation cache of one batch of prompts of equal length.

    The tensors of a block are on its device, or on the CPU if the byte budget was used up.
    """

    shape: tuple[int, int]  # prompts, positions
    storage: ActivationStore = field(default_factory=ActivationStore)  # keeps the tensors below
    devices: list[torch.device] = field(default_factory=list)  # per block; + final residual
    resid: list[Tensor] = field(default_factory=list)  # per block [pair, pos, d_model]; + final
    keys: list[Tensor] = field(default_factory=list)  # per block [pair, kv_head, pos, d_head]
    values: list[Tensor] = field(default_factory=list)  # per block [pair, kv_head, pos, d_head]
    heads: list[int] = field(default_factory=list)  # per block: heads of a query
    calls: list[BlockArgs] = field(default_factory=list)  # per block
    sites: dict[str, list[Tensor]] = field(default_factory=dict)  # per block [pair, pos, width]
    captured: Tensor | None = None  # [pair] row of the batch of `calls`; None: its own

    def layers_of(self, name: str) -> list[Tensor]:
        """Return a site's activations, layer by layer."""
        if name == "resid_pre":
            return self.resid[:-1]
        return self.resid[1:] if name == "resid_post" else self.sites[name]

    def prefix(self, length: int) -> Prefix:
        """Return the keys and values of the first `length` tokens."""
        keys, values = ([x[:, :, :length] for x in xs] for xs in (self.keys, self.values))
        return Prefix(length, keys, values)

    def half(self, prompts: slice) -> ActivationCache:
        """Return the cache of the prompts at `prompts` of the batch; the tensors are views."""
        n_prompts = len(range(*prompts.indices(self.shape[0])))
        return self.taken(n_prompts, lambda xs: [x[prompts] for x in xs])

    def taken(
        self, n_prompts: int, take: Callable[[list[Tensor]], list[Tensor]]
    ) -> ActivationCache:
        """Return a cache of other prompts; `take` returns their tensors, block by block."""
        return replace(
            self,
            shape=(n_prompts, self.shape[1]),
            resid=take(self.resid),
            keys=take(self.keys),
            values=take(self.values),
            sites={name: take(xs) for name, xs in self.sites.items()},
        )

    def moved(self, at: Callable[..., Tensor]) -> ActivationCache:
        """Return the cache with every tensor's positions moved by `at`, see `Batch.at_base`."""
        keep = self.storage.keep
        resid = [keep(at(x)) for x in self.resid]
        return ActivationCache(
            shape=(self.shape[0], resid[0].shape[1]),
            storage=self.storage,
            devices=self.devices,
            resid=resid,
            keys=[keep(at(x, dim=2)) for x in self.keys],
            values=[keep(at(x, dim=2)) for x in self.values],
            heads=self.heads,
            calls=[],  # their arguments are those of other positions
            sites={name: [keep(at(x)) for x in xs] for name, xs in self.sites.items()},
        )


@torch.no_grad()
def capture(
    unwrapped: UnwrappedModel,
    tokens: Tensor,
    sites: Sequence[SiteLocation] = (),
    storage: ActivationStore | None = None,
) -> ActivationCache:
    """Run `tokens` `[pair, pos]` once; return every block's input, K, V, arguments and `sites`.

    Raises:
        Unsupported: the model does not call every block's attention once through the attention
            interface, or passes keys and values on to later blocks.
    """
    storage = storage or ActivationStore()
    run = ActivationCache((len(tokens), tokens.shape[1]), storage)
    for site in sites:
        if site.points or site.in_attention:
            run.sites[site.site.name] = []
    inside = {s.site.name for s in sites if s.in_attention}
    n_pairs, length = tokens.shape
    rows = Rows(  # whole prompts
        offsets=torch.arange(n_pairs + 1, device="cpu") * length,
        pair=torch.arange(n_pairs, device="cpu"),
        start=torch.zeros(n_pairs, dtype=torch.int64, device="cpu"),
    )
    called = False  # whether attention was reached

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
        nonlocal called
        called = True
        settings = attention_settings(module, q.shape[-1], kw)
        run.keys.append(storage.keep(k))
        run.values.append(storage.keep(v))
        run.heads.append(q.shape[1])
        for name, x in (("q", q), ("rot_q", q), ("k", k), ("rot_k", k), ("v", v)):
            if name in inside:
                flat = rearrange(x, "pair head pos d -> pair pos (head d)")
                run.sites[name].append(storage.copy(flat))
        patterns = inside & {"pattern", "pattern_cell"}
        if patterns:
            pattern = attention_pattern(q, k, **settings)
            for name in patterns:
                run.sites[name].append(storage.keep(pattern))
        flat_q, flat_k, flat_v = (
            rearrange(x, "pair head pos d -> (pair pos) head d") for x in (q, k, v)
        )
        z = prefix_attention(flat_q, flat_k, flat_v, k, v, rows, **settings)
        return rearrange(z, "(pair pos) head d -> pair pos head d", pair=n_pairs)

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, rest_args, rest_kwargs = split_hidden(args, kwargs)
        run.devices.append(hidden.device)
        run.resid.append(storage.copy(hidden))
        run.calls.append(BlockArgs(rest_args, rest_kwargs, axes[len(run.calls) % len(axes)]))

    def keep_final(module: nn.Module, args: Any, output: Any) -> None:
        run.devices.append(first_of(output).device)
        run.resid.append(storage.copy(first_of(output)))

    with ExitStack() as stack:
        if not are_known(unwrapped):  # fetch weights outside of the blocks once for dry runs too
            stack.enter_context(unwrapped.unembed_in_memory())
        axes = argument_axes(unwrapped)
        for block in unwrapped.blocks:
            stack.enter_context(block.register_forward_pre_hook(keep_input, with_kwargs=True))
        stack.enter_context(unwrapped.blocks[-1].register_forward_hook(keep_final))
        for site in sites:
            for point in site.points:

                def keep(x: Tensor, name: str = site.site.name) -> None:
                    run.sites[name].append(storage.copy(x.reshape(*tokens.shape, -1)))

                stack.enter_context(watch(point, keep))
        stack.enter_context(unwrapped.attending(lambda _: attend))
        try:
            unwrapped.model(tokens, use_cache=False, logits_to_keep=_NO_LOGITS)
        except Exception as error:
            if called or unwrapped.takes_attention_functions:
                raise  # not caused by attention: out of memory, tensors on two devices, ...
            why = f"{OWN_ATTENTION} ({type(error).__name__}: {error})"
            raise Unsupported(why) from error
    if not called:
        raise Unsupported(OWN_ATTENTION)
    if len(run.resid) != unwrapped.n_layers + 1 or len(run.keys) != unwrapped.n_layers:
        raise Unsupported("the model does not call every block's attention once")
    for block_args in run.calls:
        block_args.check()
    return run


@torch.no_grad()
def check_attention_sites(unwrapped: UnwrappedModel, sites: Sequence[SiteLocation]) -> None:
    """Check that q, k and v inside attention equal what the bridge's hooks show.

    Attention may get more than `hook_rot_q` sees (the full query, if only a part is rotated), or
    a normalised query. A hook that is missing or never fires is not compared. Runs two forward
    passes over three tokens if one of `sites` is inside attention, and none otherwise.

    Raises:
        Unsupported: a hook shows another tensor.
    """
    inside = [s for s in sites if s.in_attention and not s.site.is_pattern]
    if not inside:
        return
    bridge = unwrapped.bridge
    tokens = torch.arange(3, device=device_of(bridge)).unsqueeze(0)
    captured = capture(unwrapped, tokens, inside).sites
    hooked: dict[str, Tensor] = {}
    names = [s.site.hook_name(layer) for s in inside for layer in range(unwrapped.n_layers)]
    hooks = [
        (name, lambda x, hook, name=name: hooked.update({name: x.detach().clone()}))
        for name in names
        if unwrapped.has_hook(name)
    ]
    with cast_while(bridge, unwrapped.dtype):
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    for point in inside:
        for layer, x in enumerate(captured[point.site.name]):
            name = point.site.hook_name(layer)
            if name not in hooked:
                continue
            y = hooked[name]
            if y.ndim == 4 and bridge.hook_dict[name].pos_dim == 2:
                y = y.transpose(1, 2)
            y = y.flatten(2)
            # 16-bit numbers are rounded at every step, in both runs
            share = 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.05
            if x.shape != y.shape or bool((x - y).abs().max() > share * x.abs().max()):
                raise Unsupported(
                    f"{name} of the bridge shows something else than what attention gets"
                )


@torch.no_grad()
def embed_to_stream(
    unwrapped: UnwrappedModel, values: Float[Tensor, "pair pos d_model"]
) -> Float[Tensor, "pair pos d_model"]:
    """Return the first block's input when the token embeddings are `values`."""
    point = resolve_site(unwrapped, SITES["embed"]).points[0]
    stream: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.append(split_hidden(args, kwargs)[0])
        raise Done

    tokens = torch.zeros(values.shape[:2], dtype=torch.long, device=values.device)
    with (
        watch(point, lambda x: x.copy_(values)),
        unwrapped.blocks[0].register_forward_pre_hook(stop, with_kwargs=True),
        suppress(Done),
    ):
        unwrapped.model(tokens, use_cache=False)
    return stream[0]


def watch(point: HookLocation, visit: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Inside the returned context, call `visit` with the tensor at `point` in each forward pass.

    `visit` may change the tensor in place, or return a tensor that replaces it. If the point has
    columns, `visit` gets a copy of these columns only.
    """

    def visited(x: Tensor) -> Tensor | None:
        if point.columns is None:
            return visit(x)
        columns = point.columns.to(x.device)
        part = x.index_select(-1, columns)
        new = visit(part)
        return x.index_copy(-1, columns, part if new is None else new)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, rest_args, rest_kwargs = split_hidden(args, kwargs)
        new = visited(hidden)
        return None if new is None else ((new, *rest_args), rest_kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        new = visited(first_of(output))
        return None if new is None else with_first(output, new)

    if point.side == "in":
        return point.module.register_forward_pre_hook(before, with_kwargs=True)
    return point.module.register_forward_hook(after)
