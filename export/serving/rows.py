"""Bytes that strangers sent, turned into rows of a task or refused with a reason; nothing is tokenised here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple


class Task(NamedTuple):
    """What a row of a task holds; any fields, of texts or lists of texts, where none are named.

    Args:
        name: As ``head.json`` has it.
        texts: Fields that hold a text.
        lists: Fields that hold a list of texts.
        needed: Fields without which there is no row.
        example: A row.
    """

    name: str
    texts: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    example: Mapping[str, Any] = {"text": "A moving film, and a funny one."}

    @property
    def fields(self) -> tuple[str, ...]:
        """All that a row may hold."""
        return (*self.texts, *self.lists)

    @property
    def by_text(self) -> bool:
        """Whether a row may be a text alone."""
        return self.needed == ("text",) or not self.needed


_BORN = "Marie Curie was born in Warsaw."
TASKS = {
    task.name: task
    for task in (
        Task("text-classification", ("text", "text_pair"), (), ("text",)),
        Task("feature-extraction", ("text", "text_pair"), (), ("text",)),
        Task(
            *("multiple-choice", ("context",), ("choices",), ("context", "choices")),
            {"context": "The glass fell", "choices": ["and broke.", "and flew."]},
        ),
        Task("token-classification", ("text",), ("tokens",), (), {"text": _BORN}),
        Task(
            *("question-answering", ("question", "context"), (), ("question", "context")),
            {"question": "Where was she born?", "context": _BORN},
        ),
        Task("fill-mask", ("text",), (), ("text",), {"text": "Paris is the [MASK] of France."}),
    )
}
"""By name; what is not here may have rows of any fields."""


def task_of(folder: Path) -> Task:
    """The task of an exported folder: its columns and an example with its mask token, where it has such.

    Args:
        folder: What ``lightning-ft export`` wrote, of one task.
    """
    head = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    name = head["task"]
    if name == "fill-mask" and (config := folder / "tokenizer_config.json").is_file():
        mask = json.loads(config.read_text(encoding="utf-8")).get("mask_token", "[MASK]")
        mask = mask["content"] if isinstance(mask, dict) else mask
        return TASKS[name]._replace(example={"text": f"Paris is the {mask} of France."})
    if name == "cloze":
        parts = [part for text in head["settings"]["patterns"] for part in Formatter().parse(text)]
        columns = tuple(dict.fromkeys(column for _, column, *_ in parts if column not in (None, "mask")))
        return Task(name, columns, (), columns, dict.fromkeys(columns, "A moving film."))
    return TASKS.get(name, Task(name))


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for.

    Args:
        body: Bytes.
        rows: Rows; of multiple choice every choice counts, since each is run by itself.
        characters: Of all texts of one row together. It bounds what is tokenised.
    """

    body: int = 1 << 20
    rows: int = 128
    characters: int = 20_000

    def __post_init__(self) -> None:
        for name in ("body", "rows", "characters"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"limits: {name}={value!r} must be a whole number, 1 or more")


class RefusalError(Exception):
    """Why a request is not answered.

    Args:
        status: HTTP status: 413 (too large), 415 (no JSON), 422 (not understood), 503 (too busy), …
        field: What is wrong, such as ``rows[3].text``. It holds no word of the sender's, so it may be logged.
        expected: What should have come.
        got: What came: its type and size, no text.
    """

    def __init__(self, status: int, field: str, expected: str, got: str) -> None:
        super().__init__(status, field, expected, got)
        self.status, self.field, self.expected, self.got = status, field, expected, got

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"

    def as_json(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": str(self), "field": self.field, "expected": self.expected, "got": self.got}


class Rows(NamedTuple):
    """What a request asks for.

    Args:
        rows: As a ``Predictor`` takes them.
        single: Whether one row came by itself, and one answer goes back by itself.
    """

    rows: list[Any]
    single: bool


def read_body(body: bytes, task: Task, limits: Limits) -> Rows:
    """Rows of a request's body.

    Args:
        body: JSON in UTF-8: ``{"rows": […]}``, or a row, such as ``{"text": "…"}``.
        task: Of the model.
        limits: What a request may hold.

    Raises:
        RefusalError: The body is too large (413) or not understood (422).

    Example:
        >>> read_body(b'{"text": "Fine."}', TASKS["text-classification"], Limits())
        Rows(rows=[{'text': 'Fine.'}], single=True)
        >>> read_body(b'{"text": 3}', TASKS["text-classification"], Limits())
        Traceback (most recent call last):
        lightning_ft.export.serving.rows.RefusalError: text: expected a text, got a number
    """
    if len(body) > limits.body:
        raise RefusalError(413, "body", f"{limits.body} bytes at most", f"{len(body)}")
    return read_rows(_parse(body), task, limits)


def read_rows(given: Any, task: Task, limits: Limits) -> Rows:
    """Rows of a request's parsed JSON.

    Args:
        given: ``{"rows": […]}``, or a row.
        task: Of the model.
        limits: What a request may hold.

    Raises:
        RefusalError: Something is not as it should be (422).
    """
    if not isinstance(given, Mapping):
        raise RefusalError(
            422, "body", f'an object: a row such as {_example(task)}, or {{"rows": […]}}', describe(given)
        )
    if "rows" not in given:
        _check_row(given, "", task, limits)
        _check_number("body", [given], limits)
        return Rows([given], single=True)
    if len(given) > 1:
        raise RefusalError(422, "body", "rows and no other field beside it", f"{len(given)} fields")
    rows = given["rows"]
    if not isinstance(rows, list) or not rows:
        raise RefusalError(422, "rows", "a list of rows", describe(rows))
    _check_number("rows", rows, limits)
    for number, row in enumerate(rows):
        _check_row(row, f"rows[{number}]", task, limits)
    return Rows(rows, single=False)


def describe(value: Any) -> str:
    """What a JSON value is, without any of its text.

    Example:
        >>> describe(None), describe("abc"), describe([1, 2])
        ('null', 'a text of 3 characters', 'a list of 2')
    """
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, str):
        return f"a text of {len(value)} characters" if value.strip() else "an empty text"
    return "null" if value is None else "true or false" if isinstance(value, bool) else "a number"


def _parse(body: bytes) -> Any:
    def refuse(name: str) -> None:
        raise RefusalError(422, "body", "JSON, which has no such number", name)

    if not body.strip():
        raise RefusalError(422, "body", "JSON", "nothing")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise RefusalError(422, "body", "UTF-8", f"byte 0x{body[error.start]:02x} at {error.start}") from None
    except RecursionError:
        raise RefusalError(422, "body", "JSON that is not nested so deeply", "hundreds of levels") from None
    except json.JSONDecodeError as error:
        raise RefusalError(422, "body", "JSON", f"{error.msg.lower()} at character {error.pos}") from None
    except ValueError:  # an integer of thousands of digits
        raise RefusalError(422, "body", "numbers of a sane size", "thousands of digits") from None


def _check_number(field: str, rows: list[Any], limits: Limits) -> None:
    number = 0
    for row in rows:
        choices = row.get("choices") if isinstance(row, Mapping) else None
        number += max(1, len(choices)) if isinstance(choices, list) else 1
    if number > limits.rows:
        raise RefusalError(422, field, f"{limits.rows} rows at most, every choice counted", f"{number}")


def _check_row(row: Any, field: str, task: Task, limits: Limits) -> None:
    if isinstance(row, str) and task.by_text:
        texts: list[tuple[str, Any]] = [(field, row)]
    elif isinstance(row, list) and len(row) == 2 and "text_pair" in task.texts:
        texts = [(f"{field}[{number}]", part) for number, part in enumerate(row)]
    elif isinstance(row, Mapping) and row:
        texts = _named_texts(row, field, task)
    else:
        raise RefusalError(422, field or "body", f"a row such as {_example(task)}", describe(row))
    for name, text in texts:
        _check_text(name, text)
    if (size := sum(len(text) for _, text in texts)) > limits.characters:
        raise RefusalError(422, field or "body", f"texts of {limits.characters} characters at most", f"{size}")


def _named_texts(row: Mapping[str, Any], field: str, task: Task) -> list[tuple[str, Any]]:
    dot = f"{field}." if field else ""
    for name in task.needed:
        if name not in row:
            raise RefusalError(422, f"{dot}{name}", f"a row such as {_example(task)}", "no such field")
    if task.fields and (unknown := set(row) - set(task.fields)):
        # The sender's own word is not repeated: `field` is logged.
        raise RefusalError(422, field or "body", f"no fields but {', '.join(task.fields)}", f"{len(unknown)} others")
    texts: list[tuple[str, Any]] = []
    for number, (name, value) in enumerate(row.items()):
        where = f"{dot}{name}" if task.fields else f"{field}[field {number}]"
        _check_text(where, name)
        if value is None and task.fields and name not in task.needed and len(row) > 1:
            continue
        if name in task.lists and (not isinstance(value, list) or not value):
            raise RefusalError(422, where, "a list of texts", describe(value))
        if isinstance(value, list) and value and name not in task.texts:
            texts += [(f"{where}[{place}]", part) for place, part in enumerate(value)]
        else:
            texts.append((where, value))
    return texts


def _check_text(field: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise RefusalError(422, field, "a text", describe(text))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusalError(422, field, "Unicode text", f"half a surrogate pair at character {error.start}") from None


def _example(task: Task) -> str:
    return json.dumps(dict(task.example), ensure_ascii=False)
