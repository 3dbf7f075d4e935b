"""T5's objective: spans of a text become sentinels, and the targets say what was there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def span_corruption(
    ids: Tensor,
    sentinels: Sequence[int],
    eos: int,
    *,
    noise: float = 0.15,
    mean_span: float = 3.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace random spans of tokens by sentinels.

    round(noise·n) of n tokens, at least 1 and at most n - 1, fall into round(that / mean_span) spans, at least 1. Text
    and spans alternate, text first; the lengths of either are drawn uniformly from all partitions into parts of 1 or
    more. Inputs are the text with the k-th sentinel in place of the k-th span; targets are each sentinel followed by
    its span; both end with ``eos``. Of one token the span is all.

    Deviations from the authors' code: a rate so high that there are fewer tokens of text than spans means fewer
    spans (there it is an error), and ids are looked up (:func:`sentinel_ids`), not computed from the vocabulary's size.

    Args:
        ids: Tokens without special tokens, ``(n,)``.
        sentinels: Ids of the sentinels, in the order of their use.
        eos: Id of the end-of-sequence token.
        noise: Share of tokens in spans.
        mean_span: Mean length of a span, in tokens.
        generator: Source of randomness; torch's default one by default.

    Returns:
        Inputs and targets, 1-D, of the type and on the device of ``ids``.

    Raises:
        ValueError: No token, a number out of range, or fewer sentinels than spans.

    Example:
        >>> inputs, targets = span_corruption(torch.arange(568), range(1000, 1100), eos=1)
        >>> len(inputs), len(targets)
        (512, 114)

    Reference:
        Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 3.1.4.
    """
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"ids must be one row of one token or more, got the shape {tuple(ids.shape)}")
    noisy, spans = _spans(len(ids), noise, mean_span)
    if spans > len(sentinels):
        raise ValueError(
            f"{len(ids)} tokens make {spans} spans, and there are {len(sentinels)} sentinels: cut the text into "
            "shorter rows, lower noise, or raise mean_span"
        )
    # Text and spans in turns; the one token of a row of one is a span, and the text before it is empty.
    text = _partition(len(ids) - noisy, spans, generator) if noisy < len(ids) else torch.zeros(1, dtype=torch.int64)
    lengths = torch.stack([text, _partition(noisy, spans, generator)], 1).flatten()
    pieces = torch.split(ids, lengths.tolist())
    marks = torch.split(ids.new_tensor(list(sentinels[:spans])), 1)
    end = ids.new_tensor([eos])
    inputs = [part for pair in zip(pieces[0::2], marks, strict=True) for part in pair]
    targets = [part for pair in zip(marks, pieces[1::2], strict=True) for part in pair]
    return torch.cat([*inputs, end]), torch.cat([*targets, end])


def corrupted_lengths(raw: int, *, noise: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Lengths of the inputs and targets that :func:`span_corruption` makes of ``raw`` tokens.

    Example:
        >>> corrupted_lengths(568), corrupted_lengths(141)
        ((512, 114), (128, 29))
    """
    noisy, spans = _spans(raw, noise, mean_span)
    return raw - noisy + spans + 1, noisy + spans + 1


def raw_length(inputs_length: int, *, noise: float = 0.15, mean_span: float = 3.0) -> int:
    """The largest number of tokens of which :func:`span_corruption` makes inputs of at most ``inputs_length``.

    Raises:
        ValueError: Not even one token fits.

    Example:
        >>> raw_length(512), raw_length(128)
        (568, 141)
    """
    if inputs_length < 2:
        raise ValueError(f"inputs_length={inputs_length} has no room for a sentinel and the end: give 2 or more")
    raw = 1
    while corrupted_lengths(raw + 1, noise=noise, mean_span=mean_span)[0] <= inputs_length:
        raw += 1
    return raw


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of ``<extra_id_0>``, ``<extra_id_1>`` and so on, up to the first that is not there.

    Raises:
        ValueError: There is none.
    """
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (name := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[name])
    if not ids:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no sentinel tokens (<extra_id_0>, …), which span corruption "
            "needs: use a T5 tokenizer, or add them to the tokenizer and resize the model's embeddings"
        )
    return ids


def _spans(length: int, noise: float, mean_span: float) -> tuple[int, int]:
    """Tokens in spans, and spans."""
    if not 0 < noise < 1:
        raise ValueError(f"noise={noise} must lie between 0 and 1; 0.15 is usual")
    if not mean_span >= 1:
        raise ValueError(f"mean_span={mean_span} must be 1 token or more; 3 is usual")
    noisy = max(min(round(length * noise), length - 1), 1)
    return noisy, max(min(round(noisy / mean_span), length - noisy), 1)


def _partition(total: int, parts: int, generator: torch.Generator | None) -> Tensor:
    """A random way, all equally likely, of writing ``total`` as a sum of ``parts`` numbers of 1 or more."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    return torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([total]))
