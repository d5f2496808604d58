"""Gradients of a user's metrics on the base run, and what a sweep with a tolerance refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.attribution.base_gradients import STREAM
from patchsweep.attribution.check import check_model
from patchsweep.errors import ConfigError, MethodError
from patchsweep.forward.grad import GradientModel, Gradients, Place
from patchsweep.models.arithmetic import SIXTEEN_BITS
from patchsweep.models.compute import name_of
from patchsweep.models.offload import device_of
from patchsweep.spec.sites import SITES

Metric = Callable[[Tensor], Any]


def refusal(tolerance: float | str, reason: str) -> ConfigError:
    """Return the error of a tolerance that cannot be met."""
    return ConfigError(
        f"tolerance={tolerance!r} takes to first order what a patch hardly changes, and cannot "
        f"here: {reason}; leave the tolerance out to run every patch exactly"
    )


def check_tolerated(
    tolerance: float | str,
    model: TransformerBridge,
    metrics: Mapping[str, Metric],
    tokens: Int[Tensor, "*prompt pos"],
) -> None:
    """Check that a tolerance can be met; tries the metrics on random logits, runs no model.

    Raises:
        ConfigError: the model computes in 16 bits or passes no gradient, or a metric has none.
    """
    if model.cfg.dtype in SIXTEEN_BITS:
        raise ConfigError(
            f"tolerance={tolerance!r} needs numbers without 16-bit rounding, and this model "
            f"computes in {name_of(model.cfg.dtype)}; load it with dtype=float32"
        )
    try:
        check_model(model)
    except MethodError as error:
        raise refusal(tolerance, str(error)) from error
    shape = (*tokens.shape, int(model.cfg.d_vocab))
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    with torch.inference_mode(False):
        for name, metric in metrics.items():
            _gradient(tolerance, name, metric, 4.0 * drawn.to(device_of(model)))


def base_gradients(
    tolerance: float | str,
    metrics: Mapping[str, Metric],
    model: GradientModel,
    tokens: Int[Tensor, "prompt pos"],
) -> tuple[Gradients, Bool[Tensor, "prompt pos"]]:
    """Return the metrics' gradients on the base run, and the positions whose logits they read.

    A metric of one number a prompt has the gradient of their sum: each number depends on its own
    prompt alone.

    Raises:
        ConfigError: a metric mixes prompts, or its gradient is zero or not finite.
    """
    n_layers = model.n_layers
    stream: list[list[Tensor]] = [[] for _ in range(n_layers + 1)]
    z: list[list[Tensor]] = [[] for _ in range(n_layers)]

    def visit(place: Place, x: Tensor) -> None:
        layer = place.layer + place.site.shift
        if place.site is SITES["resid_pre"] or layer == n_layers:
            # x holds the hook, so the hook must not hold x
            x.register_hook(lambda grad: stream[layer].append(place.flat(grad).detach()))

    def on_output(layer: int, x: Tensor) -> None:
        x.register_hook(lambda grad: z[layer].append(grad.detach()))

    with torch.enable_grad(), model.frozen():
        logits = model.forward(
            tokens, visit, range(tokens.shape[1]), sites=STREAM, gradient=True, on_output=on_output
        )
        base = logits.detach()
        seeds = []
        for name, metric in metrics.items():
            seed = _gradient(tolerance, name, metric, base)
            if not seed.any():
                raise refusal(tolerance, f"metric {name} has a gradient of zero at the base run")
            seeds.append(seed)
        for i, seed in enumerate(seeds, start=1):
            logits.backward(seed, retain_graph=i < len(seeds))
    gradients = Gradients([torch.stack(x) for x in stream], [torch.stack(x) for x in z])
    return gradients, _read(metrics, base, torch.stack(seeds))


def _gradient(
    tolerance: float | str, name: str, metric: Metric, logits: Float[Tensor, "prompt pos d_vocab"]
) -> Float[Tensor, "prompt pos d_vocab"]:
    """Return the gradient of a metric, or of the sum of its numbers.

    Raises:
        ConfigError: it has none, or a number depends on several prompts.
    """
    n_prompts = len(logits)
    with torch.enable_grad():
        x = logits.clone().requires_grad_()
        try:
            value = metric(x.clone())  # which it may change
            if not (isinstance(value, Tensor) and value.requires_grad):
                raise refusal(
                    tolerance,
                    f"metric {name} returns numbers that have no gradient (write it in torch "
                    "operations that keep one, no argmax, item or detach)",
                )
            if tuple(value.shape) not in ((), (n_prompts,)):
                raise refusal(
                    tolerance,
                    f"metric {name} returns the shape {tuple(value.shape)}, not one number or one "
                    "a prompt",
                )
            (total,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
            for prompt in range(n_prompts if value.ndim and n_prompts > 1 else 0):
                (own,) = torch.autograd.grad(value[prompt], x, retain_graph=True)
                own[prompt] = 0.0
                if own.any():
                    raise refusal(
                        tolerance,
                        f"metric {name} gives a prompt a number that depends on other prompts",
                    )
        except RuntimeError as error:
            raise refusal(
                tolerance, f"metric {name} fails on logits that take a gradient ({error})"
            ) from error
    if not total.isfinite().all():
        raise refusal(tolerance, f"the gradient of metric {name} is not finite")
    return total


@torch.no_grad()
def _read(
    metrics: Mapping[str, Metric],
    logits: Float[Tensor, "prompt pos d_vocab"],
    gradients: Float[Tensor, "metric prompt pos d_vocab"],
) -> Bool[Tensor, "prompt pos"]:
    """Return the positions whose logits a metric reads; all, if that is in doubt.

    Without a gradient there, and the same value with NaN there, a position is not read.
    """
    read = (gradients != 0).any(dim=-1).any(dim=0)
    without = torch.where(read[..., None], logits, torch.nan)
    try:
        pairs = [(metric(without.clone()), metric(logits.clone())) for metric in metrics.values()]
    except Exception:  # a metric that takes no NaN
        return torch.ones_like(read)
    return read if all(torch.equal(*pair) for pair in pairs) else torch.ones_like(read)
