"""LP-FT over heads of each kind: problems, layers, tokens, decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ft.callbacks.lp_ft import LPFT
from lightning_ft.modules import Architecture, SequenceClassification, TokenClassification
from tests.callbacks.test_lp_ft import AtStart, features, probe
from tests.strangers import FILTERED, Filtered, dataset
from tests.tiny import BERT, DISTILBERT, GPT2, LLAMA


def texts(labels: Tensor) -> Any:
    """Rows of ids with a pad of their own length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (len(labels), 7), generator=generator)
    mask = torch.arange(7) < torch.randint(2, 8, (len(labels), 1), generator=generator)
    return [
        {"input_ids": i, "attention_mask": m.long(), "labels": label}
        for i, m, label in zip(ids * mask, mask, labels, strict=True)
    ]


def fit(module: LightningModule, rows: Any, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", enable_checkpointing=False, max_epochs=1, callbacks=list(callbacks), **{**quiet, **options}
    )
    loaders = [DataLoader(rows, size, num_workers=0) for size in (4, 8)]
    trainer.fit(module, *loaders)
    return trainer


def classifier(config: Any, **arguments: Any) -> SequenceClassification:
    return SequenceClassification(
        Architecture(config), **{"labels": ["a", "b", "c"], "learning_rate": 1e-9, **arguments}
    )


def logits(module: Any, rows: Any) -> Tensor:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        return module.eval()(batch).double()


class Unmeasured(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert not any(metric.update_called for metric in pl_module.val_metrics.values())


CLASSES = torch.arange(24) % 3
RANDOM = torch.Generator().manual_seed(3)
SEVERAL = torch.randint(2, (24, 3), generator=RANDOM).float()
NUMBERS = torch.randn(24, generator=RANDOM)


def pooled(module: Any, rows: Any, path: str, position: Any = None) -> Tensor:
    found: list[Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(lambda m, args, out: found.append(args[0]))
    logits(module, rows)
    handle.remove()
    return found[0].double() if position is None else found[0].double()[torch.arange(len(rows)), position]


@pytest.mark.parametrize(
    ("labels", "arguments"),
    [
        (CLASSES, {}),
        (SEVERAL, {"problem": "multi_label"}),
        (NUMBERS, {"problem": "regression", "labels": None}),
    ],
    ids=["single_label", "multi_label", "regression"],
)
def test_every_problem_of_our_own_head(labels: Tensor, arguments: Any) -> None:
    module, rows = classifier(hf.BertConfig(**BERT), **arguments), texts(labels)
    x = pooled(module, rows, "model.classifier")
    module.train()
    x = StandardScaler().fit_transform(x)
    fit(module, rows, LPFT(penalties=[0.5]), Unmeasured())
    found = logits(module, rows)
    if arguments.get("problem") == "regression":
        expected = torch.from_numpy(Ridge(alpha=2.0).fit(x, labels).predict(x))[:, None]
    elif arguments.get("problem") == "multi_label":
        models = [LogisticRegression(C=0.5, max_iter=1000).fit(x, column) for column in labels.unbind(1)]
        expected = torch.stack([torch.from_numpy(model.decision_function(x)) for model in models], 1)
    else:
        expected = torch.from_numpy(LogisticRegression(C=0.5, max_iter=1000).fit(x, labels).decision_function(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_one_logit_is_for_class_one_against_class_zero_or_a_number() -> None:
    class One(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(8, 1)

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]).squeeze(1), batch[1].float())

    tokens, labels = dataset().tensors
    raw = features(One(), "classifier", tokens)
    x = StandardScaler().fit_transform(raw)
    logistic = torch.from_numpy(LogisticRegression(C=1.0, max_iter=1000).fit(x, labels).decision_function(x))
    ridge = torch.from_numpy(Ridge(alpha=1.0).fit(x, labels.double()).predict(x))

    def floats(batch: Any) -> Tensor:
        return batch[1].float()

    for callback, expected in (
        (LPFT(1, penalties=[1.0]), logistic),
        (LPFT(floats, problem="multi_label", penalties=[1.0]), logistic),
        (LPFT(floats, penalties=[1.0]), ridge),
    ):
        start = AtStart()
        FILTERED.fit(callback, start, module=One(), max_epochs=1)
        weight, bias = (start.weights[f"classifier.{name}"].double() for name in ("weight", "bias"))
        torch.testing.assert_close(raw @ weight[0] + bias, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (hf.RobertaConfig(**BERT), "classifier.out_proj"),
        (hf.DistilBertConfig(**DISTILBERT), "model.classifier"),
        (hf.ElectraConfig(**BERT, embedding_size=8), "out_proj"),
    ],
)
def test_head_of_two_layers_is_asked_for_and_its_last_one_probed(config: Any, head: str) -> None:
    module, rows = classifier(config), texts(CLASSES)
    with pytest.raises(ValueError, match=r"head= must name the linear layer .* here the head has 4 .*16 to 3\)"):
        fit(module, rows, LPFT())
    path = f"model.{head.removeprefix('model.')}" if "." in head else "model.classifier.out_proj"
    x = StandardScaler().fit_transform(pooled(module, rows, path))
    module.train()
    fit(module, rows, LPFT(head=head, penalties=[0.5]))
    expected = LogisticRegression(C=0.5, max_iter=1000).fit(x, CLASSES).decision_function(x)
    torch.testing.assert_close(logits(module, rows), torch.from_numpy(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [hf.GPT2Config(**GPT2, pad_token_id=0, bos_token_id=1, eos_token_id=2), hf.LlamaConfig(**LLAMA)],
    ids=["gpt2", "llama"],
)
def test_decoder_is_probed_at_the_token_that_its_model_takes(config: Any) -> None:
    module, rows = classifier(config), texts(CLASSES)
    last = torch.stack([row["attention_mask"] for row in rows]).sum(1) - 1
    x = pooled(module, rows, "model.score", last)
    scale = x.square().mean(0).sqrt()
    module.train()
    fit(module, rows, LPFT(penalties=[0.5]))
    model = LogisticRegression(C=0.5, max_iter=1000, fit_intercept=False).fit(x / scale, CLASSES)
    expected = torch.from_numpy(model.decision_function(x / scale))
    torch.testing.assert_close(logits(module, rows), expected, rtol=0, atol=1e-4)


def test_tokens_are_probed_at_their_positions_and_ignored_ones_left_out() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 3, (24, 7), generator=generator)
    labels[torch.rand(24, 7, generator=generator) < 0.3] = -100
    module = TokenClassification(Architecture(hf.BertConfig(**BERT)), labels=["O", "B-X", "I-X"], learning_rate=1e-9)
    rows = texts(labels)
    x = pooled(module, rows, "model.classifier")[labels != -100]
    x = StandardScaler().fit_transform(x)
    module.train()
    callback = LPFT(penalties=[0.5])
    fit(module, rows, callback, limit_val_batches=0)
    assert callback.report is not None
    assert callback.report.facts["training rows"] == (labels != -100).sum()
    expected = LogisticRegression(C=0.5, max_iter=1000).fit(x, labels[labels != -100]).decision_function(x)
    torch.testing.assert_close(logits(module, rows)[labels != -100], torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_classes_without_rows_are_warned_of_and_never_the_answer() -> None:
    module, rows = classifier(hf.BertConfig(**BERT), labels=list("abcde")), texts(CLASSES * 2)
    with pytest.warns(UserWarning, match=r"LPFT: the training rows lack labels \[1, 3\]"):
        fit(module, rows, LPFT(penalties=[0.5]), limit_val_batches=0)
    found = logits(module, rows)
    assert found[:, [1, 3]].max() < found[:, [0, 2, 4]].min()


def test_bf16_autocast_writes_a_head_in_fp32() -> None:
    start = AtStart()
    FILTERED.fit(probe(), start, precision="bf16-mixed", max_epochs=1)
    assert start.weights["classifier.weight"].dtype == torch.float32
    assert start.weights["classifier.weight"].isfinite().all()
