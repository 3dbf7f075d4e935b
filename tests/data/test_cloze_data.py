"""Rows under patterns: windows, gaps, demonstrations, masked texts, inputs without content, and faulty input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset

from lightning_ft.data.cloze import ClozeData
from tests.pretrained import CORPUS, Kind, tokenizer

PATTERNS = ["{text} it was {mask} .", "{mask} : {text}"]
WORDS = {"neg": ["terrible", "bad"], "pos": "great"}
TEXTS = " ".join(CORPUS).split()


def rows(count: int) -> Dataset:
    texts = [" ".join(TEXTS[i % 40 : i % 40 + 3 + i % 9]) for i in range(count)]
    return Dataset.from_dict(
        {
            "text": texts,
            "label": ["pos" if i % 3 else "neg" for i in range(count)],
            "name": [f"r{i}" for i in range(count)],
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, str] = {}

    def make(kind: Kind) -> str:
        if kind not in made:
            made[kind] = str(tmp_path_factory.mktemp(kind))
            tokenizer(kind).save_pretrained(made[kind])
        return made[kind]

    return make


def two_words(folder: str) -> dict[str, str]:
    """Words for the labels that are one token each to a byte-level tokenizer, which ones depends on its training."""
    words = hf.AutoTokenizer.from_pretrained(folder)
    known = [word for word in sorted(set(TEXTS)) if word.isalpha() and len(words.tokenize(f" {word}")) == 1]
    return dict(zip(("neg", "pos"), known[:2], strict=True))


def make(folder: str, *args: Any, **options: Any) -> ClozeData:
    return ClozeData(folder, *args, **{"patterns": PATTERNS, "verbalizer": WORDS, "batch_size": 4, **options})


def test_training_takes_every_row_under_every_pattern(folder: Any) -> None:
    words, table = hf.AutoTokenizer.from_pretrained(folder("bert")), rows(11)
    data = make(folder("bert"), table)
    data.setup("fit")
    seen = []
    for batch in data.train_dataloader():
        assert set(batch) == {*words.model_input_names, "mask_positions", "pattern", "row", "labels"}
        for i, (row, pattern) in enumerate(zip(batch["row"].tolist(), batch["pattern"].tolist(), strict=True)):
            whole = words(PATTERNS[pattern].format(text=table["text"][row], mask="[MASK]"))["input_ids"]
            real = batch["attention_mask"][i].bool()
            assert batch["input_ids"][i][real].tolist() == whole
            assert batch["mask_positions"][i].tolist() == (batch["input_ids"][i] == words.mask_token_id).long().tolist()
            assert batch["labels"][i] == data.labels.index(table["label"][row])
            seen.append((row, pattern))
    assert sorted(seen) == [(row, pattern) for row in range(11) for pattern in (0, 1)]
    assert data.labels == ["neg", "pos"]


def test_evaluation_takes_all_windows_of_a_row_together(folder: Any) -> None:
    data = make(folder("bert"), rows(12), rows(7), predict=rows(5), id="name", demonstrations=1, demonstration_draws=3)
    data.setup()
    batches = list(data.val_dataloader())
    assert sorted(row for batch in batches for row in batch["row"].tolist()) == list(range(7))
    for batch in batches:
        count = len(batch["row"])
        assert batch["pattern"].tolist() == [0, 1] * 3 * count
        assert batch["example"].tolist() == [row for row in range(count) for _ in range(6)]
        assert batch["input_ids"].shape == batch["mask_positions"].shape == (6 * count, batch["input_ids"].shape[1])
        assert batch["mask_positions"].sum(1).tolist() == [1] * 6 * count
        assert (batch["input_ids"][batch["mask_positions"].bool()] == data.tokenizer.mask_token_id).all()
        assert batch["labels"].shape == (6 * count,)
    predicted = list(data.predict_dataloader())
    assert "labels" not in predicted[0]
    assert [name for batch in predicted for name in batch["id"]] == [f"r{i}" for i in range(5)]
    report = data.describe()
    assert [row["truncated"] for row in report.rows] == [0, 0, 0]
    assert "it was {mask}" in str(report)
    facts = report.to_dict()["facts"]
    assert facts["labels"] == {"neg": 4, "pos": 8}
    assert facts["model"] == "masked"


def test_prediction_needs_neither_labels_nor_training_rows(folder: Any) -> None:
    data = make(folder("bert"), predict=rows(3).remove_columns("label"))
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert batch["row"].tolist() == [0, 1, 2]


def test_decoders_end_in_the_gap_on_either_side_of_padding(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows(9)
    for side in ("left", "right"):
        data = make(
            folder("gpt2"),
            val=table,
            patterns=["{text} it was {mask}", "is {text} : {mask}"],
            verbalizer=two_words(folder("gpt2")),
        )
        monkeypatch.setattr(type(data.tokenizer), "padding_side", side)
        data.setup("validate")
        for batch in data.val_dataloader():
            for i, pattern in enumerate(batch["pattern"].tolist()):
                real = batch["attention_mask"][i].bool()
                text = table["text"][int(batch["row"][batch["example"][i]])]
                assert data.tokenizer.decode(batch["input_ids"][i][real]) == (f"{text} it was", f"is {text} :")[pattern]
                assert batch["mask_positions"][i][real].tolist() == [0] * (int(real.sum()) - 1) + [1]
                assert batch["mask_positions"][i].sum() == 1


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_demonstrations(folder: Any, kind: Kind) -> None:
    words = WORDS if kind == "bert" else two_words(folder("gpt2"))
    pattern = "{text} it was {mask}"
    table = Dataset.from_dict({"text": [f"{TEXTS[i]} film" for i in range(12)], "label": ["neg", "pos"] * 6})
    data = make(folder(kind), table, table, patterns=pattern, verbalizer=words, demonstrations=2, demonstration_draws=3)
    data.setup("fit")
    first = [words[name] if isinstance(words[name], str) else words[name][0] for name in ("neg", "pos")]
    shown_as = {
        data.tokenizer.decode(data.tokenizer(f"{text} it was {first[i % 2]}", add_special_tokens=False)["input_ids"]): i
        for i, text in enumerate(table["text"])
    }

    def read(ids: torch.Tensor) -> tuple[str, list[int]]:
        text = data.tokenizer.decode(ids)
        if kind == "gpt2":
            *shown, query = text.replace("<|endoftext|>", "").split("\n\n")
        else:
            query, *shown = [part.strip() for part in text.replace("[CLS] ", "").split("[SEP]")[:5]]
        return query, [shown_as[part] for part in shown]

    loader, epochs = data.train_dataloader(), []
    for epoch in (0, 1, 1):
        loader.sampler.set_epoch(epoch)
        sets = {}
        for batch in loader:
            for row, ids, gap in zip(batch["row"].tolist(), batch["input_ids"], batch["mask_positions"], strict=True):
                query, shown = read(ids)
                assert query.startswith(f"{table['text'][row]} it was")
                assert row not in shown
                assert sorted(number % 2 for number in shown) == [0, 0, 1, 1]
                assert len(set(shown)) == 4
                mask = data.tokenizer.mask_token_id
                assert gap.sum() == 1
                assert ids[gap.bool()].item() == (mask if kind == "bert" else data.tokenizer(" was")["input_ids"][0])
                sets[row] = shown
        epochs.append(sets)
    assert epochs[0] != epochs[1] == epochs[2]
    assert len({tuple(shown) for shown in epochs[0].values()}) > 8

    draws = [read(ids)[1] for batch in data.val_dataloader() for ids in batch["input_ids"]]
    assert draws == draws[:3] * 12, "all rows are shown the same sets"
    assert len({tuple(shown) for shown in draws}) == 3


def test_workers_draw_what_this_process_draws(folder: Any) -> None:
    seen = []
    for workers in (0, 1):
        data = make(folder("bert"), rows(12), demonstrations=1, unlabelled=rows(9), num_workers=workers)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.trainer = None
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            seen.append([(b["input_ids"].tolist(), b["unlabelled"]["input_ids"].tolist()) for b in loader])
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_long_demonstrations_leave_room_for_the_row(folder: Any) -> None:
    long = Dataset.from_dict({"text": [" ".join(TEXTS * 3)] * 8, "label": ["neg", "pos"] * 4})
    data = make(folder("bert"), long, long, patterns=PATTERNS[0], demonstrations=1, max_length=50)
    data.setup("fit")
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        assert batch["input_ids"].shape[1] == 50
        for ids in batch["input_ids"]:
            query, *shown = data.tokenizer.decode(ids).split("[SEP]")[:3]
            assert query.endswith("it was [MASK]. ")
            assert sorted(part.strip().rsplit(" ", 1)[-1] for part in shown) == ["great.", "terrible."]


def test_content_free_inputs(folder: Any) -> None:
    data = make(folder("bert"), rows(8), rows(4), calibrate=True, demonstrations=1, demonstration_draws=2)
    data.setup("fit")
    assert "content_free" not in next(iter(data.train_dataloader()))
    [batch] = data.val_dataloader()
    free = batch["content_free"]
    assert free["pattern"].tolist() == [0, 1] * 6
    texts = [data.tokenizer.decode(ids, skip_special_tokens=False) for ids in free["input_ids"]]
    contexts = [
        data.tokenizer.decode(ids).split("[SEP]", 1)[1].replace("[PAD]", "").split() for ids in batch["input_ids"][:4]
    ]
    queries = [
        "N / A it was [MASK].",
        "[MASK] : N / A",
        "it was [MASK].",
        "[MASK] :",
        "[MASK] it was [MASK].",
        "[MASK] : [MASK]",
    ]
    for number, text in enumerate(texts):
        query, rest = text.removeprefix("[CLS] ").split("[SEP]", 1)
        assert rest.replace("[PAD]", "").split() == contexts[number % 4]
        expected = queries[2 * (number // 4) + number % 2].replace("N / A", "[UNK] / A")
        assert (
            query.replace("/", "[UNK]").split()
            == data.tokenizer.decode(
                data.tokenizer(expected.replace("[UNK] / A", "N/A"), add_special_tokens=False)["input_ids"]
            )
            .replace("/", "[UNK]")
            .split()
        )
    assert free["mask_positions"].sum(1).tolist() == [1] * 12


def test_masks_are_bert_s(minilm: str, real_data: Path) -> None:
    words = hf.AutoTokenizer.from_pretrained(minilm)
    source = str(real_data / "sst2" / "dev.jsonl")
    data = ClozeData(
        minilm,
        source,
        patterns="{text} It was {mask}.",
        verbalizer={"0": "terrible", "1": "great"},
        unlabelled=source,
        batch_size=400,
    )
    data.setup("fit")
    loader, drawn = data.train_dataloader(), []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        drawn.append([batch["unlabelled"] for batch in loader])
    again = [batch["unlabelled"] for batch in loader]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(drawn[1], again, strict=True))
    assert not any(torch.equal(a["input_ids"][0], b["input_ids"][0]) for a, b in zip(drawn[0], again, strict=True))
    ids, labels = (
        torch.cat([batch[name].flatten() for part in drawn for batch in part]) for name in ("input_ids", "labels")
    )
    chosen = labels != -100
    assert not torch.isin(labels[chosen], torch.tensor(words.all_special_ids)).any()
    mask, kept = ids[chosen] == words.mask_token_id, ids[chosen] == labels[chosen]
    real = (~torch.isin(ids, torch.tensor(words.all_special_ids))) | chosen
    assert chosen.sum() / real.sum() == pytest.approx(0.15, abs=0.01)
    assert mask.float().mean() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.unique(ids[chosen & (ids != labels)]).numel() > 200


def test_real_reviews_few_shot(minilm: str, real_data: Path) -> None:
    lines = [json.loads(line) for line in (real_data / "sst2" / "train.jsonl").read_text().splitlines()[:32]]
    data = ClozeData(
        minilm,
        Dataset.from_list(lines),
        str(real_data / "sst2" / "dev.jsonl"),
        patterns=["{text} It was {mask}.", "Just {mask}! {text}"],
        verbalizer={"0": ["terrible", "bad"], "1": ["great", "good"]},
        max_length=24,
        demonstrations=1,
        demonstration_draws=2,
        batch_size=8,
    )
    data.setup("fit")
    assert len(data.train_dataloader()) == 8
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape == (32, 24)
    train, val = data.describe().rows
    assert (train["rows"], val["rows"]) == (64, 872)
    assert 0 < train["truncated"] < val["truncated"] < 1


def test_the_tokenizer_is_asked_once(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    calls: list[int] = []
    from lightning_ft.data import cloze

    encode = cloze.cloze_windows
    monkeypatch.setattr(cloze, "cloze_windows", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
    counts = []
    for options in (
        {},
        {},
        {"max_length": 64},
        {"patterns": PATTERNS[::-1]},
        {"demonstrations": 1},
        {"demonstrations": 1},
    ):
        calls.clear()
        make(folder("bert"), rows(9), rows(4), **options).setup("fit")
        counts.append(len(calls))
    assert counts[0] > 0
    assert counts[1] == 0
    assert counts[2] == counts[3] == counts[0]
    assert counts[4] > counts[5] == 0


def test_a_validation_part_shows_training_rows_only(folder: Any) -> None:
    table = Dataset.from_dict(
        {"text": [f"{word} film" for word in sorted(set(TEXTS))[:20]], "label": ["neg", "pos"] * 10}
    )
    data = make(
        folder("bert"), table, patterns="{text} : {mask}", val_fraction=0.25, demonstrations=1, demonstration_draws=9
    )
    data.setup("fit")
    held = set(data.part("val").tolist())
    assert {row for batch in data.val_dataloader() for row in batch["row"].tolist()} == held
    assert {row for batch in data.train_dataloader() for row in batch["row"].tolist()} == set(range(20)) - held
    texts = {
        data.tokenizer.decode(data.tokenizer(table["text"][row], add_special_tokens=False)["input_ids"]) for row in held
    }
    shown = [
        part
        for b in data.val_dataloader()
        for ids in b["input_ids"]
        for part in data.tokenizer.decode(ids).split("[SEP]")[1:3]
    ]
    assert len(texts) == len(held) == 5
    assert not texts & {part.split(" :")[0].strip() for part in shown}


def write(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": "{text} It was"}, r"has no \{mask\}"),
        ({"patterns": "{label} {mask}"}, "label='label' is a column that a pattern shows"),
        ({"verbalizer": {"a": "great", "b": "great"}}, "gives 'great' twice"),
        ({"demonstrations": -1}, "demonstrations must be 0 or more"),
        ({"demonstration_draws": 0}, "demonstration_draws 1 or more"),
        ({"demonstrations": 1}, r"demonstrations=1 are rows of train: give train="),
        ({"val_fraction": 0.5, "val": "x.csv", "train": "y.csv"}, "val_fraction splits train where there is no val"),
    ],
)
def test_contradicting_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("-", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": "{body} it was {mask}"}, r"train \(the given Dataset\) has no column 'body'; there are: 'text'"),
        (
            {"verbalizer": {"neg": "bad", "other": "great"}},
            r"row 1 \(from 0\): the verbalizer gives no word for the label 'pos'",
        ),
        ({"verbalizer": {"neg": "badland", "pos": "great"}}, r"'badland' is \d tokens"),
        ({"patterns": "{text} {mask} {mask}"}, "has 2 masks, and no word of the verbalizer takes more than 1"),
        ({"max_length": 6}, "makes 4 tokens beside the texts, and max_length leaves 4"),
        ({"max_length": 30, "demonstrations": 3}, "makes 4 tokens beside the texts, and max_length leaves 4"),
        ({"demonstrations": 4}, r"needs 5 training rows or more of each label .*'neg' has 4"),
        ({"decoder": True}, r"end the pattern with one \{mask\}"),
        ({"decoder": True, "patterns": "{text} {mask}", "unlabelled": rows(3)}, "leave unlabelled out"),
    ],
)
def test_faulty_data_and_words(folder: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(folder("bert"), rows(12), **options).setup("fit")


def test_faulty_decoder_prompts(folder: Any) -> None:
    words = two_words(folder("gpt2"))
    nothing = Dataset.from_dict({"text": ["film", ""], "label": ["neg", "pos"]})
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): nothing stands before \{mask\} for a decoder"):
        make(folder("gpt2"), nothing, patterns="{text} {mask}", verbalizer=words).setup("fit")
    data = make(folder("gpt2"), val=rows(3), patterns="{text} {mask}", verbalizer=words, calibrate=True)
    with pytest.raises(ValueError, match="calibrate shows the model an empty text"):
        data.setup("validate")
    with pytest.raises(ValueError, match=r"end the pattern with one \{mask\}"):
        make(folder("gpt2"), rows(3), verbalizer=words).setup("fit")


def test_faulty_files(folder: Any, tmp_path: Path) -> None:
    good = {"text": "film", "label": "neg"}
    null = write(tmp_path / "null.jsonl", good, {"text": None, "label": "pos"})
    number = write(tmp_path / "number.jsonl", {"text": 3, "label": "pos"})
    unlabelled = write(tmp_path / "label.jsonl", good, {"text": "film", "label": None})
    empty = write(tmp_path / "empty.jsonl")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "caf\xe9", "label": "neg"}\n')
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "film", "label": "neg"}\n' * 500)[:-12])
    for path, kind, message in (
        (null, ValueError, r"null\.jsonl, line 2: column 'text' is null"),
        (number, TypeError, r"number\.jsonl, line 1: column 'text' must hold text, got 3"),
        (unlabelled, ValueError, r"label\.jsonl, line 2: column 'label' holds None: every row needs a label"),
        (empty, ValueError, r"empty\.jsonl has no rows"),
        (str(latin), ValueError, r"latin\.jsonl, line 1: not UTF-8"),
        (str(cut), ValueError, r"cut\.jsonl\.gz: damaged after line"),
    ):
        with pytest.raises(kind, match=message):
            make(folder("bert"), path).setup("fit")
