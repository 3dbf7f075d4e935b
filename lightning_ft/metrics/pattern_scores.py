"""How well each of several patterns does by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class PatternScores(Metric):
    """Accuracy and mean loss of each pattern over batches, as ``accuracy_pattern0``, ``loss_pattern0``, …

    Args:
        num_patterns: Number of patterns.

    Example:
        >>> metric = PatternScores(2)
        >>> right, wrong = [0.0, 2.0], [2.0, 0.0]
        >>> metric.update(torch.tensor([[right, wrong]]), torch.tensor([1]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'accuracy_pattern0': 1.0, 'loss_pattern0': 0.127, 'accuracy_pattern1': 0.0, 'loss_pattern1': 2.127}
    """

    is_differentiable = False
    full_state_update = False
    right: Tensor
    loss: Tensor
    rows: Tensor

    def __init__(self, num_patterns: int) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(num_patterns, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(num_patterns), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, pattern_scores: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            pattern_scores: Scores of labels under each pattern, ``(rows, patterns, labels)``.
            target: Class numbers, ``(rows,)``.
        """
        self.right += (pattern_scores.argmax(-1) == target[:, None]).sum(0)
        index = target[:, None, None].expand(-1, pattern_scores.shape[1], 1)
        self.loss -= pattern_scores.float().log_softmax(-1).gather(2, index).squeeze(2).sum(0)
        self.rows += len(target)

    @override
    def compute(self) -> dict[str, Tensor]:
        """The values of each pattern."""
        rows = self.rows.clamp(min=1)
        pairs = zip(self.right / rows, self.loss / rows, strict=True)
        return {
            f"{name}_pattern{number}": value
            for number, (accuracy, loss) in enumerate(pairs)
            for name, value in (("accuracy", accuracy), ("loss", loss))
        }
