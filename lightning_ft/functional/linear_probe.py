"""Linear probing: the best linear head on fixed features, found by convex optimisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Problem = Literal["single_label", "multi_label", "regression"]
Solver = Callable[[float], tuple[Tensor, Tensor]]
_ITERATIONS = 1000
_HELD_OUT = 5


@dataclass(frozen=True)
class LinearProbe:
    """A fitted head: outputs = features @ weight.T + bias.

    Args:
        weight: ``(outputs, features)``, fp64.
        bias: ``(outputs,)``; None for a head without one.
        penalty: The C that was chosen: the weight of the data against that of ½‖W‖².
        train_score: Accuracy (share of right labels for multi_label), or R² for regression, on the rows of the fit.
        validation_score: The same on the rows on which C was chosen.
        absent: Labels of which no row, or (multi_label) not both values, were seen.
        unconverged: How many of the fits stopped at the limit of iterations.
    """

    weight: Tensor
    bias: Tensor | None
    penalty: float
    train_score: float
    validation_score: float
    absent: tuple[int, ...] = ()
    unconverged: int = 0


class _Rows(NamedTuple):
    features: Tensor
    labels: Tensor


def fold_standardisation(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The layer on raw features that equals a layer on standardised ones: (W / σ, b − (W / σ) μ).

    Args:
        weight: W, for (x − μ) / σ, ``(outputs, features)``.
        bias: b, ``(outputs,)``.
        mean: μ, ``(features,)``.
        std: σ, ``(features,)``.

    Example:
        >>> fold_standardisation(*(torch.tensor(v) for v in ([[8.0]], [1.0], [2.0], [4.0])))
        (tensor([[2.]]), tensor([-3.]))
    """
    folded = weight / std
    return folded, bias - folded @ mean


def linear_probe(
    features: Tensor,
    labels: Tensor,
    *,
    outputs: int,
    problem: Problem,
    validation: tuple[Tensor, Tensor] | None = None,
    bias: bool = True,
    penalties: Sequence[float] | None = None,
) -> LinearProbe:
    """Fit a linear head to features: regularised logistic regression, one for each label, or ridge regression.

    min over W, b of C Σ loss(W x + b, y) + ½ ‖W‖², on standardised features x, for each C from the smallest up, each
    fit starting from the one before; the C of the best validation score (then of the lowest validation loss) is taken
    and the standardisation folded into W and b. The loss is cross-entropy for single_label, binary cross-entropy for
    each label for multi_label (both fitted by scikit-learn's L-BFGS), and half the squared error for regression (in
    closed form). Two classes are one logistic regression whose weights are halved between their two rows.

    Deviations from the paper: the loss breaks ties between scores; features that do not vary (σ below a millionth of
    their size) are not divided by σ.

    Args:
        features: ``(rows, features)``.
        labels: Classes from 0, ``(rows,)``; 0/1, ``(rows, outputs)``, for multi_label; numbers, ``(rows,)`` or
            ``(rows, outputs)``, for regression.
        outputs: Rows of the head. 1 with single_label is a head with one logit, for class 1 against class 0.
        problem: What the labels are.
        validation: Features and labels on which C is chosen. Without them every fifth row (shuffled) is held out for
            that, and the chosen C is fitted to all rows.
        bias: Whether the head has one. Without it features are divided by their root mean square, and not centred.
        penalties: The values of C; by default the paper's 100 from 1e-7 to 1e2.

    Raises:
        ValueError: Labels do not fit ``outputs`` or the features; no two classes were seen; too few rows to hold out.
        ImportError: scikit-learn is not there.

    Reference:
        Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution".
    """
    rows = _checked(features, labels, outputs, problem)
    fitted, choice = _split(rows) if validation is None else (rows, _checked(*validation, outputs, problem))
    grid = sorted(torch.logspace(-7, 2, 100, dtype=torch.float64).tolist() if penalties is None else penalties)
    if not grid or grid[0] <= 0:
        raise ValueError(f"penalties={penalties!r} must be values of C, above 0")
    fit = _Fit(fitted, outputs, problem, bias)
    path = [(penalty, *fit.at(penalty)) for penalty in grid]
    scores = [_score(choice, weight, offset, problem) for _, weight, offset in path]
    best = max(range(len(path)), key=scores.__getitem__)
    penalty, weight, offset = path[best]
    if validation is None:
        fit = _Fit(rows, outputs, problem, bias)
        weight, offset = fit.at(penalty)
    return LinearProbe(
        weight,
        offset if bias else None,
        penalty,
        train_score=_score(rows, weight, offset, problem)[0],
        validation_score=scores[best][0],
        absent=tuple(fit.absent),
        unconverged=fit.unconverged,
    )


def _checked(features: Tensor, labels: Tensor, outputs: int, problem: Problem) -> _Rows:
    features, labels = features.double(), labels.squeeze(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if features.ndim != 2 or not len(features) or len(features) != len(labels):
        raise ValueError(
            f"features {tuple(features.shape)} must be (rows, features), one row or more, and labels "
            f"{tuple(labels.shape)} one for each row"
        )
    if not features.isfinite().all():
        raise ValueError("features hold a value that is not finite: look at the model's outputs on the training rows")
    if problem == "single_label":
        top = max(outputs, 2) - 1
        if labels.ndim != 1 or labels.is_floating_point() or labels.min() < 0 or labels.max() > top:
            raise ValueError(
                f"labels must be classes from 0 to {top}, whole numbers of shape (rows,), for {outputs} outputs; got "
                f"{labels.dtype}, {tuple(labels.shape)}, from {labels.min()} to {labels.max()}"
            )
        return _Rows(features, labels.long())
    labels = labels.double().reshape(len(features), -1)
    if labels.shape[1] != outputs or not labels.isfinite().all():
        raise ValueError(
            f"labels must be finite and (rows, {outputs}) for {outputs} outputs; got {tuple(labels.shape)}"
        )
    if problem == "multi_label" and not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"labels must be 0 or 1 for multi_label; got values from {labels.min()} to {labels.max()}")
    return _Rows(features, labels)


def _split(rows: _Rows) -> tuple[_Rows, _Rows]:
    """Four of five rows, and the fifth."""
    if len(rows.labels) < _HELD_OUT:
        raise ValueError(f"{len(rows.labels)} rows are too few to hold some out: give validation rows")
    order = torch.randperm(len(rows.labels), generator=torch.Generator().manual_seed(0))
    held = torch.arange(len(order)) % _HELD_OUT == 0
    parts = (order[~held], order[held])
    fitted, choice = (_Rows(rows.features[part], rows.labels[part]) for part in parts)
    return fitted, choice


class _Fit:
    """Heads fitted to some rows, C by C; ask for rising C, since each fit starts from the one before."""

    def __init__(self, rows: _Rows, outputs: int, problem: Problem, bias: bool) -> None:
        self.mean, self.std = _moments(rows.features, centred=bias)
        self.features = (rows.features - self.mean) / self.std
        self.labels, self.outputs, self.bias = rows.labels, outputs, bias
        self.absent: list[int] = []
        self.unconverged = 0
        makers = {"single_label": self._softmax, "multi_label": self._one_against_rest, "regression": self._ridge}
        self._solve: Solver = makers[problem]()

    def at(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Weight and bias on raw features."""
        return fold_standardisation(*self._solve(penalty), self.mean, self.std)

    def _softmax(self) -> Solver:
        seen = torch.unique(self.labels)
        if len(seen) < 2:
            raise ValueError(f"labels must be of two classes or more; all {len(self.labels)} rows are {seen.tolist()}")
        self.absent = sorted(set(range(max(self.outputs, 2))) - set(seen.tolist()))
        logistic = self._logistic(self.labels)

        def solve(penalty: float) -> tuple[Tensor, Tensor]:
            rows, offsets = logistic(penalty)
            if self.outputs == 1:
                return rows, offsets
            if len(seen) == 2:
                rows, offsets = torch.cat([-rows, rows]) / 2, torch.cat([-offsets, offsets]) / 2
            weight = rows.new_zeros(self.outputs, rows.shape[1])
            weight[seen] = rows
            # Below every logit of every row seen, so that such a class is never the answer to one of them.
            bias = (self.features @ rows.T + offsets).min().expand(self.outputs) - 1
            return weight, bias.index_put((seen,), offsets) if self.bias else bias * 0

        return solve

    def _one_against_rest(self) -> Solver:
        columns = self.labels.unbind(1)
        self.absent = [i for i, column in enumerate(columns) if column.min() == column.max()]
        if len(self.absent) == len(columns):
            raise ValueError("labels must hold a 0 and a 1 for some label; each label is the same in all rows")
        solvers = {i: self._logistic(column) for i, column in enumerate(columns) if i not in self.absent}
        # What was never, or always, seen: the log-odds of its smoothed frequency, whatever the features.
        odds = torch.logit((self.labels.sum(0) + 0.5) / (len(self.labels) + 1)) * self.bias

        def solve(penalty: float) -> tuple[Tensor, Tensor]:
            weight, bias = self.features.new_zeros(self.outputs, self.features.shape[1]), odds.clone()
            for i, solver in solvers.items():
                rows, offsets = solver(penalty)
                weight[i], bias[i] = rows[0], offsets[0]
            return weight, bias

        return solve

    def _logistic(self, labels: Tensor) -> Solver:
        """scikit-learn's logistic regression, as (rows, features) and (rows,); one row for two classes."""
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError('a linear probe needs scikit-learn: pip install "lightning-ft[probe]"') from error
        model: Any = LogisticRegression(warm_start=True, max_iter=_ITERATIONS, fit_intercept=self.bias)
        features, targets = self.features.numpy(), labels.numpy()

        def solve(penalty: float) -> tuple[Tensor, Tensor]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
                model.set_params(C=penalty).fit(features, targets)
            self.unconverged += int(model.n_iter_.max() >= _ITERATIONS)
            # Copies: a warm start may write into the arrays of the fit before.
            weight, offset = torch.from_numpy(model.coef_).clone(), torch.from_numpy(model.intercept_).clone()
            return weight, offset.double().expand(len(weight))

        return solve

    def _ridge(self) -> Solver:
        """W = (XᵀX + 1/C)⁻¹ Xᵀ(y − ȳ), from one decomposition for all C."""
        centre = self.labels.mean(0) * self.bias
        values, vectors = torch.linalg.eigh(self.features.T @ self.features)
        target = vectors.T @ (self.features.T @ (self.labels - centre))

        def solve(penalty: float) -> tuple[Tensor, Tensor]:
            return (vectors @ (target / (values.clamp(min=0) + 1 / penalty)[:, None])).T, centre

        return solve


def _moments(features: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    size = features.square().mean(0).sqrt()
    mean = features.mean(0) if centred else torch.zeros_like(size)
    std = (features - mean).square().mean(0).sqrt()
    # Dividing what does not vary but for rounding would make a feature of the rounding.
    return mean, torch.where(std > 1e-6 * size, std, 1.0)


def _score(rows: _Rows, weight: Tensor, bias: Tensor, problem: Problem) -> tuple[float, float]:
    """Accuracy or R², and the negative loss."""
    logits = rows.features @ weight.T + bias
    labels = rows.labels
    if problem == "regression":
        error = (logits - labels).square()
        total = (labels - labels.mean(0)).square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        return 1 - (error.sum() / total).item(), -error.mean().item()
    if problem == "single_label" and logits.shape[1] > 1:
        return (logits.argmax(1) == labels).double().mean().item(), -F.cross_entropy(logits, labels).item()
    targets = labels.reshape(logits.shape).double()
    loss = F.binary_cross_entropy_with_logits(logits, targets).item()
    return ((logits > 0) == (targets > 0)).double().mean().item(), -loss
