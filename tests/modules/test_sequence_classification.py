"""The head: labels, losses, metrics, optimiser, loading and saving."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins.precision import MixedPrecision
from sklearn import metrics as reference
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_ft.modules import Architecture, SequenceClassification, load_checkpoint
from tests.tiny import BERT, tiny

CONFIG = hf.BertConfig(**BERT)


def module(**arguments: Any) -> SequenceClassification:
    arguments = {"labels": ["a", "b", "c"], **arguments}
    return SequenceClassification(Architecture(CONFIG), **arguments)


def batches(labels: Tensor, size: int = 8) -> DataLoader[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "input_ids": torch.randint(3, 40, (6,), generator=generator),
            "attention_mask": torch.ones(6, dtype=torch.int64),
            "labels": label,
        }
        for label in labels
    ]
    return DataLoader(rows, batch_size=size)  # type: ignore[arg-type]


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)


def fit(runner: Trainer, model: SequenceClassification, loader: DataLoader[dict[str, Tensor]]) -> None:
    runner.fit(model, loader, loader)


def test_everything_trains_and_is_in_train_mode(minilm: str) -> None:
    model = SequenceClassification(minilm, labels=["no", "yes"])
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert model.model.dtype == torch.float32


def test_head_is_seeded_apart_from_other_randomness(minilm: str) -> None:
    torch.manual_seed(3)
    first = SequenceClassification(minilm, labels=["no", "yes"]).model.classifier.weight
    after = torch.rand(1)
    torch.manual_seed(4)
    second = SequenceClassification(minilm, labels=["no", "yes"]).model.classifier.weight
    other = SequenceClassification(minilm, labels=["no", "yes"], head_seed=1).model.classifier.weight
    torch.manual_seed(3)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(after, torch.rand(1))


def test_architecture_is_not_changed() -> None:
    config = copy.deepcopy(CONFIG)
    SequenceClassification(Architecture(config), labels=["a", "b", "c"])
    assert config.to_dict() == CONFIG.to_dict()


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_loss_is_transformers_own(problem: Any) -> None:
    model = module(problem=problem, labels=None if problem == "regression" else ["a", "b", "c"])
    generator = torch.Generator().manual_seed(0)
    labels = {
        "single_label": torch.tensor([0, 2, 1, 1]),
        "multi_label": torch.randint(0, 2, (4, 3), generator=generator).float(),
        "regression": torch.randn(4, generator=generator),
    }[problem]
    (batch,) = batches(labels, 4)
    model.eval()
    expected = model.model(**batch).loss
    torch.testing.assert_close(model.loss(model(batch), batch)[0], expected)


def test_class_weights_and_label_smoothing() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    weighted = module(class_weights=[1.0, 2.0, 3.0])
    by_hand = F.cross_entropy(logits, labels, reduction="none") * torch.tensor([1.0, 2.0, 3.0])[labels]
    torch.testing.assert_close(
        weighted.loss(logits, {"labels": labels})[0], by_hand.sum() / torch.tensor([1.0, 2, 3, 3, 2]).sum()
    )
    smooth = module(label_smoothing=0.3)
    target = 0.7 * F.one_hot(labels, 3) + 0.1
    torch.testing.assert_close(
        smooth.loss(logits, {"labels": labels})[0], -(target * logits.log_softmax(-1)).sum(-1).mean()
    )


def test_metrics_equal_scikit_learn() -> None:
    model = module()
    labels = torch.arange(40) % 3
    runner = trainer()
    (logged,) = runner.validate(model, batches(labels), verbose=False)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in batches(labels)])
    true, predicted = labels.numpy(), logits.argmax(-1).numpy()
    macro = {"average": "macro", "zero_division": 0}
    expected = {
        "val_loss": float(F.cross_entropy(logits, labels)),
        "val_accuracy": reference.accuracy_score(true, predicted),
        "val_f1": reference.f1_score(true, predicted, **macro),
        "val_precision": reference.precision_score(true, predicted, **macro),
        "val_recall": reference.recall_score(true, predicted, **macro),
        "val_auroc": reference.roc_auc_score(true, logits.softmax(-1), multi_class="ovr"),
        "val_mcc": reference.matthews_corrcoef(true, predicted),
    }
    assert logged == pytest.approx(expected, abs=1e-5)


def test_multi_label_metrics_equal_scikit_learn() -> None:
    model = module(problem="multi_label")
    labels = torch.randint(0, 2, (40, 3), generator=torch.Generator().manual_seed(2)).float()
    (logged,) = trainer().validate(model, batches(labels), verbose=False)
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(batch) for batch in batches(labels)]).sigmoid().numpy()
    true, predicted = labels.numpy(), scores > 0.5
    assert logged["val_accuracy"] == pytest.approx((true == predicted).mean(), abs=1e-6)
    macro = {"average": "macro", "zero_division": 0}
    assert logged["val_f1"] == pytest.approx(reference.f1_score(true, predicted, **macro), abs=1e-6)
    assert logged["val_auroc"] == pytest.approx(reference.roc_auc_score(true, scores), abs=1e-6)


def test_regression_metrics_equal_scipy() -> None:
    from scipy.stats import pearsonr, spearmanr

    model = module(problem="regression", labels=None)
    labels = torch.randn(40, generator=torch.Generator().manual_seed(2))
    (logged,) = trainer().validate(model, batches(labels), verbose=False)
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(batch) for batch in batches(labels)]).squeeze(-1)
    assert logged["val_pearson"] == pytest.approx(pearsonr(scores, labels).statistic, abs=1e-4)
    assert logged["val_spearman"] == pytest.approx(spearmanr(scores, labels).statistic, abs=1e-4)
    assert logged["val_mse"] == pytest.approx(float(F.mse_loss(scores, labels)), abs=1e-5)


def test_optimiser_is_fused_with_two_groups_and_a_schedule_by_step() -> None:
    model = module(learning_rate=0.01, weight_decay=0.1, warmup=0.5)
    runner = trainer(max_epochs=2, accumulate_grad_batches=2)
    fit(runner, model, batches(torch.arange(32) % 3, 4))
    (optimizer,) = runner.optimizers
    assert optimizer.defaults["fused"]
    decay, rest = optimizer.param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decay["params"])
    assert all(p.ndim < 2 for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert runner.global_step == 8
    scheduler = runner.lr_scheduler_configs[0].scheduler
    rates = [0.01 * scheduler.lr_lambdas[0](step) for step in range(9)]
    expected = [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]
    assert rates == pytest.approx([0.01 * value for value in expected])
    assert decay["lr"] == pytest.approx(0)


@pytest.mark.parametrize(("clip", "fused"), [(None, True), (1.0, False)])
def test_fp16_with_clipping_is_not_fused(clip: float | None, fused: bool) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    runner = trainer(max_epochs=1, plugins=[plugin], gradient_clip_val=clip)
    model = module(learning_rate=0.01, warmup=0)
    before = model.model.classifier.weight.detach().clone()
    fit(runner, model, batches(torch.arange(16) % 3))
    assert runner.optimizers[0].defaults["fused"] is fused
    assert not torch.equal(before, model.model.classifier.weight)


def test_bf16_with_clipping_is_fused_and_clipped() -> None:
    norms: list[float] = []

    def note(trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0)

    runner = trainer(max_epochs=1, precision="bf16-mixed", gradient_clip_val=1e-3)
    runner.callbacks.append(LambdaCallback(on_before_zero_grad=note))
    fit(runner, module(learning_rate=0.01, warmup=0), batches(torch.arange(32) % 3))
    assert runner.optimizers[0].defaults["fused"]
    assert norms[-1] == pytest.approx(1e-3, rel=1e-2)


def test_slanted_triangle_rises_in_the_share_of_the_warm_up() -> None:
    runner = trainer(max_epochs=1, limit_val_batches=0)
    fit(runner, module(learning_rate=0.01, warmup=0.25, schedule="slanted_triangular"), batches(torch.arange(64) % 3))
    (factor, _) = runner.lr_scheduler_configs[0].scheduler.lr_lambdas
    assert [factor(step) for step in (0, 1, 2, 5, 8)] == [1 / 32, 33 / 64, 1, 33 / 64, 1 / 32]


def test_endless_training_needs_a_constant_schedule() -> None:
    loader = batches(torch.arange(8) % 3)
    with pytest.raises(ValueError, match=r"warmup=0.1 is a share of a training that has no end"):
        fit(trainer(max_epochs=-1, max_time={"seconds": 1}), module(), loader)
    with pytest.raises(ValueError, match=r'schedule="linear" falls to 0 at the end'):
        fit(trainer(max_epochs=-1, max_time={"seconds": 1}), module(warmup=0), loader)
    endless = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ValueError, match=r"warmup=0.1 is a share of a training that has no end"):
        fit(trainer(max_epochs=1), module(), endless)


class Endless(IterableDataset[Any]):
    """Batches without end or length, which Lightning counts as -1 steps."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from batches(torch.arange(8) % 3)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "gpt2", "llama", "xlnet"])
def test_trains_other_architectures(name: str) -> None:
    config = tiny(name).config
    config.pad_token_id = 0
    model = SequenceClassification(Architecture(config), num_labels=2, learning_rate=0.01)
    before = copy.deepcopy(model.state_dict())
    fit(trainer(max_epochs=1), model, batches(torch.arange(16) % 2))
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_predict_gives_label_score_and_probabilities(problem: Any) -> None:
    model = module(problem=problem, labels=None if problem == "regression" else ["a", "b", "c"]).eval()
    (batch,) = batches(torch.arange(5) % 3, 5)
    with torch.no_grad():
        columns, logits = model.predict_step({**batch, "row": torch.arange(5)}, 0), model(batch)
    assert columns["row"] == [0, 1, 2, 3, 4]
    if problem == "regression":
        assert columns == {"row": columns["row"], "score": logits.squeeze(-1).tolist()}
    elif problem == "single_label":
        assert columns["label"] == ["abc"[i] for i in logits.argmax(-1)]
        assert columns["score"] == pytest.approx(logits.softmax(-1).max(-1).values.tolist())
    else:
        assert columns["label"] == [["abc"[i] for i in range(3) if row[i] > 0] for row in logits.tolist()]
        assert columns["probabilities"][0] == pytest.approx(logits.sigmoid()[0].tolist())


def test_checkpoint_alone_rebuilds_the_module(minilm: str, tmp_path: Path) -> None:
    model = SequenceClassification(minilm, labels=["no", "yes"], class_weights=[1.0, 2.0])
    runner = trainer(max_steps=1)
    fit(runner, model, batches(torch.arange(8) % 2, 2))
    runner.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    for loaded in (
        SequenceClassification.load_from_checkpoint(tmp_path / "a.ckpt"),
        load_checkpoint(tmp_path / "a.ckpt"),
    ):
        assert loaded.labels == ["no", "yes"]
        assert loaded.class_weights.tolist() == [1.0, 2.0]
        assert loaded.training
        assert loaded.model.training
        assert loaded.tokenizer("a fine film")["input_ids"] == model.tokenizer("a fine film")["input_ids"]
        assert loaded.tokenizer.padding_side == "right"
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def saved(model: SequenceClassification, path: Path) -> Path:
    runner = trainer(max_steps=1)
    fit(runner, model, batches(torch.arange(12) % len(model.labels), 2))
    runner.save_checkpoint(path, weights_only=False)
    return path


def test_checkpoint_cannot_write_outside_the_folder_it_is_unpacked_in(tmp_path: Path) -> None:
    checkpoint = torch.load(saved(module(), tmp_path / "a.ckpt"), weights_only=True)
    target = tmp_path / "target"
    for name in (str(target), "../../../../../../../../" + str(target)[1:]):
        checkpoint["lightning_ft"]["tokenizer"] = {name: torch.zeros(3, dtype=torch.uint8)}
        torch.save(checkpoint, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=r"outside its folder: do not trust it"):
            load_checkpoint(tmp_path / "b.ckpt")
    assert not target.exists()


def test_checkpoint_of_other_labels_is_refused(tmp_path: Path) -> None:
    path = str(saved(module(labels=["a", "b"]), tmp_path / "a.ckpt"))
    loader = batches(torch.arange(8) % 2)
    trainer().validate(module(labels=["a", "b"]), loader, ckpt_path=path, verbose=False)
    with pytest.raises(ValueError, match=r"trained with labels \['a', 'b'\].*this module has \['b', 'a'\]"):
        trainer().validate(module(labels=["b", "a"]), loader, ckpt_path=path)
    with pytest.raises(ValueError, match=r"\(single_label_classification\).*\(multi_label_classification\)"):
        trainer().validate(module(labels=["a", "b"], problem="multi_label"), loader, ckpt_path=path)


def test_numpy_arguments_do_not_spoil_the_checkpoint(tmp_path: Path) -> None:
    model = module(labels=np.array(["a", "b"]), class_weights=np.array([1.0, 2.0]), learning_rate=np.float64(0.01))
    loaded = SequenceClassification.load_from_checkpoint(saved(model, tmp_path / "a.ckpt"))
    assert loaded.labels == ["a", "b"]
    assert loaded.class_weights.tolist() == [1.0, 2.0]


def test_decoder_without_a_pad_token_gets_the_eos_token() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1, "film": 2, "<unk>": 3}, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    config = tiny("gpt2").config
    config.pad_token_id = None
    model = SequenceClassification(Architecture(config, tokenizer), num_labels=2).eval()
    assert (config.pad_token_id, model.model.config.pad_token_id) == (None, 0)
    with torch.no_grad():
        alone = model(model.tokenizer(["a film"], return_tensors="pt"))
        padded = model(model.tokenizer(["a film", "a film a film"], padding=True, return_tensors="pt"))
    torch.testing.assert_close(padded[:1], alone)


def test_class_weights_under_bf16_weights() -> None:
    model = module(class_weights=[1.0, 2.0, 3.0]).bfloat16()
    labels = torch.tensor([0, 1, 2, 0])
    assert model.loss(torch.randn(4, 3, dtype=torch.bfloat16), {"labels": labels})[0].dtype == torch.float32


def test_saved_folder_opens_in_pipeline_with_equal_scores(minilm: str, tmp_path: Path) -> None:
    model = SequenceClassification(minilm, labels=["no", "yes"]).eval()
    model.save_pretrained(tmp_path / "folder")
    pipe = hf.pipeline("text-classification", model=str(tmp_path / "folder"), top_k=None)
    (scores,) = pipe(["a fine film"])
    with torch.no_grad():
        expected = model.probabilities(model(model.tokenizer("a fine film", return_tensors="pt")))[0]
    found = {row["label"]: row["score"] for row in scores}
    assert [found["no"], found["yes"]] == pytest.approx(expected.tolist(), abs=1e-6)


def test_pickle_weights_are_refused_unless_asked_for(tmp_path: Path) -> None:
    model = tiny("bert")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="allow_pickle=True"):
        SequenceClassification(str(tmp_path), num_labels=2)
    assert SequenceClassification(str(tmp_path), num_labels=2, allow_pickle=True).labels == ["LABEL_0", "LABEL_1"]


def test_foreign_and_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="was not written by a lightning_ft module"):
        load_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None}, "needs two labels or more"),
        ({"labels": ["a"]}, "needs two labels or more"),
        ({"labels": ["a", "a"]}, "names a label twice"),
        ({"labels": ["a", "b"], "num_labels": 3}, "contradicts labels"),
        ({"problem": "ranking"}, "problem='ranking' must be one of"),
        ({"problem": "regression"}, "regression has one output"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be 0 or more"),
        ({"warmup": 1.0}, "warmup=1.0 must be a share"),
        ({"schedule": "cubic"}, "schedule='cubic' must be one of linear, cosine, constant, slanted_triangular"),
        ({"schedule": "slanted_triangular", "warmup": 0.0}, "warmup=0.* must be above 0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must lie in"),
        ({"label_smoothing": 0.1, "problem": "multi_label"}, "label_smoothing=0.1 must lie in"),
        ({"class_weights": [1.0]}, "class_weights has 1 values"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**arguments)
