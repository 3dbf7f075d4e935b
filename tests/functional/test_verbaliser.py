"""Scores of labels, and logits at a few positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from lightning_ft.functional.verbaliser import label_scores, logits_at
from tests.tiny import BART, BERT, DEBERTA, GPT2, LLAMA, SEQ2SEQ

MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (hf.AutoModelForMaskedLM, hf.BertConfig(**BERT)),
    "roberta": (hf.AutoModelForMaskedLM, hf.RobertaConfig(**BERT)),
    "albert": (hf.AutoModelForMaskedLM, hf.AlbertConfig(**BERT, embedding_size=8)),
    "electra": (hf.AutoModelForMaskedLM, hf.ElectraConfig(**BERT, embedding_size=8)),
    "deberta": (hf.AutoModelForMaskedLM, hf.DebertaV2Config(**BERT, **DEBERTA)),
    "modernbert": (hf.AutoModelForMaskedLM, hf.ModernBertConfig(**LLAMA, cls_token_id=1, sep_token_id=2)),
    "bart": (hf.AutoModelForMaskedLM, hf.BartConfig(**SEQ2SEQ, **BART)),
    "gpt2": (hf.AutoModelForCausalLM, hf.GPT2Config(**GPT2)),
    "llama": (hf.AutoModelForCausalLM, hf.LlamaConfig(**LLAMA)),
}


def test_hand_worked() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0, 9.0]]])
    scores = label_scores(logits, torch.tensor([[[0], [1]], [[2], [-1]]]))
    assert scores.tolist() == [[2.0, 2.0]]
    assert scores.softmax(-1).tolist() == [[0.5, 0.5]]


def test_each_row_may_have_its_own_words() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0]], [[1.0, 3.0, 2.0]]])
    words = torch.tensor([[[[0]], [[1]]], [[[2]], [[0]]]])
    assert label_scores(logits, words).tolist() == [[1.0, 3.0], [2.0, 1.0]]


def test_several_masks_add_log_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 2, 7)
    words = torch.tensor([[[3, 4], [0, -1]], [[6, 2], [-1, -1]]])  # the second word is shorter: the first mask
    logp = logits.log_softmax(-1)
    expected = torch.stack([(logp[:, 0, 3] + logp[:, 1, 4] + logp[:, 0, 0]) / 2, logp[:, 0, 6] + logp[:, 1, 2]], 1)
    torch.testing.assert_close(label_scores(logits, words), expected)


def test_half_precision_becomes_single() -> None:
    assert label_scores(torch.zeros(1, 1, 4, dtype=torch.bfloat16), torch.tensor([[[0]], [[1]]])).dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_logits_at_some_positions_are_those_of_the_whole_row(name: str) -> None:
    auto, config = MODELS[name]
    model = auto.from_config(config).eval()
    ids = torch.randint(3, 50, (4, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape))
    with torch.no_grad():
        whole = model(**inputs).logits
        for positions in (torch.tensor([[0], [8], [3], [3]]), torch.tensor([[0, 1], [8, 2], [3, 4], [5, 3]])):
            picked = logits_at(model, inputs, positions)
            expected = torch.stack([row[at] for row, at in zip(whole, positions, strict=True)])
            torch.testing.assert_close(picked, expected)
            assert seen[-1] == expected.shape, "the whole row was multiplied with the output embeddings"
        torch.testing.assert_close(logits_at(model, inputs, torch.arange(9).expand(4, 9)), whole)
        assert torch.equal(model(**inputs).logits, whole), "a hook was left behind"


def test_models_that_do_not_name_their_output_embeddings() -> None:
    model = hf.AutoModelForMaskedLM.from_config(hf.BertConfig(**BERT)).eval()
    ids, positions = torch.randint(3, 50, (4, 9)), torch.tensor([[0], [8], [3], [3]])
    expected = logits_at(model, {"input_ids": ids}, positions)
    model.get_output_embeddings = lambda: None
    torch.testing.assert_close(logits_at(model, {"input_ids": ids}, positions), expected)
