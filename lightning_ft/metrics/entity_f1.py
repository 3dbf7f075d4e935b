"""Precision, recall and F1 of whole entities in tag sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric
from typing_extensions import override

Scheme = Literal["BIO", "BIOES", "IO"]
IGNORED = -100

# For each prefix of a scheme: does it open an entity (where it does not go on with one), may it go on with one, may
# another go on with it, may it be an entity's last.
_RULES: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "BIO": {"B": (1, 0, 1, 1), "I": (0, 1, 1, 1)},
    "BIOES": {"B": (1, 0, 1, 0), "I": (0, 1, 1, 0), "E": (0, 1, 0, 1), "S": (1, 0, 0, 1)},
    "IO": {"I": (1, 1, 1, 1)},
}


def tag_table(labels: Sequence[str], scheme: Scheme = "BIO") -> tuple[list[str], Tensor]:
    """What each tag means.

    Args:
        labels: The tags, in the order of their numbers: ``O``, and a prefix and a type, such as ``B-PER``.
        scheme: Which prefixes there are.

    Returns:
        The types, sorted, and a table ``(labels, 5)`` for :func:`entity_spans`: the number of the type (-1 for ``O``),
        and whether the tag opens an entity, goes on with one, lets another go on with it, and may be the last.

    Raises:
        ValueError: A tag that is not of the scheme, or none that is ``O``.

    Example:
        >>> tag_table(["O", "B-PER", "I-PER"])
        (['PER'], tensor([[-1,  0,  0,  0,  0],
                [ 0,  1,  0,  1,  1],
                [ 0,  0,  1,  1,  1]]))
    """
    if scheme not in _RULES:
        raise ValueError(f"scheme={scheme!r} must be one of {list(_RULES)}")
    parts = [label.partition("-") for label in labels]
    for label, (prefix, _, kind) in zip(labels, parts, strict=True):
        if label != "O" and not (prefix in _RULES[scheme] and kind):
            raise ValueError(
                f"labels holds {label!r}, but tags of scheme={scheme!r} are 'O' and {', '.join(_RULES[scheme])} with a "
                f"type, such as '{next(iter(_RULES[scheme]))}-PER': correct the labels, or give another scheme"
            )
    if list(labels).count("O") != 1 or len(set(labels)) < len(labels):
        raise ValueError(
            f"labels={list(labels)} must differ, and one of them must be 'O', which is outside of entities"
        )
    types = sorted({kind for _, _, kind in parts if kind})
    rows = [(types.index(kind), *_RULES[scheme][prefix]) if kind else (-1, 0, 0, 0, 0) for prefix, _, kind in parts]
    return types, torch.tensor(rows)


def entity_spans(tags: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entities in tag sequences, read strictly: tags that the scheme does not allow where they stand start nothing.

    Strict means, as in seqeval's strict mode: an ``I-X`` that follows neither ``B-X`` nor ``I-X`` is outside of
    entities; under BIOES also whatever ends in another tag than ``E-X`` or ``S-X``.

    Args:
        tags: Numbers of tags, ``(batch, words)``.
        table: From :func:`tag_table`, ``(labels, 5)``.

    Returns:
        At each word, ``(batch, words)``: whether an entity starts there; the word after its last one; its type's number
        (the two mean something only where one starts).

    Example:
        >>> types, table = tag_table(["O", "B-PER", "I-PER"])
        >>> starts, ends, _ = entity_spans(torch.tensor([[2, 0, 1, 2, 0]]), table)
        >>> starts.tolist(), ends[starts].tolist()
        ([[False, False, True, False, False]], [4])
    """
    kind, opens, inside, followed, closes = table[tags].unbind(-1)
    if not tags.numel():
        return opens.bool(), kind, kind
    width = tags.shape[1]
    goes_on = torch.zeros_like(tags, dtype=torch.bool)
    goes_on[:, 1:] = inside[:, 1:].bool() & followed[:, :-1].bool() & (kind[:, 1:] == kind[:, :-1])
    # An entity ends before the next word that does not go on with what is before it.
    breaks = torch.arange(width, device=tags.device).expand_as(tags).masked_fill(goes_on, width)
    ends = F.pad(breaks, (0, 1), value=width)[:, 1:].flip(1).cummin(1).values.flip(1)
    starts = opens.bool() & ~goes_on & closes.gather(1, ends - 1).bool()
    return starts, ends, kind


class EntityF1(Metric):
    """Micro-averaged precision, recall and F1 of whole entities, and the accuracy of single tags.

    An entity counts if its first word, its last word and its type are right. True and false positives and misses are
    counted over all batches and processes, and divided at the end. Sequences are read strictly (:func:`entity_spans`);
    the results are those of seqeval's strict mode with IOB2 (``BIO``) and IOBES (``BIOES``), which are higher or lower
    than those of its lenient default where sequences are invalid. Without entities all values are 0.

    Args:
        labels: The tags, in the order of their numbers.
        scheme: ``"BIO"`` (IOB2), ``"BIOES"``, or ``"IO"``, where neighbours of one type are one entity.
        per_type: Also ``precision_…``, ``recall_…`` and ``f1_…`` of each type.

    Raises:
        ValueError: A label that is not of the scheme; in ``update``, sequences of different shapes, or numbers that are
            no tags.

    Example:
        >>> metric = EntityF1(["O", "B-PER", "I-PER"])
        >>> metric.update(torch.tensor([[1, 0, 0]]), torch.tensor([[1, 2, 0]]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'precision': 0.0, 'recall': 0.0, 'f1': 0.0, 'accuracy': 0.667}

    Reference:
        Tjong Kim Sang and De Meulder 2003, "Introduction to the CoNLL-2003 Shared Task".
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    table: Tensor
    right: Tensor
    predicted: Tensor
    true: Tensor
    words: Tensor

    def __init__(self, labels: Sequence[str], scheme: Scheme = "BIO", *, per_type: bool = False) -> None:
        super().__init__()
        self.types, table = tag_table(labels, scheme)
        self.outside = list(labels).index("O")
        self.per_type = per_type
        self.register_buffer("table", table, persistent=False)
        for name in ("right", "predicted", "true"):  # entities of each type
            self.add_state(name, torch.zeros(len(self.types), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("words", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")  # tagged right, and all

    @override
    def update(self, preds: Tensor | Sequence[Sequence[int]], target: Tensor | Sequence[Sequence[int]]) -> None:
        """Add sequences.

        Args:
            preds: Numbers of the predicted tags, ``(batch, words)`` or lists.
            target: Those of the true ones. A word with -100 is left out of both, as if it were not there.
        """
        if not isinstance(preds, Tensor) and not isinstance(target, Tensor):
            lengths = [len(row) for row in preds], [len(row) for row in target]
            if lengths[0] != lengths[1]:
                raise ValueError(f"preds and target must be of the same lengths, got {lengths[0]} and {lengths[1]}")
        preds, target = self._as_tensor(preds), self._as_tensor(target)
        if preds.shape != target.shape or target.ndim != 2:
            raise ValueError(f"preds {tuple(preds.shape)} and target {tuple(target.shape)} must both be (batch, words)")
        kept = target != IGNORED
        if bool((kept & ((preds < 0) | (preds >= len(self.table)) | (target < 0) | (target >= len(self.table)))).any()):
            raise ValueError(f"preds and target must hold numbers of tags, from 0 to {len(self.table) - 1}")
        # Words that are left out go to the end, where nothing follows them, and are outside of entities.
        order = (~kept).int().argsort(dim=1, stable=True)
        preds = preds.masked_fill(~kept, self.outside).gather(1, order)
        target = target.masked_fill(~kept, self.outside).gather(1, order)
        starts, ends, kinds = entity_spans(preds, self.table)
        true_starts, true_ends, true_kinds = entity_spans(target, self.table)
        right = starts & true_starts & (ends == true_ends) & (kinds == true_kinds)
        self.right += self._by_type(right, kinds)
        self.predicted += self._by_type(starts, kinds)
        self.true += self._by_type(true_starts, true_kinds)
        kept = kept.gather(1, order)
        self.words += torch.stack([((preds == target) & kept).sum(), kept.sum()])

    @override
    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall``, ``f1`` and ``accuracy`` as scalars, and those of each type if asked for."""
        values = _scores(self.right.sum(), self.predicted.sum(), self.true.sum())
        values["accuracy"] = _ratio(self.words[0], self.words[1])
        if self.per_type:
            for i, kind in enumerate(self.types):
                scores = _scores(self.right[i], self.predicted[i], self.true[i])
                values |= {f"{name}_{kind}": value for name, value in scores.items()}
        return values

    def _as_tensor(self, tags: Tensor | Sequence[Sequence[int]]) -> Tensor:
        if isinstance(tags, Tensor):
            return tags
        rows = [torch.as_tensor(row, dtype=torch.int64, device=self.table.device) for row in tags]
        empty = torch.empty(0, 0, dtype=torch.int64, device=self.table.device)
        return pad_sequence(rows, batch_first=True, padding_value=IGNORED) if rows else empty

    def _by_type(self, starts: Tensor, kinds: Tensor) -> Tensor:
        types = torch.arange(len(self.types), device=kinds.device)
        return ((kinds[..., None] == types) & starts[..., None]).sum((0, 1))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp(min=1)


def _scores(right: Tensor, predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    return {
        "precision": _ratio(right, predicted),
        "recall": _ratio(right, true),
        "f1": _ratio(2 * right, predicted + true),
    }
