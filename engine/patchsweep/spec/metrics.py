"""Metrics: one number per patched run, from the logits at the positions that are read.

`answer` is the right answer after the clean prompt, `wrong` the right answer after the corrupted
prompt; both are the same for either direction. Sums over the vocabulary are fp32.

Answers of several tokens are teacher-forced with the *right* answer: token i of both answers is
read after the first i tokens of the right answer. `log_prob` is then that of the full right answer.
`logit_diff` adds the differences token by token. Where the answers diverge early, the later tokens
of the wrong answer are unlikely whatever the model prefers; use `log_prob` for such answers. A name
such as `logit_diff@1` is the metric of one token alone, here the second (see `at_token`).

Most metrics need only a few vocabulary reductions, which a runner can compute without storing
`[row, d_vocab]` logits. `Metric.sums` names them; a runner passes either them or the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Union

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep.errors import MetricError

Sum = Literal["log_z", "kl_base", "kl_source", "tv_base", "tv_source"]


@dataclass(frozen=True)
class Logits:
    """The input of metrics for some rows; axis `read`: one entry per answer token, usually one."""

    answer: Float[Tensor, "row read"]  # logit of the right answer's token
    wrong: Float[Tensor, "row read"]  # logit of the wrong answer's token
    full: Float[Tensor, "row read d_vocab"] | None = None
    base: Float[Tensor, "row read d_vocab"] | None = None  # logits of the unpatched base run
    source: Float[Tensor, "row read d_vocab"] | None = None  # logits of the source run
    # [row, read] vocabulary reductions, computed without the three tensors above
    sums: Mapping[Sum, Tensor] = field(default_factory=dict)

    def over_vocab(self, name: Sum) -> Float[Tensor, "row read"]:
        """Return one vocabulary reduction: from `sums`, or computed from the full logits."""
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

    def changed(self, change: Callable[[Tensor], Tensor]) -> Logits:
        """Return the tensors that `change` makes of these."""
        optional = {"full": self.full, "base": self.base, "source": self.source}
        return Logits(
            change(self.answer),
            change(self.wrong),
            **{name: change(x) for name, x in optional.items() if x is not None},
            sums={name: change(x) for name, x in self.sums.items()},
        )


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
    sums: tuple[Sum, ...] = ()  # vocabulary reductions that suffice; empty: needs all logits
    smooth: bool = True  # has a useful gradient
    flat_at_base: bool = False  # its gradient at the base run is zero
    # identifies a user's metric in a store; None: a store cannot tell it from another
    version: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)  # likewise; plain JSON
    token: int | None = None  # index of the one token of the answer that it reads; None: all

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
        """Return the metric that `function` computes from logits `[row, read, d_vocab]`.

        `function` returns one number per row, `[row]`. A store identifies the metric by `name`,
        `version` and `parameters`: set a new version whenever the function, or the data it reads,
        changes.

        Raises:
            MetricError: `name` is no text.
        """
        if not isinstance(name, str) or not name.strip():
            raise MetricError(f"a metric's name={name!r} must be a text, such as 'peak'")
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
    return (_full(x) > x.answer.unsqueeze(-1)).sum(dim=-1).float().amax(dim=1)


def _top1_change(x: Logits) -> Tensor:
    assert x.base is not None
    changed = _full(x).argmax(dim=-1) != x.base.argmax(dim=-1)
    return changed.any(dim=1).float()


def _kl(which: Sum) -> MetricFn:
    """Return a function for KL(reference || patched) in nats, summed over the positions read."""
    return lambda x: x.over_vocab(which).sum(dim=1)


def _total_variation(which: Sum) -> MetricFn:
    """Return a function for the largest total variation distance among the positions read."""
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
    """Return the metrics for a `MetricLike` or a sequence of them.

    A callable over logits `[row, read, d_vocab]` becomes a metric, see `Metric.of_logits`.

    Raises:
        MetricError: a name is unknown or given twice, or `given` is empty.
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
    """Return the metric for a name or a function of logits; a `Metric` as it is."""
    if isinstance(given, Metric):
        return given
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return Metric.of_logits(given, name=name)
    name, at, token = given.partition("@") if isinstance(given, str) else ("", "", "")
    if name not in METRICS or (at and not token.isdecimal()):
        raise MetricError(
            f"metric {given!r} is not known; use one of {', '.join(METRICS)}, or of one token of "
            "the answers such as logit_diff@0"
        )
    return at_token(METRICS[name], int(token)) if at else METRICS[name]


def at_token(metric: Metric, token: int) -> Metric:
    """Return `metric` of one token of the answers, the first is 0; called `logit_diff@0`, say.

    It reads the token after those of the right answer before it.
    """

    def compute(x: Logits) -> Tensor:
        return metric.compute(x.changed(lambda values: values[:, token : token + 1]))

    version = "1" if _is_built_in(metric) else metric.version
    name = f"{metric.name}@{token}"
    return replace(metric, name=name, compute=compute, version=version, token=token)


def metrics_at(n_tokens: Sequence[int], given: object, per_token: bool) -> tuple[Metric, ...]:
    """Return `get_metrics(given)`, with `per_token` also each of them at every token.

    `n_tokens` holds the number of tokens of each pair's answers.

    Raises:
        MetricError: as `get_metrics`, or a metric reads a token that an answer lacks.
    """
    metrics = get_metrics(given)
    if per_token:
        whole = [metric for metric in metrics if metric.token is None]
        alone = [at_token(metric, i) for metric in whole for i in range(max(n_tokens))]
        metrics = tuple({metric.name: metric for metric in (*metrics, *alone)}.values())
    for metric in metrics:
        for pair, n in enumerate(n_tokens):
            if metric.token is not None and metric.token >= n:
                raise MetricError(
                    f"metric {metric.name} reads token {metric.token} of the answers, and those of "
                    f"pair {pair} end with token {n - 1}; use answers of as many tokens, or the "
                    "metric of the whole answer"
                )
    return metrics


def _full(x: Logits) -> Tensor:
    assert x.full is not None
    return x.full


def compute(metrics: Sequence[Metric], logits: Logits) -> Float[Tensor, "metric row"]:
    """Return all metrics of all rows, fp32.

    A user's metric gets copies of the logits, so that it cannot modify those of other metrics.

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
    """Return copies of the tensors in `x` that `metric` needs."""

    needed = replace(
        x,
        full=None if metric.needs == "answers" else x.full,
        base=x.base if metric.needs == "references" else None,
        source=x.source if metric.needs == "references" else None,
    )
    return needed.changed(Tensor.clone)


def check_rows(metrics: Sequence[Metric], n_reads: int, d_vocab: int, device: torch.device) -> None:
    """Check that user-defined metrics compute each row independently of the other rows.

    Each runs on three rows of random logits `[row, n_reads, d_vocab]`, together and one by one:
    the rows that a sweep batches together depend on the machine and on the run.

    Raises:
        MetricError: a metric fails there, returns another shape, or mixes rows.
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
    """Whether the metric's value has a gradient, tried on logits over 8 tokens.

    True too if the metric fails on these few: it may need a real vocabulary, and the run will
    report an error if there is one.
    """
    with torch.enable_grad():
        full = torch.linspace(-1, 1, 16).view(2, 1, 8).requires_grad_()
        fixed = full.detach().flip(-1)
        try:
            value = metric.compute(Logits(full[..., 0], full[..., 1], full, fixed, fixed))
        except (RuntimeError, IndexError):
            return True
    return bool(value.requires_grad)
