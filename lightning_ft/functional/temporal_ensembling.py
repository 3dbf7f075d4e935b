"""Temporal ensembling: what a model said of each example in earlier epochs, as a target for what it says now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ft.functional.snapshots import Answer


def ramp_up(share: float) -> float:
    """exp(−5 (1 − min(1, ``share``))²): from e⁻⁵ at the beginning of the ramp to 1 at its end.

    Args:
        share: Time passed over the length of the ramp, t / T.

    Example:
        >>> [round(ramp_up(share), 4) for share in (0.0, 0.5, 1.0, 2.0)]
        [0.0067, 0.2865, 1.0, 1.0]
    """
    return math.exp(-5 * (1 - min(1.0, share)) ** 2)


def squash(logits: Tensor, answer: Answer) -> Tensor:
    """Probabilities (values, for regression) ``(batch, labels)`` in fp32."""
    rows = logits.float().reshape(len(logits), -1)
    if answer == "regression":
        return rows
    return rows.softmax(-1) if answer == "single_label" else rows.sigmoid()


def consistency(now: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """The mean squared difference to targets; rows without a target count as equal to it.

    Args:
        now: Probabilities, ``(batch, labels)``, with a graph.
        targets: The same of earlier epochs.
        known: Which rows have a target, ``(batch,)``.

    Example:
        >>> now, targets = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> consistency(now, targets, torch.tensor([True, False]))
        tensor(0.5000)
    """
    return ((now - targets) * known[:, None]).square().mean()


class PredictionAverages:
    """Moving averages of predictions by example: Z ← aZ + (1 − a) z, with the target Z / (1 − aᵗ).

    t counts the epochs in which the example was seen, so that the first target is the first prediction itself, however
    late it came.

    Args:
        momentum: a in [0, 1).

    Raises:
        ValueError: ``momentum`` is out of range.

    Example:
        >>> averages = PredictionAverages(0.6)
        >>> for _ in range(2):
        ...     averages.update([b"row 7"], torch.tensor([[1.0]]))
        >>> averages.values
        tensor([[0.6400]])
        >>> averages.targets([b"row 7", b"row 8"])
        (tensor([[1.],
                [0.]]), tensor([ True, False]))
    """

    def __init__(self, momentum: float = 0.6) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r} must lie in [0, 1); 0.6 in the paper")
        self.momentum = momentum
        self._index: dict[bytes, int] = {}
        self.values = torch.zeros(0, 0)
        """Z, ``(examples, labels)``."""
        self.seen = torch.zeros(0, dtype=torch.int64)
        """t, ``(examples,)``."""

    def update(self, keys: Sequence[bytes], predictions: Tensor) -> None:
        """Take in one epoch's predictions.

        Args:
            keys: What tells the examples apart, each once.
            predictions: z, ``(examples, labels)``.

        Raises:
            ValueError: A key comes twice, or the number of labels has changed.
        """
        if len(set(keys)) != len(keys):
            raise ValueError("keys must name each example once: an example is seen once an epoch")
        labels = predictions.shape[-1]
        if self._index and labels != self.values.shape[1]:
            raise ValueError(f"predictions have {labels} labels, and {self.values.shape[1]} before")
        new = [key for key in keys if key not in self._index]
        self._index.update(zip(new, range(len(self._index), len(self._index) + len(new)), strict=True))
        self.values = torch.cat([self.values.reshape(-1, labels), torch.zeros(len(new), labels)])
        self.seen = torch.cat([self.seen, torch.zeros(len(new), dtype=torch.int64)])
        at = torch.tensor([self._index[key] for key in keys], dtype=torch.int64)
        self.values[at] = self.momentum * self.values[at] + (1 - self.momentum) * predictions.float().cpu()
        self.seen[at] += 1

    def targets(self, keys: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """Targets ``(len(keys), labels)``, zeros where there is none yet, and which rows have one."""
        at = torch.tensor([self._index.get(key, -1) for key in keys], dtype=torch.int64)
        known = at >= 0
        targets = torch.zeros(len(keys), self.values.shape[1])
        correction = 1 - self.momentum ** self.seen[at[known]].float()
        targets[known] = self.values[at[known]] / correction[:, None]
        return targets, known

    def state_dict(self) -> dict[str, Any]:
        """Keys, averages and counts, in types that a weights-only load admits."""
        return {"keys": pack_keys(self._index), "values": self.values, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._index = {key: i for i, key in enumerate(unpack_keys(state["keys"]))}
        self.values, self.seen = state["values"].clone(), state["seen"].clone()


def pack_keys(keys: Iterable[bytes]) -> Tensor:
    """Keys of one length as bytes ``(keys, length)``."""
    listed = list(keys)
    if not listed:
        return torch.zeros(0, 0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(listed)), dtype=torch.uint8).reshape(len(listed), -1)


def unpack_keys(packed: Tensor) -> list[bytes]:
    """What :func:`pack_keys` packed."""
    return [row.numpy().tobytes() for row in packed]
