"""Data for language modelling: every token once, frames and separators, masks that survive everything, bad inputs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ft.core.special_tokens import around
from lightning_ft.data.chunks import RowCutter
from lightning_ft.data.language_modeling import LanguageModelingData
from tests.pretrained import CORPUS, Kind, tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tokenizers."""
    paths: dict[str, str] = {}
    kinds: tuple[Kind, ...] = ("bert", "roberta", "gpt2")
    for kind in kinds:
        paths[kind] = str(tmp_path_factory.mktemp(kind))
        tokenizer(kind).save_pretrained(paths[kind])
    return paths


def texts(count: int) -> list[str]:
    return [" ".join((CORPUS[i % 5] + " " + CORPUS[i * 3 % 5]).split()[: i * 7 % 23]) for i in range(count)]


def rows_of(data: LanguageModelingData, split: str) -> list[dict[str, Any]]:
    """The rows of a split in order, without padding; ids as they were before masking."""
    rows = data.encode(split)
    found = []
    for position in range(len(rows)):
        batch = rows[[position]]
        assert batch["attention_mask"].all()
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        found.append({"ids": torch.where(labels == -100, ids, labels).tolist(), "row": int(batch["row"][0])})
    return found


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("count", [3, 1003])
def test_mlm_chunks_hold_every_token_once(folders: dict[str, str], kind: str, count: int) -> None:
    words = hf.AutoTokenizer.from_pretrained(folders[kind])
    data = LanguageModelingData(folders[kind], Dataset.from_dict({"text": texts(count)}), max_length=20)
    rows = rows_of(data, "train")
    begin, end = words.cls_token_id, words.sep_token_id
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert all((row["ids"][0], row["ids"][-1]) == (begin, end) for row in rows)
    assert all(len(row["ids"]) == 20 for row in rows[:-1])
    assert len(rows[-1]["ids"]) <= 20
    documents = [words(text, add_special_tokens=False)["input_ids"] for text in texts(count) if text]
    joined = [token for ids in documents for token in [end, *ids]][1:]
    assert [token for row in rows for token in row["ids"][1:-1]] == joined


def test_clm_chunks_end_each_document(folders: dict[str, str]) -> None:
    words = hf.AutoTokenizer.from_pretrained(folders["gpt2"])
    data = LanguageModelingData(
        folders["gpt2"], Dataset.from_dict({"text": texts(50)}), objective="clm", max_length=16, batch_size=4
    )
    rows = rows_of(data, "train")
    documents = [[*words(text)["input_ids"], words.eos_token_id] for text in texts(50) if text]
    assert [token for row in rows for token in row["ids"]] == [token for ids in documents for token in ids]
    assert {len(row["ids"]) for row in rows[:-1]} == {16}
    # The ends are labels although the same token pads.
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(int((batch["labels"] == words.eos_token_id).sum()) for batch in batches) == len(documents)
    for batch in batches:
        assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)


def test_documents_are_not_joined_and_go_on_in_further_rows(folders: dict[str, str]) -> None:
    words = hf.AutoTokenizer.from_pretrained(folders["bert"])
    train = Dataset.from_dict({"text": texts(40)})
    rows = rows_of(LanguageModelingData(folders["bert"], train, rows="documents", max_length=9), "train")
    expected = []
    for number, text in enumerate(texts(40)):
        ids = words(text, add_special_tokens=False)["input_ids"]
        expected += [
            {"ids": [words.cls_token_id, *ids[at : at + 7], words.sep_token_id], "row": number}
            for at in range(0, len(ids), 7)
        ]
    assert rows == expected
    rows = rows_of(
        LanguageModelingData(folders["gpt2"], train, objective="clm", rows="documents", max_length=9), "train"
    )
    words = hf.AutoTokenizer.from_pretrained(folders["gpt2"])
    for number, text in enumerate(texts(40)):
        joined = [token for row in rows if row["row"] == number for token in row["ids"]]
        assert joined == ([*words(text)["input_ids"], words.eos_token_id] if text else [])


def test_a_tokenizer_that_begins_texts_begins_documents(folders: dict[str, str], tmp_path: Path) -> None:
    from tokenizers import processors

    words = tokenizer("llama")
    words.add_special_tokens({"bos_token": "<bos>"})
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.bos_token_id)]
    )
    words.save_pretrained(tmp_path)
    assert around(words) == ([words.bos_token_id], [])
    train = Dataset.from_dict({"text": ["the film", "a story"]})
    data = LanguageModelingData(str(tmp_path), train, predict=train, objective="clm", max_length=64)
    [row] = rows_of(data, "train")
    assert row["ids"] == [
        token
        for text in train["text"]
        for token in [words.bos_token_id, *words(text, add_special_tokens=False)["input_ids"], words.eos_token_id]
    ]
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert batch["input_ids"][batch["attention_mask"].cumsum(1) == 1].tolist() == [words.bos_token_id] * 2


def test_words_are_the_tokenizers_with_punctuation_apart() -> None:
    kinds: tuple[Kind, ...] = ("bert", "roberta")
    for kind in kinds:
        known = tokenizer(kind)
        cutter = RowCutter(known, "mlm", "documents", 64, words=True)
        table = cutter(["Anna doesn't know Straße, London; terrible film..."], [4], last=True)
        [ids], [starts] = table["input_ids"].to_pylist(), table["word_start"].to_pylist()
        assert (len(ids), table["row"].to_pylist()) == (len(starts), [4])
        spoken: list[str] = []
        for piece, begins in zip(known.convert_ids_to_tokens(ids), starts, strict=True):
            spoken = [*spoken, piece] if begins else [*spoken[:-1], spoken[-1] + piece.removeprefix("##")]
        plain = [word.removeprefix("Ġ") for word in spoken[1:-1]]
        for word in ("Anna", "London", ",", ";", "terrible", "film"):
            assert word in plain, (kind, plain)
    # SentencePiece's words are what stands between spaces: punctuation glued to them is taken off.
    t5 = tokenizer("t5")
    cutter = RowCutter(t5, "mlm", "documents", 64, words=True)
    table = cutter(["London, film."], [0], last=True)
    [ids], [starts] = table["input_ids"].to_pylist(), table["word_start"].to_pylist()
    for token, begins in zip(t5.convert_ids_to_tokens(ids), starts, strict=True):
        assert begins or token not in ",."
    assert sum(starts) >= 5


def test_whole_words_reach_the_masks(folders: dict[str, str]) -> None:
    train = Dataset.from_dict({"text": ["Smith dermatological Straße Smith " * 8] * 40})
    data = LanguageModelingData(folders["bert"], train, rows="documents", whole_words=True, max_length=512)
    words = hf.AutoTokenizer.from_pretrained(folders["bert"])
    word = torch.tensor([-1 if w is None else w for w in words(train["text"][0]).word_ids()])
    data.setup("fit")
    broken = 0
    for batch in data.train_dataloader():
        assert "word_start" not in batch
        for chosen in (batch["labels"] != -100)[:, 1:-1]:
            inside = word[1:-1][1:] == word[1:-1][:-1]
            broken += int((chosen[1:] != chosen[:-1])[inside].sum())
    assert broken == 0


class Record(LightningModule):
    """Keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_rows: list[Any] = []
        self.val_rows: list[Any] = []

    def keep(self, batch: dict[str, torch.Tensor], to: list[Any]) -> torch.Tensor:
        for index, row in enumerate(batch["row"].tolist()):
            real = batch["attention_mask"][index] == 1
            to.append((row, batch["input_ids"][index][real].tolist(), batch["labels"][index][real].tolist()))
        return self.weight * batch["input_ids"].float().mean()

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.keep(batch, self.train_rows)

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.keep(batch, self.val_rows)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: LanguageModelingData, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> Record:
    model = Record()
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False} | options
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **settings).fit(
        model, datamodule=data, ckpt_path=ckpt_path
    )
    return model


def test_masks_are_the_same_for_any_batch_size_and_worker_and_resume(folders: dict[str, str], tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Record, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 2):
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                module.start = len(module.train_rows)

    def data(**options: Any) -> LanguageModelingData:
        settings = {"batch_size": 4, "max_length": 16, **options}
        train, val = (Dataset.from_dict({"text": texts(n)}) for n in (40, 9))
        return LanguageModelingData(folders["bert"], train, val, **settings)

    whole = fit(data(), Save())
    half = len(whole.train_rows) // 2
    epochs = [sorted(whole.train_rows[:half]), sorted(whole.train_rows[half:])]
    assert [row for row, *_ in epochs[0]] == [row for row, *_ in epochs[1]] == list(range(half))
    assert sum(a == b for a, b in zip(*epochs, strict=True)) < half / 4, "masks are not drawn anew"
    third = len(whole.val_rows) // 2
    assert whole.val_rows[:third] == whole.val_rows[third:]

    for options in (
        {"batch_size": 7},
        {"bucket": False, "batch_size": 5},
        {"num_workers": 2},
        {"pad_to_multiple_of": 8},
    ):
        other = fit(data(**options))
        assert [sorted(other.train_rows[:half]), sorted(other.train_rows[half:])] == epochs
        assert sorted(other.val_rows) == sorted(whole.val_rows)
    for workers in (0, 2):
        resumed = fit(data(num_workers=workers), ckpt_path=tmp_path / "a.ckpt")
        assert resumed.train_rows == whole.train_rows[whole.start :]
    assert sorted(fit(data(seed=1)).train_rows[:half]) != epochs[0]


def test_val_fraction_divides_the_texts(folders: dict[str, str]) -> None:
    train = Dataset.from_dict({"text": texts(30)})
    data = LanguageModelingData(folders["bert"], train, val_fraction=0.25, rows="documents", max_length=64)
    numbers = {split: {row["row"] for row in rows_of(data, split)} for split in ("train", "val")}
    full = {number for number, text in enumerate(texts(30)) if text}
    assert numbers["train"] | numbers["val"] == full
    assert not numbers["train"] & numbers["val"]
    # Chunks hold the documents of their part, in order, and no others.
    words = hf.AutoTokenizer.from_pretrained(folders["bert"])
    chunked = LanguageModelingData(folders["bert"], train, val_fraction=0.25, max_length=16)
    for split in ("train", "val"):
        documents = [
            words(texts(30)[number], add_special_tokens=False)["input_ids"] for number in sorted(numbers[split])
        ]
        joined = [token for ids in documents for token in [words.sep_token_id, *ids]][1:]
        assert [token for row in rows_of(chunked, split) for token in row["ids"][1:-1]] == joined


def test_prompts(folders: dict[str, str]) -> None:
    prompts = Dataset.from_dict({"text": ["the film is [MASK] . " + "dull " * 40, "[MASK]"], "name": ["a", "b"]})
    data = LanguageModelingData(folders["bert"], predict=prompts, max_length=12, id="name")
    data.setup("predict")
    [batch] = data.predict_dataloader()
    mask = hf.AutoTokenizer.from_pretrained(folders["bert"]).mask_token_id
    assert batch["input_ids"].shape == (2, 12)
    assert (batch["input_ids"] == mask).sum(1).tolist() == [1, 1]
    assert (batch["id"], "labels" in batch) == (["a", "b"], False)
    assert data.describe().rows[0]["truncated"] == 0.5
    data = LanguageModelingData(
        folders["gpt2"], predict=Dataset.from_dict({"text": ["the film is", "a"]}), objective="clm", max_length=12
    )
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["attention_mask"][1].sum() == 1


def test_tokens_are_found_again_unless_something_changed(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    calls = []
    call = RowCutter.__call__
    monkeypatch.setattr(RowCutter, "__call__", lambda *args, **kw: calls.append(1) or call(*args, **kw))

    def build(kind: str = "bert", **options: Any) -> int:
        calls.clear()
        LanguageModelingData(folders[kind], Dataset.from_dict({"text": texts(9)}), **options).setup("fit")
        return len(calls)

    assert (build(), build(), build(seed=3, batch_size=2, mask_probability=0.3)) == (1, 0, 0)
    assert (build(max_length=30), build(rows="documents"), build(whole_words=True), build("roberta")) == (1, 1, 1, 1)
    assert (build("gpt2", objective="clm"), build("gpt2", objective="clm")) == (1, 0)


def test_real_texts(minilm: str, real_data: Path) -> None:
    for name in ("imdb_unlabelled", "wikitext2", "biomed_unlabelled"):
        path = str(real_data / name / "dev.jsonl")
        data = LanguageModelingData(minilm, val=Dataset.from_json(path).select(range(20)), max_length=128)
        data.setup("validate")
        chosen = words = 0
        for batch in data.val_dataloader():
            chosen += int((batch["labels"] != -100).sum())
            words += int(batch["attention_mask"].sum())
        assert abs(chosen / words - 0.15) < 0.02, name
        assert data.describe().rows[0]["padding"] < 0.05


def test_describe(folders: dict[str, str]) -> None:
    data = LanguageModelingData(folders["bert"], Dataset.from_dict({"text": texts(40)}), max_length=16)
    data.setup("fit")
    report = data.describe()
    assert (report.facts["objective"], report.facts["rows"]) == ("mlm", "chunks")
    assert report.rows[0]["max tokens"] == 16
    json.loads(report.to_json())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "span"}, r"objective must be one of \('mlm', 'clm'\), got 'span'"),
        ({"rows": "lines"}, r"rows must be one of \('chunks', 'documents'\), got 'lines'"),
        ({"mask_probability": 0.0}, "mask_probability=0.0 must lie between 0 and 1"),
        ({"mask_probability": 15}, "mask_probability=15 must lie between 0 and 1"),
        ({"mask_token_share": 0.95}, "they must be 0 or more, and 1 or less together"),
        ({"random_token_share": -0.1}, "they must be 0 or more, and 1 or less together"),
        ({"objective": "clm", "whole_words": True}, "objective='clm' masks nothing"),
        ({"shuffle_buffer": 0}, "shuffle_buffer=0 must be 1"),
        ({"streaming": True}, r"give train, and val in place of val_fraction"),
        ({"streaming": True, "train": "a.jsonl", "val_fraction": 0.1}, r"give train, and val in place of val_fraction"),
    ],
)
def test_contradicting_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelingData("-", **options)


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("bert", {"txt": ["a"]}, {}, "has no column 'text'"),
    ("bert", {"text": ["a", None]}, {}, r"row 1 \(from 0\): column 'text' is null"),
    ("bert", {"text": [1, 2]}, {}, "column 'text' must hold text, got 1"),
    ("bert", {"text": ["", ""]}, {}, "column 'text' holds only empty texts"),
    ("bert", {"text": ["", ""]}, {"rows": "documents"}, "column 'text' holds only empty texts"),
    ("bert", {"text": ["a"]}, {"max_length": 2}, "max_length=2 leaves no room for text beside 2 special tokens"),
    ("gpt2", {"text": ["a"]}, {"max_length": 1, "objective": "clm"}, "max_length=1 leaves no room for text"),
    ("gpt2", {"text": ["a"]}, {}, "has no mask token, which objective='mlm' needs"),
    ("bert", {"text": ["a"]}, {"objective": "clm"}, "has no end-of-sequence token, which objective='clm' puts between"),
    ("bert", b"", {}, r"bad\.jsonl has no rows"),
    ("bert", b'{"text": "a"}\n{"text": "\xff"}\n', {}, r"bad\.jsonl, line 2: not UTF-8"),
    ("bert", b'{"text": "a"}\n[1]\n', {}, r"bad\.jsonl, line 2: must be a JSON object"),
    ("bert", gzip.compress(b'{"text": "a film"}\n' * 3000)[:-40], {}, r"bad\.jsonl\.gz: damaged after line"),
]


@pytest.mark.parametrize(("kind", "content", "options", "message"), BAD)
def test_faulty_texts_are_named(
    folders: dict[str, str], tmp_path: Path, kind: str, content: Any, options: dict[str, Any], message: str
) -> None:
    source: Any = content
    if isinstance(content, bytes):
        path = tmp_path / ("bad.jsonl.gz" if content[:2] == b"\x1f\x8b" else "bad.jsonl")
        path.write_bytes(content)
        source = str(path)
    else:
        source = Dataset.from_dict(content)
    with pytest.raises((ValueError, TypeError), match=message):
        LanguageModelingData(folders[kind], source, **options).setup("fit")


@pytest.mark.parametrize(
    ("kind", "text", "options", "message"),
    [
        ("bert", "dull " * 9 + "[MASK]", {}, r"row 1 \(from 0\): a mask token stands at token 9 \(from 0\), past max_"),
        ("gpt2", "dull " * 30, {"objective": "clm"}, r"row 1 \(from 0\): the text to continue has \d+ tokens; it must"),
        ("gpt2", "", {"objective": "clm"}, r"row 1 \(from 0\): the text to continue has 0 tokens"),
        ("bert", "a", {"max_length": 2}, "max_length=2 leaves no room for text"),
        ("gpt2", "a", {}, "has no mask token"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    folders: dict[str, str], kind: str, text: str, options: dict[str, Any], message: str
) -> None:
    predict = Dataset.from_dict({"text": ["a", text]})
    with pytest.raises(ValueError, match=message):
        LanguageModelingData(folders[kind], predict=predict, **{"max_length": 10, **options}).setup("predict")


def test_whole_words_of_a_slow_tokenizer_are_refused(tmp_path: Path) -> None:
    class Slow:
        is_fast, name_or_path = False, "here"

    with pytest.raises(ValueError, match=r"whole_words=True needs a fast tokenizer.*'here' is a Slow"):
        RowCutter(Slow(), "mlm", "chunks", 32, words=True)  # type: ignore[arg-type]
