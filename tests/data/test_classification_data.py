import ast
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ft.core.report import Report
from lightning_ft.data import ClassificationData, EncodedRows, Padding, ResumableDataLoader, tokenize
from lightning_ft.data.sources import Source

WORDS = ["the", "film", "is", "a", "dull", "but", "well", "made", "story", "about", "people", "who", "sing"]


def rows(count: int, **columns: list) -> Dataset:
    texts = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 8]) for i in range(count)]
    return Dataset.from_dict({"text": texts, "label": [f"{'no' if i % 3 else 'yes'}" for i in range(count)], **columns})


class Mean(LightningModule):
    """A model without a model: its loss is the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[int]] = {"train": [], "val": [], "test": []}

    def step(self, batch: dict[str, torch.Tensor], split: str) -> torch.Tensor:
        self.seen[split] += batch["row"].tolist()
        return self.weight * batch["input_ids"].float().mean()

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.step(batch, "val")

    def test_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.step(batch, "test")

    def predict_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert "labels" not in batch
        return batch["row"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    options = {"max_epochs": 1, "num_sanity_val_steps": 0} | kwargs
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **options,
    )


def test_batches_equal_the_tokenizers_own(minilm: str, real_data: Path) -> None:
    from transformers import AutoTokenizer

    path = real_data / "mrpc" / "dev.jsonl"
    data = ClassificationData(minilm, str(path), text="sentence1", text_pair="sentence2", max_length=40, batch_size=16)
    data.setup("fit")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    seen = []
    for batch in data.train_dataloader():
        pairs = [(lines[row]["sentence1"], lines[row]["sentence2"]) for row in batch["row"]]
        expected = tokenizer(pairs, truncation="longest_first", max_length=40, padding=True, return_tensors="pt")
        assert set(batch) == {*expected, "labels", "row"}
        for name, values in expected.items():
            torch.testing.assert_close(batch[name], values)
        assert batch["labels"].tolist() == [int(lines[row]["label"]) for row in batch["row"]]
        assert batch["labels"].dtype == batch["row"].dtype == torch.int64
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(len(lines)))


@pytest.mark.parametrize("left", [False, True])
def test_padding_side_and_multiple(left: bool) -> None:
    tokens = Dataset.from_dict({"input_ids": [[5, 6, 7], [8], []], "token_type_ids": [[1, 1, 0], [1], []]})
    batch = EncodedRows(tokens, Padding(9, token_type=3, left=left, multiple=4))[[1, 0]]
    turn = (lambda row: row[::-1]) if left else (lambda row: row)
    ids, types = ([8], [5, 6, 7]), ([1], [1, 1, 0])
    for name, values, fill in (
        ("input_ids", ids, 9),
        ("token_type_ids", types, 3),
        ("attention_mask", ([1], [1] * 3), 0),
    ):
        assert batch[name].tolist() == [turn(turn(list(row)) + [fill] * (4 - len(row))) for row in values]
    assert batch["row"].tolist() == [1, 0]


def test_a_tokenizer_without_pad_token_pads_with_its_end(minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"neither a pad token nor an end-of-sequence token: add a pad_token"):
        Padding.of(tokenizer)
    tokenizer.eos_token = "[SEP]"
    tokenizer.padding_side = "left"  # for generation; absolute positions count from the right side's first column
    assert Padding.of(tokenizer, 8) == Padding(102, 0, left=False, multiple=8)
    monkeypatch.setattr(type(tokenizer), "padding_side", "left", raising=False)  # trained on that side, as XLNet is
    assert Padding.of(tokenizer) == Padding(102, 0, left=True)


def test_tokens_are_found_again_on_the_disk(minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertTokenizer

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    calls, call = [], BertTokenizer.__call__
    monkeypatch.setattr(BertTokenizer, "__call__", lambda *args, **kwargs: calls.append(1) or call(*args, **kwargs))

    def build(val: int, stage: str = "fit", **kwargs: Any) -> tuple[list[Any], int]:
        calls.clear()
        data = ClassificationData(minilm, rows(50), rows(val, note=["x"] * val), **kwargs)
        data.setup(stage)
        return [batch["input_ids"].tolist() for batch in data.val_dataloader()], len(calls)

    first, again = build(20), build(20)
    assert (first[1], again[1]) == (2, 0)
    assert first[0] == again[0]
    assert build(20, "validate")[1] == 0
    assert build(21)[1] == 1
    assert build(20, max_length=4)[1] == 2
    assert build(20, "validate", text_pair="note", labels=["no", "yes"])[1] == 1


def test_labels_are_known_before_setup_and_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,10\nb,9\nc,10\n")
    data = ClassificationData("no/such/tokenizer", str(tmp_path / "train.csv"))
    assert (data.labels, data.num_labels) == (["9", "10"], 2)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    train = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features)
    assert ClassificationData("-", train).labels == ["zebra", "ant"]
    assert ClassificationData("-", train, labels=["ant", "zebra"]).labels == ["ant", "zebra"]
    numbers = ClassificationData("-", rows(3, score=[1.0, 2.0, 3.0]), label="score", problem="regression")
    assert (numbers.labels, numbers.num_labels) == ([], 1)
    many = ClassificationData("-", rows(2, tags=["b|a", ""]), label="tags", problem="multi_label")
    assert (many.labels, many.num_labels) == (["a", "b"], 2)


def test_multi_label_and_regression_batches(minilm: str) -> None:
    train = rows(4, tags=[["b"], [], ["a", "c"], ["b", "b"]], score=[0.5, -1.0, 2.0, 3.0])
    data = ClassificationData(minilm, train, label="tags", problem="multi_label", batch_size=4)
    data.setup("fit")
    [batch] = data.train_dataloader()
    hot = torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]])
    torch.testing.assert_close(batch["labels"], hot[batch["row"]])
    assert data.describe().facts["labels"] == {"a": 1, "b": 3, "c": 1}
    data = ClassificationData(minilm, train, label="score", problem="regression", batch_size=4)
    data.setup("fit")
    [batch] = data.train_dataloader()
    torch.testing.assert_close(batch["labels"], torch.tensor([0.5, -1, 2, 3])[batch["row"]])


def test_fit_test_and_predict(minilm: str) -> None:
    unlabelled = rows(23).remove_columns("label")
    data = ClassificationData(minilm, rows(40), rows(17), rows(9), unlabelled, batch_size=8, eval_batch_size=4)
    model, runner = Mean(), trainer()
    runner.fit(model, datamodule=data)
    runner.test(model, datamodule=data, verbose=False)
    assert {split: sorted(seen) for split, seen in model.seen.items()} == {
        "train": list(range(40)),
        "val": list(range(17)),
        "test": list(range(9)),
    }
    predicted = runner.predict(model, datamodule=data)
    assert torch.cat(predicted).tolist() == list(range(23))
    assert [len(batch) for batch in predicted] == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_fit_resumes_at_its_batch(minilm: str, tmp_path: Path, workers: int) -> None:
    class Save(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Mean, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 3):
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                module.start = len(module.seen["train"])

    def data() -> ClassificationData:
        return ClassificationData(minilm, rows(40), rows(5), batch_size=6, num_workers=workers)

    whole, resumed = Mean(), Mean()
    trainer(Save(), max_epochs=2).fit(whole, datamodule=data())
    trainer(max_epochs=2).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.seen["train"] == whole.seen["train"][whole.start :]


def test_fits_without_validation_rows(minilm: str) -> None:
    model, data, runner = Mean(), ClassificationData(minilm, rows(10)), trainer()
    with pytest.warns(UserWarning, match="across ranks is zero"):
        runner.fit(model, datamodule=data)
    assert model.seen["val"] == []
    with pytest.raises(ValueError, match=r"val rows are needed: give val=\.\.\."):
        runner.validate(model, datamodule=data, verbose=False)


@pytest.mark.filterwarnings("ignore:The `overfit_batches`")
def test_overfit_batches_repeats_the_same_rows(minilm: str) -> None:
    model = Mean()
    data = ClassificationData(minilm, rows(40), rows(40), batch_size=4)
    trainer(overfit_batches=2, max_epochs=2).fit(model, datamodule=data)
    assert model.seen["train"] == [*range(8), *range(8)]


def test_val_fraction_splits_each_class(minilm: str) -> None:
    def halves(seed: int, problem: str = "single_label", label: str = "label") -> tuple[list[int], list[int]]:
        train = rows(120, score=[float(i) for i in range(120)])
        data = ClassificationData(minilm, train, val_fraction=0.25, seed=seed, problem=problem, label=label)
        data.setup("fit")
        model = Mean()
        trainer().fit(model, datamodule=data)
        return sorted(model.seen["train"]), sorted(model.seen["val"])

    train, val = halves(0)
    assert sorted(train + val) == list(range(120))
    assert Counter(row % 3 > 0 for row in val) == {False: 10, True: 20}
    assert halves(0) == (train, val) != halves(1)
    assert len(halves(0, "regression", "score")[1]) == 30


def test_ranks_come_from_the_trainer(minilm: str) -> None:
    class Two:
        world_size, global_rank, overfit_batches, predicting = 2, 1, 0.0, False
        strategy, state = trainer().strategy, trainer().state

    data = ClassificationData(minilm, rows(33), rows(33), batch_size=8)
    data.setup("fit")
    data.trainer = Two()  # type: ignore[assignment]
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableDataLoader)
    assert (loader.sampler.num_replicas, loader.sampler.rank, len(loader)) == (2, 1, 3)
    assert [len(batch) for batch in data.val_dataloader().sampler] == [6, 5, 5]


def test_bucket_pads_less(minilm: str, real_data: Path) -> None:
    from transformers import AutoTokenizer

    path = real_data / "sst2" / "dev.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    full = [len(tokenizer(json.loads(line)["text"])["input_ids"]) for line in path.read_text().splitlines()]

    def summary(bucket: bool) -> dict[str, Any]:
        data = ClassificationData(minilm, str(path), bucket=bucket, max_length=40)
        data.setup("fit")
        [row] = data.describe().rows
        return row

    bucketed, drawn = summary(True), summary(False)
    assert bucketed["padding"] < 0.1 < 0.3 < drawn["padding"]
    assert (bucketed["rows"], bucketed["max tokens"]) == (872, 40)
    assert bucketed["truncated"] == pytest.approx(sum(length > 40 for length in full) / 872)
    assert bucketed["mean tokens"] == pytest.approx(sum(min(length, 40) for length in full) / 872)


def test_describe(minilm: str) -> None:
    data = ClassificationData(minilm, rows(12), rows(4), predict=rows(3), labels=["no", "yes", "maybe"])
    with pytest.raises(RuntimeError, match="before setup"):
        data.describe()
    data.setup()
    report = data.describe()
    assert isinstance(report, Report)
    assert report.facts["labels"] == {"no": 8, "yes": 4, "maybe": 0}
    assert report.facts["labels without a training row"] == ["maybe"]
    assert [(row["split"], row["rows"], row["truncated"]) for row in report.rows] == [
        ("train", 12, 0.0),
        ("val", 4, 0.0),
        ("predict", 3, 0.0),
    ]
    json.loads(report.to_json())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"problem": "many"}, r"problem must be one of \('single_label'"),
        ({"text_pair": "label"}, "must be different columns, got 'text', 'label', 'label'"),
        ({"labels": ["a", "b", "a"]}, r"labels must differ, got \['a', 'b', 'a'\]"),
        ({"problem": "regression", "labels": ["a"]}, "regression has none: leave labels out"),
        ({"val_fraction": 0.5, "val": "x.csv", "train": "y.csv"}, "val_fraction splits train where there is no val"),
        ({"val_fraction": 1.5, "train": "y.csv"}, "between 0 and 1, got 1.5"),
    ],
)
def test_contradicting_arguments_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationData("-", **kwargs)


def test_labels_that_cannot_be_known_are_refused() -> None:
    with pytest.raises(ValueError, match=r"give labels=\.\.\., or train to take them from"):
        _ = ClassificationData("-", test=rows(3)).labels
    one = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "x"]})
    with pytest.raises(ValueError, match=r"needs two or more labels, got \['x'\].*column 'label' of train"):
        _ = ClassificationData("-", one).labels
    with pytest.raises(ValueError, match=r"two or more labels, got \['x'\]"):
        _ = ClassificationData("-", one, labels=["x"]).labels
    none = Dataset.from_dict({"text": ["a"], "label": [""]})
    with pytest.raises(ValueError, match=r"multi_label needs a label, got \[\]"):
        _ = ClassificationData("-", none, problem="multi_label").labels


def test_faulty_rows_are_named_at_setup(minilm: str, tmp_path: Path) -> None:
    val = tmp_path / "val.csv"
    val.write_text("text,label\nfine,no\n\nfine,nope\n")
    with pytest.raises(
        ValueError, match=r"val\.csv, line 4: column 'label' holds the unknown label 'nope'; known: 'no'"
    ):
        ClassificationData(minilm, rows(9), str(val)).setup("fit")
    with pytest.raises(ValueError, match=r"test \(the given Dataset\) has no column 'label'"):
        ClassificationData(minilm, rows(9), test=rows(9).remove_columns("label")).setup("test")
    with pytest.raises(ValueError, match="leaves no row to train or validate on"):
        ClassificationData(minilm, rows(9), val_fraction=0.01).setup("fit")


LINE = '{"text": "fine", "label": "no"}\n'
BAD: dict[str, tuple[str, bytes, type[Exception], str]] = {
    "null text": (
        "t.jsonl",
        (LINE + '{"text": null, "label": "no"}\n').encode(),
        ValueError,
        r"t\.jsonl, line 2: column 'text' is null: give a text",
    ),
    "number for text": (
        "t.jsonl",
        b'{"text": 3, "label": "no"}\n',
        TypeError,
        r"t\.jsonl, line 1: column 'text' must hold text, got 3",
    ),
    "null label": (
        "t.jsonl",
        (LINE + '{"text": "a", "label": null}\n').encode(),
        ValueError,
        r"t\.jsonl, line 2: column 'label' holds None: every row needs a label",
    ),
    "empty label": (
        "t.csv",
        b"text,label\nfine,no\nfine,\n",
        ValueError,
        r"t\.csv, line 3: column 'label' holds '': a label must not be empty",
    ),
    "missing column": (
        "t.jsonl",
        (LINE + '{"txt": "a", "label": "no"}\n').encode(),
        ValueError,
        r"t\.jsonl, line 2 has no column 'text'",
    ),
    "empty file": ("t.jsonl", b"", ValueError, r"t\.jsonl has no rows"),
    "header alone": ("t.csv", b"text,label\n", ValueError, r"t\.csv has no rows"),
    "not JSON": ("t.jsonl", LINE.encode() + b"{text}\n", ValueError, r"t\.jsonl, line 2: not JSON"),
    "not UTF-8": (
        "t.jsonl",
        LINE.encode() + b'{"text": "\xff", "label": "no"}\n',
        ValueError,
        r"t\.jsonl, line 2: not UTF-8",
    ),
    "cut gzip": (
        "t.jsonl.gz",
        gzip.compress(LINE.encode() * 3000)[:-30],
        ValueError,
        r"t\.jsonl\.gz: damaged after line \d+",
    ),
    "no gzip": ("t.jsonl.gz", LINE.encode(), ValueError, r"t\.jsonl\.gz: damaged after line 0 \(Not a gzipped"),
}


@pytest.mark.parametrize(
    ("fault", "split"),
    [
        (fault, split)
        for fault in BAD
        for split in ("train", "val", "predict")
        if (split, "label") != ("predict", fault[-5:])
    ],
)
def test_faulty_tables_are_named(minilm: str, tmp_path: Path, fault: str, split: str) -> None:
    name, content, kind, message = BAD[fault]
    (tmp_path / name).write_bytes(content)
    data = ClassificationData(minilm, **{"train": rows(9), split: str(tmp_path / name)}, labels=["no", "yes"])
    with pytest.raises(kind, match=message):
        data.setup({"train": "fit", "val": "fit", "predict": "predict"}[split])


def test_rows_that_are_missing_are_named(minilm: str) -> None:
    data = ClassificationData(minilm, rows(9))
    with pytest.raises(ValueError, match=r"train rows are needed: call setup\(\) first"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"test rows are needed: give test=\.\.\."):
        data.test_dataloader()


def test_a_text_without_tokens_is_refused(minilm: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    empty = Source("a", Dataset.from_dict({"text": ["fine", ""]}).data.table)
    assert tokenize(empty, ["text"], tokenizer, 8)["input_ids"][1] == [101, 102]
    tokenizer.backend_tokenizer.post_processor = __import__("tokenizers").processors.Sequence([])
    with pytest.raises(ValueError, match=r"a, row 1 \(from 0\): the tokenizer makes no token of ''"):
        tokenize(empty, ["text"], tokenizer, 8)


def test_heavy_packages_are_imported_late() -> None:
    import lightning_ft.data

    for path in Path(lightning_ft.data.__file__).parent.glob("*.py"):
        imported = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name for node in imported for name in [getattr(node, "module", None), *(a.name for a in node.names)]}
        assert not names & {"datasets", "transformers", "pyarrow", "pandas"}, path
