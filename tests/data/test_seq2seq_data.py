"""Sources with targets, span corruption, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from tokenizers import processors

from lightning_ft.data.sampler import Positions, padding_waste
from lightning_ft.data.seq2seq import Seq2SeqData
from tests import pretrained as tiny
from tests.pretrained import CORPUS

WORDS = " ".join(CORPUS).split()


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("t5")
    tiny.tokenizer("t5").save_pretrained(folder)
    return str(folder)


def rows(count: int, **columns: list[Any]) -> Dataset:
    texts = [" ".join(WORDS[i % 30 : i % 30 + 2 + i % 9]) for i in range(count)]
    return Dataset.from_dict(
        {"source": texts, "target": [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 3]) for i in range(count)]} | columns
    )


def batches(data: Seq2SeqData, stage: str = "fit", split: str = "train") -> list[dict[str, Any]]:
    data.setup(stage)
    return list(getattr(data, f"{split}_dataloader")())


@pytest.mark.parametrize("prefix", ["", "summarise: "])
def test_batches_equal_the_tokenizers_own(t5: str, real_data: Path, prefix: str) -> None:
    path = real_data / "scitldr" / "dev.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    data = Seq2SeqData(t5, str(path), prefix=prefix, max_length=60, max_target_length=30, batch_size=64)
    words = hf.AutoTokenizer.from_pretrained(t5)
    seen = []
    for batch in batches(data):
        chosen = [lines[row] for row in batch["row"].tolist()]
        options = {"truncation": True, "padding": True, "return_tensors": "pt"}
        source = words([prefix + line["source"] for line in chosen], max_length=60, **options)
        target = words(text_target=[line["target"] for line in chosen], max_length=30, **options)
        assert set(batch) == {"input_ids", "attention_mask", "labels", "row"}
        torch.testing.assert_close(batch["input_ids"], source["input_ids"])
        torch.testing.assert_close(batch["attention_mask"], source["attention_mask"])
        expected = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        torch.testing.assert_close(batch["labels"], expected)
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(len(lines)))
    full = [len(ids) for ids in words(text_target=[line["target"] for line in lines])["input_ids"]]
    facts = data.describe().facts
    assert facts["targets cut"] == {"train": sum(length > 30 for length in full)} != {"train": 0}
    assert facts["max_target_length"] == 30


def test_targets_are_padded_on_the_right_also_where_sources_are_not(
    t5: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = hf.AutoTokenizer.from_pretrained(t5)
    words.save_pretrained(tmp_path)
    monkeypatch.setattr(type(words), "padding_side", "left")
    [batch] = batches(Seq2SeqData(str(tmp_path), rows(6), batch_size=6, pad_to_multiple_of=8))
    assert batch["input_ids"].shape[1] % 8 == batch["labels"].shape[1] % 8 == 0
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert (batch["labels"][:, 0] != -100).all()
    assert (batch["labels"][:, -1] == -100).any()


def test_references(t5: str, real_data: Path) -> None:
    path = real_data / "scitldr" / "dev.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    several = Seq2SeqData(t5, val=str(path), references="references", batch_size=100)
    for batch in batches(several, "validate", "val"):
        assert batch["references"] == [lines[row]["references"] for row in batch["row"].tolist()]
    # Uncut, though the tokens are cut.
    for batch in batches(Seq2SeqData(t5, test=str(path), max_target_length=4, batch_size=100), "test", "test"):
        assert batch["references"] == [[lines[row]["target"]] for row in batch["row"].tolist()]
    alone = [[f"r{i}", "s"] for i in range(20)]
    split = Seq2SeqData(t5, rows(20, other=alone), val_fraction=0.25, references="other", batch_size=4)
    split.setup("fit")
    assert all("references" not in batch for batch in split.train_dataloader())
    for batch in split.val_dataloader():
        assert batch["references"] == [alone[row] for row in batch["row"].tolist()]


def test_translations_in_records(t5: str, tmp_path: Path) -> None:
    pairs = [{"translation": {"en": "the film", "de": "der Film"}}, {"translation": {"en": "yes", "de": "ja"}}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = hf.AutoTokenizer.from_pretrained(t5)
    for train in (str(file), Dataset.from_list(pairs)):
        data = Seq2SeqData(t5, train, source="translation.de", target="translation.en", batch_size=2)
        assert data.columns("train") == ["translation"]
        [batch] = batches(data)
        for row, labels in zip(batch["row"].tolist(), batch["labels"], strict=True):
            assert labels[labels != -100].tolist() == words(pairs[row]["translation"]["en"])["input_ids"]
    predicted = Seq2SeqData(t5, predict=str(file), source="translation.de")
    [batch] = batches(predicted, "predict", "predict")
    assert set(batch) == {"input_ids", "attention_mask", "row"}


def test_languages_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocabulary = [*special, "▁the", "▁film", "▁der", "▁Film", "▁"]
    words = hf.NllbTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[])
    words.save_pretrained(tmp_path)
    data = Seq2SeqData(str(tmp_path), rows(3), source_language="eng_Latn", target_language="deu_Latn", batch_size=3)
    [batch] = batches(data)
    known = data.tokenizer
    assert set(batch["input_ids"][:, 0].tolist()) == {known.convert_tokens_to_ids("eng_Latn")}
    assert set(batch["labels"][:, 0].tolist()) == {known.convert_tokens_to_ids("deu_Latn")}
    with pytest.raises(ValueError, match="does not know the language 'english'"):
        Seq2SeqData(str(tmp_path), rows(3), source_language="english").setup("fit")


def test_bucketing_pads_less(t5: str, real_data: Path) -> None:
    path = real_data / "scitldr" / "train.jsonl"
    data = Seq2SeqData(t5, str(path), batch_size=16, max_length=1024, max_target_length=128)
    data.setup("fit")
    bucketed, drawn = data.need("train"), list(torch.arange(1200).split(16))
    order = list(data.sampler(bucketed, train=True))
    lengths = bucketed.sources.lengths
    assert padding_waste(lengths, order) < 0.03 < 0.15 < padding_waste(lengths, [part.tolist() for part in drawn])
    turned = Seq2SeqData(t5, rows(9, source=["the"] * 9, target=["the " * i + "." for i in range(9)]))
    turned.setup("fit")
    assert turned.need("train").lengths.tolist() == turned.need("train").targets.lengths.tolist()


# ---- span corruption


def restored(inputs: list[int], targets: list[int], sentinels: list[int], eos: int) -> list[int]:
    """The text: each sentinel replaced by what the targets say of it."""
    assert (inputs[-1], targets[-1]) == (eos, eos)
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token in sentinels:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    return [part for token in inputs[:-1] for part in (spans.pop(token) if token in spans else [token])]


def test_span_corruption_loses_nothing(t5: str) -> None:
    texts = [" ".join(WORDS * 6), "", "the film is dull", "yes"]
    data = Seq2SeqData(
        t5, Dataset.from_dict({"source": texts}), objective="span_corruption", max_length=32, batch_size=2
    )
    words = hf.AutoTokenizer.from_pretrained(t5)
    sentinels = [words.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(20)]
    found: dict[int, list[int]] = {}
    data.setup("fit")
    ordered = data.need("train")
    for position in range(len(ordered)):
        batch = ordered[[position]]
        assert batch["input_ids"].shape[1] <= 32
        pieces = restored(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), sentinels, 1)
        found.setdefault(int(batch["row"]), []).extend(pieces)
    plain = words(texts, add_special_tokens=False)["input_ids"]
    assert found == {row: ids for row, ids in enumerate(plain) if ids}
    assert max(ordered.lengths) - min(ordered.lengths[:-2]) <= 1  # even pieces of the long text
    together = ordered[[0, len(ordered) - 1]]
    assert (together["labels"][1] == -100).any()
    assert (together["attention_mask"].sum(1) == (together["input_ids"] != 0).sum(1)).all()
    assert torch.equal(together["input_ids"][0], ordered[[0]]["input_ids"][0])


def test_spans_depend_on_seed_epoch_and_row_alone(t5: str) -> None:
    texts = Dataset.from_dict({"source": [" ".join(WORDS)] * 6})

    def made(epoch: int, positions: list[int], split: str = "train", **options: Any) -> list[list[int]]:
        data = Seq2SeqData(t5, texts, texts, objective="span_corruption", max_length=200, **options)
        data.setup("fit")
        return data.need(split)[Positions(positions, epoch)]["labels"].tolist()  # type: ignore[no-any-return]

    first = made(0, [0, 1, 2])
    assert made(0, [0, 1, 2], batch_size=3, num_workers=2) == first
    assert made(0, [2])[0] == [token for token in first[2] if token != -100]
    assert first[0] != first[1]
    assert first != made(1, [0, 1, 2])
    assert first != made(0, [0, 1, 2], seed=1)
    assert made(0, [0, 1, 2], "val") == made(5, [0, 1, 2], "val") != first


@pytest.mark.parametrize("workers", [0, 1])
def test_the_epoch_reaches_the_spans(t5: str, workers: int) -> None:
    texts = Dataset.from_dict({"source": [" ".join(WORDS)] * 4})
    data = Seq2SeqData(t5, texts, objective="span_corruption", batch_size=4, num_workers=workers)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)  # type: ignore[union-attr]
    loader.trainer = None  # type: ignore[attr-defined]
    [batch] = loader
    [expected] = [data.need("train")[Positions(batch["row"].tolist(), 3)]]
    assert torch.equal(batch["labels"], expected["labels"])
    assert not torch.equal(batch["labels"], data.need("train")[Positions(batch["row"].tolist(), 0)]["labels"])


def test_span_corruption_of_a_part_and_prediction(t5: str) -> None:
    data = Seq2SeqData(t5, rows(20), predict=rows(3), val_fraction=0.25, objective="span_corruption", batch_size=4)
    data.setup()
    train, val = (set(data.need(split).rows.tolist()) for split in ("train", "val"))
    assert (len(train), len(val), train & val) == (15, 5, set())
    [batch] = data.predict_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "row"}
    assert data.describe().facts["objective"] == "span_corruption"


def test_a_short_target_length_shortens_the_pieces(t5: str) -> None:
    long = Dataset.from_dict({"source": [" ".join(WORDS * 4)]})
    data = Seq2SeqData(t5, long, objective="span_corruption", max_length=512, max_target_length=10)
    assert all(batch["labels"].shape[1] <= 10 for batch in batches(data))


# ---- what is refused


CORRUPT: dict[str, Any] = {"objective": "span_corruption"}


def test_the_shortest_lengths_of_span_corruption(t5: str) -> None:
    data = Seq2SeqData(t5, rows(2), max_length=2, max_target_length=3, **CORRUPT)
    for batch in batches(data):
        assert (batch["input_ids"].shape[1], batch["labels"].shape[1]) == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "masks"}, r"objective must be one of \('text_to_text', 'span_corruption'\), got 'masks'"),
        ({"objective": "span_corruption", "prefix": "x: "}, "leave prefix and references out"),
        ({"target": "source"}, "source and target must be different columns, got 'source' for both"),
        ({"max_target_length": 1}, "max_target_length=1 must be 2 or more: a token and the end"),
        ({"max_target_length": 2, **CORRUPT}, "max_target_length=2 must be 3 or more: a sentinel, a token and the end"),
        ({"max_length": 1, **CORRUPT}, "max_length=1 must be 2 or more: a sentinel and the end"),
    ],
)
def test_contradicting_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Seq2SeqData("-", **options)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ('{"source": "a"}', {}, r"a\.jsonl, line 1 has no column 'target'; there are: 'source'"),
        ('{"source": "a", "target": null}', {}, r"a\.jsonl, line 1: column 'target' is null"),
        ('{"source": "a", "target": "b"}\n\n{"source": "a", "target": " "}', {}, r"line 3: column 'target' is empty"),
        ('{"source": null, "target": "b"}', {}, r"line 1: column 'source' is null"),
        ('{"source": 3, "target": "b"}', {}, r"column 'source' must hold text, got 3 \(int64\)"),
        ("", {}, r"a\.jsonl has no rows"),
        ('{"source": "a", "target": "b"', {}, "line 1: not JSON"),
        (
            '{"t": {"en": "a", "de": "b"}}',
            {"source": "t.en", "target": "t.fr"},
            r"a\.jsonl: column 't' has no field 'fr', of 't\.fr'; there are: 'en', 'de'",
        ),
        ('{"t": "a", "target": "b"}', {"source": "t.en"}, r"no field 'en', of 't\.en'; there are: none \(string\)"),
        (
            '{"t": {"en": "a", "de": "b"}}\n{"t": {"en": "a"}}',
            {"source": "t.en", "target": "t.de"},
            r"line 2: column 't\.de' is null",
        ),
        ('{"source": "", "target": ""}', {"objective": "span_corruption"}, "column 'source' holds only empty texts"),
    ],
)
def test_faulty_rows_are_named(t5: str, tmp_path: Path, lines: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(lines + "\n" if lines else "")
    with pytest.raises((ValueError, TypeError), match=message):
        Seq2SeqData(t5, str(tmp_path / "a.jsonl"), **options).setup("fit")


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([["a"], []], r"row 1 \(from 0\): column 'other' has no text to measure by"),
        ([["a"], None], r"row 1 \(from 0\): column 'other' has no text to measure by"),
        ([[], []], r"row 0 \(from 0\): column 'other' has no text to measure by"),
        ([["a"], ["b", None]], r"row 1 \(from 0\): column 'other' holds a null"),
        ([[1], [2]], r"column 'other' must hold lists of texts, or texts, got \[1\]"),
        (["a", None], "column 'other' is null"),
    ],
)
def test_faulty_references_are_named(t5: str, references: list[Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Seq2SeqData(t5, val=rows(2, other=references), references="other").setup("validate")


def test_damaged_files_are_named(t5: str, tmp_path: Path) -> None:
    line = b'{"source": "a", "target": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(line + b'{"source": "\xff", "target": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not UTF-8"):
        Seq2SeqData(t5, str(tmp_path / "a.jsonl")).setup("fit")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line * 1000)[:-12])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: damaged after line"):
        Seq2SeqData(t5, str(tmp_path / "b.jsonl.gz")).setup("fit")


def test_tokenizers_that_will_not_do_are_refused(t5: str, tmp_path: Path) -> None:
    tiny.tokenizer("bart").save_pretrained(tmp_path / "bart")
    corrupt: dict[str, Any] = {"objective": "span_corruption"}
    with pytest.raises(ValueError, match=r"has no sentinel tokens \(<extra_id_0>, …\)"):
        Seq2SeqData(str(tmp_path / "bart"), rows(3), **corrupt).setup("fit")
    long = Dataset.from_dict({"source": [" ".join(WORDS * 10)]})
    with pytest.raises(ValueError, match="there are 20 sentinels"):
        Seq2SeqData(t5, long, max_length=1024, max_target_length=512, noise=0.5, **corrupt).setup("fit")
    with pytest.raises(ValueError, match=r"noise=1\.5 must lie between 0 and 1"):
        Seq2SeqData(t5, rows(3), noise=1.5, **corrupt).setup("fit")
    words = hf.AutoTokenizer.from_pretrained(t5)
    words.eos_token = None
    words.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no end-of-sequence token: add one"):
        Seq2SeqData(str(tmp_path / "endless"), rows(3), **corrupt).setup("fit")
    with pytest.raises(ValueError, match="does not know the language 'de'"):
        Seq2SeqData(t5, rows(3), target_language="de").setup("fit")
    words.backend_tokenizer.post_processor = processors.Sequence([])
    words.save_pretrained(tmp_path / "bare")
    empty = Dataset.from_dict({"source": [""], "target": ["a"]})
    with pytest.raises(ValueError, match="the tokenizer makes no token of ''"):
        Seq2SeqData(str(tmp_path / "bare"), empty).setup("fit")
