"""Learnt prompts in the models themselves, against peft's own wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor

from lightning_ft.functional.peft_config import plain_config
from lightning_ft.functional.peft_methods import adapt
from lightning_ft.functional.peft_parts import adapter_parameters
from lightning_ft.functional.peft_prompts import prompts_of
from tests.tiny import BERT, GPT2, LLAMA, SEQ2SEQ, T5, tiny

METHODS: dict[str, Callable[..., Any]] = {
    "prefix": lambda **k: peft.PrefixTuningConfig(num_virtual_tokens=3, **k),
    "projected": lambda **k: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, **k),
    "prompt": lambda **k: peft.PromptTuningConfig(num_virtual_tokens=3, **k),
    "p-tuning": lambda **k: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **k),
}
TEXT = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert": ("SEQ_CLS", lambda: tiny("bert")),
    "gpt2": ("SEQ_CLS", lambda: tiny("gpt2")),
    "llama": ("SEQ_CLS", lambda: tiny("llama")),
    "bert-tokens": ("TOKEN_CLS", lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT)).eval()),
    "bert-alone": ("FEATURE_EXTRACTION", lambda: hf.BertModel(hf.BertConfig(**BERT)).eval()),
    "gpt2-lm": ("CAUSAL_LM", lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, **TEXT)).eval()),
    "llama-lm": ("CAUSAL_LM", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).eval()),
}
each_method = pytest.mark.parametrize("method", METHODS)


def texts() -> dict[str, Tensor]:
    """The second is shorter."""
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    ids[:, 4] = 2  # T5 reads a text at its end
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def first(model: Any, **given: Tensor) -> Tensor:
    result: Tensor = next(iter(model(**given).values()))
    return result


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
@each_method
def test_they_act_as_in_pefts_wrapper(method: str, name: str) -> None:
    task, build = MODELS[name]
    model = build()
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), METHODS[method](task_type=task)).eval()
    adapt(model, config=plain_config(METHODS[method](task_type=task)))
    prompts = prompts_of(model)
    assert prompts is not None
    theirs.prompt_encoder["default"].load_state_dict(prompts.encoders["default"].state_dict())
    # One text, since decoders that peft gives embeddings do not see where a shorter one ends.
    given = {key: value[:1] for key, value in texts().items()}
    ours, expected = first(model, **given), first(theirs, **given)
    if ours.ndim == 3:  # peft leaves the places of virtual tokens in
        assert ours.shape[1] == given["input_ids"].shape[1]
        expected = expected[:, -ours.shape[1] :]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "roberta", "electra"])
@each_method
def test_shape_and_padding_are_the_models(method: str, name: str) -> None:
    model = tiny(name)
    given = texts()
    before = first(model, **given)
    adapt(model, config=plain_config(METHODS[method]()))
    after = first(model, **given)
    assert after.shape == before.shape
    assert not torch.allclose(after, before, atol=1e-5)
    alone = first(model, **{key: value[1:, :5] for key, value in given.items()})
    torch.testing.assert_close(after[1:], alone, rtol=1e-5, atol=1e-6)


@each_method
def test_losses_with_labels_and_answers_to_questions(method: str) -> None:
    model = hf.BertForQuestionAnswering(hf.BertConfig(**BERT))
    adapt(model, config=plain_config(METHODS[method]()))
    given = texts()
    places = torch.tensor([1, 2])
    output = model(**given, start_positions=places, end_positions=places)
    assert output.start_logits.shape == given["input_ids"].shape
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model) if p.requires_grad)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@each_method
def test_text_is_generated_as_without_a_cache_and_whatever_the_padding(method: str, name: str) -> None:
    settings = {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, **TEXT)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ, **T5)),
    }
    torch.manual_seed(0)
    model: Any = settings[name]().eval()
    adapt(model, config=plain_config(METHODS[method]()))
    given = {key: value.flip(1) for key, value in texts().items()}  # padded on the left
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**given, **how)
    assert torch.equal(cached, model.generate(**given, **how, use_cache=False))
    alone = model.generate(**{key: value[1:, 2:] for key, value in given.items()}, **how)
    assert torch.equal(cached[1, -6:], alone[0, -6:])


def test_a_copy_has_prompts_of_its_own() -> None:
    model = tiny("bert")
    adapt(model, config=plain_config(METHODS["prompt"]()))
    given = texts()
    copied, before = copy.deepcopy(model), first(model, **given)
    for parameter in adapter_parameters(copied):
        parameter.data.add_(1.0)
    assert torch.equal(first(model, **given), before)
    assert not torch.equal(first(copied, **given), before)


def test_positions_are_shifted() -> None:
    model = tiny("bert")
    adapt(model, config=plain_config(METHODS["prompt"]()))
    given = texts()
    places = torch.arange(7).expand(2, -1)
    assert torch.equal(first(model, **given, position_ids=places), first(model, **given))
    assert torch.equal(first(model, **given, token_type_ids=torch.zeros_like(places)), first(model, **given))


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (
            "distilbert",
            METHODS["prefix"](),
            "PREFIX_TUNING needs a network that takes past_key_values=, and DistilBert",
        ),
        ("bert", METHODS["prompt"](num_transformer_submodules=2), "num_transformer_submodules 1; got 3 and 2"),
    ],
)
def test_refusals(model: str, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(tiny(model), config=plain_config(config))


def test_refuses_packing_and_recomputed_activations() -> None:
    model: Any = tiny("bert")
    adapt(model, config=plain_config(METHODS["prompt"]()))
    with pytest.raises(ValueError, match=r"need attention_mask of shape \(batch, length\), and got \(2, 1, 7, 7\)"):
        model(texts()["input_ids"], attention_mask=torch.ones(2, 1, 7, 7))
    model = tiny("bert")
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="works by the cache, which gradient checkpointing leaves out"):
        adapt(model, config=plain_config(METHODS["prefix"]()))
