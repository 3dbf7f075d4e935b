"""Streams: the tokens of the table, each once over processes and workers; exact resume; faults with their place."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from lightning.pytorch import Callback, Trainer

from lightning_ft.callbacks import ExactResume
from lightning_ft.data.language_modeling import LanguageModelingData
from lightning_ft.data.streaming import StreamedBatches, StreamLoader, open_stream
from lightning_ft.modules.checkpoint import Architecture
from lightning_ft.modules.masked_lm import MaskedLM
from tests.data.test_language_modeling_data import Record, fit, texts
from tests.pretrained import config, tokenizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer."""
    path = tmp_path_factory.mktemp("bert")
    tokenizer("bert").save_pretrained(path)
    return str(path)


def lines(count: int) -> bytes:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts(count))).encode()


@pytest.fixture
def files(tmp_path: Path) -> str:
    """A pattern that names four files."""
    for number in range(4):
        (tmp_path / f"part{number}.jsonl.gz").write_bytes(gzip.compress(lines(30 + number)))
    return str(tmp_path / "part*.jsonl.gz")


def stream(folder: str, source: Any, **options: Any) -> LanguageModelingData:
    settings = {"streaming": True, "max_length": 16, "batch_size": 4, "shuffle_buffer": 50} | options
    return LanguageModelingData(folder, source, **settings)


def batches(data: LanguageModelingData, rank: int = 0, world: int = 1) -> StreamedBatches:
    """What one process reads."""
    loader = data.train_dataloader()
    assert isinstance(loader, StreamLoader)
    found = loader.stream
    found.rank, found.num_replicas = rank, world
    return found


def first_turn(found: StreamedBatches) -> list[dict[str, Any]]:
    """The batches before the texts come again."""
    seen: list[dict[str, Any]] = []
    for batch in found:
        if {row for part in seen for row in part["row"].tolist()} & set(batch["row"].tolist()):
            break
        seen.append(batch)
    return seen


def tokens(found: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """The rows' tokens as they were before masking, sorted."""
    return sorted(
        tuple(torch.where(labels == -100, ids, labels)[real == 1].tolist())
        for batch in found
        for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    )


@pytest.mark.parametrize("rows", ["documents", "chunks"])
def test_a_stream_has_the_rows_of_the_table(bert: str, rows: Any) -> None:
    train = Dataset.from_dict({"text": texts(230)})
    whole = LanguageModelingData(bert, train, rows=rows, max_length=16)
    whole.setup("fit")
    expected = tokens(list(whole.train_dataloader()))
    assert tokens(first_turn(batches(stream(bert, train, rows=rows, shuffle_buffer=1)))) == expected
    shuffled = first_turn(batches(stream(bert, train, rows=rows)))
    if rows == "documents":
        assert tokens(shuffled) == expected
    else:  # other chunks of the same tokens
        assert sum(map(len, tokens(shuffled))) == sum(map(len, expected))
    assert sorted(row for batch in shuffled for row in batch["row"].tolist()) == list(range(len(expected)))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_texts(bert: str, files: str, world: int) -> None:
    one = tokens(first_turn(batches(stream(bert, files, rows="documents"))))
    parts = [first_turn(batches(stream(bert, files, rows="documents"), rank, world)) for rank in range(world)]
    assert sorted(row for part in parts for row in tokens(part)) == one
    keys = [row for part in parts for batch in part for row in batch["row"].tolist()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_texts(bert: str, files: str, workers: int) -> None:
    one = tokens(first_turn(batches(stream(bert, files, rows="documents"))))
    loader = stream(bert, files, rows="documents", num_workers=workers).train_dataloader()
    seen: dict[int, tuple[int, ...]] = {}
    for batch in itertools.islice(loader, 400):
        for key, row in zip(batch["row"].tolist(), tokens_of(batch), strict=True):
            seen.setdefault(key, row)
        if len(seen) == len(one):
            break
    assert sorted(seen.values()) == one


def tokens_of(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    return [tokens([{name: values[[i]] for name, values in batch.items()}])[0] for i in range(len(batch["row"]))]


def test_turns_and_epochs_and_seeds_differ_and_repeat(bert: str, files: str) -> None:
    def draw(count: int, epoch: int = 0, **options: Any) -> list[Any]:
        found = batches(stream(bert, files, **options))
        found.epoch = epoch
        return [batch["input_ids"].tolist() for batch in itertools.islice(found, count)]

    turn = len(first_turn(batches(stream(bert, files))))
    twice = draw(2 * turn)
    assert twice[:turn] != twice[turn:]
    assert draw(turn) == twice[:turn]
    assert draw(3, epoch=1) != twice[:3]
    assert draw(3, seed=1) != twice[:3]


def test_bucketing_pads_less(bert: str, files: str) -> None:
    def padding(bucket: bool) -> float:
        found = first_turn(batches(stream(bert, files, rows="documents", max_length=64, bucket=bucket)))
        real = sum(int(batch["attention_mask"].sum()) for batch in found)
        return sum(batch["attention_mask"].numel() for batch in found) / real - 1

    assert padding(True) < 0.1 < 0.3 < padding(False)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_fit_resumes_at_its_batch(bert: str, files: str, tmp_path: Path, workers: int) -> None:
    class Save(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Record, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == self.at:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                module.start = len(module.train_rows)

    def data(**options: Any) -> LanguageModelingData:
        val = Dataset.from_dict({"text": texts(9)})
        return stream(bert, files, val=val, num_workers=workers, **options)

    for options in ({"max_epochs": None, "val_check_interval": 7}, {"limit_train_batches": 9, "max_epochs": 4}):
        save = Save()
        save.at = 23  # of the second epoch, where there are some
        settings = {"max_steps": 30, **options}
        whole = fit(data(), save, **settings)
        assert len(whole.val_rows) > 0
        resumed = fit(data(), ckpt_path=tmp_path / "a.ckpt", **settings)
        assert resumed.train_rows == whole.train_rows[whole.start :]
        assert len(resumed.train_rows) > 0
    with pytest.raises(
        ValueError, match=r"of a stream with other settings; saved and present: {'batch_size': \(4, 5\)"
    ):
        fit(data(batch_size=5), ckpt_path=tmp_path / "a.ckpt", **settings)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_head_on_a_stream_resumes_bit_by_bit(bert: str, files: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if args[-1] == 12:
                raise KeyboardInterrupt

    words = AutoTokenizer.from_pretrained(bert)

    def run(folder: str, *callbacks: Callback, resume: bool = False) -> MaskedLM:
        model = MaskedLM(Architecture(config("bert", vocab_size=len(words)), words), learning_rate=1e-2)
        saver = ExactResume("1 steps", dirpath=tmp_path / folder)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        runner = Trainer(
            accelerator="cpu",
            max_steps=10,
            accumulate_grad_batches=2,
            enable_checkpointing=False,
            callbacks=[saver, *callbacks],
            **quiet,
        )
        data = stream(bert, files, rows="documents", whole_words=True)
        try:
            runner.fit(model, datamodule=data, ckpt_path=tmp_path / folder / "last.ckpt" if resume else None)
        except (KeyboardInterrupt, SystemExit):
            assert not resume
        else:
            assert runner.global_step == 10
        return model

    whole = run("whole")
    killed = run("killed", Stop())
    resumed = run("killed", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert any(not torch.equal(value, killed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 3}, r"neither has the training: set Trainer\(max_steps=\.\.\.\)"),
        ({"max_epochs": 2, "val_check_interval": 3}, r"neither has the training"),
        ({"max_steps": 9}, r"validation would never come: set Trainer\(val_check_interval=500\)"),
        ({"max_steps": 9, "overfit_batches": 2}, "needs rows that can be counted: set streaming=False"),
    ],
)
@pytest.mark.filterwarnings("ignore:The `overfit_batches`")
def test_trainers_under_which_a_stream_is_no_use_are_refused(
    bert: str, files: str, options: dict[str, Any], message: str
) -> None:
    model = MaskedLM(Architecture(config("bert")))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    runner = Trainer(accelerator="cpu", enable_checkpointing=False, num_sanity_val_steps=0, **quiet, **options)
    with pytest.raises(ValueError, match=message):
        runner.fit(model, datamodule=stream(bert, files, val=Dataset.from_dict({"text": texts(9)})))


def test_more_workers_than_parts_are_refused(bert: str, files: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_workers=5, but .*part\*\.jsonl\.gz has 4 part\(s\) for them to share"):
        stream(bert, files, num_workers=5).train_dataloader()
    # A table is cut into as many parts as there are workers.
    many = stream(bert, Dataset.from_dict({"text": texts(30)}), num_workers=2).train_dataloader()
    assert many.stream.shards == 2


def test_a_loader_without_trainer_does_not_know_its_place(bert: str, files: str) -> None:
    loader = stream(bert, files).train_dataloader()
    with pytest.raises(RuntimeError, match="does not know how far training is"):
        loader.state_dict()


def test_describe_says_that_train_is_streamed(bert: str, files: str) -> None:
    data = stream(bert, files, val=Dataset.from_dict({"text": texts(9)}))
    data.setup("fit")
    report = data.describe()
    assert (report.facts["train"], [row["split"] for row in report.rows]) == ("streamed", ["val"])
    alone = stream(bert, files)
    with pytest.raises(RuntimeError, match=r"before setup\(\): call it first"):
        alone.describe()
    alone.setup("fit")
    report = alone.describe()
    assert (report.facts["train"], report.rows) == ("streamed", [])
    assert "streamed" in str(report)


def test_kinds_of_sources(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = texts(12)
    (tmp_path / "a.csv").write_text('text,n\n"London, film",1\nNA,2\n"say ""a""",3\n')
    (tmp_path / "a.tsv").write_text('text\tn\n"London\t1\nNA\t2\n')
    Dataset.from_dict({"text": kept}).to_parquet(tmp_path / "a.parquet")
    assert [row["text"] for row in open_stream(str(tmp_path / "a.csv"), "text")] == ["London, film", "NA", 'say "a"']
    assert [row["text"] for row in open_stream(str(tmp_path / "a.tsv"), "text")] == ['"London', "NA"]
    assert [row["text"] for row in open_stream(str(tmp_path / "a.parquet"), "text")] == kept
    given = IterableDataset.from_generator(lambda: ({"text": text} for text in kept))
    assert open_stream(given, "text") is given
    calls = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kw: calls.append((args, kw)) or given)
    assert open_stream("hub://a/b@r1:c#train", "text") is given
    assert calls == [(("a/b", "c"), {"split": "train", "revision": "r1", "streaming": True})]


BAD: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"txt": "a"}\n', r"a\.jsonl, line 1 has no column 'text'; there are: 'txt'"),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"a\.jsonl, line 2: column 'text' holds None: give a text"),
    ("a.jsonl", b'{"text": 1}\n', r"cannot be read after 0 texts: .*a\.jsonl, line 1: column 'text' holds 1: give a"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\nnonsense\n', r"a\.jsonl, line 2: not JSON"),
    ("a.csv", b"text,n\na,1\nb\n", r"a\.csv, line 3: 1 fields, but the first line names 2"),
    ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl: process 0, worker 0 found no text in column 'text'"),
    ("a.jsonl", b"", r"a\.jsonl: process 0, worker 0 found no text in column 'text'"),
    ("a.jsonl.gz", gzip.compress(lines(3000))[:-60], r"a\.jsonl\.gz: damaged after line \d+"),
    ("a.parquet", b"PAR1 is not enough", r"parquet"),
    ("a.txt", b"a", r"a\.txt: cannot stream \.txt; it can be \.jsonl, \.csv, \.tsv, \.jsonl\.gz, .*, \.arrow"),
    ("a.parquet.gz", b"a", r"a\.parquet\.gz: cannot stream \.parquet\.gz; it can be"),
    ("a", b"a", r"a: cannot stream a file without an ending"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_faulty_streams_are_named(bert: str, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        first_turn(batches(stream(bert, str(tmp_path / name), shuffle_buffer=1)))


def test_files_of_different_kinds_are_refused(bert: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(3))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(3)))
    pattern = str(tmp_path / "*")
    assert len(list(open_stream(pattern, "text"))) == 6  # packed or not
    Dataset.from_dict({"text": texts(3)}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"\* is files of different kinds, .*a\.jsonl \(\.jsonl\) and .*a\.parquet \("):
        open_stream(pattern, "text")


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_what_decides_the_batches_of_a_stream_is_refused_when_changed(bert: str, files: str, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Record, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    (tmp_path / "other.jsonl").write_bytes(lines(200))
    two = Dataset.from_dict({"text": texts(90), "other": texts(90)})
    options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 4}
    for source, changes in (
        (files, {"train": str(tmp_path / "other.jsonl")}),
        (files, {"max_length": 17}),
        (files, {"rows": "documents"}),
        (files, {"whole_words": True}),
        (two, {"text": "other"}),
    ):
        fit(stream(bert, source), Save(), **options)
        changed = {"train": source, **changes}
        with pytest.raises(ValueError, match="at batch 2 of a stream with other settings"):
            fit(stream(bert, changed.pop("train"), **changed), ckpt_path=tmp_path / "a.ckpt", **options)
        fit(stream(bert, source), ckpt_path=tmp_path / "a.ckpt", **options)


def test_what_is_no_stream_is_refused(bert: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl does not exist"):
        open_stream(str(tmp_path / "gone.jsonl"), "text")
    with pytest.raises(
        TypeError, match=r"must be a path, a hub:// address, a datasets\.IterableDataset.*got dict: choose"
    ):
        open_stream({"train": 1}, "text")  # type: ignore[arg-type]
    given = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(TypeError, match=r"train is a stream \(IterableDataset\): set streaming=True"):
        LanguageModelingData(bert, given).setup("fit")
