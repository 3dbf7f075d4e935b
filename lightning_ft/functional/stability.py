"""Signs that a training run is failing, in what it has shown so far."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ft.core.report import Report

Sign = Literal["non-finite", "diverging", "at chance", "constant predictions", "vanishing gradients"]

ADVICE: dict[Sign, str] = {
    "non-finite": "a lower learning rate, gradient_clip_val=1.0, precision bf16-mixed or 32 (plugins.FP16 tells where "
    "numbers overflow); look for a logarithm or a division of 0 in the loss",
    "diverging": "a learning rate 10 times lower, warm-up over 10 % of the steps, gradient_clip_val=1.0 (all three: "
    "recipes/few_sample.yaml)",
    "at chance": "a lower learning rate with warm-up and more epochs (recipes/few_sample.yaml); a fitted head (LPFT); "
    "the top blocks drawn anew (LayerReinit); another seed (lightning-ft seeds stops failed ones early). Do the labels "
    "belong to their texts?",
    "constant predictions": "a lower learning rate with warm-up and more epochs (recipes/few_sample.yaml); a fitted "
    "head (LPFT); another seed (lightning-ft seeds)",
    "vanishing gradients": "a lower learning rate, warm-up, and Adam with bias correction "
    "(recipes/few_sample.yaml); another seed (lightning-ft seeds): such a run does not come back",
}
"""What to try, by sign."""

BEGIN = 5  # losses that say where a run began
ROWS = 3  # of norms, of which the median is taken
CHUNK = 16  # predictions among which a constant one shows


@dataclass(frozen=True)
class Finding:
    """One sign of failure.

    Args:
        sign: Which.
        since: Optimiser step from which on it has been so.
        step: Optimiser step at which it was seen.
        evidence: Numbers that show it.
        advice: What to try.

    Example:
        >>> print(Finding("at chance", since=1, step=60, evidence={"loss": 0.7, "chance": 0.6931}, advice="a new seed"))
        at chance since step 1 (seen at step 60; loss 0.7, chance 0.6931). Try: a new seed
    """

    sign: Sign
    since: int
    step: int
    evidence: Mapping[str, float]
    advice: str

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return f"{self.sign} since step {self.since} (seen at step {self.step}; {numbers}). Try: {self.advice}"


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Args:
        step: Its number, from 1.
        loss: Mean over its micro-batches; None where it is not known.
        predictions: How many examples were given which class.
    """

    step: int
    loss: float | None
    predictions: Mapping[int, int] = field(default_factory=dict)


class StabilityRecord:
    """What a run has shown, and :meth:`judge`, which finds the signs of failure in it. Its state is plain.

    - *non-finite*: a loss, or the gradient norm of a group, is inf or nan.
    - *diverging*: the median loss of half a window is twice chance (3 times the loss of the first steps, where
      chance is not known); or it had been a third below, and is back.
    - *vanishing gradients*: while the loss has hardly fallen, the gradient norm of the topmost block that trains, as a
      share of the head's, is 2 % of what it was when the block began to train.
    - *at chance*: in time (``due``), the mean loss of a window is 98 % or more of that of the best constant prediction.
    - *constant predictions*: in time, 95 % of the predictions of a window are alike, which the labels are not, and the
      loss has hardly fallen.

    The last three are those of Mosbach et al. (2021, section 5.1). A window is the last ``window`` steps. Norms that
    fall with the loss are no sign: those of a run that has fitted its data vanish as well.

    Args:
        groups: Names of the layer groups, bottom to top, the head last if there is one.
        window: Optimiser steps.
        points: Rows of norms kept at most; where there are more, every second one is left out.

    Reference:
        Mosbach, Andriushchenko and Klakow 2021, "On the Stability of Fine-tuning BERT".
    """

    def __init__(self, groups: Sequence[str], window: int = 20, points: int = 400) -> None:
        self.groups = list(groups)
        self.window = window
        self.points = points
        self.findings: list[Finding] = []
        self.chance: float | None = None
        self.steps: list[int] = []
        """Steps at which norms were taken."""
        self.norms: list[list[float | None]] = []
        """Of each such step the groups' norms; None where nothing trained."""
        self._losses: list[Step] = []
        self._first: list[float] = []
        self._lowest = math.inf
        self._recent: list[tuple[int, list[float | None]]] = []
        self._reference: dict[str, float] = {}

    def add(self, step: Step) -> None:
        """The next step."""
        self._losses = [*self._losses, step][-self.window :]
        if step.loss is not None and len(self._first) < BEGIN:
            self._first.append(step.loss)

    def add_norms(self, step: int, norms: Sequence[float | None]) -> None:
        """Gradient norms of the groups at a step."""
        self.steps.append(step)
        self.norms.append(list(norms))
        self._recent = [*self._recent, (step, list(norms))][-ROWS:]
        last = dict(self._last())
        for group in last:
            if group not in ("embeddings", "head") and math.isfinite(share := self._share(last, group)):
                self._reference.setdefault(group, share)
        if len(self.steps) > self.points:
            del self.steps[-2::-2], self.norms[-2::-2]

    def judge(
        self,
        step: int,
        *,
        due: bool,
        chance: float | None = None,
        commonest: float | None = None,
        scaled: bool = False,
    ) -> list[Finding]:
        """Signs that were not seen before.

        Args:
            step: Optimiser steps done.
            due: Whether a healthy run would have left chance by now.
            chance: Loss of the best constant prediction; None where it is not known.
            commonest: Share of the commonest label, if known.
            scaled: Whether a loss scaler skips steps whose gradients overflow: they are no sign then.
        """
        self.chance = chance
        levels = [one for one in self._losses if one.loss is not None]
        losses = [one.loss for one in levels if one.loss is not None]
        found = [self._non_finite(levels, scaled)]
        if losses and all(map(math.isfinite, losses)) and len(self._first) == BEGIN:
            # Where chance is not known the start stands for it: noisier, and it may have blown up already.
            learnt = fmean(losses) < 0.9 * (chance or median(self._first))
            found += [self._diverging(levels, chance), None if learnt else self._vanishing()]
            if len(levels) == self.window:
                self._lowest = min(self._lowest, fmean(losses))
                if due:
                    found += [self._at_chance(losses, levels[0].step, chance)]
                    found += [None if learnt else self._constant(levels[0].step, commonest)]
        known = {finding.sign for finding in self.findings}
        new = [
            Finding(sign, since, step, evidence, ADVICE[sign])
            for sign, since, evidence in filter(None, found)
            if sign not in known
        ]
        self.findings += new
        return new

    def _non_finite(self, levels: Sequence[Step], scaled: bool) -> _Found:
        for one in levels:
            if one.loss is not None and not math.isfinite(one.loss):
                return "non-finite", one.step, {"loss": one.loss}
        if self._recent and not scaled:
            bad = {f"norm of {group}": norm for group, norm in self._last() if not math.isfinite(norm)}
            if bad:
                return "non-finite", self.steps[-1], dict(list(bad.items())[-1:])
        return None

    def _last(self) -> list[tuple[str, float]]:
        return [(g, norm) for g, norm in zip(self.groups, self._recent[-1][1], strict=True) if norm is not None]

    def _diverging(self, levels: Sequence[Step], chance: float | None) -> _Found:
        recent = [(one.step, one.loss) for one in levels if one.loss is not None][-(self.window // 2) :]
        start = median(self._first)
        base, factor = (start, 3.0) if chance is None else (chance, 2.0)
        if len(recent) < self.window // 2 or base <= 0:
            return None
        now = median(loss for _, loss in recent)
        lost = self._lowest < 0.67 * base and now > 0.95 * base
        if not lost and now <= factor * base:
            return None
        lowest = {"lowest before": self._lowest} if lost else {}
        return "diverging", recent[0][0], {"loss": now, "chance" if chance else "first loss": base, **lowest}

    def _vanishing(self) -> _Found:
        measured = [g for g, _ in self._last() if g in self._reference] if self._recent else []
        if not measured or len(rows := self._rows_of(measured[-1])) < ROWS:
            return None
        top, first = measured[-1], self._reference[measured[-1]]
        if not all(math.isfinite(norm) for row in rows for norm in row.values()):
            return None
        # What fits its data has small gradients, too, but in the head as well.
        shares, limit = [self._share(row, top) for row in rows], 0.02 * min(first, 1.0)
        if median(shares) >= limit:
            return None
        since = next(step for (step, _), share in zip(self._recent[-len(rows) :], shares, strict=True) if share < limit)
        evidence = {f"norm of {top}": rows[-1][top], "beside the head's": shares[-1], "which was": first}
        return "vanishing gradients", since, evidence

    def _rows_of(self, group: str) -> list[dict[str, float]]:
        """The last rows without a gap in which a group has a norm."""
        rows = [dict(zip(self.groups, row, strict=True)) for _, row in self._recent]
        gap = max((i + 1 for i, row in enumerate(rows) if row[group] is None), default=0)
        return [{name: norm for name, norm in row.items() if norm is not None} for row in rows[gap:]]

    @staticmethod
    def _share(norms: Mapping[str, float], group: str) -> float:
        """A group's norm beside the head's."""
        return norms[group] / max(norms.get("head", 1.0), 1e-30)

    def _at_chance(self, losses: Sequence[float], since: int, chance: float | None) -> _Found:
        if chance is None or fmean(losses) < 0.98 * chance:
            return None
        return "at chance", since, {"loss": fmean(losses), "chance": chance}

    def _constant(self, since: int, commonest: float | None) -> _Found:
        if commonest is not None and commonest >= 0.9:
            return None
        shares, chunk = [], Counter[int]()
        for one in self._losses:
            chunk.update(one.predictions)
            if chunk.total() >= CHUNK:
                shares.append(max(chunk.values()) / chunk.total())
                chunk.clear()
        if len(shares) < 4 or fmean(shares) < 0.95:
            return None
        evidence = {"share of the commonest prediction": fmean(shares)}
        return "constant predictions", since, evidence | ({} if commonest is None else {"of labels": commonest})

    def report(self) -> Report:
        """The signs, and how the norms of the groups went."""
        known = "not known (labels=, chance_loss=)" if self.chance is None else self.chance
        facts: dict[str, Any] = {"signs of failure": len(self.findings), "loss at chance": known}
        facts |= {finding.sign: str(finding).removeprefix(f"{finding.sign} ") for finding in self.findings}
        rows = []
        for name, column in zip(self.groups, zip(*self.norms, strict=True), strict=True):
            if norms := [norm for norm in column if norm is not None]:
                finite = [norm for norm in norms if math.isfinite(norm)] or [math.nan]
                values = {"first": norms[0], "highest": max(finite), "lowest": min(finite), "last": norms[-1]}
                rows.append({"group": name, **values})
        return Report("Stability: norms of the gradients", facts, rows)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        plain = copy.deepcopy(vars(self))
        return {**plain, **{key: [asdict(one) for one in plain[key]] for key in ("findings", "_losses")}}

    def load(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        vars(self).update(copy.deepcopy(dict(state)))
        self.findings = [Finding(**one) for one in state["findings"]]
        self._losses = [Step(**one) for one in state["_losses"]]


_Found = tuple[Sign, int, dict[str, float]] | None


class LabelCounts:
    """The labels of a run, and the loss of the best constant prediction for them. Its state is plain.

    Classes, ``(batch,)`` of integers: their entropy, at most ln C. Several labels, ``(batch, labels)`` of 0 and 1: the
    mean of their binary entropies. Numbers, ``(batch,)`` of floats: their variance, the squared error of their mean.

    Example:
        >>> import torch
        >>> counts = LabelCounts()
        >>> counts.add(torch.tensor([0, 1, 1, 0]).tolist())
        >>> round(counts.chance(), 4)
        0.6931
    """

    def __init__(self) -> None:
        self.classes: dict[int, int] = {}
        self.count = 0
        self.sums: list[float] = []
        self.squares: list[float] = []

    def add(self, labels: Sequence[Any]) -> None:
        """Labels of some examples: integers, floats, or lists of floats."""
        for label in labels:
            if isinstance(label, int):
                if label >= 0:  # -100 is none
                    self.classes[label] = self.classes.get(label, 0) + 1
                continue
            values = [float(value) for value in (label if isinstance(label, list) else [label])]
            self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(values), values, strict=True)]
            self.squares = [a + b * b for a, b in zip(self.squares or [0.0] * len(values), values, strict=True)]
            self.count += 1

    def commonest(self) -> float | None:
        """Share of the commonest class; None where there are none."""
        return max(self.classes.values()) / sum(self.classes.values()) if self.classes else None

    def chance(self) -> float | None:
        """Loss of the best constant prediction; None where there is none, or all labels are alike."""
        if self.classes:
            total = sum(self.classes.values())
            return _entropy([count / total for count in self.classes.values()]) or None
        if len(self.sums) > 1:
            means = [value / self.count for value in self.sums]
            return fmean(_entropy([mean, 1 - mean]) for mean in means) or None
        if self.sums:
            return max(0.0, self.squares[0] / self.count - (self.sums[0] / self.count) ** 2) or None
        return None


def _entropy(shares: Sequence[float]) -> float:
    return -math.fsum(share * math.log(share) for share in shares if share > 0)


def by_row(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Scores of several choices for each row, side by side; other logits as they are.

    Args:
        logits: ``(batch · choices, 1)``, the choices of a row one after another; or any others.
        labels: Numbers of the right choices, ``(batch,)`` of integers; or any others.

    Returns:
        ``(batch, choices)``, or the logits.

    Example:
        >>> import torch
        >>> by_row(torch.arange(6.0)[:, None], torch.tensor([0, 2])).tolist()
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    if labels is None or labels.ndim != 1 or not len(labels) or labels.is_floating_point() or logits.shape[-1] != 1:
        return logits
    choices, rest = divmod(len(logits), len(labels))
    return logits if rest or choices < 2 else logits.view(len(labels), choices)


@torch.no_grad()
def own_loss(logits: Tensor, labels: Tensor) -> Tensor | None:
    """What standard losses make of logits and labels; None where none fits. Does not wait for the device.

    Args:
        logits: ``(batch, classes)``, or ``(batch, 1)`` for numbers.
        labels: Classes ``(batch,)``; 0 and 1 as floats ``(batch, classes)``; or numbers, floats ``(batch,)``.

    Returns:
        The mean cross-entropy, binary cross-entropy or squared error.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    if len(labels) != len(logits):
        return None
    if labels.is_floating_point():
        if labels.ndim == 2:
            return F.binary_cross_entropy_with_logits(logits, labels.float()) if labels.shape == logits.shape else None
        return F.mse_loss(logits.squeeze(-1), labels.float()) if logits.shape[-1] == 1 else None
    if logits.shape[-1] < 2:
        return None
    # Not F.cross_entropy: a label that is no class of these logits would stop the device.
    chosen = labels.long().clamp(0, logits.shape[-1] - 1)[:, None]
    taken = logits.log_softmax(-1).gather(1, chosen)[:, 0]
    known = labels >= 0
    return -(taken * known).sum() / known.sum().clamp(min=1)
