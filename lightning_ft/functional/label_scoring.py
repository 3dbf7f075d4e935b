"""Labels as texts: how probable an encoder-decoder finds each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ENCODER_INPUTS = ("input_ids", "attention_mask")


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """What the decoder reads to predict ``labels``: the start token, then the labels but for the last.

    Args:
        model: The model; its own method is used where it has one (mBART moves the last token to the front).
        labels: ``(batch, seq)``, -100 on padding.

    Raises:
        ValueError: The model's configuration names no start token.
    """
    if (own := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
        ids: Tensor = own(labels=labels)
        return ids
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(f"the configuration of {type(model).__name__} has no decoder_start_token_id: set it")
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return ids.masked_fill(ids == -100, model.config.pad_token_id)


def target_log_likelihoods(
    model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Tensor, *, encoded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p(target | source) = Σₜ log p(yₜ | y₁ … yₜ₋₁, source), and the number of terms.

    Args:
        model: An encoder-decoder, in eval mode for the same score each time.
        batch: ``input_ids`` and ``attention_mask`` of the sources, ``(batch, seq)``.
        labels: The targets, ``(batch, other seq)``, -100 on padding.
        encoded: The encoder's states of the sources, ``(batch, seq, width)``; computed where they are not given.

    Returns:
        Log-probabilities in nats, ``(batch,)`` in fp32, and how many tokens each is the sum over, ``(batch,)``.
    """
    from transformers.modeling_outputs import BaseModelOutput

    states = encode(model, batch) if encoded is None else encoded
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=batch.get("attention_mask"),
        decoder_input_ids=decoder_inputs(model, labels),
        use_cache=False,
    ).logits
    terms = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # 0 where a label is -100
    return -terms.sum(1), (labels != -100).sum(1)


def encode(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The encoder's last states, ``(batch, seq, width)``."""
    given = {name: batch[name] for name in _ENCODER_INPUTS if name in batch}
    states: Tensor = model.get_encoder()(**given).last_hidden_state
    return states


def label_log_likelihoods(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    label_ids: Tensor,
    *,
    normalise: Literal["sum", "mean"] = "sum",
    max_rows: int = 256,
) -> Tensor:
    """log p(label | text) for each text and label. The encoder runs once, the decoder on all labels of a text together.

    Args:
        model: An encoder-decoder, in eval mode for the same score each time.
        batch: ``input_ids`` and ``attention_mask``, ``(batch, seq)``.
        label_ids: Tokens of the labels, see :func:`label_token_ids`: ``(labels, width)``, -100 on padding.
        normalise: ``"sum"`` for log p; ``"mean"`` divides it by the label's tokens, so that long labels lose nothing
            by their length.
        max_rows: Pairs of text and label in one pass of the decoder: their logits over the vocabulary are held at once.

    Returns:
        In nats, ``(batch, labels)`` in fp32. The softmax over a row of sums gives the labels' probabilities if one of
        them is the answer.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> sizes = dict(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
        >>> model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
        >>> label_log_likelihoods(model, {"input_ids": torch.tensor([[5, 6, 1]])}, torch.tensor([[3, 1], [4, 1]])).shape
        torch.Size([1, 2])
    """
    if normalise not in ("sum", "mean"):
        raise ValueError(f'normalise={normalise!r} must be "sum" or "mean"')
    states, rows = encode(model, batch), len(batch["input_ids"])
    scores = []
    for part in torch.split(label_ids.to(states.device), max(max_rows // max(rows, 1), 1)):
        again: dict[str, Any] = {
            name: batch[name].repeat_interleave(len(part), 0) for name in _ENCODER_INPUTS if name in batch
        }
        total, tokens = target_log_likelihoods(
            model, again, part.repeat(rows, 1), encoded=states.repeat_interleave(len(part), 0)
        )
        scores.append((total if normalise == "sum" else total / tokens).view(rows, -1))
    return torch.cat(scores, 1)


def label_token_ids(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> Tensor:
    """Tokens of label strings as targets, with what the tokenizer ends a target with.

    Returns:
        ``(labels, width)``, -100 on padding.

    Raises:
        ValueError: A label is the beginning of another one: it would be the more probable one for every text, whichever
            is right. Targets that end in an end-of-sequence token never are.
    """
    ids = [tuple(row) for row in tokenizer(text_target=list(labels))["input_ids"]]
    for i, (first, short) in enumerate(zip(labels, ids, strict=True)):
        for j, (second, long) in enumerate(zip(labels, ids, strict=True)):
            if i != j and long[: len(short)] == short:
                raise ValueError(
                    f"the tokens {list(short)} of the label {first!r} begin those of {second!r}: {list(long)}. Choose "
                    "labels that differ in their tokens, or a tokenizer that ends targets with an end-of-sequence token"
                )
    width = max(map(len, ids))
    return torch.tensor([[*row, *[-100] * (width - len(row))] for row in ids])
