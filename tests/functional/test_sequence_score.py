"""Scores of whole texts against loops by hand."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from lightning_ft.functional.sequence_score import log_likelihood, pseudo_log_likelihood
from tests.tiny import BERT, GPT2, LLAMA


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("config", [hf.GPT2Config(**GPT2), hf.LlamaConfig(**LLAMA)], ids=["gpt2", "llama"])
def test_log_likelihood_is_the_sum_of_a_loop(config: hf.PreTrainedConfig, left: bool) -> None:
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    texts = [[5, 6, 7, 8, 9], [10, 11, 3], [4]]
    ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)
    expected = []
    for row, text in enumerate(texts):
        place = slice(5 - len(text), 5) if left else slice(len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
        total = 0.0
        for end in range(1, len(text)):
            logits = model(input_ids=torch.tensor([text[:end]])).logits[0, -1]
            total += logits.log_softmax(-1)[text[end]].item()
        expected.append(total)
    score, tokens = log_likelihood(model, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(score, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == [4, 2, 0]


def test_log_likelihood_of_an_answer_alone() -> None:
    model = hf.AutoModelForCausalLM.from_config(hf.GPT2Config(**GPT2)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    whole, _ = log_likelihood(model, {"input_ids": ids})
    prompt, _ = log_likelihood(model, {"input_ids": ids[:, :2]})
    answer, tokens = log_likelihood(model, {"input_ids": ids, "labels": torch.tensor([[-100, -100, 7, 8]])})
    torch.testing.assert_close(answer, whole - prompt)
    assert tokens.tolist() == [2]


@pytest.mark.parametrize("batch_size", [2, 100])
def test_pseudo_log_likelihood_is_the_sum_of_a_loop(batch_size: int) -> None:
    model = hf.AutoModelForMaskedLM.from_config(hf.BertConfig(**BERT)).eval()
    special, mask_id = [1, 2, 3], 3
    texts = [[1, 5, 6, 7, 2], [1, 9, 2], [1, 2]]
    ids = torch.tensor([text + [0] * (5 - len(text)) for text in texts])
    before = ids.clone()
    expected = []
    for text in texts:
        total = 0.0
        for place, token in enumerate(text):
            if token not in special:
                masked = torch.tensor([[*text[:place], mask_id, *text[place + 1 :]]])
                total += model(input_ids=masked).logits[0, place].log_softmax(-1)[token].item()
        expected.append(total)
    score, tokens = pseudo_log_likelihood(model, ids, (ids > 0).long(), mask_id, special, batch_size)
    torch.testing.assert_close(score, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == [3, 1, 0]
    assert torch.equal(ids, before)
    nothing = torch.tensor([[1, 2]])
    score, tokens = pseudo_log_likelihood(model, nothing, torch.ones_like(nothing), mask_id, special, batch_size)
    assert (score.tolist(), tokens.tolist()) == ([0.0], [0])
