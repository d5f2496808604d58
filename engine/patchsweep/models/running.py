"""The lock and the checked state under which a model runs.

Functions of this package set hooks, flags and attention functions on a model's modules and remove
them again, so two threads that run one model at once would disturb each other. Every public
function that runs a model holds it by `running`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_bridge
from patchsweep.errors import ModelError
from patchsweep.models.arithmetic import full_arithmetic
from patchsweep.models.compute import name_of

# modules of the libraries that build a model; hooks defined there are not the user's
OWN_HOOKS = (
    "accelerate.",
    "patchsweep.",
    "torch.",
    "transformer_lens.model_bridge.",
    "transformers.",
    "transformers_modules.",  # code of a model's repository
)
_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class _Turn:
    """The lock of one model."""

    lock: Any = field(default_factory=threading.RLock)
    depth: int = 0  # nested calls of `running` in the thread that holds the lock


_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_turns_lock = threading.Lock()


@contextmanager
def alone(model: TransformerBridge) -> Iterator[_Turn]:
    """Hold the lock of `model`; other threads wait."""
    with _turns_lock:
        turn = _turns.setdefault(model.original_model, _Turn())
    with turn.lock:
        yield turn


@contextmanager
def running(model: TransformerBridge) -> Iterator[None]:
    """Hold and check `model`, with gradients enabled and full fp32 products.

    Raises:
        ModelError: see `check_state`.
    """
    with ExitStack() as stack:
        turn = stack.enter_context(alone(model))
        if not turn.depth:  # an outer call has done this otherwise
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(full_arithmetic())
            check_state(model)
        turn.depth += 1
        try:
            yield
        finally:
            turn.depth -= 1


def runs_model(function: F) -> F:
    """Decorate `function`, whose first parameter is a bridge `model`, to run inside `running`."""

    @wraps(function)
    def call(model: TransformerBridge, *args: Any, **kwargs: Any) -> Any:
        check_bridge(model)
        with running(model):
            return function(model, *args, **kwargs)

    return cast(F, call)


def check_state(model: TransformerBridge) -> None:
    """Check that all forward passes of `model` compute the same function, in the bridge's dtype.

    Raises:
        ModelError: a module is in training mode or carries a user's hook, or most weights have
            another dtype than `cfg.dtype`.
    """
    training = training_module(model)
    if training is not None:
        where = f", at {training}" if training else ""
        raise ModelError(
            f"the model is in training mode{where}, where dropout is drawn; call model.eval()"
        )
    hooked = users_hooks(model)
    if hooked:
        more = f" and {len(hooked) - 3} more" if len(hooked) > 3 else ""
        raise ModelError(
            f"the model carries a hook at {', '.join(hooked[:3])}{more}, which some passes would "
            "run and others not; take hooks away (model.reset_hooks(including_permanent=True), or "
            "remove() of the handle), or write the change into the weights"
        )
    dtype = weight_dtype(model)
    if dtype is not None and dtype != model.cfg.dtype:
        raise ModelError(
            f"most weights are {name_of(dtype)} and the bridge says {name_of(model.cfg.dtype)}; "
            f"call model.to(torch.{name_of(dtype)}), or load the model with dtype={name_of(dtype)}"
        )


def training_module(model: TransformerBridge) -> str | None:
    """Return the name of a module in training mode, "" for the whole model; None if none is."""
    return next((name for name, module in _modules(model) if module.training), None)


def users_hooks(model: TransformerBridge) -> list[str]:
    """Return the names of modules and hook points with a user's hook or `forward`."""
    hooked = []
    for name, module in _modules(model):
        hooks = [hook for table in _TABLES for hook in getattr(module, table).values()]
        if "forward" in module.__dict__:  # overrides the class's method
            hooks.append(module.__dict__["forward"])
        if isinstance(module, HookPoint):
            # TransformerLens registers a wrapper; the handle holds the user's function
            hooks = [hook for hook in hooks if hook.__module__ != HookPoint.__module__]
            hooks += [handle.user_hook for handle in (*module.fwd_hooks, *module.bwd_hooks)]
            name = module.name or name
        if not all(_is_own(hook) for hook in hooks):
            hooked.append(name or "the model itself")
    return hooked


def weight_dtype(model: TransformerBridge) -> torch.dtype | None:
    """Return the dtype of most weights; None if none are floating-point of two bytes or more.

    Norms and routers may have another dtype, and quantised weights have no such dtype.
    """
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.original_model.parameters():
        if parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1:
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def _modules(model: TransformerBridge) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the bridge and of the Hugging Face model inside it, each once."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", model.original_model), ("", model)]
    while waiting:
        name, module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield name.replace("_original_component.", ""), module
            prefix = f"{name}." if name else ""
            waiting += [(prefix + key, child) for key, child in module._modules.items()]


def _is_own(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(OWN_HOOKS)
