"""Which models keep packed documents apart, and how padding moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from lightning_ft.functional.packing import keeps_documents_apart, move_padding
from tests.tiny import GPT2, LLAMA, WIDE

APART = {
    "gpt2": hf.GPT2Config(**GPT2),
    "llama": hf.LlamaConfig(**LLAMA),
    "qwen3": hf.Qwen3Config(**LLAMA),
    "mistral": hf.MistralConfig(**{**LLAMA, "sliding_window": 4}),
    "gemma3": hf.Gemma3TextConfig(**{**LLAMA, "sliding_window": 4}),
    "gpt_neox": hf.GPTNeoXConfig(**WIDE, num_hidden_layers=3),
}
ACROSS = {
    "mamba": hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, state_size=4),
    "bloom": hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50),
    "opt": hf.OPTConfig(**{**WIDE, "ffn_dim": 32, "word_embed_proj_dim": 16}, num_hidden_layers=2),
    "falcon": hf.FalconConfig(**WIDE, num_hidden_layers=2),
}


def model(config: hf.PreTrainedConfig, attention: str | None = None) -> Any:
    settings = {} if attention is None else {"attn_implementation": attention}
    return hf.AutoModelForCausalLM.from_config(config, **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", APART)
def test_packed_logits_equal_those_of_each_document_alone(name: str, attention: str) -> None:
    decoder = model(APART[name], attention).eval()
    documents = [torch.randint(5, 50, (length,)) for length in (9, 1, 12)]
    ids = torch.cat(documents)[None]
    places = torch.cat([torch.arange(len(document)) for document in documents])[None]
    with torch.no_grad():
        packed = decoder(input_ids=ids, position_ids=places, use_cache=False).logits[0]
        alone = torch.cat([decoder(input_ids=document[None]).logits[0] for document in documents])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)
    assert keeps_documents_apart(decoder, ids)


@pytest.mark.parametrize("name", ACROSS)
def test_models_that_read_across_are_found(name: str) -> None:
    assert not keeps_documents_apart(model(ACROSS[name]), torch.arange(5, 35).view(2, 15))


def test_a_batch_of_one_token_alone_is_no_reason_to_refuse() -> None:
    assert keeps_documents_apart(model(APART["llama"]), torch.full((1, 16), 7))
    assert not keeps_documents_apart(model(ACROSS["falcon"]), torch.full((1, 16), 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 3, 40])
def test_holds_for_every_precision_and_width(dtype: torch.dtype, width: int) -> None:
    assert keeps_documents_apart(model(APART["llama"]).to(dtype), torch.randint(5, 50, (3, width)))
    assert not keeps_documents_apart(model(ACROSS["falcon"]).to(dtype), torch.randint(5, 50, (3, width)))


def test_leaves_modes_and_random_numbers_as_they_were() -> None:
    decoder = model(APART["gpt2"]).train()
    decoder.transformer.h[1].eval()
    modes = [module.training for module in decoder.modules()]
    state = torch.get_rng_state()
    keeps_documents_apart(decoder, torch.arange(5, 20).view(1, 15))
    assert [module.training for module in decoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_padding_moves_and_tokens_keep_their_order() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 1]])
    ids = torch.tensor([[0, 5, 6, 0], [1, 2, 3, 4], [7, 0, 0, 8]])
    moved, left = move_padding(mask, ids, left=True)
    assert moved.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert left.tolist() == [[0, 0, 5, 6], [1, 2, 3, 4], [0, 0, 7, 8]]
    assert move_padding(mask, ids, left=False)[1].tolist() == [[5, 6, 0, 0], [1, 2, 3, 4], [7, 8, 0, 0]]
