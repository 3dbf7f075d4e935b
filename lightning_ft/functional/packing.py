"""Several documents in one sequence: whether a model keeps them apart; and where the tokens of padded rows lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ft.core.undisturbed import eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAK = 0.1


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Whether a causal language model treats documents in one sequence as it treats each of them alone.

    Packed documents are told from another by nothing but ``position_ids`` that begin anew. The models of transformers
    that make their attention mask with ``create_causal_mask`` read them so, with every attention function (flash
    attention only in batches of one sequence); others read on across the border without a word: models that have a
    state instead of attention, or compute positions themselves.

    Two short documents go through the model: packed; the second one alone; and as if they were one document. Packing
    must remove nine tenths or more of the difference that the last makes to the second one's logits; what it leaves is
    rounding, whatever the precision. The model's modes come back as they were, and no random number is drawn.

    Args:
        model: A causal language model.
        input_ids: A batch, ``(batch, seq)`` of two tokens or more: for the number of its sequences and their length.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = AutoModelForCausalLM.from_config(LlamaConfig(**size, vocab_size=9))
        >>> keeps_documents_apart(model, torch.arange(8).view(1, 8))
        True

    Reference:
        Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination".
    """
    half = min(8, input_ids.shape[1])
    # All different, or the second document would be read alike with and without the first. Two sequences at most, but
    # not one for several: flash attention reads the borders of a single one only.
    tokens = torch.arange(2 * half, device=input_ids.device) % model.config.get_text_config().vocab_size
    tokens = tokens.expand(min(len(input_ids), 2), -1)
    once = torch.arange(half, device=tokens.device)
    twice = torch.arange(2 * half, device=tokens.device)
    with eval_mode(model.modules()):
        packed, alone, joined = (
            model(input_ids=ids, position_ids=positions.expand(len(ids), -1), use_cache=False).logits[:, -half:].float()
            for ids, positions in (
                (tokens, torch.cat([once, once])),
                (tokens[:, half:], once),
                (tokens, twice),
            )
        )
    return bool((packed - alone).abs().max() <= _LEAK * (joined - alone).abs().max())


def move_padding(mask: Tensor, *tensors: Tensor, left: bool) -> tuple[Tensor, ...]:
    """Move the padding of each row to one side; tokens keep their order.

    Args:
        mask: 1 at tokens, 0 at padding, ``(batch, seq)``.
        tensors: What else to move, ``(batch, seq)`` each.
        left: To the left, where generation wants it; else to the right, where positions count from 0 by themselves.

    Returns:
        The mask and the tensors, moved.

    Example:
        >>> mask, ids = move_padding(torch.tensor([[1, 1, 0]]), torch.tensor([[7, 8, 0]]), left=True)
        >>> mask.tolist(), ids.tolist()
        ([[0, 1, 1]], [[0, 7, 8]])
    """
    order = mask.long().argsort(dim=1, descending=not left, stable=True)
    return tuple(tensor.gather(1, order) for tensor in (mask, *tensors))
