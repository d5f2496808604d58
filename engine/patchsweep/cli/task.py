"""`patchsweep task list` lists the built-in tasks; `patchsweep task check NAME` scores a model."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from patchsweep.cli.console import stdout
from patchsweep.cli.parser import Parser, at_least
from patchsweep.models import load_model
from patchsweep.tasks import TASKS, TaskCheck, check_task, find_task


def main(arguments: list[str]) -> int:
    """List the tasks, or score a model on some; return 0."""
    parser = Parser("patchsweep task", description="The built-in tasks.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="names, what they ask, and their sources")
    check = verbs.add_parser(
        "check", help="how well a model does a task: a sweep of a task it fails explains nothing"
    )
    check.add_argument("names", nargs="*", metavar="NAME", help="tasks (all)")
    check.add_argument("--model", default="smollm2-135m", help="as load_model takes it")
    check.add_argument("--n-pairs", type=at_least(1), help="pairs (the task's own number)")
    check.add_argument("--seed", type=at_least(0), default=0, help="of the pairs (0)")
    options = parser.parse_args(arguments)
    console = stdout()
    if options.verb == "list":
        console.print(_listed())
        return 0
    names = [find_task(name).name for name in options.names or TASKS]
    transformers_logging.disable_progress_bar()
    model = load_model(options.model)
    checks = [check_task(model, name, options.n_pairs, options.seed) for name in names]
    console.print(_scored(options.model, checks))
    return 0


def _listed() -> Table:
    table = Table()
    for column in ("task", "what it asks", "options", "source"):
        table.add_column(column)
    for task in TASKS.values():
        options = "\n".join(f"{name}={value}" for name, value in task.options().items())
        table.add_row(task.name, Text(task.description), Text(options), Text(task.source))
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
            f"{check.clean_accuracy:.0%}  {check.clean_logit_diff:+.2f}  {check.clean_top1:.0%}",
            f"{check.corrupted_accuracy:.0%}  {check.corrupted_logit_diff:+.2f}  "
            f"{check.corrupted_top1:.0%}",
        )
    return table
