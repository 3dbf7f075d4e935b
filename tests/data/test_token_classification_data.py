"""Words and spans as tags of tokens, in windows."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import models, pre_tokenizers, processors, trainers

from lightning_ft.core.report import Report
from lightning_ft.data.curriculum import Curriculum, competence
from lightning_ft.data.tags import complete_labels
from lightning_ft.data.token_classification import TokenClassificationData
from tests.pretrained import CORPUS, Kind, tokenizer

KINDS = ["bert", "roberta", "gpt2", "t5"]


def saved(folder: Path, given: Any) -> str:
    (tokenizer(given) if isinstance(given, str) else given).save_pretrained(folder)
    return str(folder)


def read(path: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def all_rows(loader: Any) -> dict[int, dict[str, Any]]:
    """Rows of evaluation, each with its windows, by number."""
    rows = {}
    for batch in loader:
        for i, row in enumerate(batch["row"].tolist()):
            windows = batch["example"] == i
            one = {name: batch[name][windows] for name in ("input_ids", "attention_mask", "words")}
            one["offsets"] = [tuple(pair) for pair in batch["offsets"][i].tolist() if pair[0] >= 0]
            if "tags" in batch:
                one["tags"] = [tag for tag in batch["tags"][i].tolist() if tag >= 0]
                one["labels"] = batch["labels"][windows]
            rows[row] = one
    return rows


def spans_of(tags: list[str], offsets: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Spans of a valid BIO sequence, written anew."""
    spans: list[dict[str, Any]] = []
    for tag, (start, end) in zip(tags, offsets, strict=True):
        if tag[0] == "B":
            spans.append({"start": start, "end": end, "label": tag[2:]})
        elif tag[0] == "I":
            spans[-1]["end"] = end
    return spans


def joined(words: list[str]) -> list[tuple[int, int]]:
    starts = [len(" ".join([*words[:i], ""])) for i in range(len(words))]
    return [(start, start + len(word)) for start, word in zip(starts, words, strict=True)]


def test_batches_equal_transformers_own(minilm: str, real_data: Path) -> None:
    """Tokens as `is_split_into_words` makes them; labels at the first token of each word."""
    path = real_data / "uner_ewt" / "dev.jsonl"
    lines = read(path, 10_000)
    data = TokenClassificationData(minilm, str(path), max_length=256)
    data.setup("fit")
    assert data.labels == ["O", "B-LOC", "B-ORG", "B-PER", "I-LOC", "I-ORG", "I-PER"]
    tokens = hf.AutoTokenizer.from_pretrained(minilm)
    seen = []
    for batch in data.train_dataloader():
        words = [lines[row]["tokens"] for row in batch["row"]]
        expected = tokens(words, is_split_into_words=True, padding=True, return_tensors="pt")
        assert set(batch) == {*expected, "labels", "row"}
        for name, values in expected.items():
            torch.testing.assert_close(batch[name], values)
        for i, row in enumerate(batch["row"].tolist()):
            ids = expected.word_ids(i)
            first = [w if w is not None and w != before else None for before, w in zip([None, *ids], ids, strict=False)]
            names = [-100 if w is None else data.labels.index(lines[row]["tags"][w]) for w in first]
            assert batch["labels"][i].tolist() == names
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(len(lines)))


def test_windows_equal_transformers_own_and_each_word_is_read_in_the_middle(minilm: str, real_data: Path) -> None:
    lines = read(real_data / "wnut17" / "dev.jsonl", 60)
    rows = [
        {name: list(chain.from_iterable(line[name] for line in lines[i : i + 15])) for name in ("tokens", "tags")}
        for i in range(0, 60, 15)
    ]
    rows.insert(2, {"tokens": ["short"], "tags": ["O"]})
    table = Dataset.from_list(rows)
    data = TokenClassificationData(minilm, table, table, max_length=40, stride=13, eval_batch_size=2)
    data.setup("fit")
    tokens = hf.AutoTokenizer.from_pretrained(minilm)
    training = {}
    for batch in data.train_dataloader():
        for i, row in enumerate(batch["row"].tolist()):
            ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
            training[row, tuple(ids.tolist())] = batch["labels"][i][: len(ids)].tolist()
    for row, got in all_rows(data.val_dataloader()).items():
        words = rows[row]["tokens"]
        options = {"truncation": True, "max_length": 40, "stride": 13, "return_overflowing_tokens": True}
        expected = tokens([words], is_split_into_words=True, **options, padding=True, return_tensors="pt")
        assert len(got["input_ids"]) == len(expected["input_ids"]) == (1 if row == 2 else len(expected["input_ids"]))
        width = expected["input_ids"].shape[1]
        torch.testing.assert_close(got["input_ids"][:, :width], expected["input_ids"])
        context: dict[int, tuple[int, int, int]] = {}
        for w in range(len(expected["input_ids"])):
            ids, before = expected.word_ids(w), None
            if w:  # whether the first token goes on with a word of the window before
                whole = tokens([words], is_split_into_words=True, add_special_tokens=False).word_ids(0)
                at = w * (38 - 13)
                before = whole[at - 1]
            last = max(j for j, word in enumerate(ids) if word is not None)
            # In training a word has its label in every window.
            firsts = [w is not None and w != b for b, w in zip([before, before, *ids[1:]], ids, strict=False)]
            length = int(expected["attention_mask"][w].sum())
            labels = training[row, tuple(expected["input_ids"][w, :length].tolist())]
            wanted = [
                data.labels.index(rows[row]["tags"][word]) if first else -100
                for word, first in zip(ids, firsts, strict=True)
            ]
            assert labels == wanted[:length]
            for j, word in enumerate(ids):
                if word is not None and word != before:
                    shorter = min(j - 1, last - j)
                    if shorter > context.get(word, (-1, 0, 0))[0]:
                        context[word] = (shorter, w, j)
                before = word if word is not None else before
        marks = {int(got["words"][w, j]) - 1: (w, j) for w, j in got["words"].nonzero().tolist()}
        assert marks == {word: (w, j) for word, (_, w, j) in context.items()}
        assert sorted(marks) == list(range(len(words)))
        read_tags = {word: data.labels[got["labels"][place]] for word, place in marks.items()}
        assert [read_tags[i] for i in range(len(words))] == rows[row]["tags"]
        assert int((got["labels"] != -100).sum()) == len(words)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_every_tokenizer(kind: Kind, tmp_path: Path, real_data: Path) -> None:
    """Labels stand at the first token with characters of a word, in the tokens of the joined text."""
    lines = read(real_data / "wnut17" / "dev.jsonl", 100)
    lines.append({"tokens": ["東京", "naïve", "a b", "😂😂", "x"], "tags": ["B-person", "O", "O", "O", "O"]})
    table = Dataset.from_list(lines)
    data = TokenClassificationData(saved(tmp_path, kind), table, table, max_length=256, scheme="BIO")
    data.setup("fit")
    tokens = hf.AutoTokenizer.from_pretrained(tmp_path)
    for row, got in all_rows(data.val_dataloader()).items():
        words = lines[row]["tokens"]
        text = " ".join(words)
        expected = tokens(text, return_offsets_mapping=True)
        ids = got["input_ids"][got["attention_mask"].bool()].tolist()
        assert ids == expected["input_ids"]
        assert got["offsets"] == joined(words)
        assert [text[a:b] for a, b in got["offsets"]] == words
        at = {}
        for j, (a, b) in enumerate(expected["offset_mapping"]):
            for word, (start, end) in enumerate(got["offsets"]):
                if max(a, start) < min(b, end) and not text[max(a, start) : min(b, end)].isspace():
                    at.setdefault(word, j)
        marks = got["words"][got["attention_mask"].bool()]
        assert marks.nonzero().flatten().tolist() == [at[word] for word in sorted(at)]
        assert [data.labels[tag] for tag in got["tags"]] == lines[row]["tags"]


def test_byte_level_words_are_those_of_add_prefix_space(tmp_path: Path, real_data: Path) -> None:
    """But for the first word, which stands at the start of a text as in pretraining."""
    lines = read(real_data / "uner_ewt" / "dev.jsonl", 50)
    table = Dataset.from_list(lines)
    data = TokenClassificationData(saved(tmp_path, "roberta"), predict=table, max_length=256)
    data.setup("predict")
    reference = hf.AutoTokenizer.from_pretrained(tmp_path)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for row, got in all_rows(data.predict_dataloader()).items():
        theirs = reference(lines[row]["tokens"], is_split_into_words=True)
        rest = [i for i, word in zip(theirs["input_ids"], theirs.word_ids(), strict=True) if word not in (None, 0)]
        ours = got["input_ids"][got["attention_mask"].bool()].tolist()
        assert ours[len(ours) - len(rest) - 1 : -1] == rest


@pytest.mark.parametrize("scheme", ["BIO", "BIOES", "IO"])
@pytest.mark.parametrize("kind", KINDS)
def test_spans_become_tags_and_spans_again(kind: Kind, scheme: Any, tmp_path: Path, real_data: Path) -> None:
    lines = read(real_data / "wnut17" / "dev.jsonl", 150)
    rows = [
        {"text": " ".join(line["tokens"]), "spans": spans_of(line["tags"], joined(line["tokens"]))} for line in lines
    ]
    if scheme == "IO":  # neighbours of one type cannot be told apart
        for row in rows:
            row["spans"] = row["spans"][:1]
    table = Dataset.from_list(rows)
    data = TokenClassificationData(saved(tmp_path, kind), table, table, text="text", scheme=scheme, max_length=300)
    data.setup("fit")
    kinds = sorted({span["label"] for row in rows for span in row["spans"]})
    assert data.labels == complete_labels(kinds, scheme)
    assert data.facts()["snapped spans"] == {"train": 0, "val": 0}
    for row, got in all_rows(data.val_dataloader()).items():
        tags = [data.labels[tag] for tag in got["tags"]]
        if scheme == "BIOES":
            assert all(b[0] in "IE" for a, b in zip(tags, [*tags[1:], "O"], strict=True) if a[0] in "BI")
            assert all(b[0] not in "IE" for a, b in pairwise(tags) if a[0] in "SEO")
            tags = [{"S": "B", "E": "I"}.get(tag[0], tag[0]) + tag[1:] for tag in tags]
        if scheme == "IO":
            firsts = [tag != "O" and tag != before for before, tag in zip(["O", *tags], tags, strict=False)]
            tags = ["B" + tag[1:] if first else tag for first, tag in zip(firsts, tags, strict=True)]
        assert spans_of(tags, got["offsets"]) == rows[row]["spans"]
        text = rows[row]["text"]
        assert all(text[a:b] == text[a:b].strip() != "" for a, b in got["offsets"])


def words_of(text: str, given: Any, folder: Path, **options: Any) -> list[str]:
    data = TokenClassificationData(saved(folder, given), predict=Dataset.from_dict({"text": [text]}), text="text")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    return [text[a:b] for a, b in batch["offsets"][0].tolist()]


def characters() -> hf.PreTrainedTokenizerFast:
    """Like Llama 2's: no pre-tokeniser that divides, so that a whole text is one piece; a token a character."""
    raw = tk.Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(split=False, prepend_scheme="first")
    alphabet = sorted(set("".join(CORPUS)) | set("नमस्ते दुनिया東京都に。สวัสดี"))
    special = ["<unk>", "</s>"]
    raw.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special))
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Anna  lives, in\nParis. ", ["Anna", "lives", ",", "in", "Paris", "."]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("東京都に。", list("東京都に。")),
        ("สวัสดี", list("สวัสดี")),
        ("in </s> it", ["in", "</s>", "it"]),
    ],
)
def test_words_where_the_pre_tokeniser_makes_none(text: str, expected: list[str], tmp_path: Path) -> None:
    assert words_of(text, characters(), tmp_path) == expected


def test_unigram_pieces_are_divided_at_punctuation(tmp_path: Path) -> None:
    text = "Anna (café), U.S.\n😂ok"
    assert words_of(text, "t5", tmp_path / "t5") == ["Anna", "(", "café", ")", ",", "U", ".", "S", ".", "😂", "ok"]
    # Four byte tokens of one character are one word.
    assert words_of("a 😂 b", "gpt2", tmp_path / "gpt2") == ["a", "😂", "b"]


def tagged(minilm: str, text: str, *spans: tuple[int, int, str], **options: Any) -> tuple[list[str], int]:
    items = [{"start": start, "end": end, "label": label} for start, end, label in spans]
    table = Dataset.from_list([{"text": text, "spans": items}])
    data = TokenClassificationData(minilm, table, val=table, text="text", **options)
    data.setup("fit")
    (row,) = all_rows(data.val_dataloader()).values()
    return [data.labels[tag] for tag in row["tags"]], data.facts()["snapped spans"]["val"]


def test_spans_take_whole_words(minilm: str) -> None:
    text = "Anna Smithson of Acme"
    assert tagged(minilm, text, (0, 13, "PER"), (17, 21, "ORG")) == (["B-PER", "I-PER", "O", "B-ORG"], 0)
    assert tagged(minilm, text, (17, 21, "ORG"), (0, 13, "PER"))[0] == ["B-PER", "I-PER", "O", "B-ORG"]
    assert tagged(minilm, text, (2, 10, "PER"), (17, 20, "ORG")) == (["B-PER", "I-PER", "O", "B-ORG"], 2)
    # White space at the ends is nothing that could be tagged.
    assert tagged(minilm, text, (4, 14, "PER")) == (["O", "B-PER", "O", "O"], 0)
    # A word that two spans share belongs to the first.
    assert tagged(minilm, text, (0, 8, "PER"), (8, 16, "ORG")) == (["B-PER", "I-PER", "B-ORG", "O"], 2)
    with pytest.raises(ValueError, match=r"the span \{'start': 10.*no word in it that is not in the span before it"):
        tagged(minilm, text, (0, 9, "PER"), (10, 13, "ORG"))
    with pytest.raises(
        ValueError, match=r"holds the span \{'start': 4, 'end': 5, 'label': 'PER'\}: the tokenizer finds"
    ):
        tagged(minilm, text, (4, 5, "PER"))
    with pytest.raises(
        ValueError, match=r"the labels \['O', 'B-PER'\] lack a tag.*give labels=... with all of \['B-PER"
    ):
        tagged(minilm, text, (0, 13, "PER"), labels=["O", "B-PER"])
    with pytest.raises(ValueError, match="unknown label 'ORG'; known: 'PER'"):
        tagged(minilm, text, (0, 13, "ORG"), labels=["O", "B-PER", "I-PER"])


def test_words_without_a_token_keep_their_place(minilm: str) -> None:
    rows = [
        {"tokens": ["New", "\u200b", "York", "", " ", "won"], "tags": ["B-LOC", "I-LOC", "I-LOC", "O", "O", "B-PER"]},
        {"tokens": [], "tags": []},
        {"tokens": ["\u200b"], "tags": ["B-LOC"]},
    ]
    table = Dataset.from_list(rows)
    data = TokenClassificationData(minilm, table, table, predict=table)
    data.setup()
    assert data.facts()["words without a token"] == {"train": 4, "val": 4, "predict": 4}
    got = all_rows(data.val_dataloader())
    assert [[data.labels[tag] for tag in got[i]["tags"]] for i in range(3)] == [row["tags"] for row in rows]
    assert [got[i]["offsets"] for i in range(3)] == [joined(row["tokens"]) for row in rows]
    assert got[0]["words"][got[0]["words"] > 0].tolist() == [1, 3, 6]
    assert not got[1]["words"].any()
    (batch,) = data.train_dataloader()
    place = batch["row"].tolist().index(0)
    labels = batch["labels"][place]
    assert [data.labels[i] for i in labels[labels >= 0].tolist()] == ["B-LOC", "I-LOC", "B-PER"]


def test_many_rows_without_words_come_first(minilm: str) -> None:
    table = Dataset.from_dict({"words": [[""]] * 1200 + [["Anna"]], "starts": [["O"]] * 1200 + [["B-PER"]]})
    data = TokenClassificationData(minilm, table, table, tokens="words", tags="starts", eval_batch_size=500)
    data.setup("fit")
    got = all_rows(data.val_dataloader())
    assert (len(got), got[1200]["offsets"], got[1200]["tags"]) == (1201, [(0, 4)], [1])


def test_labels(minilm: str) -> None:
    table = Dataset.from_dict({"tokens": [["a", "b", "c"]], "tags": [["I-Z", "B-creative-work", "O"]]})
    complete = ["O", "B-Z", "B-creative-work", "I-Z", "I-creative-work"]
    assert TokenClassificationData("-", table).labels == complete
    assert TokenClassificationData("-", table, scheme="BIOES").num_labels == 9
    given = TokenClassificationData("-", table, labels=["I-Z", "O", "B-creative-work"])
    assert given.labels == ["I-Z", "O", "B-creative-work"]
    names = ["B-PER", "O", "I-LOC"]
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=names))})
    numbered = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[0, 1]]}, features=features)
    data = TokenClassificationData(minilm, numbered, numbered)
    assert data.labels == [*names, "B-LOC", "I-PER"]
    data.setup("fit")
    assert all_rows(data.val_dataloader())[0]["tags"] == [0, 1]
    with pytest.raises(ValueError, match=r"give labels=\.\.\., or train to take them from"):
        _ = TokenClassificationData("-", test=table).labels
    with pytest.raises(ValueError, match=r"one of them must be 'O', got \['B-Z'\]"):
        _ = TokenClassificationData("-", labels=["B-Z"]).labels
    with pytest.raises(ValueError, match=r"'E-Z' is no tag of scheme='BIO', whose tags are 'O' and 'B-…' and 'I-…'"):
        _ = TokenClassificationData("-", labels=["O", "E-Z"]).labels


def test_prediction_needs_no_tags_and_keeps_order_and_ids(minilm: str) -> None:
    rows = Dataset.from_dict({"tokens": [["a"] * (9 * i % 50) for i in range(7)], "key": list("abcdefg")})
    data = TokenClassificationData(minilm, predict=rows, id="key", eval_batch_size=3, max_length=16, stride=4)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert torch.cat([batch["row"] for batch in batches]).tolist() == list(range(7))
    assert [name for batch in batches for name in batch["id"]] == list("abcdefg")
    assert [len(words) for batch in batches for words in batch["tokens"]] == [9 * i % 50 for i in range(7)]
    assert all("tags" not in batch and "labels" not in batch for batch in batches)
    data.skip_predicted({0, 1, 5})
    assert [row for batch in data.predict_dataloader() for row in batch["row"].tolist()] == [2, 3, 4, 6]


def test_val_fraction_divides_documents_and_not_windows(minilm: str) -> None:
    rows = [
        {"tokens": ["the", "film", "is", "dull"] * (1 + i % 9), "tags": ["O", "B-X", "O", "O"] * (1 + i % 9)}
        for i in range(40)
    ]
    data = TokenClassificationData(minilm, Dataset.from_list(rows), val_fraction=0.25, max_length=14, stride=4)
    data.setup("fit")
    train = {row for batch in data.train_dataloader() for row in batch["row"].tolist()}
    val = all_rows(data.val_dataloader())
    assert (len(train), len(val), train & set(val)) == (30, 10, set())
    assert all([data.labels[t] for t in got["tags"]] == rows[row]["tags"] for row, got in val.items())
    assert data.facts()["labels"]["B-X"] == sum(rows[row]["tags"].count("B-X") for row in train)
    assert data.facts()["words"] == {
        "train": sum(len(rows[row]["tokens"]) for row in train),
        "val": sum(len(rows[row]["tokens"]) for row in val),
    }
    assert data.facts()["words without a token"] == {"train": 0, "val": 0}
    assert data.facts()["labels without a training word"] == ["I-X"]
    assert isinstance(data.describe(), Report)
    json.loads(data.describe().to_json())


def test_tags_and_settings_of_a_row_seen_before_are_not_confused(minilm: str) -> None:
    """The tokens are found on the disk by the words; the tags are not part of them."""
    for tag, max_length in (("B-X", 128), ("B-Y", 128), ("O", 12)):
        table = Dataset.from_dict({"tokens": [["film"] * 20], "tags": [[tag] * 20]})
        data = TokenClassificationData(minilm, table, table, labels=["O", "B-X", "B-Y"], max_length=max_length)
        data.setup("fit")
        (got,) = all_rows(data.val_dataloader()).values()
        assert {data.labels[t] for t in got["tags"]} == {tag}
        assert (len(got["input_ids"]) > 1) == (max_length == 12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scheme": "BILOU"}, r"scheme must be one of \('BIO', 'BIOES', 'IO'\), got 'BILOU'"),
        ({"spans": "spans"}, r"spans='spans' are offsets in a text: give its column as text="),
        ({"stride": 128}, "stride=128 must be 0 or more and less than max_length=128"),
        ({"stride": -1}, "stride=-1 must be 0 or more"),
        ({"tags": "tokens"}, "must be different columns, both are 'tokens'"),
    ],
)
def test_contradicting_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenClassificationData("-", **kwargs)


GOOD = {"tokens": ["a", "b"], "tags": ["O", "B-X"], "text": "a b", "spans": [{"start": 0, "end": 1, "label": "X"}]}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"tags": ["O"]}, ValueError, r"line 2: column 'tokens' holds 2 words and column 'tags' 1 tags: every word"),
        ({"tags": ["O", "B-Y"]}, ValueError, r"line 2: column 'tags' holds the unknown label 'B-Y'; known: 'O', 'B-X'"),
        ({"tags": ["O", "X-X"]}, ValueError, r"line 2: column 'tags': 'X-X' is no tag of scheme='BIO'"),
        ({"tags": ["O", "BI-X"]}, ValueError, r"line 2: column 'tags': 'BI-X' is no tag of scheme='BIO'"),
        ({"tags": ["O", "X"]}, ValueError, r"line 2: column 'tags': 'X' is no tag of scheme"),
        ({"tags": ["O", ""]}, ValueError, r"line 2: column 'tags': '' is no tag of scheme"),
        ({"tags": ["O", None]}, ValueError, r"line 2: column 'tags' holds a null among its tags"),
        ({"tags": None}, ValueError, r"line 2: column 'tags' is null: give an empty list for none"),
        ({"tokens": ["a", None]}, ValueError, r"line 2: column 'tokens' holds a null among its words"),
        ({"tokens": [1, 2]}, TypeError, r"line 2: column 'tokens' holds \[1, 2\] \(list\), which does not fit"),
        ({"spans": [{"start": 2, "end": 4, "label": "X"}]}, ValueError, r"line 2.*'end': 4.*the text, which has 3"),
        ({"spans": [{"start": -1, "end": 1, "label": "X"}]}, ValueError, r"line 2.*start must be 0 or more"),
        ({"spans": [{"start": 1, "end": 1, "label": "X"}]}, ValueError, r"line 2.*end more than start"),
        ({"spans": [{"start": 0, "end": 3, "label": "X"}, {"start": 2, "end": 3, "label": "X"}]}, ValueError,
         r"line 2: column 'spans' holds the span \{'start': 2.*overlaps the one before it"),
        ({"spans": [{"start": 0, "end": 1}]}, ValueError, r"line 2.*start, end and label must not be null"),
        ({"spans": [{"start": 0, "end": 1, "label": " "}]}, ValueError, r"line 2.*label must not be empty"),
        ({"spans": [{"start": 0, "end": 1, "label": "Y"}]}, ValueError, r"line 2: .*unknown label 'Y'; known: 'X'"),
        ({"spans": [{"start": 1, "end": 2, "label": "X"}]}, ValueError, r"line 2.*the tokenizer finds no word in it"),
        ({"spans": None}, ValueError, r"line 2: column 'spans' is null"),
        ({"text": None}, ValueError, r"line 2: column 'text' is null"),
    ],
)  # fmt: skip
def test_faulty_rows_are_named(bad: dict[str, Any], error: Any, message: str, minilm: str, tmp_path: Path) -> None:
    path, good = tmp_path / "val.jsonl", Dataset.from_list([GOOD])
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, {**GOOD, **bad})))
    text = "text" if {"spans", "text"} & set(bad) else None
    with pytest.raises(error, match=r"(?s)val\.jsonl, " + message):
        TokenClassificationData(minilm, good, str(path), text=text).setup("fit")


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"tokens": ["a"], "tags": ["O"]}, TypeError, r"'tokens' must hold lists of words, got 'a' \(string\); csv"),
        ({"tokens": [["a"]], "tags": [[1]]}, TypeError, r"lists of tags as strings, got 1.*need a datasets.ClassLabel"),
        ({"tokens": [["a"]]}, ValueError, r"has no column 'tags'; there are: 'tokens'"),
        ({"text": [["a"]], "spans": [[]]}, TypeError, r"column 'text' must hold text, got \['a'\]"),
        (
            {"text": ["a"], "spans": [[1]]},
            TypeError,
            r"'spans' must hold lists of \{start, end, label\}.*, got 1 \(int64",
        ),
        ({"text": ["a"], "spans": ["0-1"]}, TypeError, r"'spans' must hold lists of \{start, end, label\}"),
        ({"text": ["a"], "spans": [[{"start": 0, "stop": 1, "label": "X"}]]}, TypeError, r"must hold lists of \{start"),
        ({"text": ["a"], "spans": [[{"start": 0.0, "end": 1.0, "label": "X"}]]}, TypeError, "with whole numbers"),
    ],
)
def test_columns_of_other_types_are_refused(columns: dict[str, Any], error: Any, message: str, minilm: str) -> None:
    text = "text" if "text" in columns else None
    with pytest.raises(error, match=message):
        TokenClassificationData(minilm, Dataset.from_dict(columns), text=text).setup("fit")


def test_damaged_files_are_refused(minilm: str, tmp_path: Path) -> None:
    line = json.dumps(GOOD) + "\n"
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(line.encode() + b'{"tokens": ["caf\xe9"], "tags": ["O"]}\n')
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(line.encode() * 5000)[:-20])
    (tmp_path / "words.csv").write_text("tokens,tags\na b,O O\n")
    for name, error, message in (
        ("empty.jsonl", ValueError, r"empty\.jsonl has no rows"),
        ("latin.jsonl", ValueError, r"latin\.jsonl, line 2: not UTF-8"),
        ("short.jsonl.gz", ValueError, r"short\.jsonl\.gz: damaged after line \d+"),
        ("words.csv", TypeError, r"csv, line 2: column 'tokens' must hold lists of words.*write jsonl or parquet"),
    ):
        with pytest.raises(error, match=message):
            TokenClassificationData(minilm, str(tmp_path / name)).setup("fit")


def test_tokenizers_that_do_not_serve_are_refused(minilm: str, tmp_path: Path) -> None:
    table = Dataset.from_list([GOOD, {**GOOD, "tokens": [], "tags": [], "text": " ", "spans": []}])
    hf.ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(ValueError, match=r"is a slow one \(ByT5Tokenizer\).*choose a model with a fast tokenizer"):
        TokenClassificationData(str(tmp_path / "slow"), table).setup("fit")
    with pytest.raises(ValueError, match=r"max_length=8 leaves 6 tokens of text in a window, of which stride=7"):
        TokenClassificationData(minilm, table, max_length=8, stride=7).setup("fit")
    gpt2 = saved(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): the tokenizer makes no token of \[\]: remove the row"):
        TokenClassificationData(gpt2, table).setup("fit")


@pytest.mark.parametrize("difficulty", ["length", "rarity", "grade"])
def test_curriculum_over_windows(difficulty: str, minilm: str) -> None:
    columns = {"tokens": [["film"] * (9 + 5 * i) for i in range(12)], "tags": [["O"] * (9 + 5 * i) for i in range(12)]}
    table = Dataset.from_dict({**columns, "grade": list(range(12))})
    curriculum = Curriculum(difficulty, until="50 steps", start=0.2)
    data = TokenClassificationData(
        minilm, table, labels=["O", "B-X"], max_length=16, batch_size=2, curriculum=curriculum
    )
    data.setup("fit")
    loader = data.train_dataloader()
    windows = data.need("train")
    # Of each window: its tokens, their surprise, or its row's grade.
    ids = windows.windows.tokens.with_format(None)["input_ids"]
    counts = Counter(token for row in ids for token in row)
    hard = {
        "length": [len(row) for row in ids],
        "rarity": [-sum(math.log(counts[token] / counts.total()) for token in row) for row in ids],
        "grade": windows.rows.tolist(),
    }[difficulty]
    drawn = [loader.sampler.pool(batch).tolist() for batch in (0, 10)]
    for pool, share in zip(drawn, (0.2, competence(10, duration=50, start=0.2)), strict=True):
        assert len(pool) == max(math.ceil(share * len(ids)), 2)
        others = [hard[window] for window in range(len(ids)) if window not in pool]
        assert max(hard[window] for window in pool) <= min(others) + 1e-9
    first = next(iter(loader))
    assert set(first["row"].tolist()) <= {int(windows.rows[window]) for window in drawn[0]}
    assert first["labels"].shape == first["input_ids"].shape
