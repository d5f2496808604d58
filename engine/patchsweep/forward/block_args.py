"""Arguments of blocks: which of their axes are prompts and positions, and how tokens take them.

Sizes alone do not tell: a tensor of four heads looks like one of four positions. So the model is
run twice with its blocks left out, on batches of different sizes; the axes that follow are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from patchsweep.forward.unwrapped import OWN_ATTENTION, CausalMask, Unsupported, UnwrappedModel
from patchsweep.models.offload import device_of


@dataclass(frozen=True)
class Axes:
    """Which axis of a tensor numbers the prompts of a batch, and which their positions."""

    prompt: int | None
    position: int | None


@dataclass(frozen=True)
class BlockArgs:
    """The arguments that one block was called with, its hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: tuple[Axes | None, ...]  # of each argument, nested ones in their order; None: no tensor

    def at(self, token_pair: Tensor, token_pos: Tensor) -> BlockArgs:
        """The same arguments for one packed row of tokens, each taken where it lies."""
        leaves, structure = tree_flatten((self.args, self.kwargs))
        taken = [
            value if axes is None else _take(value, axes, token_pair, token_pos)
            for value, axes in zip(leaves, self.axes, strict=True)
        ]
        args, kwargs = tree_unflatten(taken, structure)
        return BlockArgs(args, kwargs, self.axes)

    def check(self) -> None:
        """See that no block left anything for the next one in an argument that they share.

        Raises:
            Unsupported: one did.
        """
        for value in tree_flatten((self.args, self.kwargs))[0]:
            if isinstance(value, Mapping) and value:
                raise Unsupported("its blocks hand keys and values on to later ones")


def _take(x: Tensor, axes: Axes, token_pair: Tensor, token_pos: Tensor) -> Tensor:
    if axes.position is None:
        return x
    if axes.prompt is None:
        return x.index_select(axes.position, token_pos.to(x.device))
    first = x.movedim((axes.prompt, axes.position), (0, 1))
    rows = first[token_pair.to(x.device), token_pos.to(x.device)].unsqueeze(0)
    return rows.movedim((0, 1), (axes.prompt, axes.position))


class _LastBlock(Exception):
    """Every block was called."""


class _Recorder(nn.Module):
    """Stands for a block: notes what it is called with, and gives back its hidden states."""

    def __init__(self, block: nn.Module, calls: list[Any], n_blocks: int) -> None:
        super().__init__()
        self.__dict__.update(block=block, calls=calls, n_blocks=n_blocks)  # no child of this one

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, rest, named = split_hidden(args, kwargs)
        self.calls.append((rest, named))
        if len(self.calls) == self.n_blocks:
            raise _LastBlock
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # models look at a block's kind


@torch.no_grad()
def dry_run(
    unwrapped: UnwrappedModel, n_prompts: int, length: int
) -> list[tuple[Any, dict[str, Any]]]:
    """What each block is called with on a batch of that size, hidden states left out.

    Blocks give back what they get, so that no weight but the embeddings' is read.

    Raises:
        Unsupported: a mask of prompts of that length is none that attention here knows, the model
            has an attention of its own, or its blocks hand on more than hidden states.
    """
    calls: list[tuple[Any, dict[str, Any]]] = []
    tokens = torch.zeros(n_prompts, length, dtype=torch.long, device=device_of(unwrapped.bridge))
    parent, name, blocks = unwrapped.list_of_blocks()
    recorders = [_Recorder(block, calls, unwrapped.n_layers) for block in unwrapped.blocks]
    setattr(parent, name, nn.ModuleList(recorders))
    try:
        unwrapped.model(tokens, use_cache=False)
    except _LastBlock:
        return calls
    except Exception as error:
        if not unwrapped.takes_attention_functions:
            raise Unsupported(OWN_ATTENTION) from error  # which works on a mask of its own
        if calls and type(error) in (TypeError, ValueError):
            raise Unsupported("its blocks hand on more than hidden states") from error
        raise
    finally:
        setattr(parent, name, blocks)
    raise Unsupported("the model does not call every block once")


_KNOWN: WeakKeyDictionary[UnwrappedModel, list[tuple[Axes | None, ...]]] = WeakKeyDictionary()


def are_known(unwrapped: UnwrappedModel) -> bool:
    """Whether `argument_axes` needs no more dry runs."""
    return unwrapped in _KNOWN


def argument_axes(unwrapped: UnwrappedModel) -> list[tuple[Axes | None, ...]]:
    """The axes of each block's arguments, nested ones in their order.

    Raises:
        Unsupported: an argument is not understood.
    """
    if unwrapped not in _KNOWN:
        small, large = dry_run(unwrapped, 2, 3), dry_run(unwrapped, 3, 5)
        try:
            _KNOWN[unwrapped] = [_axes_of(*calls) for calls in zip(small, large, strict=True)]
        except Unsupported as error:
            if unwrapped.takes_attention_functions:
                raise
            raise Unsupported(OWN_ATTENTION) from error  # such as the biases of ALiBi
    return _KNOWN[unwrapped]


def _axes_of(small: Any, large: Any) -> tuple[Axes | None, ...]:
    (a, structure), (b, same) = tree_flatten(small), tree_flatten(large)
    if structure != same:
        raise Unsupported("its blocks take other arguments for longer prompts")
    return tuple(_axes_between(x, y) for x, y in zip(a, b, strict=True))


def _axes_between(x: Any, y: Any) -> Axes | None:
    """Of an argument for 2 prompts of 3 tokens, and the same for 3 prompts of 5 tokens."""
    if not isinstance(x, Tensor):
        if x is None or isinstance(x, bool | int | float | str | Mapping | CausalMask):
            return None
        raise Unsupported(f"its blocks take a {type(x).__name__}, which is not known")
    sizes = list(zip(x.shape, y.shape, strict=False))
    moved = [axis for axis, (small, large) in enumerate(sizes) if small != large]
    prompts = [axis for axis in moved if sizes[axis] == (2, 3)]
    positions = [axis for axis in moved if sizes[axis] == (3, 5)]
    known = x.ndim == y.ndim and len(prompts) <= 1 and len(positions) <= 1
    if not known or len(moved) > len(prompts) + len(positions) or (prompts and not positions):
        raise Unsupported(
            f"its blocks take a tensor of which neither prompts nor positions are one axis: "
            f"{tuple(x.shape)} for 2 prompts of 3 tokens, {tuple(y.shape)} for 3 of 5"
        )
    return Axes(prompts[0] if prompts else None, positions[0] if positions else None)


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states of a block's call, and the arguments without them."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), args, rest


def first_of(output: Any) -> Tensor:
    """The hidden states among what a module returned."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def with_first(output: Any, hidden: Tensor) -> Any:
    """What a module returned, with other hidden states."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden
