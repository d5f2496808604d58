"""Prompt pairs of a sweep, as text and as tokens.

This module checks every prompt, answer and label with the tokenizer, before the model runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_bridge, one_of, true_or_false
from patchsweep.data.alignment import END, NONE, partners
from patchsweep.data.answers import UnfitPair, answer_ids, prompt_ids
from patchsweep.data.chat import CHAT, render
from patchsweep.data.labels import place_labels
from patchsweep.data.records import REQUIRED, CharSpan, Label, Prompt, PromptRecord
from patchsweep.data.show import plural, table_html, token_html
from patchsweep.data.tables import Columns, Row, read_table, records_of
from patchsweep.data.tokenize import token_strings
from patchsweep.errors import PromptError

__all__ = [
    "CharSpan",
    "Label",
    "PromptPair",
    "PromptPairs",
    "PromptRecord",
    "UnfitPair",
    "tokenise_pair",
]


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt, of the same number of tokens unless they are aligned."""

    clean: tuple[int, ...]  # token ids, with a start token if the model's rule adds one
    corrupted: tuple[int, ...]  # same length as `clean`, or aligned by `data.alignment`
    answer: tuple[int, ...]  # ids of the right answer after `clean`; one unless multi-token
    wrong_answer: tuple[int, ...]  # ids of the right answer after `corrupted`
    clean_tokens: tuple[str, ...]  # token strings of `clean`
    corrupted_tokens: tuple[str, ...]  # token strings of `corrupted`
    answer_text: str  # text of `answer`
    wrong_answer_text: str  # text of `wrong_answer`
    labels: Mapping[str, tuple[int, int]] = field(hash=False)  # name -> [first, past last) token

    def __len__(self) -> int:
        """Return the number of tokens in the clean prompt."""
        return len(self.clean)

    @property
    def aligned(self) -> bool:
        """Whether the prompts have unequal lengths, so that a shift aligns their positions."""
        return len(self.clean) != len(self.corrupted)

    @property
    def differ(self) -> int:
        """Index of the first token at which the two answers differ."""
        both = zip(self.answer, self.wrong_answer, strict=False)
        return next((i for i, (right, wrong) in enumerate(both) if right != wrong), 0)


_SHOWN = 10  # pairs in a notebook


@dataclass(frozen=True)
class PromptPairs(Sequence[PromptPair]):
    """The pairs of one sweep; lengths may differ from pair to pair.

    Raises:
        PromptError: `pairs` is empty.
    """

    pairs: tuple[PromptPair, ...]  # in the order given, at least one
    # how they were made and chosen, in words, for provenance
    origin: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.pairs:
            raise PromptError("a sweep needs at least one prompt pair, got 0; give a pair")
        for pair in self.pairs:
            if not isinstance(pair, PromptPair):
                raise PromptError(
                    f"pairs must be of PromptPair, got {pair!r}; make them with "
                    "PromptPairs.from_strings, from_records or from_jsonl"
                )

    @classmethod
    def from_strings(
        cls,
        model: TransformerBridge,
        clean: Sequence[Prompt],
        corrupted: Sequence[Prompt],
        answers: Sequence[tuple[str, str]],
        labels: Sequence[Mapping[str, Label]] | None = None,
        *,
        multi_token: bool = False,
        prepend_bos: bool | None = None,
        template: str | None = None,
        align: str | None = None,
    ) -> PromptPairs:
        """Make pairs from parallel lists, one entry per pair.

        `answers` holds (right for clean, right for corrupted). `labels` maps names to places in
        the clean prompt: a substring that occurs once, a `CharSpan`, or token positions
        `(first, past_last)`. `multi_token=True` allows answers of several tokens. The model's
        start token goes before each prompt unless the text begins with it (as the output of a
        chat template does); `prepend_bos=True` or `False` overrides that. `template="chat"`: each
        prompt is a message of the user, or a list of messages `{"role": ..., "content": ...}`,
        rendered by the tokenizer's own chat template, whose start token is the only one; the
        roles become labels, see `patchsweep.data.chat.render`. `align="end"` allows prompts of
        unequal lengths: positions correspond in the common beginning, and behind it by the
        distance from the end, see `patchsweep.data.alignment`.

        Raises:
            PromptError: the lists differ in size or are empty, or as `from_records`.
        """
        columns: dict[str, Sequence[Any]] = {
            "clean": clean,
            "corrupted": corrupted,
            "answers": answers,
        }
        if labels is not None:
            columns["labels"] = labels
        for name, column in columns.items():
            if isinstance(column, str | Mapping) or not isinstance(column, Sequence):
                raise PromptError(
                    f"{name} must be a list with one entry per pair, got {column!r}; "
                    f"for a single pair write {name}=[...]"
                )
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) > 1:
            counted = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise PromptError(
                f"the lists must have one entry per pair each, but {counted}; "
                "give lists of the same size"
            )
        for index, pair in enumerate(answers):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise PromptError(
                    f"pair {index}: answers must be (right for clean, right for corrupted), "
                    f"got {pair!r}; write for example (' Mary', ' John')"
                )
        for index, places in enumerate(labels or ()):
            if not isinstance(places, Mapping):
                raise PromptError(
                    f"pair {index}: labels must map names to places, got {places!r}; "
                    "write for example {'subject': 'John'}, or {} for none"
                )
        records = [
            PromptRecord(
                clean=clean[index],
                corrupted=corrupted[index],
                answer=answers[index][0],
                wrong_answer=answers[index][1],
                labels={} if labels is None else labels[index],
            )
            for index in range(len(clean))
        ]
        return cls.from_records(
            model,
            records,
            multi_token=multi_token,
            prepend_bos=prepend_bos,
            template=template,
            align=align,
        )

    @classmethod
    def from_records(
        cls,
        model: TransformerBridge,
        records: Iterable[PromptRecord],
        *,
        multi_token: bool = False,
        prepend_bos: bool | None = None,
        template: str | None = None,
        align: str | None = None,
    ) -> PromptPairs:
        """Make pairs from text records, tokenised one prompt at a time.

        `template` is for records that name none themselves.

        Raises:
            PromptError: `records` is empty; a prompt is empty or longer than the context; the
                prompts of a pair are equal or differ in length; an answer is not one token, does
                not follow the prompt's tokens in the tokens of the joined text, or equals the
                other answer; a label has no place in the prompt; there is no such template.
        """
        named = ((f"pair {index}", record) for index, record in enumerate(records))
        return cls._of(model, named, multi_token, prepend_bos, template, align)

    @classmethod
    def from_rows(
        cls,
        model: TransformerBridge,
        rows: Iterable[Row],
        *,
        columns: Columns | None = None,
        multi_token: bool = False,
        prepend_bos: bool | None = None,
        template: str | None = None,
        align: str | None = None,
    ) -> PromptPairs:
        """Make pairs from mappings: a list of dicts, a `datasets.Dataset`, or a pandas DataFrame.

        See `patchsweep.data.tables.record_of` for the columns and how `columns` renames them.

        Raises:
            PromptError: as `from_records`, or a row lacks a column.
        """
        return cls._of(model, records_of(rows, columns), multi_token, prepend_bos, template, align)

    @classmethod
    def from_file(
        cls,
        model: TransformerBridge,
        path: str | Path,
        *,
        columns: Columns | None = None,
        multi_token: bool = False,
        prepend_bos: bool | None = None,
        template: str | None = None,
        align: str | None = None,
    ) -> PromptPairs:
        """Make pairs from a JSONL, CSV, TSV or Parquet file, or a folder that `datasets` saved.

        Columns: `clean`, `corrupted`, `answer`, `wrong_answer`, and optionally `labels`, whose
        values are substrings of the clean prompt or `[first, past_last]` token positions; see
        `patchsweep.data.tables`. `columns={"clean": "prompt"}` finds a column by another name.

        Raises:
            PromptError: as `from_records`, the file cannot be read, or a row is no pair; the
                message opens with the file and the line or row.
        """
        named = read_table(Path(path), columns)
        return cls._of(model, named, multi_token, prepend_bos, template, align)

    @classmethod
    def from_jsonl(
        cls,
        model: TransformerBridge,
        path: str | Path,
        *,
        multi_token: bool = False,
        prepend_bos: bool | None = None,
        template: str | None = None,
        align: str | None = None,
    ) -> PromptPairs:
        """Make pairs from a file with one JSON object per line, whatever its name ends in.

        See `from_file` for the keys; unknown ones are refused.

        Raises:
            PromptError: as `from_file`.
        """
        named = read_table(Path(path), kind=".jsonl")
        return cls._of(model, named, multi_token, prepend_bos, template, align)

    @classmethod
    def _of(
        cls,
        model: TransformerBridge,
        records: Iterable[tuple[str, PromptRecord]],
        multi_token: bool,
        prepend_bos: bool | None,
        template: str | None,
        align: str | None,
    ) -> PromptPairs:
        return cls(
            tuple(
                tokenise_pair(
                    model,
                    record,
                    where=where,
                    multi_token=multi_token,
                    prepend_bos=prepend_bos,
                    template=template,
                    align=align,
                )
                for where, record in records
            )
        )

    @property
    def n_pos(self) -> int:
        """Number of tokens in the longest pair."""
        return max(len(pair) for pair in self.pairs)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest run: a prompt and its answer's tokens but the last."""
        return max(max(len(p.clean), len(p.corrupted)) + len(p.answer) - 1 for p in self.pairs)

    def by_length(self) -> dict[int, tuple[int, ...]]:
        """Return the indices of the pairs of each length, shortest length first."""
        groups: dict[int, list[int]] = {}
        for index, pair in enumerate(self.pairs):
            groups.setdefault(len(pair), []).append(index)
        return {length: tuple(groups[length]) for length in sorted(groups)}

    def _repr_html_(self) -> str:
        """Return a table of the pairs; tokens that differ between the prompts are marked."""
        rows = []
        for number, pair in enumerate(self.pairs[:_SHOWN]):
            for name, tokens, others, answer in (
                ("clean", pair.clean_tokens, pair.corrupted_tokens, pair.answer_text),
                ("corrupted", pair.corrupted_tokens, pair.clean_tokens, pair.wrong_answer_text),
            ):
                first = str(number) if name == "clean" else ""
                rows.append([first, name, _marked(tokens, others), token_html(answer)])
        more = len(self.pairs) - _SHOWN
        rest = f"<p>and {plural(more, 'pair')} more</p>" if more > 0 else ""
        if any(pair.aligned for pair in self.pairs):
            rest += "<p>prompts of unequal lengths are aligned at their ends</p>"
        return table_html(["pair", "prompt", "tokens", "answer"], rows) + rest

    def content_hash(self) -> str:
        """Return the SHA-256 (hex) of all that a sweep reads: ids, answers and labels."""
        content = [
            [p.clean, p.corrupted, p.answer, p.wrong_answer, sorted(p.labels.items())]
            for p in self.pairs
        ]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> PromptPair: ...
    @overload
    def __getitem__(self, index: slice) -> PromptPairs: ...
    def __getitem__(self, index: int | slice) -> PromptPair | PromptPairs:
        if isinstance(index, slice):
            return PromptPairs(self.pairs[index], self.origin)
        return self.pairs[index]

    def __iter__(self) -> Iterator[PromptPair]:
        return iter(self.pairs)


def _marked(tokens: Sequence[str], others: Sequence[str]) -> str:
    """Return tokens as HTML, those that differ from their partners in `others` marked."""
    parts = []
    for token, partner in zip(tokens, partners(tokens, others), strict=True):
        html = token_html(token)
        same = partner != NONE and others[partner] == token
        parts.append(html if same else f"<mark>{html}</mark>")
    return "<wbr>".join(parts)


def tokenise_pair(
    model: TransformerBridge,
    record: PromptRecord,
    *,
    where: str,
    multi_token: bool = False,
    prepend_bos: bool | None = None,
    template: str | None = None,
    align: str | None = None,
) -> PromptPair:
    """Tokenise `record` for `model`; `where` opens each error message.

    `template` is for a record that names none itself. A chat's start token is its template's, so
    that `prepend_bos=None` adds none there.

    Raises:
        PromptError: see `PromptPairs.from_records`; `UnfitPair` where the record could fit
            another model's tokenizer or context.
    """
    check_bridge(model)
    true_or_false("multi_token", multi_token, error=PromptError)
    true_or_false("prepend_bos", prepend_bos, none=True, error=PromptError)
    if not isinstance(record, PromptRecord):
        raise PromptError(
            f"{where} must be a PromptRecord, got {record!r}; write "
            "PromptRecord(clean, corrupted, answer, wrong_answer)"
        )
    if align is not None:
        one_of("align", align, [END], error=PromptError)
    template = record.template or template
    if template not in (None, CHAT):
        raise PromptError(
            f"{where}: template={template!r} is not known; use 'chat' or leave it out"
        )
    if template == CHAT and record.clean and record.corrupted:
        record = render(model, record, where)
        prepend_bos = False if prepend_bos is None else prepend_bos
    for name in REQUIRED:
        text = getattr(record, name)
        if not isinstance(text, str) or not text:
            raise PromptError(f"{where}: {name} must be a text, got {text!r}; write it out")
    texts = str(record.clean), str(record.corrupted)
    if record.clean == record.corrupted:
        raise PromptError(
            f"{where}: the clean and the corrupted prompt must differ, both are "
            f"{record.clean!r}; change the words that the answer depends on"
        )
    if record.answer == record.wrong_answer:
        raise PromptError(
            f"{where}: answer and wrong_answer must differ, both are {record.answer!r}; "
            "give the right answer of each prompt"
        )
    clean, corrupted = (prompt_ids(model, text, where, prepend_bos) for text in texts)
    clean_tokens, corrupted_tokens = (token_strings(model, ids) for ids in (clean, corrupted))
    if len(clean) != len(corrupted) and align is None:
        raise UnfitPair(
            f"{where}: both prompts must have the same number of tokens, but clean has "
            f"{len(clean)}: {list(clean_tokens)}, corrupted has {len(corrupted)}: "
            f"{list(corrupted_tokens)}; change words for others of as many tokens, "
            "or align the prompts with align='end'",
            reason="the prompts differ in tokens",
        )
    if clean == corrupted:
        raise UnfitPair(
            f"{where}: the clean and the corrupted prompt must differ in tokens, both are "
            f"{list(clean_tokens)}; change the words that the answer depends on",
            reason="the prompts are the same tokens",
        )
    answer, wrong_answer = (
        answer_ids(model, prompt, ids, name, text, where, multi_token, prepend_bos)
        for prompt, ids, name, text in (
            (texts[0], clean, "answer", record.answer),
            (texts[1], corrupted, "wrong_answer", record.wrong_answer),
        )
    )
    if answer == wrong_answer:
        raise UnfitPair(
            f"{where}: answer {record.answer!r} and wrong_answer {record.wrong_answer!r} must "
            f"differ in tokens, both are {list(token_strings(model, answer))}; "
            "give the right answer of each prompt",
            reason="the answers are the same tokens",
        )
    return PromptPair(
        clean=clean,
        corrupted=corrupted,
        answer=answer,
        wrong_answer=wrong_answer,
        clean_tokens=clean_tokens,
        corrupted_tokens=corrupted_tokens,
        answer_text=record.answer,
        wrong_answer_text=record.wrong_answer,
        labels=place_labels(model, texts[0], record.labels, clean, where),
    )
