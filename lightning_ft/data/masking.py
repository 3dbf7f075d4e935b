"""Labels of language modelling: masked tokens, or the next token; drawn anew in each epoch and yet repeatable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lightning_ft.core.counter_random import below, random_bits, random_key, uniform
from lightning_ft.data.encoding import EncodedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labeller = Callable[[dict[str, Any], Tensor, int], dict[str, Any]]
"""Gives a batch its labels, from the keys of its rows ``(batch,)`` and the number of the draw."""

WORD_START = "word_start"
"""Column that says of each token whether a word begins with it."""
_FIXED = -1  # the draw of validation and test


class Masking:
    """BERT's masking: some tokens become the model's task; of these most are hidden, some replaced, some left.

    Each token, or with ``word_start`` in the batch each word, is chosen with ``probability``; in every row that has a
    token to choose, at least one is (the one that came closest), for a batch without any has no loss. Of a chosen
    word all tokens are. Then each token by itself becomes the mask token (``mask_share``) or a random one
    (``random_share``), or stays. Special tokens (padding, separators, the unknown token) are never chosen.

    What is drawn depends on the seed, the draw (the epoch), the row and the token's place in it: on nothing else.

    Deviation from ``transformers.DataCollatorForLanguageModeling``: random tokens are never special ones, and whole
    words keep the three shares (there all become the mask token).

    Args:
        tokenizer: Gives the mask token, the special tokens and the vocabulary.
        probability: Share of tokens, or words, to choose.
        mask_share: Share of the chosen tokens that become the mask token.
        random_share: Share of the chosen tokens that become another one.
        seed: Seed of all draws.

    Raises:
        ValueError: The tokenizer has no mask token.

    Reference:
        Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", 3.1 and A.1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        probability: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no mask token, which objective='mlm' needs: use an "
                "encoder's tokenizer (BERT, RoBERTa, …), or objective='clm'"
            )
        self.mask_token = int(tokenizer.mask_token_id)
        self.probability = probability
        self.mask_share = mask_share
        self.random_share = random_share
        self.seed = seed
        ids = torch.tensor(sorted(tokenizer.get_vocab().values()))
        special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self._special = torch.zeros(int(ids.max()) + 1, dtype=torch.bool)
        self._special[special] = True
        self._ordinary = ids[~self._special[ids]]

    def __call__(self, batch: dict[str, Any], keys: Tensor, draw: int) -> dict[str, Any]:
        """The batch with masked ``input_ids`` and with ``labels``: the true tokens where one was chosen, else -100.

        Args:
            batch: ``input_ids`` and ``attention_mask``, ``(batch, width)``; maybe ``word_start``, which is taken out.
            keys: A number for each row that no other row has, ``(batch,)``.
            draw: Number of the draw: the epoch.
        """
        batch = dict(batch)
        ids, real = batch["input_ids"], batch["attention_mask"]
        # From the row's first token, and so the same however wide the batch and on whichever side the padding.
        place = real.cumsum(1)
        unit = batch.pop(WORD_START).cumsum(1) if WORD_START in batch else place
        choice = uniform(self._bits(keys, draw, 0, unit))
        choice.masked_fill_(self._special[ids] | (real == 0), 2.0)
        # The smallest of a row is chosen in any case; 2 marks what cannot be chosen.
        least = choice.amin(1, keepdim=True)
        chosen = (choice < 2) & ((choice < self.probability) | (choice == least))
        bits = self._bits(keys, draw, 1, place)
        fate = uniform(bits)
        other = self._ordinary[below(bits, len(self._ordinary))]
        changed = torch.where(fate < self.mask_share, self.mask_token, other)
        batch["input_ids"] = torch.where(chosen & (fate < self.mask_share + self.random_share), changed, ids)
        batch["labels"] = torch.where(chosen, ids, -100)
        return batch

    def _bits(self, keys: Tensor, draw: int, purpose: int, counters: Tensor) -> Tensor:
        rows = random_bits(random_key(self.seed, draw, purpose), keys)
        return random_bits(rows[:, None], counters)


def next_token_labels(batch: dict[str, Any], keys: Tensor, draw: int) -> dict[str, Any]:
    """The batch with ``labels``: its tokens, -100 on padding. The model compares each with the token before it.

    Padding is known by the attention mask, not by the token: where padding is done with the end-of-sequence token, the
    ends of documents are learnt all the same.
    """
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


class LabelledRows(TorchDataset[dict[str, Any]]):
    """Rows of tokens that get their labels when they are batched.

    Args:
        rows: The rows.
        label: Gives a batch its labels; a row's key is its number in the table.
        redraw: Whether each epoch has a draw of its own, for training; else all have the same one.
    """

    def __init__(self, rows: EncodedRows, label: Labeller, *, redraw: bool) -> None:
        self.inner = rows
        self.label = label
        self.redraw = redraw
        self.rows = rows.rows
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        """A batch: what :class:`EncodedRows` gives, with labels.

        Args:
            positions: Positions in the set, ``(batch,)``; from a :class:`LengthBucketSampler` they know their epoch,
                and without one it is the first.
        """
        draw = getattr(positions, "epoch", 0) if self.redraw else _FIXED
        return self.label(self.inner[positions], self.rows[torch.as_tensor(positions)], draw)

    # A DataLoader that batches by itself calls this one, and hands the result to `collate_fn`.
    __getitems__ = __getitem__
