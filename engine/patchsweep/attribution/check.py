"""Checks before any forward pass: whether a method can attribute a request's metrics and sites."""

from __future__ import annotations

from collections.abc import Sequence

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.attribution.estimates import Method
from patchsweep.errors import MethodError, ModelError
from patchsweep.models.quantised import check_gradients, first_packed
from patchsweep.spec.interventions import Custom
from patchsweep.spec.metrics import Metric, has_gradient
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import Request


def check_request(request: Request, methods: Sequence[Method]) -> None:
    """Raise unless every method can attribute every metric and site of `request`.

    Raises:
        MethodError: one cannot; the message names an alternative.
    """
    check_weights(request.bridge)
    check_gradients(request.bridge)
    for method in methods:
        for metric in request.metrics:
            check_metric(metric, method)
        for plan in request.plans:
            _check_plan(plan, method)
            if plan.site.written_as and isinstance(request.intervention, Custom):
                raise MethodError(
                    f"values of your own at the site {plan.site.name} are no values of "
                    f"{plan.site.written_as}, where method={method.name} works; give them for the "
                    f"site {plan.site.written_as}, or use method=exact"
                )
        if getattr(method, "needs_source", False) and any(p.aligned for p in request.pairs):
            raise MethodError(
                f"method={method.name} goes from the base prompt to the source prompt token by "
                "token, and a pair has prompts of unequal lengths; use atp, relp or ig"
            )
        if getattr(method, "needs_source", False) and not request.intervention.from_source:
            raise MethodError(
                f"method={method.name} goes from the base prompt to the source prompt, and "
                f"intervention={request.intervention.name} has no source prompt; use atp or ig, or "
                "intervention=resample"
            )


def check_model(model: TransformerBridge) -> None:
    """Raise unless gradients can pass through all weights of `model`, and weights are numbers.

    Raises:
        MethodError: a module is quantised.
        ModelError: a weight was created inside `torch.inference_mode()`.
    """
    check_weights(model)
    packed = first_packed(model)
    if packed is not None:
        raise MethodError(
            f"{packed}, which are no numbers to compute with; load the model with dtype=bfloat16 "
            "or float32, or use method=exact"
        )


def check_weights(model: TransformerBridge) -> None:
    """Raise if a weight of `model` can be in no graph.

    Raises:
        ModelError: it was created inside `torch.inference_mode()`.
    """
    original = model.original_model
    for name, weight in (*original.named_parameters(), *original.named_buffers()):
        if weight.is_inference():
            raise ModelError(
                f"weight {name} was made inside torch.inference_mode(), so no gradient passes the "
                "model; load it outside, or use method=exact"
            )


def check_metric(metric: Metric, method: Method) -> None:
    """Raise unless `method` can attribute `metric`.

    Raises:
        MethodError: the metric is not smooth, has zero gradient at the base run (for a method
            that takes only that gradient), or returns numbers without gradient.
    """
    zeros = f"method={method.name} would give 0 everywhere; use the metric logit_diff, or method=ig"
    check_gradient_of(metric, "method=exact", zeros if method.at_base else "")


def check_gradient_of(metric: Metric, exact: str, zeros: str) -> None:
    """Raise unless `metric` has a gradient; `exact` is named as what needs none.

    `zeros` says what its gradient at the base run would give if that is zero; "" allows that.

    Raises:
        MethodError: see `check_metric`.
    """
    if not metric.smooth:
        raise MethodError(
            f"metric {metric.name} changes by jumps, so its gradient is zero or undefined; use "
            f"logit_diff, or {exact}"
        )
    if metric.flat_at_base and zeros:
        raise MethodError(
            f"metric {metric.name} is smallest at the base run, where its gradient is zero, so "
            f"{zeros}"
        )
    if not has_gradient(metric):
        raise MethodError(
            f"metric {metric.name} returns numbers that have no gradient; write it in torch "
            f"operations that keep one (no argmax, item or detach), or use {exact}"
        )


def _check_plan(plan: SitePlan, method: Method) -> None:
    if plan.site.cells:
        raise MethodError(
            "single cells of the pattern are estimated by patchsweep.attribution.patterns, all at "
            "once; use it, or method=exact"
        )
    joint = [layers for layers in plan.axes.layers if len(layers) > 1]
    if plan.site.layered and joint:
        raise MethodError(
            f"layers={list(joint[0])} are patched together, and method={method.name} estimates "
            "each layer by itself; give layers one by one, or use method=exact"
        )
    if method.name == "relp_ah" and plan.site.side in ("query", "key"):
        raise MethodError(
            f"method=relp_ah holds the attention pattern constant, so {plan.site.name} would get "
            "0 everywhere; use relp or atp_star"
        )
