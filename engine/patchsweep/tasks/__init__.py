"""Built-in tasks: prompt pairs for behaviours with known circuits.

`TASKS` maps names to tasks; `load_task` draws pairs for one model; `check_task` measures how
well that model does the task without patches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_bridge
from patchsweep.data.pairs import PromptPair, PromptPairs, UnfitPair, tokenise_pair
from patchsweep.data.records import PromptRecord
from patchsweep.errors import PromptError
from patchsweep.tasks.addition import ADDITION
from patchsweep.tasks.base import Task, draw_limit
from patchsweep.tasks.check import TaskCheck, check_pairs, keep_answered
from patchsweep.tasks.docstring import DOCSTRING
from patchsweep.tasks.facts import FACTS
from patchsweep.tasks.greater_than import GREATER_THAN
from patchsweep.tasks.induction import INDUCTION
from patchsweep.tasks.ioi import DEMO_PAIR, IOI, IOI_DEMO
from patchsweep.tasks.plain import text_pairs
from patchsweep.tasks.pronouns import PRONOUNS
from patchsweep.tasks.sva import SVA
from patchsweep.tasks.template import template_task

__all__ = [
    "DEMO_PAIR",
    "TASKS",
    "Task",
    "TaskCheck",
    "check_pairs",
    "check_task",
    "find_task",
    "keep_answered",
    "load_task",
    "template_task",
    "text_pairs",
]

_TASKS = (IOI_DEMO, IOI, FACTS, GREATER_THAN, DOCSTRING, PRONOUNS, SVA, ADDITION, INDUCTION)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})


def find_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        PromptError: no task has this name.
    """
    if name not in TASKS:
        raise PromptError(f"task {name!r} is not known; use one of {', '.join(sorted(TASKS))}")
    return TASKS[name]


def load_task(
    model: TransformerBridge,
    name: str | Task,
    n_pairs: int | None = None,
    seed: int = 0,
    **options: Any,
) -> PromptPairs:
    """Return the first `n_pairs` pairs of a task that fit the tokenizer of `model`.

    `name` is that of a built-in task, or a task of your own from `template_task`.

    Skips records whose prompts differ in number of tokens or whose answers are not one token.
    A seed fixes the result, and fewer pairs are a prefix of more. Without `n_pairs` the number
    is the task's default.

    Raises:
        PromptError: as `Task.records`; the task is unknown, or too few records fit (with the
            commonest reason).
    """
    task = name if isinstance(name, Task) else find_task(name)
    check_bridge(model)
    n = task.n_pairs if n_pairs is None else n_pairs
    fitting: list[PromptPair] = []
    seen: set[PromptRecord] = set()
    reasons: Counter[str] = Counter()
    for record in task.draws(n, seed, model, options):
        if record in seen:
            reasons["it repeats an earlier pair"] += 1
            continue
        seen.add(record)
        try:
            fitting.append(tokenise_pair(model, record, where=f"task {task.name!r}"))
        except UnfitPair as error:
            reasons[error.reason] += 1
        if len(fitting) == n:
            own = "".join(f", {key}={value}" for key, value in options.items())
            origin = f"task {task.name}: {task.description}; seed {seed}{own}"
            return PromptPairs(tuple(fitting), (origin,))
    reason, count = reasons.most_common(1)[0]
    raise PromptError(
        f"task {task.name!r} must give n_pairs={n} for this tokenizer, got {len(fitting)} in "
        f"{draw_limit(n)} draws; the commonest reason against a draw ({count} times): {reason}; "
        f"ask for at most {len(fitting)} pairs or use another model"
        if fitting
        else f"task {task.name!r} gives no pair for this tokenizer in {draw_limit(n)} draws; the "
        f"commonest reason against a draw ({count} times): {reason}; use another task or model"
    )


def check_task(
    model: TransformerBridge,
    name: str,
    n_pairs: int | None = None,
    seed: int = 0,
    **options: Any,
) -> TaskCheck:
    """Measure `model` on a task: accuracies, mean logit differences, top-1 rates.

    Raises:
        PromptError: as `load_task`.
    """
    pairs = load_task(model, find_task(name), n_pairs, seed, **options)
    return replace(check_pairs(model, pairs), task=name, seed=seed)
