"""Scores of labels from the logits of their words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def label_scores(logits: Tensor, words: Tensor) -> Tensor:
    """The mean score of each label's words; softmax over labels turns them into probabilities.

    One mask: the raw logits of the words (PET). Several masks: Σ log p of a word's tokens, each at its own mask, all
    masks being read at once; a word of fewer tokens than masks is read at the first ones.

    Args:
        logits: Logits over the vocabulary at the masks, ``(batch, masks, vocab)``.
        words: Tokens of the words, ``(batch, labels, words, masks)`` or without ``batch``; −1 where a label has fewer
            words, or a word fewer tokens.

    Returns:
        ``(batch, labels)``, in fp32.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[1.0, 3.0, 2.0]]])
        >>> label_scores(logits, torch.tensor([[[0], [1]], [[2], [-1]]]))  # the words 0 and 1 against the word 2
        tensor([[2., 2.]])

    Reference:
        Schick and Schütze 2021, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language
        Inference".
    """
    logits = logits.float()
    batch, masks, _ = logits.shape
    if masks > 1:
        logits = logits.log_softmax(-1)
    words = words.expand(batch, *words.shape[-3:])
    given = words >= 0
    index = words.clamp(min=0).permute(0, 3, 1, 2)  # (batch, masks, labels, words)
    scores = logits.gather(2, index.flatten(2)).view(index.shape).permute(0, 2, 3, 1)
    means: Tensor = (scores * given).sum((-1, -2)) / given.any(-1).sum(-1)
    return means


def logits_at(model: nn.Module, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Logits over the vocabulary at a few positions of each row.

    Only these are multiplied with the output embeddings, where the model says which module they are: for BERT-base and
    128 tokens that saves a quarter of the compute, and nearly all of the memory that logits take.

    Args:
        model: A Hugging Face model with a language-modelling head.
        inputs: What it takes.
        positions: ``(batch, n)``.

    Returns:
        ``(batch, n, vocab)``.
    """
    # Not len(), which would fix the batch in a traced graph.
    seen = (positions.shape[0], next(iter(inputs.values())).shape[1])
    picked = False

    def pick(values: Tensor) -> Tensor:
        return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal picked
        picked = args[0].ndim == 3 and args[0].shape[:2] == seen
        return (pick(args[0]), *args[1:]) if picked else None

    output: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    handle = None if output is None else output.register_forward_pre_hook(hook)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits if picked else pick(logits)
