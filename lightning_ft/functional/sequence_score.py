"""How probable a language model finds a text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ft.functional.packing import move_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p(text) = Σₜ log p(wₜ | w₁ … wₜ₋₁) under a causal language model, and the number of terms.

    A row's first token is given, not scored: begin texts with the tokenizer's beginning-of-sequence token where it has
    one. Divide by the number of terms to compare texts of different lengths.

    Args:
        model: A causal language model, in eval mode for the same score each time.
        batch: ``input_ids``, ``(batch, seq)``, padded on either side; ``attention_mask``, without which every token
            counts; ``labels``, where only a part of the tokens is scored: -100 at the others.

    Returns:
        Log-probabilities in nats, ``(batch,)`` in fp32, and how many tokens each is the sum over, ``(batch,)``.

    Example:
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=5)).eval()
        >>> score, tokens = log_likelihood(model, {"input_ids": torch.tensor([[1, 2, 3, 4]])})
        >>> score.shape, tokens.tolist()
        (torch.Size([1]), [3])
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    # Padding on the right needs no position_ids, which not every model takes.
    mask, ids, labels = move_padding(mask, ids, batch.get("labels", ids), left=False)
    scored = (mask[:, 1:] == 1) & (labels[:, 1:] != -100)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    terms = torch.zeros(scored.shape, device=ids.device)
    terms[scored] = -F.cross_entropy(logits[scored].float(), ids[:, 1:][scored], reduction="none")
    return terms.sum(1), scored.sum(1)


@torch.no_grad()
def pseudo_log_likelihood(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    mask_id: int,
    special_ids: Collection[int],
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Σₜ log p(wₜ | the rest of the text) under a masked language model, and the number of terms.

    Each token in turn is replaced by the mask token, so that a text costs as many sequences as it has tokens. The sum
    is no log-probability of the text, but ranks texts as one.

    Args:
        model: A masked language model, in eval mode for the same score each time.
        input_ids: ``(batch, seq)``.
        attention_mask: 1 at tokens, 0 at padding, ``(batch, seq)``.
        mask_id: Number of the mask token.
        special_ids: Numbers of tokens that are not scored: ``tokenizer.all_special_ids``.
        batch_size: Sequences of one forward pass.

    Returns:
        Sums in nats, ``(batch,)`` in fp32, and how many tokens each is the sum over, ``(batch,)``.

    Example:
        >>> from transformers import AutoModelForMaskedLM, BertConfig
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
        >>> model = AutoModelForMaskedLM.from_config(config).eval()
        >>> ids = torch.tensor([[1, 5, 6, 2, 0]])
        >>> score, tokens = pseudo_log_likelihood(model, ids, (ids > 0).long(), mask_id=3, special_ids=[0, 1, 2, 3])
        >>> score.shape, tokens.tolist()
        (torch.Size([1]), [2])

    Reference:
        Salazar et al. 2020, "Masked Language Model Scoring".
    """
    special = torch.tensor(sorted(special_ids), device=input_ids.device, dtype=input_ids.dtype)
    scored = (attention_mask == 1) & ~torch.isin(input_ids, special)
    total = torch.zeros(len(input_ids), device=input_ids.device)
    for places in torch.split(scored.nonzero(), batch_size) if scored.any() else ():
        rows, columns = places.unbind(1)
        ids, each = input_ids[rows], torch.arange(len(rows), device=rows.device)
        targets = ids[each, columns]
        ids[each, columns] = mask_id
        logits = model(input_ids=ids, attention_mask=attention_mask[rows]).logits[each, columns]
        total.index_add_(0, rows, -F.cross_entropy(logits.float(), targets, reduction="none"))
    return total, scored.sum(1)
