"""Labelled examples from .jsonl and .csv files. Each knows its file and line, so that a slip in it can be named."""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """One line of a file.

    Attributes:
        where: "reviews.jsonl:12".
        fields: its columns under the file's names.
        columns: our names of columns -> the file's, where they differ.
    """

    where: str
    fields: Mapping[str, Any]
    columns: Mapping[str, str]

    def has(self, name: str) -> bool:
        """Whether a column is there and holds something."""
        return self.fields.get(self.columns.get(name, name)) is not None

    def value(self, name: str) -> Any:
        """What a column holds.

        Raises:
            ValueError: there is no such column, or it holds nothing.
        """
        if not self.has(name):
            column = self.columns.get(name, name)
            raise ValueError(
                f"{self.where}: no {column!r}: its columns are {', '.join(map(str, self.fields))}; "
                f"task.columns = {{{name!r}: ...}} names another"
            )
        return self.fields[self.columns.get(name, name)]

    def text(self, name: str) -> str:
        """A text.

        Raises:
            ValueError: there is none, or it is empty.
        """
        value = self.value(name)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {name} is {value!r}: it is a text")
        if not value.strip():
            raise ValueError(f"{self.where}: {name} is empty")
        return value

    def words(self, name: str) -> list[str]:
        """A list of texts, none empty; of a .csv the words of a text.

        Raises:
            ValueError: it is something else.
        """
        value = self.value(name)
        if isinstance(value, str):
            value = value.split()
        if not isinstance(value, Sequence) or not value:
            raise ValueError(f"{self.where}: {name} is {value!r}: it is a list of texts")
        for item in value:
            if not isinstance(item, str) or not item.strip():
                raise ValueError(f"{self.where}: {name} holds {item!r}: each is a text that is not empty")
        return list(value)

    def texts(self) -> Iterator[str]:
        """All that stands in its columns, for a tokenizer to be trained on; words of a list as one text."""
        for value in self.fields.values():
            if isinstance(value, str):
                yield value
            elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
                yield " ".join(value)


def read_examples(path: str, columns: Mapping[str, str], setting: str = "task.train_file") -> list[Example]:
    """Reads a file of examples.

    Args:
        path: a .jsonl, or a .csv with a header.
        columns: our names of columns -> the file's.
        setting: what the path was given as, for messages.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is malformed, or there is none.
    """
    file = Path(path).expanduser()
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if file.suffix not in readers:
        raise ValueError(f"{setting} = {path!r}: examples come in .jsonl or .csv files")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            found = [
                Example(f"{file.name}:{number}", fields, columns)
                for number, fields in readers[file.suffix](file.name, lines)
            ]
    except OSError as error:
        raise OSError(f"{setting} = {path!r}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting} = {path!r}: not UTF-8: {error.reason}") from None
    if not found:
        raise ValueError(f"{setting} = {path!r}: it holds no example")
    return found


def _read_jsonl(name: str, lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}:{number}: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f'{name}:{number}: not an object with columns, such as {{"text": ...}}')
        yield number, fields


def _read_csv(name: str, lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for fields in reader:
            if None in fields or None in fields.values():
                count = len(reader.fieldnames or ())
                raise ValueError(f"{name}:{reader.line_num}: it has not the {count} columns of the header")
            yield reader.line_num, {str(key): value for key, value in fields.items() if value != ""}
    except csv.Error as error:
        raise ValueError(f"{name}:{reader.line_num}: not CSV: {error}") from None


def hold_out(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(examples to train on, examples held out), chosen by a hash of what they hold: the same ones in any order.

    Raises:
        ValueError: there are too few for both.
    """
    if len(examples) < 2:
        raise ValueError(f"{examples[0].where}: one example is too few to hold some out: give task.eval_file")
    keys = [json.dumps(dict(one.fields), sort_keys=True, default=str).encode() for one in examples]
    marks = [int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in keys]
    bound = int(fraction * 2.0**64)
    held = [mark < bound for mark in marks]
    if not any(held) or all(held):
        held = [mark == min(marks) for mark in marks]
        if all(held):  # all of them are the same
            held = [i == 0 for i in range(len(examples))]
    return (
        [one for one, out in zip(examples, held, strict=True) if not out],
        [one for one, out in zip(examples, held, strict=True) if out],
    )
