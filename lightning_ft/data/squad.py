"""Reads SQuAD: its nested files, and the answers of a table, each checked against its context."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.data.sources import Source, is_list, text_lines

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_FORM = '{"text": [...], "answer_start": [...]} or [{"text": ..., "answer_start": ...}, ...]'


@dataclass(frozen=True)
class Answers:
    """The right answers of each row.

    Args:
        texts: Their texts; an empty list where there is none.
        starts: First character of each row's first answer in its context; -1 for none.
        ends: One past its last character; -1 for none.
    """

    texts: list[list[str]]
    starts: list[int]
    ends: list[int]


def read_answers(source: Source, column: str, context: str) -> Answers:
    """The answers of a table.

    Args:
        source: The rows.
        column: Column of the answers: ``{"text": [...], "answer_start": [...]}`` or a list of
            ``{"text": ..., "answer_start": ...}``, with offsets in characters, from 0.
        context: Column of the texts that they are parts of.

    Raises:
        TypeError: The column holds something else.
        ValueError: A null, an empty answer, or one that does not stand where its offset says.
    """
    values = source.table[column].combine_chunks()
    _check_form(source, column, values.type)
    contexts = source.texts(context)
    answers = Answers([], [], [])
    for row, (value, text) in enumerate(zip(values.to_pylist(), contexts.to_pylist(), strict=True)):
        try:
            texts, starts = _pairs(value)
            for answer, start in zip(texts, starts, strict=True):
                _check(answer, start, text)
        except ValueError as error:
            raise ValueError(f"{source.where(row)}: column {column!r}: {error}") from None
        answers.texts.append(texts)
        answers.starts.append(starts[0] if texts else -1)
        answers.ends.append(starts[0] + len(texts[0]) if texts else -1)
    return answers


def _check_form(source: Source, column: str, kind: pa.DataType) -> None:
    import pyarrow as pa

    inner = kind.value_type if is_list(kind) else kind
    empty = pa.types.is_null(inner)  # only empty lists, or only nulls, which are refused row by row
    names = {field.name for field in inner} if pa.types.is_struct(inner) else set()
    if not empty and not {"text", "answer_start"} <= names:
        raise TypeError(f"{source.where(0)}: column {column!r} must hold {_FORM}, got {kind}")


def _pairs(value: Any) -> tuple[list[str], list[int]]:
    if value is None:
        raise ValueError("null: a question without an answer has empty lists")
    if isinstance(value, Mapping):
        texts, starts = value["text"], value["answer_start"]
    else:
        texts, starts = [one and one["text"] for one in value], [one and one["answer_start"] for one in value]
    if not isinstance(texts, list) or not isinstance(starts, list):
        raise ValueError(f"got {value!r}: text and answer_start must be lists")
    if len(texts) != len(starts):
        raise ValueError(f"{len(texts)} texts and {len(starts)} values of answer_start: give one for each text")
    return texts, starts


def _check(answer: Any, start: Any, context: str) -> None:
    if not isinstance(answer, str) or not isinstance(start, int):
        raise ValueError(f"text {answer!r} and answer_start {start!r} must be a string and a whole number")
    if not answer.strip():
        raise ValueError(f"the answer {answer!r} is empty: a question without an answer has empty lists")
    end = start + len(answer)
    if start < 0 or end > len(context):
        raise ValueError(
            f"answer {answer!r} would stand at characters {start} to {end} of a context of {len(context)}: offsets "
            f"count characters from 0; {_place(answer, context)}"
        )
    if not context.startswith(answer, start):
        raise ValueError(
            f"answer {answer!r} is not in the context at answer_start={start}, where {context[start:end]!r} stands: "
            f"{_place(answer, context)}"
        )


def _place(answer: str, context: str) -> str:
    place = context.find(answer)
    return f"it stands at {place}" if place >= 0 else "it stands nowhere in the context; correct or remove the row"


def read_squad(path: Path) -> Dataset:
    """The questions of an official SQuAD file, 1.1 or 2.0, as rows.

    Args:
        path: A file ``.json`` or ``.json.gz`` of the form ``data[].paragraphs[].qas[]``.

    Returns:
        The columns ``id``, ``title``, ``context``, ``question`` and ``answers``, which is null where a question has no
        key of that name.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, or of another form.
    """
    import pyarrow as pa
    from datasets import Dataset

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (from {Path.cwd()})")
    try:
        content = json.loads("".join(line for _, line in text_lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); rows that are one object a line belong in .jsonl") from None
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(_questions(content))
        table = pa.table({name: [row[name] for row in rows] for name in rows[0]} if rows else {})
    except (KeyError, TypeError, AttributeError, UnicodeError, pa.ArrowException) as error:
        raise ValueError(
            f"{path}, after {len(rows)} questions: not of SQuAD's form data[].paragraphs[].qas[] "
            f"({type(error).__name__}: {error}); rows that are one object a line belong in .jsonl"
        ) from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return Dataset(table)


def _questions(content: Any) -> Iterator[dict[str, Any]]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers")
                yield {
                    "id": question.get("id"),
                    "title": article.get("title"),
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": None
                    if answers is None
                    else [{"text": answer["text"], "answer_start": answer["answer_start"]} for answer in answers],
                }
