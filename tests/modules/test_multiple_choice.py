"""Multiple choice: the contract, transformers' own loss, and what a permutation of the choices changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer

from lightning_ft.data.multiple_choice import MultipleChoiceData
from lightning_ft.modules.multiple_choice import MultipleChoice
from tests.data.test_multiple_choice_data import rows
from tests.pretrained import Kind, check_head, pretrained


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_contract(kind: Kind, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", kind, hf.AutoModelForMultipleChoice)
    check_head(
        lambda: MultipleChoice(folder, learning_rate=1e-3),
        lambda: MultipleChoiceData(folder, rows(24), rows(7), predict=rows(5), batch_size=4),
        hf.AutoModelForMultipleChoice,
        tmp_path,
    )


def model_and_batch(folder: Path, choices: int = 3) -> tuple[MultipleChoice, dict[str, torch.Tensor]]:
    path = pretrained(folder / "model", "bert", hf.AutoModelForMultipleChoice, initializer_range=0.3)
    data = MultipleChoiceData(path, val=rows(6, choices))
    data.setup("validate")
    return MultipleChoice(path).eval(), next(iter(data.val_dataloader()))


@pytest.mark.parametrize("choices", [2, 5])
def test_loss_and_metric_equal_transformers_own(choices: int, tmp_path: Path) -> None:
    module, batch = model_and_batch(tmp_path, choices)
    given = {name: values for name, values in batch.items() if name != "row"}
    with torch.no_grad():
        expected, logits = module.model(**given), module(batch)
        loss, items = module.loss(logits, batch)
    assert logits.shape == (6, choices)
    assert torch.equal(logits, expected.logits)
    assert items == 6
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-6)
    module.update_metrics(module.val_metrics, logits, batch)
    module.update_metrics(module.val_metrics, logits[:1], {"labels": logits[:1].argmax(-1)})
    right = int((logits.argmax(-1) == batch["labels"]).sum())
    assert module.val_metrics.compute()["val_accuracy"].item() == pytest.approx((right + 1) / 7)


def test_a_permutation_of_the_choices_permutes_the_probabilities(tmp_path: Path) -> None:
    module, batch = model_and_batch(tmp_path)
    order = torch.tensor([2, 0, 1])
    turned = {name: values[:, order] if values.ndim == 3 else values for name, values in batch.items()}
    with torch.no_grad():
        first, second = module.predictions(batch), module.predictions(turned)
        turned["labels"] = order.argsort()[batch["labels"]]
        losses = [module.loss(module(part), part)[0] for part in (batch, turned)]
    torch.testing.assert_close(
        torch.tensor(first["probabilities"])[:, order], torch.tensor(second["probabilities"]), rtol=0, atol=1e-6
    )
    assert [int(order[choice]) for choice in second["choice"]] == first["choice"]
    assert second["score"] == pytest.approx(first["score"], abs=1e-6)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
    assert len({round(p, 4) for p in first["probabilities"][0]}) == 3


def test_decoders_have_no_such_head(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, "gpt2", hf.AutoModelForCausalLM)
    with pytest.raises(ValueError, match=r"Unrecognized configuration class.*MultipleChoice"):
        MultipleChoice(folder)


def test_learns_which_choice_fits(tmp_path: Path) -> None:
    """Right is the choice with the word "good", wherever it stands."""
    path = pretrained(tmp_path, "bert", hf.AutoModelForMultipleChoice, initializer_range=0.2)
    words = ["film", "story", "people", "London"]
    pairs = [(a, b) for a in words for b in words]
    train = Dataset.from_dict(
        {
            "context": [a for a, _ in pairs],
            "choices": [[f"good {b}", f"bad {b}"][:: 1 - 2 * (i % 2)] for i, (_, b) in enumerate(pairs)],
            "label": [i % 2 for i in range(len(pairs))],
        }
    )
    data = MultipleChoiceData(path, train, train, batch_size=8)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=20,
        check_val_every_n_epoch=20,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MultipleChoice(path, learning_rate=1e-2), datamodule=data)
    assert trainer.callback_metrics["val_accuracy"] == 1
    assert trainer.callback_metrics["val_loss"] < 0.3
