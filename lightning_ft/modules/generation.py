"""How a model chooses the tokens that it writes: what its heads' arguments mean to ``generate``."""

from __future__ import annotations

from typing import Any


def check_generation(*, max_new_tokens: int, num_beams: int, temperature: float, top_p: float) -> None:
    """Refuse settings that mean nothing, or contradict each other.

    Raises:
        ValueError: One of them does.
    """
    if max_new_tokens < 1 or num_beams < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and num_beams={num_beams} must be 1 or more")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be 0 or more, and top_p={top_p} lie in (0, 1]")
    if temperature == 0 and top_p < 1:
        raise ValueError(f"top_p={top_p} is about drawn tokens, and temperature=0 draws none: set temperature=1.0")


def generation_settings(*, max_new_tokens: int, num_beams: int, temperature: float, top_p: float) -> dict[str, Any]:
    """The settings of a ``GenerationConfig``: ours in place of the model's own way of choosing tokens.

    Args:
        max_new_tokens: Tokens of a text at most.
        num_beams: Beams of the search; 1 is greedy.
        temperature: Draw from the softmax of logits / temperature; 0 takes the most probable tokens.
        top_p: Draw from the most probable tokens that together have this probability.
    """
    draws = temperature > 0
    return {
        "max_new_tokens": max_new_tokens,
        "max_length": None,
        "num_beams": num_beams,
        "do_sample": draws,
        "temperature": temperature if draws else None,
        "top_p": top_p if draws else None,
        "top_k": 0 if draws else None,
    }
