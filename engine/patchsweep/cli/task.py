"""`patchsweep task list` lists the built-in tasks; `patchsweep task check NAME` scores a model."""

from __future__ import annotations

from dataclasses import replace

from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from patchsweep.arguments import user_path
from patchsweep.cli import parsers
from patchsweep.cli.console import stdout
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.show import number, percent, visible
from patchsweep.data.tables import SUFFIXES
from patchsweep.errors import ConfigError
from patchsweep.models import load_model
from patchsweep.tasks import TASKS, TaskCheck, check_pairs, check_task, find_task
from patchsweep.tasks.check import ANSWER_COLUMNS


def main(arguments: list[str]) -> int:
    """List the tasks, or score a model on some; return 0."""
    options = parsers.task(arguments)
    console = stdout()
    if options.verb == "list":
        console.print(_listed())
        return 0
    words = options.names or list(TASKS)
    files = [word for word in words if word.lower().endswith(SUFFIXES)]
    names = [find_task(name).name for name in words if name not in files]
    for file in files:
        if not user_path(file).is_file():
            raise ConfigError(f"there is no file {file}; give a table of pairs, or a task's name")
    transformers_logging.disable_progress_bar()
    model = load_model(options.model)
    checks = [check_task(model, name, options.n_pairs, options.seed) for name in names]
    for file in files:
        pairs = PromptPairs.from_file(
            model, user_path(file), template=options.template, align=options.align
        )
        checks.append(replace(check_pairs(model, pairs), task=file))
    console.print(_scored(options.model, checks))
    for one in checks[len(names) :]:
        console.print(_answers(one))
    return 0


def _listed() -> Table:
    table = Table()
    for column in ("task", "what it asks", "options", "source"):
        table.add_column(column)
    for task in TASKS.values():
        options = "\n".join(f"{name}={value}" for name, value in task.options().items())
        table.add_row(task.name, Text(task.description), Text(options), Text(task.source))
    return table


def _answers(check: TaskCheck) -> Table:
    """Return both answers of each pair of a file, after both prompts."""
    table = Table(title=Text(f"{check.task}: probability and rank of both answers"))
    for i, column in enumerate(ANSWER_COLUMNS):
        table.add_column(column, justify="left" if i < 3 else "right")
    for answer in check.answers:
        pair, prompt, right, *numbers = answer.row(visible)
        table.add_row(pair, prompt, Text(right), *numbers)
    return table


def _scored(model: str, checks: list[TaskCheck]) -> Table:
    table = Table(title=Text(f"{model}: accuracy, mean logit difference, top-1 rate"))
    table.add_column("task")
    for column in ("pairs", "clean", "corrupted"):
        table.add_column(column, justify="right")
    for check in checks:
        table.add_row(
            check.task,
            str(check.n_pairs),
            _score(check.clean_accuracy, check.clean_logit_diff, check.clean_top1),
            _score(check.corrupted_accuracy, check.corrupted_logit_diff, check.corrupted_top1),
        )
    return table


def _score(accuracy: float, logit_diff: float, top1: float) -> str:
    return f"{percent(accuracy)}  {number(logit_diff, sign=True)}  {percent(top1)}"
