"""Choices: batches against the tokenizer's own pairs, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as ListOf
from transformers import AutoTokenizer

from lightning_ft.data.multiple_choice import MultipleChoiceData
from tests.pretrained import CORPUS, Kind, tokenizer


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return saved(tmp_path, "bert")


def saved(folder: Path, kind: Kind) -> str:
    tokenizer(kind).save_pretrained(folder / kind)
    return str(folder / kind)


def rows(count: int, choices: int = 3) -> Dataset:
    words = " ".join(CORPUS).split()[:15]
    columns = {
        "context": [" ".join(words[i % 7 : i % 7 + 2 + i % 5]) for i in range(count)],
        "choices": [[" ".join(words[j : j + 1 + (i + j) % 4]) for j in range(choices)] for i in range(count)],
        "label": [i % choices for i in range(count)],
    }
    return Dataset.from_dict(columns)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_batches_equal_the_tokenizers_own_pairs(kind: Kind, tmp_path: Path, real_data: Path) -> None:
    path = real_data / "hellaswag" / "dev.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    folder = saved(tmp_path, kind)
    data = MultipleChoiceData(folder, predict=str(path), val=str(path), max_length=500, batch_size=3, id="activity")
    data.setup("validate")
    words = AutoTokenizer.from_pretrained(folder)
    words.pad_token = words.pad_token or words.eos_token
    seen = []
    for batch in list(data.val_dataloader())[::40]:
        assert batch["labels"].tolist() == [lines[row]["label"] for row in batch["row"]]
        pairs = [(lines[row]["context"], choice) for row in batch["row"] for choice in lines[row]["choices"]]
        expected = words(pairs, truncation="only_first", max_length=500, padding=True, return_tensors="pt")
        assert {"labels", "row", *expected} == set(batch)
        for name, values in expected.items():
            assert batch[name].shape == (3, 4, values.shape[1])
            assert torch.equal(batch[name].flatten(0, 1), values), name
        seen += batch["row"].tolist()
    assert len(set(seen)) == len(seen)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert "labels" not in batch
    assert (batch["row"].tolist(), batch["id"]) == ([0, 1, 2], [line["activity"] for line in lines[:3]])


def test_only_the_context_is_cut(bert: str) -> None:
    words = AutoTokenizer.from_pretrained(bert)
    table = {"context": ["the film is dull " * 9, "the"], "choices": [["a story", "made"], ["sing", "in"]]}
    data = MultipleChoiceData(bert, Dataset.from_dict({**table, "label": ["1", "0"]}), max_length=12, batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].tolist() == ([1, 0] if batch["row"][0] == 0 else [0, 1])
    first = batch["row"].tolist().index(0)
    for ids, choice in zip(batch["input_ids"][first], table["choices"][0], strict=True):
        ids = ids[ids != words.pad_token_id].tolist()
        end = words(choice, add_special_tokens=False)["input_ids"]
        assert ids[-1 - len(end) : -1] == end
        assert len(ids) == 12
    assert data.need("train").truncated.tolist() == [True, False]
    assert data.need("train").lengths.tolist()[0] == 12


def test_columns_for_choices_question_and_prefix(bert: str) -> None:
    """SWAG's columns and COPA's question say the same as one list of whole texts."""
    swag = Dataset.from_dict(
        {
            "sent1": ["the film", "people"],
            "ask": ["is a", "who"],
            "sent2": ["story", "sing"],
            **{f"ending{i}": [f"about {w}", f"in {w}"] for i, w in enumerate(["a", "is", "well"])},
            "label": [2, 0],
        }
    ).cast(
        Features(
            {
                **dict.fromkeys(["sent1", "ask", "sent2"], Value("string")),
                **{f"ending{i}": Value("string") for i in range(3)},
                "label": ClassLabel(names=["0", "1", "2"]),
            }
        )
    )
    plain = Dataset.from_dict(
        {
            "context": ["the film is a", "people who"],
            "choices": [
                [f"story about {w}" for w in ["a", "is", "well"]],
                [f"sing in {w}" for w in ["a", "is", "well"]],
            ],
            "label": [2, 0],
        }
    )
    first = MultipleChoiceData(
        bert, val=swag, context="sent1", question="ask", prefix="sent2", choices=[f"ending{i}" for i in range(3)]
    )
    second = MultipleChoiceData(bert, val=plain)
    batches = []
    for data in (first, second):
        data.setup("validate")
        batches.append(next(iter(data.val_dataloader())))
        assert data.describe().facts["choices"] == {"val": 3}
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_val_fraction_and_buckets(bert: str) -> None:
    data = MultipleChoiceData(bert, rows(60), val_fraction=0.2, batch_size=4)
    data.setup("fit")
    train = torch.cat([batch["row"] for batch in data.train_dataloader()])
    val = torch.cat([batch["row"] for batch in data.val_dataloader()])
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(60))
    assert len(val) == 12
    for batch in data.val_dataloader():
        assert torch.equal(batch["labels"], batch["row"] % 3)
        lengths = batch["attention_mask"].sum(-1).amax(-1)
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


def test_lists_of_fixed_size_and_slices(bert: str) -> None:
    fixed = rows(6, 2).cast(
        Features({"context": Value("string"), "choices": ListOf(Value("string"), length=2), "label": Value("int64")})
    )
    for table in (fixed, rows(9, 2).select(range(3, 9))):
        data = MultipleChoiceData(bert, val=table)
        data.setup("validate")
        for batch in data.val_dataloader():
            assert batch["labels"].tolist() == [table[row]["label"] for row in batch["row"].tolist()]
            assert batch["input_ids"].shape[:2] == (6, 2)


def test_labels_with_names_count_by_their_order(bert: str) -> None:
    """The hub's COPA names its classes "choice1" and "choice2"; the names of others may even be other digits."""
    table = {"premise": ["the film", "a story"] * 2, "choice1": ["is dull"] * 4, "choice2": ["sing"] * 4}
    for names in (["choice1", "choice2"], ["B", "A"], ["1", "2"], ["1", "0"]):
        features = Features({**dict.fromkeys(table, Value("string")), "label": ClassLabel(names=names)})
        given = Dataset.from_dict({**table, "label": [0, 1, 1, 0]}, features)
        data = MultipleChoiceData(bert, val=given, context="premise", choices=["choice1", "choice2"])
        data.setup("validate")
        [batch] = data.val_dataloader()
        assert batch["labels"].tolist() == [[0, 1, 1, 0][row] for row in batch["row"]], names
    for names, labels, message in (
        (
            ["choice1", "choice2"],
            [0, -1],
            r"row 1 \(from 0\): .*holds None: .*by its name, one of 'choice1', 'choice2'",
        ),
        (["a", "b", "c"], [0, 2], r"row 1 \(from 0\): .*holds 'c': .*from 0 to 1 \(by its name, one of 'a', 'b'\)"),
    ):
        features = Features({**dict.fromkeys(table, Value("string")), "label": ClassLabel(names=names)})
        few = Dataset.from_dict({**{name: values[:2] for name, values in table.items()}, "label": labels}, features)
        with pytest.raises(ValueError, match=message):
            MultipleChoiceData(bert, val=few, context="premise", choices=["choice1", "choice2"]).setup("validate")


def jsonl(*changes: dict[str, Any]) -> str:
    row = {"context": "the film", "choices": ["is dull", "sing"], "label": 0}
    lines = [{name: value for name, value in {**row, **change}.items() if value != "gone"} for change in changes]
    return "".join(json.dumps(line) + "\n" for line in lines)


BAD: dict[str, tuple[str, type[Exception], str]] = {
    "missing column": (jsonl({}, {"choices": "gone"}), ValueError, r"t\.jsonl, line 2 has no column 'choices'"),
    "null context": (jsonl({}, {"context": None}), ValueError, r"line 2: column 'context' is null"),
    "null choices": (jsonl({}, {"choices": None}), ValueError, r"line 2: column 'choices' is null: give its choices"),
    "null choice": (jsonl({}, {"choices": ["a", None]}), ValueError, r"line 2: .*holds a null choice"),
    "ragged": (
        jsonl({}, {}, {"choices": ["a", "b", "c"]}),
        ValueError,
        r"line 3: .*holds 3 choices, .*first row has 2",
    ),
    "one choice": (jsonl({"choices": ["a"]}), ValueError, r"line 1: .*holds 1 choices: there must be two or more"),
    "no choice": (jsonl({"choices": []}), ValueError, r"line 1: .*holds 0 choices"),
    "a text": (jsonl({"choices": "a, b"}), TypeError, r"must hold lists of texts, got 'a, b' .*choices=\[\.\.\.\]"),
    "numbers": (jsonl({"choices": [1, 2]}), TypeError, r"must hold lists of texts, got \[1, 2\]"),
    "number for context": (jsonl({"context": 3}), TypeError, r"'context' must hold text, got 3"),
    "label too high": (jsonl({}, {"label": 2}), ValueError, r"line 2: .*holds 2: .*from 0 to 1"),
    "label below 0": (jsonl({}, {"label": -1}), ValueError, r"line 2: .*holds -1: .*from 0 to 1"),
    "letter": (jsonl({"label": "0"}, {"label": "B"}), ValueError, r"line 2: .*holds 'B': a label is the number"),
    "null label": (jsonl({}, {"label": None}), ValueError, r"line 2: .*holds None"),
    "float label": (jsonl({"label": 1.0}), TypeError, r"'label' must hold the number of the right choice.*got 1\.0"),
    "long choice": (
        jsonl({}, {"choices": ["a", "film " * 20]}),
        ValueError,
        r"line 2: choice 1 has 20 tokens, .*leaves 9",
    ),
    "mixed types": (jsonl({}, {"choices": "a"}), TypeError, r"line 2: column 'choices' holds 'a' \(str\)"),
    "empty": ("", ValueError, r"t\.jsonl has no rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str, bert: str, tmp_path: Path) -> None:
    content, kind, message = BAD[name]
    (tmp_path / "t.jsonl").write_text(content)
    data = MultipleChoiceData(bert, str(tmp_path / "t.jsonl"), max_length=12)
    with pytest.raises(kind, match=message):
        data.setup("fit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", jsonl({}).encode() + b'{"context": "\xff"}\n', r"t\.jsonl, line 2: not UTF-8"),
        (
            "t.jsonl.gz",
            gzip.compress(jsonl(*[{"context": str(i)} for i in range(999)]).encode())[:-30],
            r"damaged after",
        ),
    ],
)
def test_damaged_files(name: str, content: bytes, message: str, bert: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MultipleChoiceData(bert, str(tmp_path / name)).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": ["a"]}, r"must name one column of lists, or two columns or more"),
        ({"choices": ["a", "a"]}, r"must be different columns, got \['context', 'a', 'a', 'label'\]"),
        ({"question": "context"}, r"must be different columns"),
        ({"label": "choices"}, r"must be different columns"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultipleChoiceData("-", **options)


def test_a_choice_that_just_fits(bert: str, tmp_path: Path) -> None:
    """Nine tokens are left for a choice and the context, of which one must stay."""
    make: Callable[[int, str], Dataset] = lambda n, context: Dataset.from_dict(  # noqa: E731
        {"context": [context], "choices": [["a", "film " * n]], "label": [0]}
    )
    for count, context, fits in ((8, "the film", True), (9, "the film", False), (9, "", True), (10, "", False)):
        data = MultipleChoiceData(bert, val=make(count, context), max_length=12)
        if fits:
            data.setup("validate")
            ids = next(iter(data.val_dataloader()))["input_ids"][0, 1]
            assert len(ids) == 12
            assert len(ids[-1 - count : -1].unique()) == 1  # the choice is whole, though the longer of the two
        else:
            with pytest.raises(ValueError, match=r"row 0 \(from 0\): choice 1 has"):
                data.setup("validate")
