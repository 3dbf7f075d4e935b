"""What strangers send: taken, or refused with a status, the field and no word of theirs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lightning_ft.export.serving.rows import TASKS, Limits, RefusalError, Rows, Task, read_body, task_of

LIMITS = Limits(body=4000, rows=5, characters=100)


def read(body: Any, task: str = "text-classification") -> Rows:
    return read_body(
        body if isinstance(body, bytes) else json.dumps(body).encode(), TASKS.get(task, Task(task)), LIMITS
    )


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_rows(task: str) -> None:
    example = dict(TASKS[task].example)
    assert read(example, task) == Rows([example], single=True)
    assert read({"rows": [example, example]}, task) == Rows([example, example], single=False)


def test_ways_to_write_a_row() -> None:
    rows: list[Any] = [
        "a",
        ["a", "b"],
        {"text": "a"},
        {"text": "a", "text_pair": "b"},
        {"text": "a", "text_pair": None},
    ]
    assert read({"rows": rows}).rows == rows
    assert read({"text": "e\u0301 \U0001f600 \u0000"}).single
    assert read({"tokens": ["a", "b"]}, "token-classification").single
    # Of a task that is not known here, texts and lists of texts in any field.
    assert read({"premise": "a", "parts": ["b", "c"]}, "own-task").single
    assert read({"rows": ["a"]}, "own-task").rows == ["a"]
    assert read({"text": "x" * 100}).single
    choices = {"context": "a", "choices": ["b"] * 5}
    assert read(choices, "multiple-choice").single


BAD: list[tuple[Any, int, str]] = [
    (b"", 422, "body: expected JSON, got nothing"),
    (b"  \n", 422, "body: expected JSON, got nothing"),
    (b"{", 422, "body: expected JSON, got .* at character 1"),
    (b'{"text": "a"} x', 422, "body: expected JSON, got extra data at character 14"),
    (b'{"text": "\xff"}', 422, "body: expected UTF-8, got byte 0xff at 10"),
    (b'{"text": NaN}', 422, "JSON, which has no such number, got NaN"),
    (b'{"text": -Infinity}', 422, "JSON, which has no such number, got -Infinity"),
    (b"[" * 3000, 422, "not nested so deeply"),
    (b"1" * 3900 + b"1" * 100, 422, "body: expected an object|numbers of a sane size"),
    (b"x" * 4001, 413, "body: expected 4000 bytes at most, got 4001"),
    (b'{"text": "\\ud800"}', 422, "text: expected Unicode text, got half a surrogate pair at character 0"),
    (None, 422, "body: expected an object: .*, got null"),
    ("text", 422, "body: expected an object: .*, got a text of 4 characters"),
    ([{"text": "a"}], 422, "body: expected an object: .*, got a list of 1"),
    ({}, 422, "body: expected a row such as .*, got an empty object"),
    ({"text": None}, 422, "text: expected a text, got null"),
    ({"text": 3}, 422, "text: expected a text, got a number"),
    ({"text": True}, 422, "text: expected a text, got true or false"),
    ({"text": ""}, 422, "text: expected a text, got an empty text"),
    ({"text": " \n"}, 422, "text: expected a text, got an empty text"),
    ({"text": ["a"]}, 422, "text: expected a text, got a list of 1"),
    ({"text": {"a": "b"}}, 422, "text: expected a text, got an object of 1 fields"),
    ({"text": "a", "text_pair": 1}, 422, "text_pair: expected a text, got a number"),
    ({"text": "a", "secret": "b"}, 422, "body: expected no fields but text, text_pair, got 1 others"),
    ({"txt": "a"}, 422, 'text: expected a row such as {"text": .*, got no such field'),
    ({"text": "x" * 101}, 422, "body: expected texts of 100 characters at most, got 101"),
    ({"rows": []}, 422, "rows: expected a list of rows, got an empty list"),
    ({"rows": "a"}, 422, "rows: expected a list of rows, got a text of 1 characters"),
    ({"rows": None}, 422, "rows: expected a list of rows, got null"),
    ({"rows": ["a"], "text": "b"}, 422, "body: expected rows and no other field beside it, got 2 fields"),
    ({"rows": ["a"] * 6}, 422, "rows: expected 5 rows at most, every choice counted, got 6"),
    ({"rows": ["a", {"text": None, "text_pair": "b"}]}, 422, r"rows\[1\]\.text: expected a text, got null"),
    ({"rows": ["a", ["b", 3]]}, 422, r"rows\[1\]\[1\]: expected a text, got a number"),
    ({"rows": ["a", ["b", "c", "d"]]}, 422, r"rows\[1\]: expected a row such as .*, got a list of 3"),
    ({"rows": [None]}, 422, r"rows\[0\]: expected a row such as .*, got null"),
    ({"rows": [["x" * 60, "y" * 60]]}, 422, r"rows\[0\]: expected texts of 100 characters at most, got 120"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD, ids=[str(row[0])[:30] for row in BAD])
def test_refusals(body: Any, status: int, message: str) -> None:
    with pytest.raises(RefusalError, match=message) as caught:
        read(body)
    assert caught.value.status == status
    assert {"error", "field", "expected", "got"} == caught.value.as_json().keys()


def test_refusals_of_other_tasks() -> None:
    for task, row, message in (
        ("multiple-choice", {"context": "a", "choices": "b"}, "choices: expected a list of texts, got a text of 1"),
        ("multiple-choice", {"context": "a", "choices": []}, "choices: expected a list of texts, got an empty list"),
        ("multiple-choice", {"context": "a", "choices": ["b", 1]}, r"choices\[1\]: expected a text, got a number"),
        ("multiple-choice", {"context": "a", "choices": ["b"] * 6}, "body: expected 5 rows at most, .*, got 6"),
        ("multiple-choice", {"context": "a"}, "choices: expected a row such as .*, got no such field"),
        ("question-answering", {"question": "a"}, "context: expected a row such as .*, got no such field"),
        ("question-answering", {"rows": ["a"]}, r"rows\[0\]: expected a row such as .*, got a text of 1 characters"),
        ("own-task", {"secret": 3}, r"\[field 0\]: expected a text, got a number"),
        ("own-task", {"\ud800": "a"}, r"\[field 0\]: expected Unicode text, got half a surrogate pair"),
        ("own-task", {"a": ["b", {}]}, r"\[field 0\]\[1\]: expected a text, got an empty object"),
    ):
        with pytest.raises(RefusalError, match=message):
            read(row, task)


def test_no_word_of_the_sender_in_what_is_logged() -> None:
    """The log shows status and field."""
    for task in (*TASKS, "own-task"):
        for body in (
            {"geheim": 1},
            {"rows": [{"geheim": ["geheim", 1]}]},
            {"text": "geheim" * 99},
            {"rows": {"geheim": 1}},
        ):
            with pytest.raises(RefusalError) as caught:
                read(body, task)
            assert "geheim" not in str(caught.value)
    with pytest.raises(RefusalError) as caught:
        read(b'{"geheim" "geheim"}')
    assert "geheim" not in str(caught.value)


def test_whatever_comes_is_read_or_refused() -> None:
    generator = random.Random(0)
    good = json.dumps({"rows": [{"text": "a film", "text_pair": "b"}, "two"]}).encode()
    taken, statuses = 0, set()
    for _ in range(5000):
        body = bytearray(good)
        for _ in range(generator.randrange(1, 6)):
            place = generator.randrange(len(body))
            body[place : place + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
        try:
            asked = read(bytes(body))
        except RefusalError as refusal:
            statuses.add(refusal.status)
        else:
            taken += 1
            json.dumps(asked.rows, ensure_ascii=False).encode()
    assert statuses == {422}
    assert 20 < taken < 4000


def test_task_of_a_folder(tmp_path: Path) -> None:
    def task(name: str, settings: Any = None, config: Any = None) -> Task:
        (tmp_path / "head.json").write_text(json.dumps({"task": name, "labels": [], "settings": settings or {}}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config or {}))
        return task_of(tmp_path)

    assert task("text-classification") == TASKS["text-classification"]
    assert task("own-task") == Task("own-task")
    for mask in ("<mask>", {"content": "<mask>"}):
        assert task("fill-mask", config={"mask_token": mask}).example == {"text": "Paris is the <mask> of France."}
    cloze = task("cloze", {"patterns": ["{a} {{x}} {mask} {b}", "{mask}: {b}"]})
    assert (cloze.texts, cloze.needed, set(cloze.example)) == (("a", "b"), ("a", "b"), {"a", "b"})


def test_limits_are_numbers() -> None:
    for name in ("body", "rows", "characters"):
        with pytest.raises(ValueError, match=f"limits: {name}=0 must be a whole number, 1 or more"):
            Limits(**{name: 0})
