"""What each head says of its labels: −log p is its loss without the mean, and F is that of batches of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from torch import Tensor

from lightning_ft.data.cloze import ClozeData
from lightning_ft.functional.fisher import FisherEstimate
from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.modules import (
    Architecture,
    CausalLM,
    Cloze,
    MaskedLM,
    MultipleChoice,
    MultiTask,
    QuestionAnswering,
    Seq2Seq,
    SequenceClassification,
    TokenClassification,
    TransformerModule,
)
from lightning_ft.modules.question_answering import QuestionAnswering as Spans
from tests.modules.test_cloze import rows, task
from tests.pretrained import config, pretrained, tokenizer

Case = tuple[TransformerModule, dict[str, Any], bool]


def source(kind: Any = "bert", **options: Any) -> Architecture:
    words = tokenizer(kind)
    return Architecture(config(kind, vocab_size=len(words), **options), words)


def inputs(width: int = 8, examples: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(width) < torch.tensor([8, 3, 5, 8, 4])[:examples, None]).long()
    return {"input_ids": torch.randint(5, 60, (examples, width), generator=generator) * mask, "attention_mask": mask}


def tokens(classes: int) -> dict[str, Any]:
    made = inputs()
    labels = (made["input_ids"] % classes).masked_fill(made["attention_mask"] == 0, -100)
    labels[:, 0] = labels[2] = -100
    return {**made, "labels": labels}


def single() -> Case:
    module = SequenceClassification(source(), num_labels=3)
    return module, {**inputs(), "labels": torch.tensor([0, 2, 1, 0, 1])}, True


def several() -> Case:
    module = SequenceClassification(source(), num_labels=3, problem="multi_label")
    return module, {**inputs(), "labels": torch.arange(15).view(5, 3) % 2}, True


def number() -> Case:
    module = SequenceClassification(source(), problem="regression")
    return module, {**inputs(), "labels": torch.linspace(-1, 2, 5)}, True


def tags() -> Case:
    return TokenClassification(source(), labels=["O", "B-x", "I-x"]), tokens(3), True


def masked() -> Case:
    return MaskedLM(source()), tokens(50), True


def causal() -> Case:
    return CausalLM(source("gpt2")), tokens(50), True


def llama() -> Case:
    return CausalLM(source("llama")), tokens(50), True


def bart() -> Case:
    module = Seq2Seq(source("bart"))
    return module, {**inputs(), "labels": tokens(50)["labels"][:, :5]}, False


def t5() -> Case:
    # A bias of positions that all examples share has a gradient that no layer's input tells apart.
    return Seq2Seq(source("t5")), {**inputs(), "labels": tokens(50)["labels"][:, :5]}, False


def spans() -> Case:
    module = Spans(source())
    starts = torch.tensor([1, 2, 0, 8, 3])  # 8 lies past the window
    return module, {**inputs(), "start_positions": starts, "end_positions": starts + 1 - (starts == 8).long()}, True


def choice() -> Case:
    one = inputs()
    stacked = {name: torch.stack([value, value.roll(1, 0), value.roll(2, 0)], 1) for name, value in one.items()}
    return MultipleChoice(source()), {**stacked, "labels": torch.tensor([0, 1, 2, 0, 1])}, True


def multi() -> Case:
    heads: dict[str, TransformerModule] = {
        "tone": SequenceClassification(source(), num_labels=3),
        "words": MaskedLM(source()),
    }
    return MultiTask(heads), {**tokens(50), "task": "words"}, True


@pytest.mark.parametrize("make", [single, several, number, tags, masked, causal, llama, bart, t5, spans, choice, multi])
def test_heads(make: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    module, batch, whole = make()
    module.eval()
    outputs = module(batch)
    terms = module.likelihood(outputs, batch)
    assert terms.examples == 5
    loss, items = (module.heads["words"] if isinstance(module, MultiTask) else module).loss(outputs, batch)  # type: ignore[operator]
    torch.testing.assert_close(surprise(terms), loss * int(items) * scale(module, batch))
    for variant in ("empirical", "sampled"):
        check(module, batch, variant, whole)
    if terms.outputs.shape[1] <= 8:
        check(module, batch, "exact", whole)


def surprise(terms: Likelihood) -> Tensor:
    """−log p of all labels, but for the Gaussian's constant."""
    assert terms.labels is not None
    if terms.family == "categorical":
        return F.cross_entropy(terms.outputs, terms.labels.clamp(min=-1), ignore_index=-1, reduction="sum")
    if terms.family == "bernoulli":
        return F.binary_cross_entropy_with_logits(terms.outputs, terms.labels.float(), reduction="sum")
    return 0.5 * (terms.outputs - terms.labels).square().sum()


def scale(module: TransformerModule, batch: dict[str, Any]) -> float:
    if isinstance(module, QuestionAnswering):
        return 2 * 4 / 5  # the mean of both, over the four windows that hold their answers
    if isinstance(module, SequenceClassification):
        return {"single_label": 1.0, "multi_label": 3.0, "regression": 0.5}[module.problem]
    return 1.0


def check(module: TransformerModule, batch: dict[str, Any], variant: Any, whole: bool) -> None:
    estimates = [FisherEstimate(module, variant, vectorise=vectorise) for vectorise in (None, False)]
    for estimate in estimates:
        assert estimate.add(batch) == 5
    assert estimates[0].vectorised is whole, estimates[0].why_not
    found, expected = (estimate.result().tensors for estimate in estimates)
    peak = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        limit = 2e-5 * max(float(value.max()), 1e-5 * peak)
        assert float((found[name] - value).abs().max()) <= limit, name


def test_each_task_s_layers_are_proven_when_they_are_first_called() -> None:
    module, batch, _ = multi()
    other = {**single()[1], "task": "tone"}
    estimates = [FisherEstimate(module, "empirical", vectorise=vectorise) for vectorise in (None, False)]
    for estimate in estimates:
        for each in (batch, other, batch):
            estimate.add(each)
    assert estimates[0].vectorised
    found, expected = (estimate.result() for estimate in estimates)
    assert float(found.tensors["heads.tone.model.classifier.weight"].sum()) > 0
    assert found.trace() == pytest.approx(expected.trace(), rel=1e-5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_cloze(split: str, tmp_path: Path) -> None:
    path = pretrained(tmp_path / "model", "bert", hf.AutoModelForMaskedLM, initializer_range=0.3)
    table: Dataset = rows(5)
    settings = task(path, "bert")
    data = ClozeData(path, train=table, val=table, batch_size=5, **settings)
    data.setup("fit")
    batch = next(iter(getattr(data, f"{split}_dataloader")()))
    module = Cloze(path, **settings)
    estimates = [FisherEstimate(module, "exact", vectorise=vectorise) for vectorise in (None, False)]
    for estimate in estimates:
        estimate.add(batch)
    assert estimates[0].vectorised, estimates[0].why_not
    found, expected = (estimate.result() for estimate in estimates)
    assert found.examples == expected.examples == len(batch["input_ids"])
    assert found.trace() == pytest.approx(expected.trace(), rel=1e-5)
