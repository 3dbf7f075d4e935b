"""Several heads on one backbone: gradients by hand, the heads' own results, resuming, and two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.data import ClassificationData
from lightning_ft.data.multi_task import MultiTaskData
from lightning_ft.data.multiple_choice import MultipleChoiceData
from lightning_ft.data.question_answering import QuestionAnsweringData
from lightning_ft.data.token_classification import TokenClassificationData
from lightning_ft.modules import Architecture, SequenceClassification, TransformerModule
from lightning_ft.modules.masked_lm import MaskedLM
from lightning_ft.modules.multi_task import MultiTask, loss_weight
from lightning_ft.modules.multiple_choice import MultipleChoice
from lightning_ft.modules.question_answering import QuestionAnswering
from lightning_ft.modules.token_classification import TokenClassification
from tests.data.test_curriculum import rows
from tests.data.test_multiple_choice_data import rows as choice_rows
from tests.pretrained import _assert_same, _fit, _Stop, _trainer, config, pretrained, tokenizer
from tests.ranks import RANKS, run_ranks

EXACT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def heads(source: Any) -> dict[str, TransformerModule]:
    return {
        "mood": SequenceClassification(source, ["no", "yes"]),
        "tone": SequenceClassification(source, num_labels=3),
        "ends": MultipleChoice(source),
    }


def data(folder: str) -> MultiTaskData:
    return MultiTaskData(
        {
            "mood": ClassificationData(folder, rows(24), rows(7), batch_size=4, labels=["0", "1"]),
            "tone": ClassificationData(folder, rows(16), predict=rows(5), batch_size=4, labels=["0", "1", "x"]),
            "ends": MultipleChoiceData(folder, choice_rows(12), choice_rows(5), predict=choice_rows(3), batch_size=3),
        },
        seed=3,
    )


def architecture(**options: Any) -> Architecture:
    return Architecture(config("bert", **EXACT, **options))


def batches() -> dict[str, dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)

    def ids(*shape: int) -> Tensor:
        return torch.randint(5, 100, shape, generator=draw)

    tags = torch.tensor([[-100, 0, 1, 2, -100], [1, -100, -100, -100, -100], [-100] * 5])
    return {
        "mood": {"task": "mood", "input_ids": ids(3, 6), "labels": torch.tensor([0, 1, 1])},
        "tone": {"task": "tone", "input_ids": ids(2, 4), "labels": torch.tensor([2, 0])},
        "ends": {"task": "ends", "input_ids": ids(2, 4, 5), "labels": torch.tensor([3, 1])},
        "tags": {"task": "tags", "input_ids": ids(3, 5), "labels": tags},
    }


def test_trains_and_resumes_exactly(tmp_path: Path) -> None:
    """RoBERTa: the head for choices has a pooler, the classifiers have none."""
    folder = pretrained(tmp_path / "model", "roberta", hf.AutoModelForSequenceClassification)

    def make() -> MultiTask:
        return MultiTask(heads(folder), learning_rate=1e-3, weights={"tone": 0.5})

    whole = make()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    assert _fit(_trainer(tmp_path / "whole"), whole, data(folder))
    assert len([name for name, p in whole.named_parameters() if not torch.equal(p, start[name])]) > 60
    for place in ((0, 13), (1, 4)):
        files = tmp_path / f"killed{place}"
        assert not _fit(_trainer(files, _Stop(*place)), make(), data(folder))
        resumed = make()
        assert _fit(_trainer(files), resumed, data(folder), files / "last.ckpt")
        _assert_same(whole.state_dict(), resumed.state_dict())

    loaded = MultiTask.load_from_checkpoint(tmp_path / "whole" / "last.ckpt").eval()
    _assert_same(whole.state_dict(), loaded.state_dict())
    assert {task: type(head) for task, head in loaded.heads.items()} == {
        "mood": SequenceClassification,
        "tone": SequenceClassification,
        "ends": MultipleChoice,
    }
    assert loaded.weights == {"tone": 0.5}
    assert loaded.heads["mood"].labels == ["no", "yes"]
    assert loaded.heads["ends"].model.base_model is loaded.model
    size = (tmp_path / "whole" / "last.ckpt").stat().st_size
    weights = sum(p.numel() for p in loaded.parameters()) * 4
    assert size < 3.6 * weights + 200_000  # weights once and two moments, not the backbone once a head

    first, second = (predicted(module, folder) for module in (whole.eval(), loaded))
    assert first == second
    assert [(part["task"], part["row"]) for part in first] == [
        (["tone"] * 4, [0, 1, 2, 3]),
        (["tone"], [4]),
        (["ends"] * 3, [0, 1, 2]),
    ]
    assert set(first[2]) == {"row", "task", "choice", "score", "probabilities"}

    loaded.save_pretrained(tmp_path / "saved")
    for task, auto in (("tone", hf.AutoModelForSequenceClassification), ("ends", hf.AutoModelForMultipleChoice)):
        reopened = auto.from_pretrained(tmp_path / "saved" / task).eval()
        batch = batches()[task]
        with torch.no_grad():
            assert torch.equal(reopened(input_ids=batch["input_ids"]).logits, loaded(batch))
        assert hf.AutoTokenizer.from_pretrained(tmp_path / "saved" / task)("the film")["input_ids"]


def predicted(module: MultiTask, folder: str) -> list[dict[str, Any]]:
    trainer = quiet(callbacks=[])
    return [out for part in trainer.predict(module, datamodule=data(folder)) or [] for out in part]


def quiet(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in options["callbacks"]),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize(("outcomes", "weight"), [(2, 1.4427), (3, 0.9102), (50265, 0.0924), (1, 1.0), (0, 1.0)])
def test_weights_of_the_paper(outcomes: int, weight: float) -> None:
    assert round(loss_weight(outcomes), 4) == weight


def test_weights_of_heads() -> None:
    source = architecture()
    made = MultiTask(
        {
            **heads(source),
            "many": SequenceClassification(source, num_labels=7, problem="multi_label"),
            "score": SequenceClassification(source, problem="regression"),
            "words": MaskedLM(source),
        }
    )
    given = {
        **batches(),
        **{task: {"task": task, "input_ids": torch.ones(1, 4).long()} for task in ("many", "score", "words")},
    }
    del given["tags"]
    with torch.no_grad():
        weights = {task: round(made.weight(task, made(batch)), 4) for task, batch in given.items()}
    vocabulary = round(1 / math.log(len(tokenizer("bert"))), 4)
    assert weights == {
        "mood": 1.4427, "tone": 0.9102, "ends": 0.7213, "many": 1.4427, "score": 1.0, "words": vocabulary
    }  # fmt: skip
    plain = MultiTask(heads(source), loss_scaling=False, weights={"ends": 3.0})
    assert [plain.weight(task, torch.ones(2, 5)) for task in plain.heads] == [1.0, 1.0, 3.0]


def test_a_window_has_the_sum_of_the_tasks_scaled_gradients() -> None:
    """Four batches, one of each task, make one step; expected from transformers' own losses on the same weights."""
    source = architecture()
    made = MultiTask({**heads(source), "tags": TokenClassification(source, labels=["O", "B-x", "I-x"])}, warmup=0.0)
    expected: dict[int, Tensor] = {}
    for task, batch in batches().items():
        model = made.heads[task].model
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        factor = {"mood": 1.442695, "tone": 0.910239, "ends": 0.721348, "tags": 0.910239}[task] / 4
        used = [p for p in made.parameters() if p.requires_grad]
        for p, grad in zip(used, torch.autograd.grad(loss * factor, used, allow_unused=True), strict=True):
            if grad is not None:
                expected[id(p)] = expected.get(id(p), 0) + grad
    got: dict[int, Tensor] = {}

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            got.update({id(p): p.grad.clone() for p in pl_module.parameters()})

    loader = torch.utils.data.DataLoader(list(batches().values()), batch_size=None)
    quiet(max_epochs=1, accumulate_grad_batches=4, limit_val_batches=0, callbacks=[Look()]).fit(made, loader, loader)
    assert got.keys() == expected.keys()
    for name, p in made.named_parameters():
        torch.testing.assert_close(got[id(p)], expected[id(p)], rtol=1e-4, atol=1e-7, msg=name)


def test_every_parameter_has_a_gradient_after_each_batch() -> None:
    source = architecture()
    made = MultiTask({**heads(source), "tags": TokenClassification(source, labels=["O", "B-x", "I-x"])})
    made.log = lambda *args, **options: None  # type: ignore[method-assign]
    for task, batch in batches().items():
        made.zero_grad()
        made.training_step(batch, 0).backward()
        missing = [name for name, p in made.named_parameters() if p.grad is None]
        assert not missing
        others = [p for other, head in made.heads.items() if other != task for p in head_only(head)]
        assert all(float(p.grad.abs().max()) == 0 for p in others)
        assert all(float(p.grad.abs().max()) > 0 for p in head_only(made.heads[task]))


def head_only(head: TransformerModule) -> list[Tensor]:
    backbone = {id(p) for p in head.model.base_model.parameters()}
    return [p for p in head.parameters() if id(p) not in backbone]


def test_the_backbone_with_most_weights_serves_all() -> None:
    source = architecture()
    tags = TokenClassification(source, labels=["O", "B-x", "I-x"])
    words = MaskedLM(source)
    assert not hasattr(tags.model.bert.pooler, "dense")
    made = MultiTask({"tags": tags, "words": words, "mood": SequenceClassification(source, num_labels=2)})
    assert tags.model.bert is words.model.bert is made.model
    assert made.model.pooler.dense.weight.requires_grad
    embeddings = made.model.embeddings.word_embeddings.weight
    assert words.model.get_output_embeddings().weight is embeddings  # tied anew
    total = sum(p.numel() for p in made.parameters())
    assert total == sum(p.numel() for p in made.model.parameters()) + sum(
        p.numel() for head in made.heads.values() for p in head_only(head)
    )


def test_results_are_those_of_the_heads_alone(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, "bert", hf.AutoModelForSequenceClassification, initializer_range=0.4)
    made = MultiTask(heads(folder))
    trainer = quiet(callbacks=[])
    (results, *_) = trainer.validate(made, datamodule=data(folder), verbose=False)
    expected = {}
    losses = []
    for task in ("mood", "ends"):
        (alone,) = quiet(callbacks=[]).validate(made.heads[task], datamodule=data(folder).tasks[task], verbose=False)
        expected |= {f"val_{task}_{name.removeprefix('val_')}": value for name, value in alone.items()}
        losses.append(alone["val_loss"] * loss_weight({"mood": 2, "ends": 3}[task]))
    expected["val_loss"] = sum(losses) / 2
    assert trainer.callback_metrics.keys() == expected.keys()
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert {"val_mood_accuracy", "val_mood_f1", "val_ends_accuracy", "val_ends_loss"} <= results.keys()
    # Nothing of one validation is left in the next.
    short = quiet(limit_val_batches=1, callbacks=[])
    (results, *_) = short.validate(made, datamodule=data(folder), verbose=False)
    (alone,) = short.validate(made.heads["mood"], datamodule=data(folder).tasks["mood"], verbose=False)
    assert results["val_mood_loss"] == pytest.approx(alone["val_loss"], abs=1e-6)
    assert results["val_mood_loss"] != pytest.approx(expected["val_mood_loss"], abs=1e-4)


def test_a_checkpoint_callback_watches_a_task(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    best = ModelCheckpoint(tmp_path / "best", "best-{val_ends_accuracy:.2f}", monitor="val_ends_accuracy", mode="max")
    trainer = quiet(max_epochs=1, accumulate_grad_batches=3, callbacks=[best])
    trainer.fit(MultiTask(heads(folder)), datamodule=data(folder))
    assert Path(best.best_model_path).name.startswith("best-val_ends_accuracy=")
    logged = {"train_loss", "train_mood_loss", "train_tone_loss", "train_ends_loss", "val_loss"}
    assert logged <= trainer.callback_metrics.keys()
    assert "val_tone_loss" not in trainer.callback_metrics


def test_layer_groups_find_the_shared_backbone() -> None:
    groups = LayerGroups.of(MultiTask(heads(architecture())))
    assert groups.names == LayerGroups.of(heads(architecture())["mood"]).names
    tensors = {name.split(".")[1] for name, _ in groups.named_parameters("head") if name.startswith("heads.")}
    assert tensors == {"mood", "tone", "ends"}


def test_a_head_that_keeps_a_hook_is_called() -> None:
    calls: list[str] = []

    class Own(SequenceClassification):
        def on_validation_start(self) -> None:
            calls.append("start")

        def on_validation_epoch_end(self) -> None:
            calls.append(f"end {self.trainer.sanity_checking}")
            super().on_validation_epoch_end()

    source = architecture()
    made = MultiTask({"mood": Own(source, num_labels=2), "tone": SequenceClassification(source, num_labels=3)})
    trainer = quiet(callbacks=[])
    loader = torch.utils.data.DataLoader([batches()["mood"]], batch_size=None)
    trainer.validate(made, loader, verbose=False)
    assert calls == ["start", "end False"]
    assert "val_mood_accuracy" in trainer.callback_metrics
    assert "log_dict" not in vars(made.heads["mood"])


def test_tags_and_answers_beside_labels(tmp_path: Path) -> None:
    """Heads whose evaluation reads windows, and one that finds its threshold in validation for the test."""
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    words = ["Anna", "Smith", "lives", "in", "London"]
    tagged = Dataset.from_dict({"tokens": [words] * 4, "tags": [["B-P", "I-P", "O", "O", "B-L"]] * 4})
    found = [{"text": ["London"], "answer_start": [20]}, {"text": [], "answer_start": []}] * 2
    asked = Dataset.from_dict({"question": ["what is it ?"] * 4, "context": [" ".join(words)] * 4, "answers": found})
    parts = MultiTaskData(
        {
            "mood": ClassificationData(folder, rows(8), rows(4), rows(4), batch_size=2),
            "tags": TokenClassificationData(folder, tagged, tagged, tagged, batch_size=2),
            "answers": QuestionAnsweringData(
                folder, asked, asked, asked, asked, batch_size=2, max_length=64, stride=16
            ),
        }
    )
    made = MultiTask(
        {
            "mood": SequenceClassification(folder, num_labels=2),
            "tags": TokenClassification(folder, labels=parts.tasks["tags"].labels),
            "answers": QuestionAnswering(folder, no_answer_threshold=-7.0),
        }
    )
    trainer = quiet(max_epochs=1, accumulate_grad_batches=4, num_sanity_val_steps=0, callbacks=[])
    trainer.fit(made, datamodule=parts)
    keys = {"val_mood_accuracy", "val_answers_f1", "val_answers_loss", "val_tags_loss", "train_tags_loss", "val_loss"}
    assert keys <= trainer.callback_metrics.keys()
    threshold = made.heads["answers"].no_answer_threshold
    assert threshold == trainer.callback_metrics["val_answers_best_f1_thresh"] != -7.0
    (results, *_) = trainer.test(made, datamodule=parts, verbose=False)
    assert made.heads["answers"].test_metrics["squad"].threshold == threshold
    assert any(name.startswith("test_tags_") for name in results)
    assert [row["task"] for row in trainer.predict(made, datamodule=parts)] == [["answers"] * 2] * 2


# ---- two processes


def ddp_trainer(**options: Any) -> Trainer:
    return quiet(max_epochs=1, accumulate_grad_batches=2, callbacks=[], limit_val_batches=0, **options)


class Plain(MultiTask):
    """No dropout and plain SGD, so that two processes must do what one does with the batches of both."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: str, batch_size: int, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = Plain(heads(Architecture(hf.AutoConfig.from_pretrained(folder))))
    parts = MultiTaskData(
        {
            "mood": ClassificationData(folder, rows(24), batch_size=2 * batch_size, labels=["0", "1"]),
            "tone": ClassificationData(folder, rows(16), batch_size=2 * batch_size, labels=["0", "1", "x"]),
            "ends": MultipleChoiceData(folder, choice_rows(12), batch_size=batch_size),
        }
    )
    ddp_trainer(**options).fit(made, datamodule=parts)
    return {name: p.detach().clone() for name, p in made.named_parameters()}


def ranks_train() -> dict[str, Tensor]:
    import os

    strategy = DDPStrategy(process_group_backend="gloo")
    return train(os.environ["MULTI_TASK_FOLDER"], 1, strategy=strategy, devices=RANKS)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain DDP, which refuses parameters without a gradient; RoBERTa, whose pooler one of the heads reads."""
    folder = pretrained(tmp_path / "model", "roberta", hf.AutoModelForSequenceClassification, **EXACT)
    monkeypatch.setenv("MULTI_TASK_FOLDER", folder)
    single = train(folder, 2)
    first, second = run_ranks("tests.modules.test_multi_task:ranks_train", tmp_path)
    assert first.keys() == second.keys() == single.keys()
    for name in single:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], single[name], rtol=0, atol=1e-6, msg=name)


# ---- what is refused


def test_refused_heads(tmp_path: Path) -> None:
    source, other = architecture(), architecture(hidden_size=32)
    mood = SequenceClassification(source, num_labels=2)
    with pytest.raises(ValueError, match=r"heads must name one task or more"):
        MultiTask({})
    for bad in ("a.b", "", "a/b", "items"):
        with pytest.raises(ValueError, match=r"cannot name tasks"):
            MultiTask({bad: mood})
    with pytest.raises(ValueError, match=r"weights names \['x'\], but the tasks are \['mood'\]"):
        MultiTask({"mood": mood}, weights={"x": 1.0})
    with pytest.raises(ValueError, match=r"weights=\{'mood': 0\.0\} must all be above 0"):
        MultiTask({"mood": mood}, weights={"mood": 0.0})
    with pytest.raises(ValueError, match=r"'mood' and 'ends' have different architectures"):
        MultiTask({"mood": mood, "ends": MultipleChoice(other)})
    with pytest.raises(
        ValueError, match=r"'mood' and 'ends' have different architectures .*BertModel and RobertaModel"
    ):
        MultiTask({"mood": mood, "ends": MultipleChoice(Architecture(config("roberta")))})
    folders = [pretrained(tmp_path / name, "bert", hf.AutoModelForSequenceClassification) for name in "ab"]
    with pytest.raises(ValueError, match=r"need one pretrained model, got \{'mood': '.*a', 'ends': '.*b'\}"):
        MultiTask({"mood": SequenceClassification(folders[0], num_labels=2), "ends": MultipleChoice(folders[1])})
    with pytest.raises(ValueError, match=r"learning_rate=-1\.0 must be above 0"):
        MultiTask({"mood": mood}, learning_rate=-1)


def test_names_of_tasks_and_heads_must_agree(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    made = MultiTask({"mood": SequenceClassification(folder, num_labels=2), "ends": MultipleChoice(folder)})
    with pytest.raises(
        ValueError, match=r"data's tasks are \['mood', 'tone', 'ends'\], but the heads are \['mood', 'ends'\]"
    ):
        quiet(max_epochs=1, callbacks=[]).fit(made, datamodule=data(folder))
    with pytest.raises(ValueError, match=r"a batch of the task 'tone', but the heads are \['mood', 'ends'\]"):
        made(batches()["tone"])
    with pytest.raises(ValueError, match=r"a batch of the task None"):
        made({"input_ids": torch.ones(1, 3).long()})


def test_checkpoints_of_other_heads_are_refused(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    assert _fit(_trainer(tmp_path), MultiTask(heads(folder)), data(folder))
    path = tmp_path / "last.ckpt"
    other = {**heads(folder), "tone": MultipleChoice(folder)}
    with pytest.raises(ValueError, match=r"trained with the heads \{.*'tone': 'SequenceClassification'.*\}, and this"):
        MultiTask(other).on_load_checkpoint(torch.load(path, weights_only=True))
    other = {**heads(folder), "mood": SequenceClassification(folder, ["yes", "no"])}
    with pytest.raises(ValueError, match=r"trained with labels \['no', 'yes'\]"):
        MultiTask(other).on_load_checkpoint(torch.load(path, weights_only=True))
    with pytest.raises(ValueError, match=r"holds a MultiTask, not a SequenceClassification"):
        SequenceClassification.load_from_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    stored["lightning_ft"]["heads"]["mood"]["class"] = "Unheard"
    torch.save(stored, path)
    with pytest.raises(ValueError, match=r"holds a head Unheard, which is not there: import the module"):
        MultiTask.load_from_checkpoint(path)


def test_overfit_batches_are_refused(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match=r"overfit_batches.* would mix rows of several tasks"):
        quiet(max_epochs=1, overfit_batches=2, callbacks=[]).fit(MultiTask(heads(folder)), datamodule=data(folder))


def test_labels_are_those_of_the_data(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    made = MultiTask(heads(folder))
    assert _fit(_trainer(tmp_path), made, data(folder))
    for module in (made, MultiTask.load_from_checkpoint(tmp_path / "last.ckpt")):
        assert module.heads["mood"].labels == ["no", "yes"]  # named otherwise than in the data
        assert module.heads["tone"].labels == ["0", "1", "x"]
        assert module.heads["tone"].model.config.id2label == {0: "0", 1: "1", 2: "x"}
    for labels in (["1", "0"], ["a", "b", "c"]):
        wrong = {**heads(folder), "mood": SequenceClassification(folder, labels)}
        with pytest.raises(ValueError, match=r"task 'mood': its head has the labels .*, and its data \['0', '1'\]"):
            quiet(max_epochs=1, callbacks=[]).fit(MultiTask(wrong), datamodule=data(folder))


def test_trains_after_an_evaluation(tmp_path: Path) -> None:
    """An evaluation runs in inference mode, whose tensors training may not change."""
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    made = MultiTask(heads(folder))
    quiet(callbacks=[]).validate(made, datamodule=data(folder), verbose=False)
    quiet(max_epochs=1, callbacks=[]).fit(made, datamodule=data(folder))


def test_heads_of_other_weights_are_refused(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    own = Architecture(hf.AutoConfig.from_pretrained(folder))
    mood = SequenceClassification(folder, num_labels=2)
    with pytest.raises(ValueError, match=r"one pretrained model, got .*'ends': 'an Architecture or a checkpoint'"):
        MultiTask({"mood": mood, "ends": MultipleChoice(own)})
    made = [MultipleChoice(own, head_seed=seed) for seed in (0, 1)]
    MultiTask({"a": made[0], "b": made[1]})  # random weights are no loss
    data_of = ClassificationData(folder, rows(8), rows(4), batch_size=4, labels=["0", "1"])
    quiet(max_steps=1, callbacks=[]).fit(trained := SequenceClassification(folder, num_labels=2), datamodule=data_of)
    trained.trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = SequenceClassification.load_from_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"bring different weights of the backbone, of which one would be lost"):
        MultiTask({"mood": loaded, "ends": MultipleChoice(own)})
    with pytest.raises(ValueError, match=r"heads \['ends'\] have gradient_checkpointing=True: give it to MultiTask"):
        MultiTask({"mood": mood, "ends": MultipleChoice(folder, gradient_checkpointing=True)})
