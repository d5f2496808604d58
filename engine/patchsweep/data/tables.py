"""Tables of prompt pairs: JSONL, CSV, TSV, Parquet, folders of Hugging Face `datasets`, and rows.

Each row becomes a `PromptRecord`. Columns are found by name; `columns` says where a name differs.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from patchsweep.data.records import REQUIRED, Label, PromptRecord
from patchsweep.errors import PromptError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
"""Endings of the files that are read; a folder is one that `datasets` saved."""

OPTIONAL = ("labels", "template")
LABEL = "labels."  # `labels.subject` is the column of the label subject
Row = Mapping[str, Any]
Columns = Mapping[str, str]  # name here, such as `clean` or `labels.subject` -> name of the column


def read_table(
    path: Path, columns: Columns | None = None, *, kind: str | None = None
) -> Iterator[tuple[str, PromptRecord]]:
    """Yield ("file, line n" or "file, row n", record) for each row of a file or folder.

    A JSONL file has one JSON object per line; blank lines are skipped. CSV and TSV files are
    UTF-8 with a line of names, and every value is text. A folder is what `Dataset.save_to_disk`
    of `datasets` wrote. `kind` is an ending that counts instead of the file's own. See `record_of`
    for the columns.

    Raises:
        PromptError: the file cannot be read, or a row is no pair; the message opens with its place.
    """
    kind = kind or ("folder" if path.is_dir() else path.suffix.lower())
    readers = {
        ".jsonl": _jsonl_rows,
        ".csv": lambda path: _csv_rows(path, ","),
        ".tsv": lambda path: _csv_rows(path, "\t"),
        ".parquet": _parquet_rows,
        "folder": _saved_rows,
    }
    if kind not in readers:
        raise PromptError(
            f"{path} is no table of pairs that can be read; give a file that ends in "
            f"{', '.join(SUFFIXES)}, or a folder that datasets saved"
        )
    # in a file made for patchsweep an unknown key is a slip of the pen; tables have other columns
    strict = kind == ".jsonl" and columns is None
    for where, row in readers[kind](path):
        yield where, record_of(row, where, columns, strict=strict)


def records_of(
    rows: Iterable[Row], columns: Columns | None = None
) -> Iterator[tuple[str, PromptRecord]]:
    """Yield ("row n", record) for each mapping of `rows`, as `read_table` does.

    `rows` may be a list of dicts, a `datasets.Dataset` or a pandas DataFrame.

    Raises:
        PromptError: `rows` holds something else, or a row is no pair.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a DataFrame
        rows = rows.to_dict("records")
    if isinstance(rows, str | Mapping) or not hasattr(rows, "__iter__"):
        raise PromptError(
            f"rows must be a list of mappings, a datasets.Dataset or a DataFrame, got a "
            f"{type(rows).__name__}; for files use PromptPairs.from_file"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise PromptError(f"row {number}: a row must be a mapping, got {row!r}")
        yield f"row {number}", record_of(row, f"row {number}", columns)


def record_of(
    row: Row, where: str, columns: Columns | None = None, *, strict: bool = False
) -> PromptRecord:
    """Return the record of a row with the columns clean, corrupted, answer and wrong_answer.

    `labels` is optional: a mapping of names to substrings of the clean prompt or to `[first,
    past_last]` token positions, or such a mapping as JSON text. A column `labels.<name>` holds
    one label; empty, there is none. `template` may be "chat"; the prompts are then messages, see
    `patchsweep.data.chat`. `columns` maps these names to those of the table:
    `{"clean": "prompt", "labels.subject": "who"}`. Other columns are ignored, unless `strict`.

    Raises:
        PromptError: a column is missing or holds no text; `where` opens the message.
    """
    named = _checked(columns, where)
    template = row.get(named.get("template", "template"))
    for key in REQUIRED:
        column = named.get(key, key)
        if column not in row:
            there = ", ".join(map(repr, row)) or "none"
            meant = f"key {key!r}" if column == key else f"column {column!r} (for {key!r})"
            raise PromptError(f"{where}: {meant} is required, got {there}; add it")
        chat = template is not None and key in ("clean", "corrupted")  # messages, see `chat`
        if not isinstance(row[column], str | list if chat else str):
            raise PromptError(
                f"{where}: {column} must be a text, got {row[column]!r}; put it in quotes"
            )
    labels = {**_mapping_of(row, named, where), **_label_columns(row, named, where)}
    used = {named.get(key, key) for key in (*REQUIRED, *OPTIONAL)} | set(named.values())
    for key in row if strict else ():
        if key not in used and not key.startswith(LABEL):
            raise PromptError(
                f"{where}: key {key!r} is not known; use {', '.join((*REQUIRED, *OPTIONAL))}, or "
                "remove it"
            )
    clean, corrupted, answer, wrong_answer = (row[named.get(key, key)] for key in REQUIRED)
    return PromptRecord(clean, corrupted, answer, wrong_answer, labels, template or None)


def _checked(columns: Columns | None, where: str) -> Columns:
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        raise PromptError(f"columns={columns!r} must map names to columns, {{'clean': 'prompt'}}")
    for name, column in columns.items():
        label = isinstance(name, str) and name.startswith(LABEL) and name != LABEL
        if (name not in (*REQUIRED, *OPTIONAL) and not label) or not isinstance(column, str):
            raise PromptError(
                f"columns has {name!r}: {column!r}; map {', '.join((*REQUIRED, *OPTIONAL))} or "
                f"{LABEL}<name> to a column's name"
            )
    return columns


def _mapping_of(row: Row, named: Columns, where: str) -> Mapping[str, Label]:
    column = named.get("labels", "labels")
    labels = row.get(column)
    if isinstance(labels, str):
        if not labels.strip():
            return {}
        with suppress(json.JSONDecodeError):  # told below
            labels = json.loads(labels)
    if labels is None and (column == "labels" or column in row):
        return {}
    if not isinstance(labels, Mapping):
        raise PromptError(
            f"{where}: {column} must be an object of names and places, got {labels!r}; "
            'write for example {"subject": "John"}'
        )
    # a Parquet struct has every name in every row
    return {name: place for name, place in labels.items() if place is not None}


def _label_columns(row: Row, named: Columns, where: str) -> Mapping[str, Label]:
    found: dict[str, Label] = {}
    own = {key: key for key in row if str(key).startswith(LABEL)}
    for name, column in {**own, **{k: c for k, c in named.items() if k.startswith(LABEL)}}.items():
        if column not in row:
            raise PromptError(f"{where}: column {column!r} (for {name!r}) is missing; add it")
        place = row[column]
        if isinstance(place, float) and place != place:  # an empty cell of a DataFrame
            place = None
        if place is not None and place != "":
            found[name.removeprefix(LABEL)] = place
    return found


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_text(path, "one JSON object per line").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(
                f"{where}: a line must be JSON, {error}: {line[:60]!r}; write one object per line"
            ) from None
        if not isinstance(entry, dict):
            raise PromptError(
                f"{where}: a line must be a JSON object, got {line[:60]!r}; "
                f"give the keys {', '.join(REQUIRED)}"
            )
        yield where, entry


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    lines = _text(path, "a line of names and one line per pair").splitlines(keepends=True)
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise PromptError(
                    f"{where}: the line must have as many values as there are names, "
                    f"{len(reader.fieldnames or ())}; put texts with {delimiter!r} in quotes"
                )
            yield where, row
    except csv.Error as error:
        raise PromptError(
            f"{path}, line {reader.line_num}: {error}; write a table that a CSV reader reads"
        ) from None


def _text(path: Path, of: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"{path} could not be read: {error}; give a UTF-8 file with {of}"
        ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise _needed("pyarrow", path) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise PromptError(f"{path} could not be read: {error}; give a Parquet file") from None
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _saved_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise _needed("datasets", path) from None
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise PromptError(
            f"{path} could not be read: {error}; give a folder that Dataset.save_to_disk wrote"
        ) from None
    if isinstance(saved, DatasetDict):
        raise PromptError(
            f"{path} holds the splits {', '.join(saved)}; name one, such as "
            f"{path / next(iter(saved))}"
        )
    for number, row in enumerate(saved):
        yield f"{path}, row {number}", row


def _needed(package: str, path: Path) -> PromptError:
    return PromptError(
        f"{path} needs the package {package}, which is not installed; "
        f"pip install 'patchsweep[data]', or write the pairs as JSONL or CSV"
    )
