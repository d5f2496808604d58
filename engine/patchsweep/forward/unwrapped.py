"""The unwrapped model: the Hugging Face modules behind a bridge, without hooks, same weights.

`TransformerBridge` wraps the modules of a model in place. The packed runner needs them plain, with
its own attention function. An `UnwrappedModel` copies the module objects, but no weights, and
leaves the bridge as it is.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AttentionInterface, AttentionMaskInterface

from patchsweep.errors import ModelError
from patchsweep.forward.casting import cast_rows, keep_no_casts, looks_up
from patchsweep.forward.fused_layers import leaner
from patchsweep.forward.plain import MORE_OUTPUTS, PlainModel
from patchsweep.forward.weight_streaming import (
    SplitBlock,
    StreamedModule,
    WeightTraffic,
    stream_modules,
)
from patchsweep.models.heartbeat import beat

ATTENTION = "patchsweep"
OWN_ATTENTION = "its attention does not go through the attention interface of transformers"
Attend = Callable[..., Tensor]


class Unsupported(ModelError):
    """The packed runner cannot run this model or site; `reason` says why.

    Most callers fall back to the hooked runner, or raise an error with their own remedy. Raised in
    the middle of a run, it reaches the user.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the model's plain modules cannot run this: {reason}; use method=exact with "
            "runner=hooked, which takes every model"
        )
        self.reason = reason


@dataclass(frozen=True, eq=False)
class HookLocation:
    """A module's input or output, where an activation can be read and replaced."""

    module: nn.Module
    side: Literal["in", "out"]
    columns: Tensor | None = None  # columns of that tensor, in order; None: all


class UnwrappedModel(PlainModel):
    """Plain modules that share every parameter and buffer with `bridge` and run packed batches.

    If `accelerate` placed the model on several devices, or offloads weights to the CPU or to disk,
    each block runs on its device and its weights are fetched once per call; `traffic` counts them.
    16-bit weights are cast to `dtype`, if given, in the same way: a block's while it runs.

    Raises:
        Unsupported: the model has no list of blocks with attention modules, mixes tokens by a
            convolution, or splits a block over devices.
    """

    blocks: tuple[nn.Module, ...]

    def __init__(self, bridge: TransformerBridge, dtype: torch.dtype | None = None) -> None:
        super().__init__(bridge, ATTENTION)
        self.dtype: torch.dtype = dtype or bridge.cfg.dtype  # of activations
        self._hooks = bridge.hook_dict
        self._names: dict[int, list[str]] = defaultdict(list)  # hook point -> its names
        for name, hook in self._hooks.items():
            self._names[id(hook)] += [name, str(hook.name)]
        self.traffic = WeightTraffic()
        if not hasattr(bridge, "blocks"):
            raise Unsupported("the model has no single list of decoder blocks")
        self.blocks = tuple(self._copies[id(b.original_component)] for b in bridge.blocks)
        for layer, block in enumerate(self.blocks):
            if any(isinstance(module, nn.Conv1d) for module in block.modules()):
                # the convolution's state runs from token to token: rows could not share a prefix
                raise Unsupported(f"block {layer} mixes tokens by a convolution, not by attention")
        self._attentions = tuple(self._attention_of(i) for i in range(len(self.blocks)))
        try:
            cast = None if self.dtype == bridge.cfg.dtype else self.dtype
            self._stations = stream_modules(
                self.model, self.blocks, self._homes, self.traffic, cast
            )
        except SplitBlock as error:
            raise Unsupported(str(error)) from None
        for module, streamed in [*self._stations.items()]:
            if module not in self._homes and looks_up(module, streamed):
                cast_rows(module, *self._stations.pop(module).away)
            else:
                streamed.serve(module)

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def takes_attention_functions(self) -> bool:
        """Whether every block's attention looks up its function in transformers' registry."""
        return all(
            any(
                "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(cls.forward).__code__.co_names
                for cls in type(module).__mro__  # a subclass may call its base's forward
                if "forward" in vars(cls) and issubclass(cls, nn.Module) and cls is not nn.Module
            )
            for module in self._attentions
        )

    def unembed_in_memory(self) -> AbstractContextManager[None]:
        """Inside, the weights outside of the blocks stay fetched over several calls."""
        return _fetched(s for module, s in self._stations.items() if module not in self.blocks)

    @contextmanager
    def replacing_blocks(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, the model runs `blocks` in place of its own.

        Raises:
            Unsupported: it keeps its blocks in no list.
        """
        children = ((m, *child) for m in self.model.modules() for child in m.named_children())
        for parent, name, child in children:
            if isinstance(child, nn.ModuleList) and tuple(child) == self.blocks:
                setattr(parent, name, nn.ModuleList(blocks))
                try:
                    yield
                finally:
                    setattr(parent, name, child)
                return
        raise Unsupported("the model keeps its blocks in no list")

    def block_at_hand(self, layer: int) -> AbstractContextManager[None]:
        """Inside, the weights of a block stay fetched, for calls of its submodules."""
        return _fetched(s for module, s in self._stations.items() if module is self.blocks[layer])

    def is_away(self, module: nn.Module) -> bool:
        """Whether weights of a plain module are offloaded or uncast until it runs."""
        streamed = self._stations.get(module)
        return streamed is not None and bool(streamed.away)

    def rests_elsewhere(self, module: nn.Module) -> bool:
        """Whether weights of a plain module are offloaded until it runs."""
        return self.is_away(module) and self._stations[module].n_bytes > 0

    def cast_no_weights_of(self, modules: Collection[nn.Module]) -> None:
        """Stop casting the in-memory weights of `modules` while they run."""
        for streamed in self._stations.values():
            streamed.leave(modules)

    def graph(self) -> AbstractContextManager[Any]:
        """Return a context for differentiable forward passes; its graphs save no cast weights."""
        return keep_no_casts(self._stations.values())

    def values_of(self, module: nn.Module, name: str) -> Tensor | None:
        """Return a weight of a plain module from where it is stored; fetches nothing.

        None if the module has no weight of that name.
        """
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor):
            return None
        home = self._homes.get(module)
        if weight.is_meta and home is not None and home.away is not None:
            return home.away[name]
        return weight.detach()

    @contextmanager
    def attending(self, layer_fns: Callable[[int], Attend]) -> Iterator[None]:
        """Inside, layer i's attention calls `layer_fns(i)`."""
        for layer, module in enumerate(self._attentions):
            module.__dict__["patchsweep_attend"] = layer_fns(layer)
        try:
            yield
        finally:
            for module in self._attentions:
                module.__dict__.pop("patchsweep_attend", None)

    def has_hook(self, hook_name: str) -> bool:
        """Whether the bridge has that hook. Cached: each `bridge.hook_dict` builds a new table."""
        return hook_name in self._hooks

    def point(self, hook_name: str) -> HookLocation | None:
        """Return the location of the bridge's hook `hook_name` in the plain modules.

        None if the hook is inside a function instead of at a module's input or output, or on a
        module that only the bridge has.

        Raises:
            KeyError: the bridge has no such hook.
        """
        sides: dict[str, Literal["in", "out"]] = {"hook_in": "in", "hook_out": "out"}
        for name in self._names[id(self._hooks[hook_name])]:
            path, _, leaf = name.rpartition(".")
            if leaf not in sides:
                continue
            component: Any = self.bridge
            for part in path.split("."):
                component = component[int(part)] if part.isdigit() else getattr(component, part)
            module = self.module_of(component)
            if module is not None:
                return HookLocation(module, sides[leaf])
        return None

    def _class_of(self, module: nn.Module) -> type[nn.Module]:
        return leaner(type(module))  # type: ignore[arg-type]  # mypy takes classes for unhashable

    def _attention_of(self, layer: int) -> nn.Module:
        component = getattr(self.bridge.blocks[layer], "attn", None)
        module = None if component is None else self.module_of(component)
        if module is None:
            raise Unsupported(f"block {layer} has no attention module of its own")
        return module


@contextmanager
def _fetched(streamed: Iterable[StreamedModule]) -> Iterator[None]:
    with ExitStack() as stack:
        for module_weights in streamed:
            module_weights.fetch()
            stack.callback(module_weights.release)
        yield


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that Hugging Face layers call; q, k, v `[1, head, token, d_head]`."""
    if not query.shape[2] == key.shape[2] == value.shape[2]:
        raise Unsupported(
            f"its attention reads {key.shape[2]} keys where the prompt has {query.shape[2]} tokens"
        )
    # fp32 rotary tables make q and k fp32 in bf16 layers
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    attend = module.__dict__["patchsweep_attend"]
    beat(query.shape[0] * query.shape[2])  # every forward pass gets here once per layer
    return attend(module, query, key, value, attention_mask=attention_mask, **kwargs), None


@dataclass(frozen=True)
class CausalMask:
    """A model's attention mask: query i sees key j if i - window < j <= i."""

    length: int  # tokens
    window: int  # at most the length

    def __getitem__(self, index: object) -> NoReturn:
        raise Unsupported("its own code works on the attention mask")


def _make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    **_: Any,
) -> CausalMask:
    """Return the mask that `mask_function` describes; blocks pass it to their attention.

    Raises:
        Unsupported: the mask is neither causal nor a sliding window.
    """
    # on the CPU: what a mask shows is read here, and on a GPU each reading would wait
    row = torch.arange(batch_size, device="cpu").view(-1, 1, 1)
    head = torch.zeros((), dtype=torch.long, device="cpu")
    query = torch.arange(q_length, device="cpu").unsqueeze(1)
    key = torch.arange(kv_length, device="cpu").unsqueeze(0)
    seen = mask_function(row, head, query, key).cpu()
    seen = seen.expand(batch_size, q_length, kv_length)
    window = int(seen[0].sum(dim=1).max())
    known = (key <= query) & (key > query - window)
    if attention_mask is not None or not bool((seen == known).all()):
        raise Unsupported(
            f"its attention over {kv_length} tokens is neither causal nor a sliding window"
        )
    return CausalMask(kv_length, window)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _make_mask)

# arguments that layers pass to their attention: without effect on it, and supported here
_HARMLESS = ("position_ids", "cache_position", "use_cache", *MORE_OUTPUTS)
_HONOURED = ("attention_mask", "scaling", "sliding_window", "softcap", "s_aux", "is_causal")


def attention_settings(module: nn.Module, d_head: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `scale`, `window`, `softcap` and `sinks` from a layer's arguments to its attention.

    Raises:
        Unsupported: an argument is not supported, or contradicts the mask.
    """
    for name, value in kwargs.items():
        is_set = value is not None and value is not False
        if is_set and name not in (*_HARMLESS, *_HONOURED) and (name, value) != ("dropout", 0.0):
            raise Unsupported(f"its attention is given {name}, which is not known")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise Unsupported("attention is not causal")
    window, mask = kwargs.get("sliding_window"), kwargs.get("attention_mask")
    if not isinstance(mask, CausalMask):
        kind = "no mask" if mask is None else "a mask of its own making"
        raise Unsupported(f"its attention is given {kind}")
    if min(window or mask.length, mask.length) != mask.window:
        raise Unsupported(
            f"its mask shows {mask.window} of {mask.length} tokens, and its attention is told of "
            + (f"a window of {window}" if window else "no window")
        )
    scale = kwargs.get("scaling")
    if scale is None:
        scale = getattr(module, "scaling", None)
    sinks = kwargs.get("s_aux")
    return {
        "scale": float(d_head**-0.5 if scale is None else scale),
        "window": window,
        "softcap": kwargs.get("softcap"),
        "sinks": sinks.detach() if isinstance(sinks, torch.Tensor) else None,
    }
