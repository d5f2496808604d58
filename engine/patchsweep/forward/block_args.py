"""Block arguments: their prompt and position axes, and their values for packed tokens.

One tensor's sizes are ambiguous: four heads look like four positions. So the model runs twice
without its blocks, on batches of different sizes, and the axes are those whose size changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from patchsweep.forward.unwrapped import OWN_ATTENTION, CausalMask, Unsupported, UnwrappedModel
from patchsweep.models.offload import device_of


@dataclass(frozen=True)
class Axes:
    """The axes of a tensor that index prompts and positions; None: it has no such axis."""

    prompt: int | None
    position: int | None


@dataclass(frozen=True)
class BlockArgs:
    """The arguments of one block's call, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: tuple[Axes | None, ...]  # one per argument, nested ones flattened; None: no tensor

    def at(
        self, token_pair: Tensor, token_pos: Tensor, known: dict[int, Tensor] | None = None
    ) -> BlockArgs:
        """Return the arguments for packed tokens: i is of `token_pair[i]`, at `token_pos[i]`.

        `known`: results of earlier calls for the same tokens, by the id of the argument.
        """
        known = {} if known is None else known

        def taken(x: Tensor, axes: Axes) -> Tensor:
            if axes.position is None:
                return x
            if id(x) not in known:
                known[id(x)] = _take(x, axes, token_pair, token_pos)
            return known[id(x)]

        return self._with(taken)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the arguments that have an axis of positions."""
        for value, axes in zip(tree_flatten((self.args, self.kwargs))[0], self.axes, strict=True):
            if axes is not None and axes.position is not None:
                yield value

    def repeated(self, copies: int) -> BlockArgs:
        """Return the arguments for the batch of prompts, repeated `copies` times."""
        if copies == 1:
            return self
        return self._with(
            lambda x, axes: x if axes.prompt is None else torch.cat([x] * copies, axes.prompt)
        )

    def _with(self, change: Callable[[Tensor, Axes], Tensor]) -> BlockArgs:
        leaves, structure = tree_flatten((self.args, self.kwargs))
        changed = [
            value if axes is None else change(value, axes)
            for value, axes in zip(leaves, self.axes, strict=True)
        ]
        args, kwargs = tree_unflatten(changed, structure)
        return BlockArgs(args, kwargs, self.axes)

    def run(self, block: nn.Module, hidden: Float[Tensor, "token d_model"]) -> Tensor:
        """Return the output `[token, d_model]` of `block` for packed tokens."""
        return first_of(block(hidden.unsqueeze(0), *self.args, **self.kwargs)).reshape(hidden.shape)

    def check(self) -> None:
        """Check that no block stored anything for later ones in a shared argument, such as a dict.

        Raises:
            Unsupported: a block did.
        """
        for value in tree_flatten((self.args, self.kwargs))[0]:
            if isinstance(value, Mapping) and value:
                raise Unsupported("its blocks hand keys and values on to later ones")


class SharedArguments:
    """The arguments of all blocks for packed tokens.

    What several blocks take, such as rotary tables, is gathered once while the tokens stay.
    """

    def __init__(self, calls: Sequence[BlockArgs]) -> None:
        self._calls = calls
        uses = Counter(id(leaf) for call in calls for leaf in call.tensors())
        self._shared = {key for key, n in uses.items() if n > 1}
        self._tokens: tuple[Tensor, Tensor] | None = None
        self._known: dict[int, Tensor] = {}

    def at(self, layer: int, token_pair: Tensor, token_pos: Tensor) -> BlockArgs:
        """Return the arguments of block `layer`, see `BlockArgs.at`."""
        tokens = (token_pair, token_pos)
        if self._tokens is None or any(
            a is not b for a, b in zip(tokens, self._tokens, strict=True)
        ):
            self._tokens, self._known = tokens, {}
        taken = self._calls[layer].at(*tokens, self._known)
        self._known = {key: x for key, x in self._known.items() if key in self._shared}
        return taken


def _take(x: Tensor, axes: Axes, token_pair: Tensor, token_pos: Tensor) -> Tensor:
    assert axes.position is not None
    if axes.prompt is None:
        return x.index_select(axes.position, token_pos.to(x.device))
    first = x.movedim((axes.prompt, axes.position), (0, 1))
    rows = first[token_pair.to(x.device), token_pos.to(x.device)].unsqueeze(0)
    return rows.movedim((0, 1), (axes.prompt, axes.position))


class Done(Exception):
    """Ends a forward pass once all that is needed of it has run."""


class _Recorder(nn.Module):
    """Replaces a block: records the block's arguments and returns its hidden states unchanged."""

    def __init__(self, block: nn.Module, calls: list[Any], n_blocks: int) -> None:
        super().__init__()
        self.__dict__.update(block=block, calls=calls, n_blocks=n_blocks)  # not as a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, rest, named = split_hidden(args, kwargs)
        self.calls.append((rest, named))
        if len(self.calls) == self.n_blocks:
            raise Done
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # models read attributes of their blocks


@torch.no_grad()
def dry_run(
    unwrapped: UnwrappedModel, n_prompts: int, length: int
) -> list[tuple[Any, dict[str, Any]]]:
    """Return each block's arguments on a batch of that size, without the hidden states.

    Blocks are replaced by recorders, so that only the embeddings' weights are read.

    Raises:
        Unsupported: prompts of that length get a mask that is neither causal nor a sliding window,
            the model does not use the attention interface, or blocks pass on more than hidden
            states.
    """
    block_args: list[tuple[Any, dict[str, Any]]] = []
    tokens = torch.zeros(n_prompts, length, dtype=torch.long, device=device_of(unwrapped.bridge))
    recorders = [_Recorder(block, block_args, unwrapped.n_layers) for block in unwrapped.blocks]
    with unwrapped.replacing_blocks(recorders):
        try:
            unwrapped.model(tokens, use_cache=False)
        except Done:
            return block_args
        except Exception as error:
            if not unwrapped.takes_attention_functions:
                raise Unsupported(OWN_ATTENTION) from error  # its attention needs its own mask
            if block_args and type(error) in (TypeError, ValueError):
                raise Unsupported("its blocks hand on more than hidden states") from error
            raise
    raise Unsupported("the model does not call every block once")


_KNOWN: WeakKeyDictionary[UnwrappedModel, list[tuple[Axes | None, ...]]] = WeakKeyDictionary()


def are_known(unwrapped: UnwrappedModel) -> bool:
    """Whether `argument_axes` has its result already and needs no dry run."""
    return unwrapped in _KNOWN


def argument_axes(unwrapped: UnwrappedModel) -> list[tuple[Axes | None, ...]]:
    """Return, per block, the axes of its arguments, nested ones flattened.

    Raises:
        Unsupported: an argument has an unknown type, or axes that are ambiguous.
    """
    if unwrapped not in _KNOWN:
        small, large = dry_run(unwrapped, 2, 3), dry_run(unwrapped, 3, 5)
        try:
            _KNOWN[unwrapped] = [
                _axes_of(*block_args) for block_args in zip(small, large, strict=True)
            ]
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
    """Return the axes of an argument: `x` for 2 prompts of 3 tokens, `y` for 3 of 5 tokens."""
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
    """Return the hidden states of a block's call, and the args and kwargs without them."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), args, rest


def first_of(output: Any) -> Tensor:
    """Return the hidden states in a module's output."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def with_first(output: Any, hidden: Tensor) -> Any:
    """Return a module's output with its hidden states replaced."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden
