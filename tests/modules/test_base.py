"""What all heads share: the contract, weights of micro-batches, gradient checkpointing, rows and their names."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_ft.callbacks import WritePredictions
from lightning_ft.data import ClassificationData
from lightning_ft.modules import Architecture, SequenceClassification, TransformerModule
from tests.pretrained import CORPUS, check_head, config, pretrained
from tests.ranks import run_ranks
from tests.tiny import BERT


def rows(count: int) -> Dataset:
    words = " ".join(CORPUS).split()
    texts = [" ".join(words[i % 40 : i % 40 + 3 + i % 9]) for i in range(count)]
    return Dataset.from_dict({"text": texts, "label": [i % 3 for i in range(count)]})


def test_contract(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    check_head(
        lambda: SequenceClassification(folder, labels=["0", "1", "2"], learning_rate=1e-3),
        lambda: ClassificationData(folder, rows(48), rows(7), predict=rows(5), batch_size=8),
        hf.AutoModelForSequenceClassification,
        tmp_path,
    )


def predicted(folder: str, path: Path, *callbacks: Callback, data: ClassificationData | None = None) -> int:
    """Number of batches predicted; rows in `path`."""
    module = SequenceClassification(folder, labels=["0", "1", "2"])
    counter = Count()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[WritePredictions(path), counter, *callbacks],
    )
    data = data or ClassificationData(folder, predict=named(20), id="name", eval_batch_size=4)
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        trainer.predict(module, datamodule=data)
    return counter.batches


def named(count: int) -> Dataset:
    return rows(count).add_column("name", [f"r{i}" for i in range(count)])


class Count(Callback):
    batches = 0

    def on_predict_batch_end(self, *args: Any) -> None:
        self.batches += 1


class Interrupt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if args[-1] == self.batch:
            raise KeyboardInterrupt


def test_predictions_have_ids_and_an_interrupted_prediction_goes_on(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    assert predicted(folder, whole) == 5
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(line["row"], line["id"]) for line in lines] == [(i, f"r{i}") for i in range(20)]
    assert predicted(folder, path, Interrupt(2)) == 3
    assert not path.exists()
    (part,) = tmp_path.glob(".p.jsonl.0.part")
    with part.open("a") as file:  # killed in the middle of a line
        file.write('[0, {"row": 19, "la')
    assert predicted(folder, path) == 2  # 12 of 20 rows were there
    assert path.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".*.part"))


def test_an_interrupted_prediction_of_other_rows_or_weights_begins_anew(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    path = tmp_path / "p.jsonl"
    assert predicted(folder, path, Interrupt(2)) == 3
    assert predicted(folder, path, data=ClassificationData(folder, predict=named(16), eval_batch_size=4)) == 4
    assert len(path.read_text().splitlines()) == 16
    assert predicted(folder, path, Interrupt(2)) == 3
    torch.manual_seed(5)
    hf.AutoModelForSequenceClassification.from_config(config("bert", num_labels=3)).save_pretrained(folder)
    assert predicted(folder, path) == 5


def test_all_rows_predicted_but_the_file_not_written(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    predicted(folder, whole)
    assert predicted(folder, path, Interrupt(4)) == 5
    assert predicted(folder, path) == 1
    assert path.read_text().splitlines()[:19] == whole.read_text().splitlines()[:19]


def ddp_predict() -> list[int]:
    """For `run_ranks`: a prediction that both ranks leave at their second batch, and its continuation."""
    folder, path = os.environ["FOLDER"], Path(os.environ["FOLDER"]).parent / "p.jsonl"
    counts = [Count(), Count()]
    for callbacks in ([Interrupt(1), counts[0]], [counts[1]]):
        data = ClassificationData(folder, predict=named(21), id="name", eval_batch_size=4)
        module = SequenceClassification(folder, labels=["0", "1", "2"])
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer = Trainer(
            strategy=strategy,
            devices=2,
            accelerator="cpu",
            logger=False,
            callbacks=[WritePredictions(path), *callbacks],
        )
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            trainer.predict(module, datamodule=data, return_predictions=False)
    return [count.batches for count in counts]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_write_and_continue_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    predicted(folder, tmp_path / "whole.jsonl", data=ClassificationData(folder, predict=named(21), id="name"))
    monkeypatch.setenv("FOLDER", folder)
    (tmp_path / "out").mkdir()
    # 21 rows in batches of 4: three batches for each rank, two before the interruption and one after it.
    assert run_ranks("tests.modules.test_base:ddp_predict", tmp_path / "out") == [[1, 1], [1, 1]]
    whole, lines = ((tmp_path / name).read_text().splitlines() for name in ("whole.jsonl", "p.jsonl"))
    assert [json.loads(line)["id"] for line in lines] == [f"r{i}" for i in range(21)]
    for expected, line in zip(map(json.loads, whole), map(json.loads, lines), strict=True):
        assert line["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    assert not list(tmp_path.glob(".*.part"))


class Tokens(TransformerModule):
    """Masked tokens with very unequal numbers of labels in a batch; no dropout and plain SGD."""

    def __init__(self, *, token_weighted: bool) -> None:
        shared = {"learning_rate": 0.1, "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant", "head_seed": 0}
        flags = dict.fromkeys(("gradient_checkpointing", "trust_remote_code", "allow_pickle"), False)
        super().__init__(
            hf.AutoModelForTokenClassification,
            Architecture(hf.BertConfig(**BERT, hidden_dropout_prob=0, attention_probs_dropout_prob=0)),
            arguments={**shared, **flags},
            metrics={},
            token_weighted=token_weighted,
        )

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        tokens = (batch["labels"] != -100).sum()
        total = F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return total / tokens.clamp(min=1), tokens

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def unequal(count: int) -> list[dict[str, Tensor]]:
    """Rows with 0 to 7 labels."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for i in range(count):
        ids = torch.randint(3, 50, (8,), generator=generator)
        labels = torch.where(torch.arange(8) < i * i % 8, ids % 2, -100)
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return result


class Gradients(Callback):
    """What reaches the optimiser at each step; the hook in which penalties add their own."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]))


def gradients(batches: list[Any], *, weighted: bool, **options: Any) -> list[Tensor]:
    keep = Gradients()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        enable_model_summary=False,
        callbacks=[keep],
        **quiet,
        **options,
    )
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(Tokens(token_weighted=weighted), loader, loader)
    return keep.steps


def ddp_gradients() -> dict[str, list[Tensor]]:
    """For `run_ranks`: each rank takes every second row of six, in windows of 2 and 1."""
    rank = int(os.environ["RANK"])
    rows = [default_collate([row]) for row in unequal(6)][rank::2]
    options = {"devices": 2, "accumulate_grad_batches": 2, "use_distributed_sampler": False}
    return {
        str(weighted): gradients(rows, weighted=weighted, strategy=DDPStrategy(process_group_backend="gloo"), **options)
        for weighted in (True, False)
    }


def is_close(first: list[Tensor], second: list[Tensor]) -> bool:
    assert len(first) == len(second)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("weighted", [True, False])
def test_accumulation_averages_over_tokens(weighted: bool) -> None:
    """Six micro-batches in windows of 4 and 2 are two batches of 4 and 2 rows."""
    data = unequal(6)
    expected = gradients([default_collate(data[:4]), default_collate(data[4:])], weighted=False)
    got = gradients([default_collate([row]) for row in data], weighted=weighted, accumulate_grad_batches=4)
    assert is_close(got, expected) == weighted


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_processes_average_over_tokens(tmp_path: Path) -> None:
    data = unequal(6)
    expected = gradients([default_collate(data[:4]), default_collate(data[4:])], weighted=False)
    for rank in run_ranks("tests.modules.test_base:ddp_gradients", tmp_path):
        assert is_close(rank["True"], expected)
        assert not is_close(rank["False"], expected)


def test_gradient_checkpointing_trains_the_same() -> None:
    def backward(checkpointing: bool) -> list[Tensor]:
        calls = []
        model = SequenceClassification(
            Architecture(hf.BertConfig(**BERT, hidden_dropout_prob=0, attention_probs_dropout_prob=0)),
            num_labels=3,
            gradient_checkpointing=checkpointing,
        )
        model.model.bert.encoder.layer[0].attention.register_forward_pre_hook(lambda *args: calls.append(1))
        batch = {"input_ids": torch.arange(3, 15).view(2, 6), "labels": torch.tensor([0, 2])}
        model.loss(model(batch), batch)[0].backward()
        assert len(calls) == 1 + checkpointing
        return [p.grad for p in model.parameters() if p.grad is not None]

    for with_it, without in zip(backward(True), backward(False), strict=True):
        torch.testing.assert_close(with_it, without)


# ---- what an interruption must not leave behind


class Stop(Callback):
    """Raises in one hook, the first time."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._raise)
        self._due = True

    def _raise(self, *args: Any) -> None:
        if self._due:
            self._due = False
            raise RuntimeError("stop")


def plain_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **quiet, **options)


def test_a_window_left_unfinished_does_not_weigh_in_the_next_fit() -> None:
    loader = DataLoader([default_collate([row]) for row in unequal(6)[1:]], batch_size=None)

    def first_step(module: Tokens) -> Tensor:
        keep = Gradients()
        plain_trainer(keep, max_steps=1, accumulate_grad_batches=2, limit_val_batches=0).fit(module, loader, loader)
        return keep.steps[0]

    interrupted = Tokens(token_weighted=True)
    with pytest.raises(RuntimeError, match="stop"):
        plain_trainer(Stop("on_after_backward"), accumulate_grad_batches=2, limit_val_batches=0, max_epochs=1).fit(
            interrupted, loader, loader
        )
    interrupted.zero_grad()
    torch.testing.assert_close(first_step(interrupted), first_step(Tokens(token_weighted=True)))


def test_an_interrupted_evaluation_leaves_no_rows_in_the_next(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    data = ClassificationData(folder, val=rows(12), labels=["0", "1", "2"], batch_size=4)
    module = SequenceClassification(folder, labels=["0", "1", "2"])
    (clean,) = plain_trainer().validate(module, datamodule=data, verbose=False)
    with pytest.raises(RuntimeError, match="stop"):
        plain_trainer(Stop("on_validation_batch_end")).validate(module, datamodule=data, verbose=False)
    assert plain_trainer().validate(module, datamodule=data, verbose=False) == [clean]
    assert module.val_metrics["f1"].tp.sum() == 0


# ---- padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [None, 7])
def test_a_decoder_reads_a_row_alike_alone_and_in_a_batch(side: str, pad: int | None, tmp_path: Path) -> None:
    """Whatever side generation needs, and whatever pad token the configuration names beside the tokenizer's."""
    folder = pretrained(tmp_path / "model", "gpt2", hf.AutoModelForSequenceClassification, pad_token_id=pad)
    hf.AutoTokenizer.from_pretrained(folder, padding_side=side).save_pretrained(folder)
    module = SequenceClassification(folder, labels=["0", "1", "2"]).eval()
    assert module.model.config.pad_token_id == module.tokenizer.eos_token_id

    def scores(batch_size: int) -> Tensor:
        data = ClassificationData(folder, predict=rows(9), eval_batch_size=batch_size)
        data.setup("predict")
        with torch.no_grad():
            return torch.cat([module(batch) for batch in data.predict_dataloader()])

    torch.testing.assert_close(scores(9), scores(1))
