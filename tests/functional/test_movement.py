"""Masks over weights: the closed forms, ties, counts, and what is left when they are baked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_ft.core.fresh import fresh_parameters
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.functional.masked_weights import (
    MaskedWeight,
    Mode,
    bake,
    check_masks,
    mask_weights,
    masked_weights,
    sparsity,
)
from lightning_ft.functional.movement import add_penalty_grad_, cubic, kept_count, top_mask, update_masks
from tests.strangers import Filtered
from tests.tiny import tiny

KINDS = ("bert", "gpt2", "llama", "t5")
GROUPS = {"groups": {"block.0": "layers"}}


def tower(size: int = 10) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(size, size) for _ in range(2))})


def score(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for masked in masked_weights(module):
            assert masked.by.scores is not None
            masked.by.scores.normal_(generator=generator)


def test_the_cubic_is_halfway_where_the_paper_has_it() -> None:
    assert cubic(1.0, 0.15, 0.5) == pytest.approx(0.25625, abs=1e-12)
    assert [cubic(1.0, 0.15, x) for x in (-1.0, 0.0, 1.0, 2.0)] == [1.0, 1.0, 0.15, 0.15]


@pytest.mark.parametrize(("share", "total", "count"), [(0.29, 100, 29), (0.15, 10, 1), (0.999, 10, 9), (1.0, 7, 7)])
def test_the_kept_count_is_the_floor(share: float, total: int, count: int) -> None:
    assert kept_count(share, total) == count


def test_the_gradient_goes_straight_through() -> None:
    weight = torch.tensor([[2.0, -3.0]], requires_grad=True)
    masked = MaskedWeight(weight, scored=True)
    masked.mask[0, 1] = False
    out = masked(weight)
    assert out.tolist() == [[2.0, 0.0]]
    out.backward(torch.tensor([[0.5, 0.5]]))
    assert masked.scores is not None
    assert masked.scores.grad is not None
    assert weight.grad is not None
    assert masked.scores.grad.tolist() == [[1.0, -1.5]]  # W = 2, ∂L/∂W′ = 0.5: 1; also of what is masked
    assert weight.grad.tolist() == [[0.5, 0.0]]


def test_the_gradient_is_that_of_the_mask_as_a_factor() -> None:
    """The oracle: autograd of W · (M + S − S.detach())."""
    weight = torch.randn(4, 5, requires_grad=True)
    masked = MaskedWeight(weight, scored=True)
    masked.mask.bernoulli_(0.5)
    x = torch.randn(3, 5)
    assert masked.scores is not None
    (x @ masked(weight).T).square().sum().backward()
    own = weight.detach().clone().requires_grad_(), masked.scores.detach().clone().requires_grad_()
    (x @ (own[0] * (masked.mask + own[1] - own[1].detach())).T).square().sum().backward()
    torch.testing.assert_close(weight.grad, own[0].grad)
    torch.testing.assert_close(masked.scores.grad, own[1].grad)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_exactly_so_many_are_kept_and_the_highest(count: int) -> None:
    values = torch.randint(5, (10, 10)).float()  # most are equal to others
    ties = torch.rand(10, 10)
    mask = top_mask(values, count, ties)
    order = sorted(range(100), key=lambda i: (-values.flatten()[i], -ties.flatten()[i]))
    expected = torch.zeros(100, dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(mask.flatten(), expected)
    assert int(top_mask(values, count).sum()) == count


def test_before_any_score_has_moved_the_smallest_weights_go() -> None:
    module, twin = tower(), tower()
    twin.load_state_dict(module.state_dict())
    mask_weights(module, layers=GROUPS)
    mask_weights(twin, "magnitude", layers=GROUPS)
    update_masks(masked_weights(module), "hard", 0.3)
    update_masks(masked_weights(twin), "magnitude", 0.3)
    for one, other in zip(masked_weights(module), masked_weights(twin), strict=True):
        assert torch.equal(one.by.mask, other.by.mask)
        assert int(one.by.mask.sum()) == 30


@pytest.mark.parametrize("mode", ["hard", "magnitude"])
def test_a_global_choice_keeps_the_highest_of_all(mode: Mode) -> None:
    module = tower()
    mask_weights(module, mode, layers=GROUPS)
    weights = masked_weights(module)
    if mode == "hard":
        score(module)
    update_masks(weights, mode, 0.15, "global")
    values = [m.weight.detach().abs() if m.by.scores is None else m.by.scores.detach() for m in weights]
    lowest = min(v[m.by.mask].min() for v, m in zip(values, weights, strict=True))
    highest = max(v[~m.by.mask].max() for v, m in zip(values, weights, strict=True))
    assert lowest > highest
    assert sum(int(m.by.kept) for m in weights) == 30
    assert len({int(m.by.kept) for m in weights}) == 2  # other shares of one matrix than of the other
    assert bake(module).facts["kept"] == 30


def test_a_threshold_keeps_what_is_above_it_and_half_a_percent_at_least() -> None:
    module = tower(20)
    mask_weights(module, "soft", layers=GROUPS)
    score(module)
    weights = masked_weights(module)
    update_masks(weights, "soft", 0.0)
    assert all(bool(m.by.mask.all()) for m in weights)
    update_masks(weights, "soft", 0.6)
    for m in weights:
        assert m.by.scores is not None
        assert torch.equal(m.by.mask, torch.sigmoid(m.by.scores) > 0.6)
    update_masks(weights, "soft", 1 - 1e-9)
    for m in weights:
        assert m.by.scores is not None
        assert int(m.by.mask.sum()) == 2 == int(m.by.kept)
        assert m.by.scores[m.by.mask].min() > m.by.scores[~m.by.mask].max()


def test_the_penalty_is_the_mean_of_the_matrices_means() -> None:
    scores = [nn.Parameter(torch.randn(shape)) for shape in ((2, 3), (4, 5))]
    for p in scores:
        p.grad = torch.ones_like(p)
    add_penalty_grad_(scores, 7.0, 2, torch.tensor(8.0))
    value = 7.0 * torch.stack([torch.sigmoid(p).mean() for p in scores]).mean()
    for p, expected in zip(scores, torch.autograd.grad(value, scores), strict=True):
        torch.testing.assert_close(p.grad, 1 + 8 * expected)
    frozen = nn.Parameter(torch.zeros(2, 2))
    add_penalty_grad_([frozen], 7.0, 1, None)
    assert frozen.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_keeps_all_changes_no_bit_and_the_blocks_alone_have_one(kind: str) -> None:
    model = tiny(kind)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 2
    before, groups = model(ids).logits, LayerGroups.of(model)
    matrices = {
        name
        for group in groups.select("blocks")
        for name, p in groups.named_parameters(group)
        if p.ndim == 2 and "relative_attention_bias" not in name
    }
    names = {name for name, _ in model.named_parameters()}
    mask_weights(model)
    weights = masked_weights(model)
    assert {m.name for m in weights} == matrices
    assert matrices
    assert torch.equal(model(ids).logits, before)
    assert LayerGroups.of(model).names == groups.names
    assert fresh_parameters(model) == {m.by.scores for m in weights}
    score(model)
    update_masks(weights, "hard", 0.5)
    pruned = model(ids).logits
    assert not torch.equal(pruned, before)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, pruned)
    bake(copied)  # torch takes a class apart that both share
    assert torch.equal(copied(ids).logits, model(ids).logits)
    report = bake(model)
    assert torch.equal(model(ids).logits, pruned)
    assert {name for name, _ in model.named_parameters()} == names
    assert report.facts["kept"] == sum(m.weight.numel() // 2 for m in weights)
    assert [row["kept"] for row in report.rows] == [int(m.weight.count_nonzero()) for m in weights]
    assert all(row["sparsity"] == 0.5 for row in report.rows)
    assert not any(bool(torch.signbit(m.weight[m.weight == 0]).any()) for m in weights)
    with pytest.raises(ValueError, match="has no masked weights: MovementPruning"):
        sparsity(model)


def test_a_mask_that_something_else_changed_is_not_baked() -> None:
    module = tower()
    mask_weights(module, layers=GROUPS)
    weights = masked_weights(module)
    update_masks(weights, "hard", 0.5)
    assert check_masks(module).facts["kept"] == 100
    weights[1].by.mask.fill_(True)
    with pytest.raises(RuntimeError, match=r"layers.1.weight keeps 100 weights, where 50 were chosen"):
        bake(module)


def test_a_weight_that_comes_back_is_not_baked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tower()
    mask_weights(module, layers=GROUPS)
    update_masks(masked_weights(module), "hard", 0.5)
    monkeypatch.setattr(MaskedWeight, "forward", lambda self, weight: weight + 0)
    with pytest.raises(RuntimeError, match=r"layers.0.weight has weights other than 0 where its mask has none"):
        bake(module)


def test_gradients_of_single_examples_can_be_mapped() -> None:
    module = tower(4)
    mask_weights(module, layers=GROUPS)
    update_masks(masked_weights(module), "hard", 0.5)
    layer = module.get_submodule("layers.0")
    state = dict(layer.named_parameters())
    x = torch.randn(3, 4)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        masks = dict(layer.named_buffers())
        return torch.func.functional_call(layer, {**parameters, **masks}, (row,)).square().sum()

    name = "parametrizations.weight.0.scores"
    mapped = torch.vmap(torch.func.grad(loss), (None, 0))(state, x)[name]
    for i in range(3):
        torch.testing.assert_close(mapped[i], torch.func.grad(loss)(state, x[i])[name])


# ---- refusals


def _quantised() -> nn.Module:
    module = Filtered()
    weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    module.encoder.layers[0].linear1.weight = weight
    return module


def _parametrised() -> nn.Module:
    module = Filtered()
    parametrize.register_parametrization(module.encoder.layers[0].linear1, "weight", nn.Identity())
    return module


def _shared() -> nn.Module:
    module = Filtered()
    module.encoder.layers[1].linear1.weight = module.encoder.layers[0].linear1.weight
    return module


def _adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny("bert"), peft.LoraConfig(target_modules=["query"]))


def _without() -> nn.Module:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.LayerNorm(4)])

    return Tower()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (_quantised, {}, r"linear1 has quantised weights \(Linear\), which cannot be masked: load the model without"),
        (_parametrised, {}, r"is a parametrised weight already: bake that before"),
        (_shared, {}, "two linear maps of the blocks share a weight"),
        (_adapted, {}, "is an adapter of peft, over frozen weights: merge it"),
        (_without, {"layers": GROUPS}, "no block of Tower has a linear map"),
        (Filtered, {"mode": "movement"}, "mode='movement' must be \"hard\""),
    ],
)
def test_refuses(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_weights(make(), **options)
