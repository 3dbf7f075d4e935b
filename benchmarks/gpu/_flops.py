"""Floating-point operations of a training step, from a configuration, and what GPUs can do at most."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

# Dense TFLOP/s of the makers' data sheets (half of what they print "with sparsity"), at the boost clock and with sums
# in fp32. fp32 is that of the CUDA cores. The first pattern that matches the whole name counts.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"NVIDIA H(100|200) NVL", {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}),
    (r"NVIDIA H100 PCIe", {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0}),
    (r"NVIDIA (H100|H200|GH200).*", {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4}),
    (r"(NVIDIA )?A100.*", {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}),
    (r"NVIDIA L40S", {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0, "fp16": 362.0}),
    (r"NVIDIA L4", {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0}),
    (r"NVIDIA A10", {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0}),
    (r"(NVIDIA )?(Tesla )?V100.*", {"fp32": 15.7, "fp16": 125.0}),
    (r"(NVIDIA )?(Tesla )?T4", {"fp32": 8.1, "fp16": 65.0}),
)


def peak(device: str, kind: str) -> float | None:
    """FLOP/s that a device has at most in a data type; None where the table does not know, and for a part of a GPU."""
    for pattern, values in PEAKS:
        if re.fullmatch(pattern, device) and "MIG" not in device:
            return 1e12 * values[kind] if kind in values else None
    return None


def block_linears(config: Config) -> list[tuple[int, int]]:
    """Sizes of a block's linear layers."""
    wide, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", wide // heads)
    queries, keys = heads * size, config.get("num_key_value_heads", heads) * size
    up, down = (wide, config["intermediate_size"]), (config["intermediate_size"], wide)
    gate = [up] if config["decoder"] else []
    return [(wide, queries), (wide, keys), (wide, keys), (queries, wide), up, *gate, down]


def matrix_weights(config: Config) -> int:
    """N: weights that every token is multiplied by.

    Those of the blocks' linear layers, and of a decoder's output layer, tied or not. Looking up an embedding is no
    product; the pooler and classifier of an encoder see one token of a row.
    """
    blocks = config["num_hidden_layers"] * sum(rows * columns for rows, columns in block_linears(config))
    return blocks + (config["hidden_size"] * config["vocab_size"] if config["decoder"] else 0)


def lora_weights(config: Config, rank: int) -> int:
    """N of LoRA on all linear layers of the blocks."""
    return config["num_hidden_layers"] * sum(rank * (rows + columns) for rows, columns in block_linears(config))


def attention_flops(config: Config, length: int) -> float:
    """Scores and weighted means of the forward pass, for a token; of a decoder only the half that is not masked."""
    heads = config["num_attention_heads"]
    wide = heads * config.get("head_dim", config["hidden_size"] // heads)
    products = 4.0 * config["num_hidden_layers"] * wide * length
    return products / 2 if config["decoder"] else products


def flops_per_token(config: Config, length: int, *, lora_rank: int | None = None) -> float:
    """Forward and backward pass, for a token.

    Full fine-tuning: 6·N + 3·A: two for each weight in the forward pass, and twice that in the backward pass, for the
    gradients of inputs and of weights; A is :func:`attention_flops`. LoRA: 4·N + 6·N_lora + 3·A: no gradients of the
    frozen weights. What is computed anew in the backward pass (checkpointing, flash attention), quantisation and the
    optimiser are not counted: it is the model's FLOPs that MFU divides by the peak.
    """
    attention = 3 * attention_flops(config, length)
    if lora_rank is None:
        return 6.0 * matrix_weights(config) + attention
    return 4.0 * matrix_weights(config) + 6.0 * lora_weights(config, lora_rank) + attention
