"""What training.py runs: variants, sizes of models, and the order of a round."""

from __future__ import annotations

from typing import Any, NamedTuple

from _flops import flops_per_token, matrix_weights

OURS, THEIRS, AGAIN = "lightning_ft", "HF Trainer", "lightning_ft (again)"
RANK = 16  # of LoRA


class Variant(NamedTuple):
    """What is trained, and how.

    Args:
        name: In the table.
        precision: fp32, tf32, bf16 or fp16; the last two are autocast over fp32 weights.
        base: full (all weights train), lora, int8 or int4 (LoRA over a quantised base).
        optimizer: adamw (fused), or adamw8bit.
        attention: eager, sdpa, flash (PyTorch's own kernel and no other) or flash_attention_2 (the package flash-attn).
        compiled: Whether the model is compiled.
    """

    name: str
    precision: str
    base: str = "full"
    optimizer: str = "adamw"
    attention: str = "sdpa"
    compiled: bool = False

    @property
    def needs_gpu(self) -> bool:
        """Whether there is no such thing on a CPU."""
        return self.precision in ("tf32", "fp16") or self.attention.startswith("flash")


# In the order in which they matter: what there may be no time for stands last.
VARIANTS = (
    Variant("bf16", "bf16"),
    Variant("fp32", "fp32"),
    Variant("tf32", "tf32"),
    Variant("fp16", "fp16"),
    Variant("bf16, 8-bit AdamW", "bf16", optimizer="adamw8bit"),
    Variant("bf16, LoRA", "bf16", base="lora"),
    Variant("bf16, int8 + LoRA", "bf16", base="int8"),
    Variant("bf16, 4 bits + LoRA (QLoRA)", "bf16", base="int4"),
    Variant("bf16, eager attention", "bf16", attention="eager"),
    Variant("bf16, PyTorch's flash attention", "bf16", attention="flash"),
    Variant("bf16, flash-attn 2", "bf16", attention="flash_attention_2"),
    Variant("bf16, torch.compile", "bf16", compiled=True),
)


class Model(NamedTuple):
    """A size, the rows and tokens of its batches, and its share of the time."""

    config: dict[str, Any]
    rows: int
    length: int
    share: float


BERT = {
    "decoder": False,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}
LLAMA = {  # Llama 3.2 1B's
    "decoder": True,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
MODELS = {"BERT-base": Model(BERT, 64, 128, 0.4), "Llama-1B": Model(LLAMA, 4, 1024, 0.6)}
QUICK = {
    "tiny BERT": Model({**BERT, **TINY}, 2, 8, 0.5),
    "tiny Llama": Model({**LLAMA, **TINY, "num_key_value_heads": 2, "head_dim": 16}, 2, 8, 0.5),
}


def order(variants: list[Variant]) -> list[tuple[Variant, str]]:
    """A round: each variant under both trainers, and the first one again."""
    pairs = [(variant, trainer) for variant in variants for trainer in (OURS, THEIRS)]
    return [*pairs[:2], (variants[0], AGAIN), *pairs[2:]]


def describe(models: dict[str, Model], variants: list[Variant], rounds: int, seconds: int) -> str:
    """The plan, for people."""
    lines = [f"{len(models)} models, {len(variants)} variants, at most {rounds} rounds, {seconds} s in all"]
    for name, model in models.items():
        full, lora = (flops_per_token(model.config, model.length, lora_rank=rank) / 1e9 for rank in (None, RANK))
        weights = matrix_weights(model.config) / 1e6
        lines.append(
            f"{name}: {model.rows} rows of {model.length} tokens, N = {weights:.1f} million, {full:.3g} GFLOPs a "
            f"token, {lora:.3g} over a frozen base"
        )
    lines += ["A round:", *(f"  {title(contestant)}" for contestant in order(variants))]
    return "\n".join(lines)


def title(contestant: tuple[Variant, str]) -> str:
    """Its name."""
    variant, trainer = contestant
    return f"{variant.name}: {trainer}"
