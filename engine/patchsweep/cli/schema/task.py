"""The config group `task`: where the prompt pairs of a run come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import user_path
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.records import PromptRecord
from patchsweep.data.tables import LABEL
from patchsweep.errors import ConfigError
from patchsweep.tasks import load_task


@dataclass
class TaskConfig:
    """The source of the prompt pairs; one of the classes below."""

    def load(self, model: TransformerBridge) -> PromptPairs:
        """Return the pairs, in tokens of `model`."""
        raise ConfigError("a task is needed; give task=<name>, task=jsonl or task=strings")


@dataclass
class BuiltinTask(TaskConfig):
    """A built-in task: seeded pairs, see `patchsweep task list`."""

    name: str = MISSING
    n_pairs: int | None = None  # null: the task's own number
    seed: int = 0  # the same seed gives the same pairs
    options: dict[str, Any] = field(default_factory=dict)  # the task's own

    def load(self, model: TransformerBridge) -> PromptPairs:
        return load_task(model, self.name, self.n_pairs, self.seed, **self.options)


@dataclass
class FileTask(TaskConfig):
    """Pairs from a JSONL, CSV, TSV or Parquet file, or a folder that `datasets` saved."""

    path: str = MISSING
    multi_token: bool = False  # answers may have several tokens
    prepend_bos: bool | None = None  # start token: null: unless a prompt begins with it
    template: str | None = None  # chat: prompts are messages for the tokenizer's chat template
    align: str | None = None  # end: prompts of a pair may have unequal lengths
    # clean, ... to the names of the table; labels: {subject: who} finds a label by its column
    columns: dict[str, Any] = field(default_factory=dict)

    def load(self, model: TransformerBridge) -> PromptPairs:
        return PromptPairs.from_file(
            model,
            user_path(self.path),
            columns=self._columns() or None,
            multi_token=self.multi_token,
            prepend_bos=self.prepend_bos,
            template=self.template,
            align=self.align,
        )

    def _columns(self) -> dict[str, Any]:
        """Return `columns` in the form that `PromptPairs.from_file` takes."""
        flat = {name: column for name, column in self.columns.items() if name != "labels"}
        labels = self.columns.get("labels", {})
        if not isinstance(labels, dict):
            return {**flat, "labels": labels}
        return {**flat, **{f"{LABEL}{name}": column for name, column in labels.items()}}


@dataclass
class TextTask(TaskConfig):
    """One pair, written on the command line."""

    clean: str = MISSING
    corrupted: str = MISSING
    answer: str = MISSING  # right after `clean`; one token, its leading space included
    wrong_answer: str = MISSING  # right after `corrupted`
    multi_token: bool = False  # answers may have several tokens
    prepend_bos: bool | None = None  # start token: null: unless a prompt begins with it
    template: str | None = None  # chat: each prompt is a message of the user
    align: str | None = None  # end: the prompts may have unequal lengths

    def load(self, model: TransformerBridge) -> PromptPairs:
        record = PromptRecord(self.clean, self.corrupted, self.answer, self.wrong_answer)
        return PromptPairs.from_records(
            model,
            [record],
            multi_token=self.multi_token,
            prepend_bos=self.prepend_bos,
            template=self.template,
            align=self.align,
        )
