"""MaskedLM: the head's contract, transformers' own loss and pipeline, perplexity by hand, heads that are missing."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_ft.data.language_modeling import LanguageModelingData
from lightning_ft.modules.checkpoint import Architecture
from lightning_ft.modules.masked_lm import MaskedLM
from tests.pretrained import CORPUS, Kind, check_head, config, pretrained, tokenizer


def texts(count: int) -> Dataset:
    return Dataset.from_dict({"text": [" ".join(CORPUS[i % 5].split()[: 4 + i % 9]) for i in range(count)]})


PROMPTS = Dataset.from_dict({"text": ["the film is [MASK] .", "no gap", "[MASK] [MASK] lives in New York ."]})


@pytest.mark.parametrize(("rows", "count"), [("documents", 24), ("chunks", 36)])
def test_contract(tmp_path: Path, rows: Any, count: int) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForMaskedLM)

    def data() -> LanguageModelingData:
        return LanguageModelingData(
            folder, texts(count), texts(7), predict=PROMPTS, rows=rows, max_length=16, batch_size=4, whole_words=True
        )

    check_head(lambda: MaskedLM(folder, learning_rate=1e-3), data, hf.AutoModelForMaskedLM, tmp_path)


def batches(kind: Kind, folder: str, count: int = 9) -> list[dict[str, Any]]:
    data = LanguageModelingData(folder, val=texts(count), rows="documents", max_length=32, eval_batch_size=4)
    data.setup("validate")
    return list(data.val_dataloader())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_loss_is_transformers_own(tmp_path: Path, kind: Kind) -> None:
    folder = pretrained(tmp_path, kind, hf.AutoModelForMaskedLM)
    model = MaskedLM(folder).eval()
    for batch in batches(kind, folder):
        mean, tokens = model.loss(model(batch), batch)
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        torch.testing.assert_close(mean, model.model(**given).loss, rtol=0, atol=1e-6)
        assert tokens == (batch["labels"] != -100).sum() > 0


def test_metrics_are_those_of_all_masked_tokens(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, "bert", hf.AutoModelForMaskedLM)
    model = MaskedLM(folder)
    loader = batches("bert", folder)
    runner = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (logged,) = runner.validate(model, DataLoader(loader, batch_size=None), verbose=False)  # type: ignore[arg-type]
    model.eval()
    losses, right = [], []
    with torch.no_grad():
        for batch in loader:
            for scores, labels in zip(model(batch).log_softmax(-1), batch["labels"], strict=True):
                for place in torch.nonzero(labels != -100).flatten().tolist():
                    losses.append(-scores[place, labels[place]].item())
                    right.append(float(scores[place].argmax() == labels[place]))
    mean = sum(losses) / len(losses)
    assert logged["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert logged["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert logged["val_accuracy"] == pytest.approx(sum(right) / len(right))


def test_a_batch_without_masks_has_no_loss_and_no_gradient_of_nan() -> None:
    model = MaskedLM(Architecture(config("bert")))
    batch = {"input_ids": torch.full((2, 4), 9), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
    batch["labels"] = torch.full((2, 4), -100)
    mean, tokens = model.loss(model(batch), batch)
    mean.backward()
    assert (mean.item(), int(tokens)) == (0.0, 0)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    model.update_metrics(model.val_metrics, model(batch), batch)


def test_logits_are_selected_before_they_are_converted() -> None:
    model = MaskedLM(Architecture(config("bert")))
    logits = torch.randn(2, 4, 30, dtype=torch.bfloat16)
    labels = torch.full((2, 4), -100)
    labels[1, 2] = 7
    mean, _ = model.loss(logits, {"labels": labels})
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, -logits[1, 2].float().log_softmax(-1)[7])


@pytest.mark.parametrize(("kind", "mask"), [("bert", "[MASK]"), ("roberta", "<mask>")])
def test_predictions_are_those_of_the_pipeline(tmp_path: Path, kind: Kind, mask: str) -> None:
    folder = pretrained(tmp_path, kind, hf.AutoModelForMaskedLM)
    sentences = [f"the film is {mask} .", "Anna lives in New York .", f"{mask} Smith sings in {mask}"]
    model = MaskedLM(folder, top_k=3).eval()
    data = LanguageModelingData(folder, predict=Dataset.from_dict({"text": sentences}), eval_batch_size=2)
    data.setup("predict")
    with torch.no_grad():
        parts = [model.predict_step(batch, 0) for batch in data.predict_dataloader()]
    found, filled = ([value for part in parts for value in part[name]] for name in ("tokens", "filled"))
    pipeline = hf.pipeline("fill-mask", model=folder, tokenizer=folder, top_k=3, device="cpu")
    assert [len(masks) for masks in found] == [1, 0, 2]
    for row in (0, 2):
        expected = pipeline(sentences[row])
        for ours, theirs in zip(found[row], expected if row == 2 else [expected], strict=True):
            assert [item["token"] for item in ours] == [item["token_str"] for item in theirs]
            assert [item["score"] for item in ours] == pytest.approx([item["score"] for item in theirs], rel=1e-5)
        if row == 0:
            assert filled[0] == expected[0]["sequence"]
    assert filled[1] == model.tokenizer.decode(model.tokenizer(sentences[1])["input_ids"], skip_special_tokens=True)
    assert mask not in filled[2]


def test_a_batch_without_masks_has_no_tokens_to_predict() -> None:
    words = tokenizer("bert")
    model = MaskedLM(Architecture(config("bert"), words)).eval()
    batch = words(["the film is fine .", "Anna sings ."], padding=True, return_tensors="pt")
    predicted = model.predictions(batch)
    assert predicted == {"tokens": [[], []], "filled": words.batch_decode(batch["input_ids"], skip_special_tokens=True)}


def test_weights_that_are_missing_are_named(tmp_path: Path, minilm: str) -> None:
    with pytest.warns(UserWarning, match=r"lacks weights of AutoModelForMaskedLM.*cls\.predictions\.transform\.dense"):
        MaskedLM(minilm)
    classifier = pretrained(tmp_path / "classifier", "roberta", hf.AutoModelForSequenceClassification)
    with pytest.warns(UserWarning, match=r"random ones take their place: .*lm_head\.dense\.weight"):
        MaskedLM(classifier)
    whole = pretrained(tmp_path / "whole", "roberta", hf.AutoModelForMaskedLM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MaskedLM(whole)
        MaskedLM(Architecture(config("bert"), tokenizer("bert")))


def test_weights_of_another_size_are_named(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, "bert", hf.AutoModelForMaskedLM)
    settings = hf.AutoConfig.from_pretrained(folder)
    settings.vocab_size += 3
    settings.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"lacks weights.*word_embeddings\.weight"):
        MaskedLM(folder)


def test_the_encoder_goes_on_to_a_classifier(tmp_path: Path) -> None:
    model = MaskedLM(Architecture(config("bert"), tokenizer("bert")))
    model.save_pretrained(tmp_path)
    classifier = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    theirs = dict(classifier.bert.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in model.model.bert.named_parameters())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k=0 must be 1 or more"):
        MaskedLM(Architecture(config("bert")), top_k=0)
    model = MaskedLM(Architecture(config("bert")))
    with pytest.raises(ValueError, match="has no tokenizer that knows one"):
        model.predictions({"input_ids": torch.ones(1, 2, dtype=torch.int64)})
