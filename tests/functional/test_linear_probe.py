from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ft.functional.linear_probe import fold_standardisation, linear_probe

Rows = tuple[Tensor, Tensor]


def rows(count: int, classes: int, *, seed: int = 0, width: int = 4) -> Rows:
    """Features of unlike sizes and means, classes that a line separates in part."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    hidden = torch.randn(width, classes, generator=torch.Generator().manual_seed(9))
    y = (x @ hidden + torch.randn(count, classes, generator=generator)).argmax(1)
    return x * torch.tensor([1.0, 100.0, 0.01, 5.0]) + torch.tensor([0.0, 50.0, -3.0, 1.0]), y


def standard(features: Tensor, like: Tensor) -> Any:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit(like.double().numpy()).transform(features.double().numpy())


def test_folding_of_the_closed_form() -> None:
    weight, bias = fold_standardisation(*(torch.tensor(v) for v in ([[8.0]], [1.0], [2.0], [4.0])))
    assert (weight.item(), bias.item()) == (2.0, -3.0)
    x = torch.randn(50, 1) * 4 + 2
    torch.testing.assert_close(x @ weight.T + bias, (x - 2) / 4 * 8 + 1, rtol=0, atol=1e-5)


def test_folded_head_gives_the_logits_of_the_standardised_one() -> None:
    mean, std = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x = torch.randn(20, 6, dtype=torch.float64)
    folded, offset = fold_standardisation(weight, bias, mean, std)
    torch.testing.assert_close(x @ folded.T + offset, (x - mean) / std @ weight.T + bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("classes", "outputs"), [(2, 2), (2, 1), (3, 3)])
def test_equals_a_pipeline_of_scikit_learn(classes: int, outputs: int) -> None:
    from sklearn.linear_model import LogisticRegression

    (x, y), (vx, vy) = rows(200, classes), rows(60, classes, seed=1)
    probe = linear_probe(x, y, outputs=outputs, problem="single_label", validation=(vx, vy), penalties=[0.3])
    model = LogisticRegression(C=0.3, max_iter=1000).fit(standard(x, x), y)
    expected = torch.from_numpy(model.decision_function(standard(vx, x)))
    assert probe.bias is not None
    logits = vx.double() @ probe.weight.T + probe.bias
    ours = {(2, 2): logits[:, -1] - logits[:, 0], (2, 1): logits[:, 0], (3, 3): logits}[classes, outputs]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert probe.weight.shape == (outputs, 4)
    assert probe.train_score == pytest.approx(model.score(standard(x, x), y))
    assert probe.validation_score == pytest.approx(model.score(standard(vx, x), vy))


def test_is_a_minimum_of_its_loss() -> None:
    x, y = rows(100, 3)
    penalty = 0.5
    probe = linear_probe(x, y, outputs=3, problem="single_label", validation=(x, y), penalties=[penalty])
    mean, std = x.double().mean(0), x.double().std(0, unbiased=False)
    weight = (probe.weight * std).requires_grad_()
    assert probe.bias is not None
    bias = (probe.bias + probe.weight @ mean).detach().requires_grad_()
    logits = (x.double() - mean) / std @ weight.T + bias
    loss = penalty * F.cross_entropy(logits, y, reduction="sum") + weight.square().sum() / 2
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-2  # scikit-learn stops at 1e-4 of the mean loss


def test_penalty_is_the_one_of_the_best_validation_score_then_of_the_lowest_loss() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    (x, y), (vx, vy) = rows(30, 3), rows(40, 3, seed=7)
    grid = [1e-6, 1e-3, 1e-2, 0.1, 1.0, 10.0]
    found = []
    for penalty in grid:
        model = LogisticRegression(C=penalty, max_iter=1000).fit(standard(x, x), y)
        probabilities = model.predict_proba(standard(vx, x))
        found.append((model.score(standard(vx, x), vy), -log_loss(vy, probabilities)))
    expected = grid[max(range(len(grid)), key=found.__getitem__)]
    validated = linear_probe(x, y, outputs=3, problem="single_label", validation=(vx, vy), penalties=grid[::-1])
    assert validated.penalty == expected
    assert validated.penalty not in (grid[0], grid[-1])
    # Labels of noise want no weights at all; those of the model itself want all.
    assert (
        linear_probe(x, y, outputs=3, problem="single_label", validation=(vx, vy.roll(1)), penalties=grid).penalty < 1
    )


def test_default_grid_is_the_papers() -> None:
    x, y = rows(40, 2)
    penalty = linear_probe(x, y, outputs=2, problem="single_label", validation=(x, y)).penalty
    assert min(abs(penalty / c - 1) for c in torch.logspace(-7, 2, 100, dtype=torch.float64).tolist()) < 1e-9


def test_held_out_rows_choose_and_all_rows_fit() -> None:
    x, y = rows(100, 3)
    probe = linear_probe(x, y, outputs=3, problem="single_label")
    again = linear_probe(x, y, outputs=3, problem="single_label", validation=(x, y), penalties=[probe.penalty])
    torch.testing.assert_close(probe.weight, again.weight, rtol=1e-3, atol=1e-4)
    assert probe.validation_score != again.validation_score


def test_class_without_rows_has_no_weights_and_is_never_the_answer() -> None:
    x, y = rows(120, 3)
    y = torch.tensor([0, 2, 4])[y]
    probe = linear_probe(x, y, outputs=5, problem="single_label", validation=(x, y), penalties=[1.0])
    assert probe.absent == (1, 3)
    assert not probe.weight[[1, 3]].any()
    assert probe.weight[[0, 2, 4]].abs().sum(1).min() > 0
    assert probe.bias is not None
    logits = x.double() @ probe.weight.T + probe.bias
    assert logits[:, [1, 3]].max() < logits[:, [0, 2, 4]].min()
    two = linear_probe(x[y < 4], y[y < 4], outputs=5, problem="single_label", validation=(x, y), penalties=[1.0])
    assert two.absent == (1, 3, 4)
    torch.testing.assert_close(two.weight[0], -two.weight[2])


def test_several_labels_are_fitted_each_for_itself() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = rows(100, 3)
    labels = torch.stack([y == 0, y < 2, torch.zeros_like(y) > 0, torch.ones_like(y) > 0], 1).float()
    probe = linear_probe(x, labels, outputs=4, problem="multi_label", validation=(x, labels), penalties=[0.1, 1.0])
    assert probe.absent == (2, 3)
    assert not probe.weight[2:].any()
    assert probe.bias is not None
    assert probe.bias[2] < -5 < 5 < probe.bias[3]
    for i in (0, 1):
        model = LogisticRegression(C=probe.penalty, max_iter=1000).fit(standard(x, x), labels[:, i])
        expected = torch.from_numpy(model.decision_function(standard(x, x)))
        torch.testing.assert_close(x.double() @ probe.weight[i] + probe.bias[i], expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_are_fitted_by_ridge_regression(outputs: int) -> None:
    from sklearn.linear_model import Ridge

    x, _ = rows(80, 2)
    y = torch.stack([x[:, 0] + 0.1 * x[:, 3], 7 - x[:, 1]], 1)[:, :outputs] + torch.randn(80, outputs)
    y = y.squeeze(1) if outputs == 1 else y
    probe = linear_probe(x, y, outputs=outputs, problem="regression", validation=(x, y), penalties=[0.2])
    model = Ridge(alpha=5.0).fit(standard(x, x), y.double().numpy())
    assert probe.bias is not None
    ours = (x.double() @ probe.weight.T + probe.bias).squeeze(-1)
    torch.testing.assert_close(ours, torch.from_numpy(model.predict(standard(x, x))), rtol=0, atol=1e-8)
    if outputs == 1:
        assert probe.train_score == pytest.approx(model.score(standard(x, x), y.double().numpy()))


def test_head_without_a_bias_is_fitted_without_one() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = rows(100, 3)
    probe = linear_probe(x, y, outputs=3, problem="single_label", validation=(x, y), penalties=[1.0], bias=False)
    assert probe.bias is None
    scale = x.double().square().mean(0).sqrt()
    model = LogisticRegression(C=1.0, max_iter=1000, fit_intercept=False).fit((x.double() / scale).numpy(), y)
    torch.testing.assert_close(probe.weight * scale, torch.from_numpy(model.coef_), rtol=0, atol=1e-6)
    numbers = linear_probe(x, x[:, 0], outputs=1, problem="regression", validation=(x, x[:, 0]), bias=False)
    torch.testing.assert_close(numbers.weight[0], torch.tensor([1.0, 0, 0, 0]).double(), rtol=0, atol=1e-3)


def test_features_that_do_not_vary_get_no_weight_of_note() -> None:
    x, y = rows(100, 2)
    x = torch.cat([x, torch.full((100, 1), 3.0), torch.zeros(100, 1)], 1)
    x[:, 4] += 1e-7 * torch.randn(100)  # rounding
    probe = linear_probe(x, y, outputs=2, problem="single_label", validation=(x, y), penalties=[100.0])
    assert probe.weight[:, 4:].abs().max() < 1e-3
    assert probe.weight.isfinite().all()


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    x, y = rows(20, 2)
    with pytest.raises(ImportError, match=r'needs scikit-learn: pip install "lightning-ft\[probe\]"'):
        linear_probe(x, y, outputs=2, problem="single_label")
    linear_probe(x, x[:, 0], outputs=1, problem="regression")


X, Y = rows(20, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": 1, "labels": Y + 1}, "labels must be classes from 0 to 1, .* for 1 outputs; got .* from 1 to 2"),
        ({"labels": Y - 1}, "labels must be classes from 0 to 1"),
        ({"labels": Y.float()}, "labels must be classes from 0 to 1, whole numbers"),
        ({"labels": Y * 0}, r"labels must be of two classes or more; all 16 rows are \[0\]"),
        ({"labels": Y[:9]}, r"features \(20, 4\) must be .* labels \(9,\) one for each row"),
        ({"features": X[:3], "labels": Y[:3]}, "3 rows are too few to hold some out"),
        ({"features": X * torch.inf}, "features hold a value that is not finite"),
        ({"penalties": [0.0, 1.0]}, r"penalties=\[0.0, 1.0\] must be values of C, above 0"),
        ({"penalties": []}, r"penalties=\[\] must be values of C"),
        ({"problem": "multi_label"}, r"labels must be finite and \(rows, 2\) for 2 outputs; got \(20, 1\)"),
        ({"problem": "multi_label", "labels": X[:, :2]}, "labels must be 0 or 1 for multi_label; got values from"),
        ({"problem": "multi_label", "labels": X[:, :2] * 0}, "labels must hold a 0 and a 1 for some label"),
        ({"problem": "regression"}, r"labels must be finite and \(rows, 2\)"),
    ],
)
def test_refuses_what_cannot_be_fitted(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_probe(**{"features": X, "labels": Y, "outputs": 2, "problem": "single_label", **arguments})
