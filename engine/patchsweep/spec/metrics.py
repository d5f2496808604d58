"""Metrics: one number per patched run, from the logits at the positions they read.

`answer` is the right answer after the clean prompt, `wrong` the right one after the corrupted
prompt; both stay what they are whichever run is the base. Sums over the vocabulary are fp32.

Answers of several tokens are teacher-forced with the *right* answer: token i of both answers is
read behind the right answer's first i tokens. `log_prob` is then that of the whole right answer.
`logit_diff` adds the differences token by token; where the answers part early, the wrong one's
later tokens are unlikely there whatever the model prefers, so prefer `log_prob` for such answers.

Most metrics want of the vocabulary only a few sums, which can be had without `[row, d_vocab]`
logits: `Metric.sums` names them, and a runner gives either them or the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep.errors import MetricError

Sum = Literal["log_z", "kl_base", "kl_source", "tv_base", "tv_source"]


@dataclass(frozen=True)
class Logits:
    """What metrics see of some rows; `read` runs over the answer's tokens (usually one)."""

    answer: Float[Tensor, "row read"]  # logit of the right answer's token
    wrong: Float[Tensor, "row read"]  # logit of the wrong answer's token
    full: Float[Tensor, "row read d_vocab"] | None = None
    base: Float[Tensor, "row read d_vocab"] | None = None  # logits of the unpatched base run
    source: Float[Tensor, "row read d_vocab"] | None = None  # logits of the source run
    # [row, read] sums over the vocabulary that were made without the three above
    sums: Mapping[Sum, Tensor] = field(default_factory=dict)

    def over_vocab(self, name: Sum) -> Float[Tensor, "row read"]:
        """One of `sums`: as given, or made of the whole logits."""
        if name in self.sums:
            return self.sums[name]
        assert self.full is not None
        if name == "log_z":
            return self.full.logsumexp(dim=-1)
        reference = self.base if name.endswith("_base") else self.source
        assert reference is not None
        if name.startswith("kl"):
            p, q = reference.log_softmax(dim=-1), self.full.log_softmax(dim=-1)
            return (p.exp() * (p - q)).sum(dim=-1)
        return 0.5 * (reference.softmax(dim=-1) - self.full.softmax(dim=-1)).abs().sum(dim=-1)


MetricLike = Union[str, "Metric", Callable[[Tensor], Tensor]]
MetricFn = Callable[[Logits], Float[Tensor, " row"]]
Needs = Literal["answers", "vocab", "references"]


@dataclass(frozen=True)
class Metric:
    """A named function of logits."""

    name: str
    unit: str  # nats, probability, rank, ...
    needs: Needs  # the answers' logits, the whole vocabulary, or base and source logits too
    compute: MetricFn
    sums: tuple[Sum, ...] = ()  # sums that do instead of the whole vocabulary; none: nothing does
    smooth: bool = True  # has a useful gradient
    flat_at_base: bool = False  # its gradient at the base run is zero
    # by which a store knows a metric of the user's own; None: no store can tell it from another
    version: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)  # likewise, plain JSON

    @classmethod
    def of_logits(
        cls,
        function: Callable[[Tensor], Tensor],
        *,
        name: str,
        version: str | None = None,
        unit: str = "",
        parameters: Mapping[str, Any] | None = None,
    ) -> Metric:
        """The metric that `function` makes of logits `[row, read, d_vocab]`: one number a row.

        A store knows it by `name`, `version` and `parameters`: give another version whenever the
        function, or what it reads, changes.
        """
        return cls(
            name,
            unit,
            "vocab",
            lambda x: function(_full(x)),
            version=version,
            parameters=parameters or {},
        )


def _logit_diff(x: Logits) -> Tensor:
    return (x.answer - x.wrong).sum(dim=1)


def _log_prob(x: Logits) -> Tensor:
    return (x.answer - x.over_vocab("log_z")).sum(dim=1)


def _rank(x: Logits) -> Tensor:
    assert x.full is not None
    return (x.full > x.answer.unsqueeze(-1)).sum(dim=-1).float().amax(dim=1)


def _top1_change(x: Logits) -> Tensor:
    assert x.full is not None
    assert x.base is not None
    changed = x.full.argmax(dim=-1) != x.base.argmax(dim=-1)
    return changed.any(dim=1).float()


def _kl(which: Sum) -> MetricFn:
    """KL(reference || patched), summed over the positions read."""
    return lambda x: x.over_vocab(which).sum(dim=1)


def _total_variation(which: Sum) -> MetricFn:
    """The largest distance among the positions read."""
    return lambda x: x.over_vocab(which).amax(dim=1)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("logit_diff", "logits", "answers", _logit_diff),
        Metric("logit", "logits", "answers", lambda x: x.answer.sum(dim=1)),
        Metric("log_prob", "nats", "vocab", _log_prob, ("log_z",)),
        Metric("prob", "probability", "vocab", lambda x: _log_prob(x).exp(), ("log_z",)),
        Metric("rank", "tokens above the answer", "vocab", _rank, smooth=False),
        Metric(
            "top1_change", "1 if the top token changed", "references", _top1_change, smooth=False
        ),
        Metric("kl_base", "nats", "references", _kl("kl_base"), ("kl_base",), flat_at_base=True),
        Metric("kl_source", "nats", "references", _kl("kl_source"), ("kl_source",)),
        Metric(
            "tv_base",
            "total variation",
            "references",
            _total_variation("tv_base"),
            ("tv_base",),
            flat_at_base=True,
        ),
        Metric(
            "tv_source",
            "total variation",
            "references",
            _total_variation("tv_source"),
            ("tv_source",),
        ),
    )
}


BUILT_IN = tuple(METRICS.values())


def get_metrics(given: object) -> tuple[Metric, ...]:
    """The metrics of a `MetricLike` or a sequence of them.

    A callable over logits `[row, read, d_vocab]` becomes a metric too.

    Raises:
        MetricError: a name is unknown or given twice, or there is none.
    """
    if isinstance(given, str | Metric) or callable(given):
        given = [given]
    if not isinstance(given, Sequence):
        raise MetricError(
            f"metrics={given!r} must be a metric or a list of them, such as ['logit_diff']"
        )
    if not given:
        raise MetricError("metrics is empty; name at least one, such as logit_diff")
    metrics = tuple(_get(metric) for metric in given)
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise MetricError(
            f"metrics={names} names a metric twice; name each once, functions by "
            "Metric.of_logits(function, name=...)"
        )
    return metrics


def _get(given: object) -> Metric:
    """The metric of a name, of a function of logits, or the one given."""
    if isinstance(given, Metric):
        return given
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return Metric.of_logits(given, name=name)
    if not isinstance(given, str) or given not in METRICS:
        raise MetricError(f"metric {given!r} is not known; use one of {', '.join(METRICS)}")
    return METRICS[given]


def _full(x: Logits) -> Tensor:
    assert x.full is not None
    return x.full


def compute(metrics: Sequence[Metric], logits: Logits) -> Float[Tensor, "metric row"]:
    """Every metric of every row, fp32.

    A metric of the user's own gets copies, so that it cannot change what others see.

    Raises:
        MetricError: a user's metric does not return one number per row.
    """
    n_rows = len(logits.answer)
    values = []
    for metric in metrics:
        value = metric.compute(logits if _is_built_in(metric) else _copies(metric, logits))
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != (n_rows,):
            raise MetricError(
                f"metric {metric.name} returned the shape {shape} for {n_rows} rows; "
                "return one number per row, shape [row]"
            )
        values.append(value.float())
    return torch.stack(values)


def _is_built_in(metric: Metric) -> bool:
    return METRICS.get(metric.name) is metric


def _copies(metric: Metric, x: Logits) -> Logits:
    """Copies of what `metric` needs."""

    def copy(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.clone()

    return Logits(
        answer=x.answer.clone(),
        wrong=x.wrong.clone(),
        full=None if metric.needs == "answers" else copy(x.full),
        base=copy(x.base) if metric.needs == "references" else None,
        source=copy(x.source) if metric.needs == "references" else None,
        sums={name: values.clone() for name, values in x.sums.items()},
    )


def check_rows(metrics: Sequence[Metric], n_reads: int, d_vocab: int, device: torch.device) -> None:
    """See that metrics of the user's own give each row a number that no other row changes.

    They are tried on three rows of drawn logits `[row, n_reads, d_vocab]`, together and one by one:
    how many rows, and which, come together depends on the machine and on the run.

    Raises:
        MetricError: one fails there, has another shape, or mixes rows.
    """
    generator = torch.Generator().manual_seed(0)
    for metric in metrics:
        if _is_built_in(metric):
            continue
        drawn = torch.randn(3, 3, n_reads, d_vocab, generator=generator, device="cpu")
        full, base, source = (4.0 * drawn).to(device)
        answer, wrong = full[..., 0], full[..., -1]
        rows = [slice(0, 3), *(slice(i, i + 1) for i in range(3))]
        try:
            together, *alone = (
                compute([metric], Logits(answer[i], wrong[i], full[i], base[i], source[i]))[0]
                for i in rows
            )
        except MetricError:
            raise
        except Exception as error:
            raise MetricError(
                f"metric {metric.name} failed on logits of the shape {tuple(full.shape)}, "
                f"[row, read, d_vocab]: {type(error).__name__}: {error}"
            ) from error
        if not torch.allclose(together, torch.cat(alone), rtol=1e-3, atol=1e-4, equal_nan=True):
            raise MetricError(
                f"metric {metric.name} gives a row another number when other rows are beside it, "
                "and which rows come together is no part of a sweep; compute each row by itself"
            )


def has_gradient(metric: Metric) -> bool:
    """Whether the metric's value keeps a gradient, tried on a few numbers.

    True too where they do not suffice, since the metric wants a real vocabulary: then the run
    will say what is wrong, if anything is.
    """
    with torch.enable_grad():
        full = torch.linspace(-1, 1, 16).view(2, 1, 8).requires_grad_()
        fixed = full.detach().flip(-1)
        try:
            value = metric.compute(Logits(full[..., 0], full[..., 1], full, fixed, fixed))
        except (RuntimeError, IndexError):
            return True
    return bool(value.requires_grad)
