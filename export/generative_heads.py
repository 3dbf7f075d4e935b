"""The heads of models that write text: their graphs, how tokens are chosen, and what prompts look like."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_ft.core.special_tokens import around
from lightning_ft.export.generation import GenerationSettings
from lightning_ft.export.generative_graphs import (
    DECODER,
    ENCODER,
    CausalGraphs,
    Seq2SeqGraphs,
    generation_settings,
)
from lightning_ft.export.graphs import MODEL
from lightning_ft.export.heads import Head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.modules import CausalLM, Seq2Seq

NEW_TOKENS = 128
"""What is written at most where a model does not say, as in our modules."""


def causal_head(module: CausalLM, tokenizer: PreTrainedTokenizerBase | None) -> Head:
    """The head of our causal language model: it writes as its predictions do."""
    if (used := tokenizer or module.tokenizer) is None:
        return _causal(_settings(module.model), None)
    config = module._generation()
    chosen = {} if tokenizer is None else {"pad_token_id": used.pad_token_id}
    return _causal(generation_settings(config, **chosen), used)


def seq2seq_head(module: Seq2Seq) -> Head:
    """The head of our encoder-decoder: it writes, or chooses among labels, as its predictions do."""
    settings = _settings(module.model)
    labels = tuple(module.label_texts or ())
    extra: dict[str, Any] = {}
    if labels:
        ids = [[token for token in row if token != -100] for row in module._label_ids.tolist()]
        extra = {"label_ids": ids, "length_normalised": module.length_normalised}
    return _paired(settings, labels, extra)


def hf_generative_head(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Head:
    """The head of a model of transformers: it writes as its ``generation_config`` says."""
    settings = _settings(model)
    return _paired(settings, (), {}) if model.config.is_encoder_decoder else _causal(settings, tokenizer)


def _settings(model: Any) -> GenerationSettings:
    config = model.generation_config
    chosen: dict[str, Any] = {} if config.max_new_tokens else {"max_new_tokens": NEW_TOKENS}
    pad = model.config.pad_token_id if config.pad_token_id is None else config.pad_token_id
    start = config.decoder_start_token_id
    if model.config.is_encoder_decoder and start is None:
        start = getattr(model.config, "decoder_start_token_id", None)
        start = config.bos_token_id if start is None else start
        if start is None:
            raise ValueError(
                f"{type(model).__name__} has no decoder_start_token_id, with which texts begin: set it in "
                "model.generation_config"
            )
    return generation_settings(config, **chosen, pad_token_id=pad or 0, decoder_start_token_id=start)


def _causal(settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase | None) -> Head:
    known = {
        "graphs": {"decoder": MODEL},
        "generation": settings._asdict(),
        "prompt": {} if tokenizer is None else _prompt(tokenizer),
    }
    return Head("text-generation", partial(CausalGraphs, settings=settings), settings=known)


def _paired(settings: GenerationSettings, labels: tuple[str, ...], extra: dict[str, Any]) -> Head:
    known = {"graphs": {"encoder": ENCODER, "decoder": DECODER}, "generation": settings._asdict(), **extra}
    return Head("text2text-generation", partial(Seq2SeqGraphs, settings=settings), labels, known)


def _prompt(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How rows become prompts, as our data modules make them.

    Returns:
        ``before``, the ids before a text; ``template``, the text that instructions are put into; ``chat_template``, the
        tokenizer's own in Jinja, which comes before it, or None; and ``special``, the tokens that it may name.
    """
    from lightning_ft.data.prompts import TEMPLATE

    chat = tokenizer.get_chat_template() if tokenizer.chat_template else None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return {"before": around(tokenizer)[0], "template": TEMPLATE, "chat_template": chat, "special": special}
