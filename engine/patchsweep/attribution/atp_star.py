"""AtP*: attribution patching that computes the patched attention softmax exactly.

A patched query or key changes attention probabilities. Where they are saturated, their gradient
is nearly zero although the change is large. AtP* (Kramár et al., arXiv 2403.00745) computes the
patched probabilities p' and linearises only what follows them:

    estimate = sum over (query i, key k) of (p'_ik - p_ik) * d metric / d p_ik

Q-fix (`q`, `rot_q`) takes the patched query of token i against the base run's keys. K-fix (`k`,
`rot_k`) takes the patched key of token t for all later queries, in O(T^2) per head by the closed
form in `key_effect`. All other sites are attributed as in `atp`. The estimate of a span of keys
is the sum of the estimates of its keys.

GradDrop (`atp_star_drop`) treats direct and indirect effects that cancel. It makes one backward
pass per layer l, with the gradient stopped at the outputs of l to the residual stream, and
averages the **absolute** estimates over l. The result has no sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchsweep.attribution.atp import differentiable_run
from patchsweep.attribution.estimates import Estimates, Found, Work, backward_each
from patchsweep.errors import MethodError
from patchsweep.forward.grad import GradientModel, Heads, Place
from patchsweep.forward.pattern import attention_pattern
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.sites import SITES, Site


@dataclass(frozen=True)
class AtpStar:
    """Q-fix and K-fix; `grad_drop` adds GradDrop, whose estimates have no sign."""

    name: str = "atp_star"
    grad_drop: bool = False
    at_base: bool = True

    def run(self, work: Work) -> Found:
        """See `Method`."""
        estimates = work.empty()
        other_sites = tuple(s for s in work.sites if s.side not in ("query", "key"))
        switch = _Switch()
        logits = differentiable_run(
            work,
            estimates,
            other_sites,
            on_attention=lambda layer, heads: _watch_pattern(work, estimates, layer, heads),
            after=(lambda: switch.on(work)) if self.grad_drop else ExitStack,
        )
        scores = work.score(logits, logits.detach())
        if self.grad_drop:
            self._dropped(work.gradients.n_layers, estimates, scores, switch)
        else:
            backward_each(scores, estimates)
        return Found(estimates, logits.detach())

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """See `Method`: the fixes need q and k after rotary, GradDrop the layers' outputs."""
        sides = {site.side for site in sites}
        needed = [SITES["rot_q"]] if "query" in sides else []
        needed += [SITES["rot_k"]] if "key" in sides else []
        if self.grad_drop:
            needed += [SITES["attn_out"], SITES["mlp_out"]]
        return tuple(needed)

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """See `Method`."""
        return 2 + n_metrics * (n_layers if self.grad_drop else 1)

    def _dropped(
        self,
        n_layers: int,
        estimates: Estimates,
        scores: Float[Tensor, "metric pair"],
        switch: _Switch,
    ) -> None:
        total = {name: torch.zeros_like(x) for name, x in estimates.values.items()}
        for layer in range(n_layers):
            switch.dropped = layer
            for metric, row in enumerate(scores):
                estimates.metric = metric
                last = layer == n_layers - 1 and metric == len(scores) - 1
                row.sum().backward(retain_graph=not last)
            for name, x in estimates.values.items():
                total[name] += x.abs()
                x.zero_()
        for name, x in estimates.values.items():
            # a node's own layer contributes nothing to its mean
            x.copy_(total[name] / max(1, n_layers - 1))


def check_intervention(
    model: GradientModel, sites: Sequence[Site], intervention: Intervention
) -> None:
    """Raise unless each patched query and key is also known after rotary, where AtP* needs it.

    Raises:
        MethodError: `intervention` gives values before rotary that do not determine those after.
    """
    for site in sites:
        before_rotary = (
            site.projected and site.side != "value" and not model.points[site.name].in_attention
        )
        if before_rotary and not carries_over(intervention):
            raise MethodError(
                f"method=atp_star needs the patched {site.name} after rotary, which "
                f"intervention={intervention.name} does not give; use the site "
                f"rot_{site.name}, or method=atp"
            )


def carries_over(intervention: Intervention) -> bool:
    """Whether `intervention` at a site determines its own values at later sites."""
    return intervention.name in ("resample", "shuffle", "zero")


def _watch_pattern(work: Work, estimates: Estimates, layer: int, heads: Heads) -> None:
    """Hook `layer`'s pattern: its gradient adds the query and key estimates to `estimates`."""
    query_key_sites = [site for site in work.sites if site.side in ("query", "key")]
    if not query_key_sites:
        return
    pattern = heads.pattern.detach()
    n_rows, _, n_pos, _ = heads.q.shape

    def on_gradient(grad: Tensor) -> None:
        for site in query_key_sites:
            after_rotary = SITES["rot_q" if site.side == "query" else "rot_k"]
            place = Place(after_rotary, layer, n_rows, n_pos, True)
            base = heads.q if site.side == "query" else heads.k[:, :, -n_pos:]
            values = work.values(after_rotary, layer, place.flat(base))
            patched = values.unflatten(-1, (base.shape[1], -1)).transpose(1, 2)
            if site.side == "query":
                effect = query_effect(heads, patched, pattern, grad)
            else:
                patched = torch.cat([heads.k[:, :, :-n_pos], patched], dim=2)
                effect = key_effect(heads, patched, pattern, grad)[..., -n_pos:]
                effect = effect.unflatten(1, (base.shape[1], -1)).sum(dim=2)
            estimates.add_units(Place(site, layer, n_rows, n_pos, True), effect.transpose(1, 2))

    heads.pattern.register_hook(on_gradient)


def query_effect(
    heads: Heads,
    patched: Float[Tensor, "row head dest d"],
    pattern: Float[Tensor, "row head dest src"],
    grad: Float[Tensor, "row head dest src"],
) -> Float[Tensor, "row head dest"]:
    """Q-fix: the estimate for each query, from the probabilities of its patched value."""
    patched_pattern = attention_pattern(patched, heads.k, **heads.settings)
    return ((patched_pattern - pattern) * grad).sum(dim=-1)


def key_effect(
    heads: Heads,
    patched: Float[Tensor, "row kv_head src d"],
    pattern: Float[Tensor, "row head dest src"],
    grad: Float[Tensor, "row head dest src"],
) -> Float[Tensor, "row head src"]:
    """K-fix: the estimate for each key and query head, summed over the queries that attend to it.

    A key's new score changes p_t to p'_t and scales all other probabilities by one factor. So
    p . grad changes by (p'_t - p_t) * (grad_t - mean of grad over the other keys). This equals the
    paper's closed form g (grad_t - p . grad) with g = p_t (e^D - 1) / (1 + p_t (e^D - 1)), and
    also holds where p_t rounds to 0 or 1.
    """
    base = attention_scores(heads.q, heads.k, heads.settings)
    change = attention_scores(heads.q, patched, heads.settings) - base
    log_p = log_pattern(base, pattern, heads.settings)
    sink = (1 - pattern.sum(dim=-1, keepdim=True)).clamp_min(0)
    if heads.settings.get("sinks") is None:
        sink = torch.zeros_like(sink)
    total = (pattern * grad).sum(dim=-1, keepdim=True)
    # the key with the largest probability: 1 - p would be lost to rounding, so sum the others
    top = torch.zeros_like(pattern, dtype=torch.bool)
    top.scatter_(-1, pattern.argmax(dim=-1, keepdim=True), True)
    log_others = torch.cat([log_p.masked_fill(top, float("-inf")), sink.log()], dim=-1)
    weights = log_others.softmax(dim=-1)[..., :-1].nan_to_num(0.0)  # NaN: there is no other key
    log_rest = torch.where(
        top, log_others.logsumexp(dim=-1, keepdim=True), torch.log1p(-pattern.clamp_max(0.5))
    )
    mean_rest = torch.where(
        top,
        (weights * grad).sum(dim=-1, keepdim=True),
        (total - pattern * grad) / (1 - pattern.clamp_max(0.5)),
    )
    moved = torch.sigmoid(log_p - log_rest + change) - pattern
    return (moved.nan_to_num(0.0) * (grad - mean_rest)).sum(dim=-2)


def log_pattern(
    scores: Float[Tensor, "row head dest src"],
    pattern: Float[Tensor, "row head dest src"],
    settings: dict[str, Any],
) -> Float[Tensor, "row head dest src"]:
    """Logarithms of attention probabilities, finite where p rounds to 0; -inf where masked."""
    top, best = pattern.max(dim=-1, keepdim=True)
    total = scores.gather(-1, best) - top.log()
    src = torch.arange(scores.shape[3], device=scores.device)[None, :]
    dest = src[:, scores.shape[3] - scores.shape[2] :].T
    hidden = src > dest
    if settings.get("window") is not None:
        hidden |= src <= dest - settings["window"]
    return (scores - total).masked_fill(hidden, float("-inf"))


def attention_scores(
    q: Float[Tensor, "row head dest d"],
    k: Float[Tensor, "row kv_head src d"],
    settings: dict[str, Any],
) -> Float[Tensor, "row head dest src"]:
    """Attention scores after scaling and soft-cap, unmasked; fp32, or fp64 for fp64 inputs."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * settings["scale"]
    softcap = settings.get("softcap")
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


class _Stop(torch.autograd.Function):
    """The identity, whose gradient is zero at the switch's dropped layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: _Switch, layer: int) -> Tensor:
        ctx.switch, ctx.layer = switch, layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (torch.zeros_like(grad) if ctx.switch.dropped == ctx.layer else grad), None, None


class _Switch:
    """Selects the layer whose outputs to the residual stream pass no gradient (GradDrop)."""

    def __init__(self) -> None:
        self.dropped: int | None = None

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Hook a `_Stop` to every layer's attention and MLP output."""
        with ExitStack() as stack:
            for name in ("attn_out", "mlp_out"):
                for layer, point in enumerate(work.gradients.points[name].points):
                    assert point.side == "out"
                    handle = point.module.register_forward_hook(self._hook(layer))
                    stack.callback(handle.remove)
            yield

    def _hook(self, layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        def stop(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (_Stop.apply(output[0], self, layer), *output[1:])
            return _Stop.apply(output, self, layer)

        return stop
