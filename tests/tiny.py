"""Tiny random models by architecture: three blocks, width 16, vocabulary 50; made offline in milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf
from torch import nn

WIDE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
BERT = {**WIDE, "num_hidden_layers": 3, "max_position_embeddings": 32, "pad_token_id": 0}
LLAMA = {**BERT, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"vocab_size": 50, "d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "pooler_hidden_size": 16}
DISTILBERT = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50, "max_position_embeddings": 32}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50, "n_positions": 32}
T5 = {"d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
}


def classifier(config: hf.PreTrainedConfig) -> nn.Module:
    return hf.AutoModelForSequenceClassification.from_config(config).eval()


TINY: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: classifier(hf.BertConfig(**BERT)),
    "distilbert": lambda: classifier(hf.DistilBertConfig(**DISTILBERT)),
    "roberta": lambda: classifier(hf.RobertaConfig(**BERT)),
    "deberta": lambda: classifier(hf.DebertaV2Config(**BERT, **DEBERTA)),
    "deberta-full": lambda: classifier(
        hf.DebertaV2Config(**BERT, **DEBERTA, norm_rel_ebd="layer_norm", conv_kernel_size=3, embedding_size=8)
    ),
    "electra": lambda: classifier(hf.ElectraConfig(**BERT, embedding_size=8)),
    "albert": lambda: classifier(hf.AlbertConfig(**BERT, embedding_size=8)),
    "xlnet": lambda: classifier(hf.XLNetConfig(d_model=16, n_layer=3, n_head=2, d_inner=32, vocab_size=50)),
    "gpt2": lambda: classifier(hf.GPT2Config(**GPT2, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "llama": lambda: classifier(hf.LlamaConfig(**LLAMA)),
    "qwen3": lambda: classifier(hf.Qwen3Config(**LLAMA)),
    "modernbert": lambda: classifier(hf.ModernBertConfig(**LLAMA, cls_token_id=1, sep_token_id=2)),
    "t5": lambda: classifier(hf.T5Config(**SEQ2SEQ, **T5)),
    "bart": lambda: classifier(hf.BartConfig(**SEQ2SEQ, **BART)),
}
"""Architecture to a factory of a sequence classification model in eval mode."""


def tiny(name: str) -> nn.Module:
    """A fresh model of the architecture ``name``, one of ``TINY``."""
    return TINY[name]()
