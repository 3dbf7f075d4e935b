from __future__ import annotations

import copy
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from lightning_ft.core.counter_random import random_key
from lightning_ft.core.layers import Layers
from lightning_ft.export.bake import baked
from lightning_ft.functional.intrinsic_dimension import (
    FastFood,
    Subspace,
    SubspaceWeight,
    normal,
    permutation,
    restrict_to_subspace,
    subspace_of,
)
from tests.strangers import FILTERED, Filtered
from tests.tiny import tiny

SIZES = [(5, 16), (16, 16), (100, 16), (7, 100), (200, 100), (3, 1), (1, 5), (1, 1)]


def dense(projection: FastFood) -> Tensor:
    return torch.stack([projection.project(e) for e in torch.eye(projection.dimension, dtype=torch.double)], 1)


@pytest.mark.parametrize(("dimension", "size"), SIZES)
def test_projection_is_the_product_of_its_dense_factors(dimension: int, size: int) -> None:
    """c H G Π H B with matrices from scipy, each piece of a long vector with its own."""
    projection = FastFood(dimension, size, seed=3)
    signs, _, gaussian = projection._draws(torch.zeros(0, dtype=torch.double))
    n, d = projection.padded, projection.piece
    hadamard = torch.tensor(scipy.linalg.hadamard(n), dtype=torch.double)
    expected = torch.zeros(n, projection.pieces * d, dtype=torch.double)
    for i in range(projection.pieces):
        shuffle = torch.zeros(n, n, dtype=torch.double)
        shuffle[torch.arange(n), permutation(n, random_key(3, 1, i))] = 1
        block = hadamard @ torch.diag(gaussian[i]) @ shuffle @ hadamard
        expected[:, i * d : (i + 1) * d] = block[:, :d]
    torch.testing.assert_close(dense(projection), (expected[:size, :dimension] * signs))


@pytest.mark.parametrize(("dimension", "size"), SIZES)
def test_transpose_is_the_adjoint(dimension: int, size: int) -> None:
    projection = FastFood(dimension, size, seed=3)
    v, w = torch.randn(dimension, dtype=torch.double), torch.randn(size, dtype=torch.double)
    torch.testing.assert_close(projection.project(v) @ w, v @ projection.transpose(w))


@pytest.mark.parametrize(("dimension", "size"), SIZES)
def test_a_gpu_folds_to_the_same_sums(dimension: int, size: int) -> None:
    """There the permutation is kept whole, as sums are to be taken in one order."""
    projection = FastFood(dimension, size, seed=3)
    _, places, gaussian = projection._draws(torch.zeros(0, dtype=torch.double))
    values = torch.randn(gaussian.numel(), dtype=torch.double)
    n = projection.padded
    whole = torch.cat([permutation(n, random_key(3, 1, i)) + i * n for i in range(projection.pieces)])
    torch.testing.assert_close(projection._ordered(values, whole), projection._fold(values, places))
    assert torch.equal(projection._reduced(whole), places.long())


@pytest.mark.parametrize(("dimension", "size"), [(5, 16), (100, 16), (7, 100), (200, 100)])
def test_lengths_are_kept_in_the_mean(dimension: int, size: int) -> None:
    v = torch.randn(dimension, dtype=torch.double)
    ratios = [FastFood(dimension, size, seed=s).project(v).square().sum() / v.square().sum() for s in range(300)]
    mean, error = torch.stack(ratios).mean().item(), torch.stack(ratios).std().item() / 300**0.5
    assert mean == pytest.approx(1, abs=4 * error)
    assert error < 0.05


def test_columns_are_of_length_one_and_nearly_orthogonal() -> None:
    """Where nothing is cut off, each column's length is exactly 1; two columns meet at √(2/n) in the mean."""
    columns = dense(FastFood(64, 4096, seed=0))
    products = columns.T @ columns
    torch.testing.assert_close(products.diagonal(), torch.ones(64, dtype=torch.double))
    others = products[~torch.eye(64, dtype=torch.bool)]
    assert others.square().mean().sqrt().item() == pytest.approx((2 / 4096) ** 0.5, rel=0.3)
    # Like Gaussian entries: the fourth moment is three times the square of the second.
    assert ((columns**4).mean() / (columns**2).mean() ** 2).item() == pytest.approx(3, rel=0.1)


def test_every_value_of_a_vector_longer_than_the_tensor_counts() -> None:
    """The reference code cuts off what the tensor has no room for."""
    lengths = dense(FastFood(100, 8, seed=1)).square().sum(0)
    torch.testing.assert_close(lengths, torch.ones(100, dtype=torch.double))


def test_draws_are_a_function_of_the_seed_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    v = torch.randn(7, generator=torch.Generator().manual_seed(0))
    one, same, other = (FastFood(7, 50, seed=seed).project(v) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_these_on_every_machine() -> None:
    """A checkpoint holds the seed alone: other draws would be another model."""
    projection = FastFood(3, 6, seed=7)
    signs, places, _ = projection._draws(torch.zeros(1))
    assert signs.tolist() == SIGNS
    assert permutation(8, random_key(7, 1, 0)).tolist() == PLACES
    assert places.tolist() == [place % 4 for place in PLACES]
    torch.testing.assert_close(projection.project(torch.tensor([1.0, 2.0, 3.0])), torch.tensor(PROJECTED))


SIGNS = [1, 1, -1]
PLACES = [4, 0, 7, 6, 1, 3, 5, 2]
PROJECTED = [1.55411065, 0.18844166, -1.28916991, 0.55414021, -2.52370811, -0.01743451]


@pytest.mark.parametrize("size", [1, 2, 4, 1 << 12])
def test_permutation_is_one_and_mixes(size: int) -> None:
    places = permutation(size, 5)
    assert torch.equal(places.sort().values, torch.arange(size))
    if size > 100:
        # Neighbours, and halves, are torn apart as by chance: |i - j| is n/3 in the mean.
        assert (places[1:] - places[:-1]).abs().double().mean().item() == pytest.approx(size / 3, rel=0.1)
        assert (places[: size // 2] < size // 2).double().mean().item() == pytest.approx(0.5, abs=0.05)
        assert not torch.equal(places, permutation(size, 6))


def test_normal_numbers_are_normal() -> None:
    numbers = normal(100_001, 1)
    assert len(numbers) == 100_001
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert (numbers**power).mean().item() == pytest.approx(moment, abs=0.08)


# ---- weights


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (2,)])
def test_gradient_is_that_of_finite_differences(said: bool, shape: tuple[int, ...]) -> None:
    subspace = Subspace(6, 2, said=said).double()
    size = torch.Size(shape).numel()
    steps = SubspaceWeight(subspace, 1, size, seed=3)
    weight = torch.randn(shape, dtype=torch.double, requires_grad=True)
    with torch.no_grad():
        subspace.vector.normal_()
        if subspace.scales is not None:
            subspace.scales.normal_()
    inputs = [weight, *subspace.parameters()]
    assert torch.autograd.gradcheck(lambda *_: steps(weight), inputs)


def test_a_projection_onto_all_is_full_fine_tuning() -> None:
    """With P = I and d = D, a step of plain SGD moves θ as full fine-tuning does."""

    class Identity(FastFood):
        def project(self, vector: Tensor) -> Tensor:
            return vector.clone()

        transpose = project

    subspace = Subspace(20, 1, said=False)
    steps = SubspaceWeight(subspace, 0, 20, seed=0)
    steps.projection = Identity(20, 20, seed=0)
    layer, full = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)
    full.load_state_dict(layer.state_dict())
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", steps, unsafe=True)
    inputs = torch.randn(8, 5)
    own = [torch.optim.SGD(p, lr=0.1) for p in (subspace.parameters(), full.parameters())]
    for _ in range(3):
        for model, optimizer in zip((layer, full), own, strict=True):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, full.weight)


def ids(kind: str) -> dict[str, Tensor]:
    tokens = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = 2
    return {"input_ids": tokens}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_starts_as_the_model_was_and_just_d_values_train(kind: str) -> None:
    model = tiny(kind)
    before = model(**ids(kind)).logits
    head = sum(p.numel() for p in Layers().of(model).parameters("head"))
    groups = Layers().of(model).names
    report = restrict_to_subspace(model, dimension=300, seed=1)
    assert torch.equal(model(**ids(kind)).logits, before)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 300 + head
    assert report.facts["values that train"] == 300 + head
    assert Layers().of(model).names == groups

    subspace = subspace_of(model)
    assert subspace is not None
    model(**ids(kind)).logits.sum().backward()
    assert subspace.vector.grad is not None
    assert subspace.vector.grad.count_nonzero() == len(subspace.vector)
    with torch.no_grad():
        for parameter in subspace.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        moved = model(**ids(kind)).logits
        assert not torch.equal(moved, before)
        # A copy has a vector of its own, and a baked one none.
        twin, (plain, done) = copy.deepcopy(model), baked(model)
        torch.testing.assert_close(plain(**ids(kind)).logits, moved, rtol=0, atol=1e-6)
        assert done == ["parametrisations applied"]
        subspace.vector.zero_()
        assert torch.equal(twin(**ids(kind)).logits, moved)


def test_the_inner_model_alone_is_copied_with_its_vector() -> None:
    module = Filtered(dropout=0)
    restrict_to_subspace(module, dimension=100)
    subspace = subspace_of(module)
    assert subspace is not None
    with torch.no_grad():
        subspace.vector.normal_()
    tokens = torch.randint(20, (2, 5))
    inner = copy.deepcopy(module.encoder)
    plain, _ = baked(module.encoder)
    assert torch.equal(inner(tokens), module.encoder(tokens))
    torch.testing.assert_close(plain(tokens), module.encoder(tokens), rtol=0, atol=1e-5)
    with torch.no_grad():
        subspace.vector.zero_()
    assert not torch.equal(inner(tokens), module.encoder(tokens))


def test_layers_given_frozen_and_half_precision_weights_are_respected() -> None:
    model = tiny("bert").bfloat16()
    frozen = model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    groups = {"embeddings": "embeddings", "below": r"layer\.[01]\.", "head": r"layer\.2\.|pooler|classifier"}
    restrict_to_subspace(model, dimension=100, layers={"groups": groups})
    assert model.bert.embeddings.word_embeddings.weight is frozen
    assert all(p.requires_grad for p in model.bert.encoder.layer[2].parameters())
    assert model(**ids("bert")).logits.dtype == torch.bfloat16
    assert not model.bert.encoder.layer[0].attention.self.query.parametrizations.weight.original.requires_grad


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens)
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return hidden


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 39}, r"dimension=39 must lie between 40 .*one scale for each of 39 tensors.*said=False it may"),
        ({"dimension": 0, "said": False}, r"dimension=0 must lie between 1 \(one value\)"),
        ({"dimension": 10**6}, r"must lie between 40 .* and 1976, all values of the tensors"),
    ],
)
def test_refuses_a_dimension_out_of_range(arguments: dict[str, Any], message: str) -> None:
    module = FILTERED.module()
    with pytest.raises(ValueError, match=message):
        restrict_to_subspace(module, **arguments)
    assert all(p.requires_grad for p in module.parameters())


def test_refuses_what_it_cannot_change() -> None:
    module = FILTERED.module()
    restrict_to_subspace(module, dimension=100)
    with pytest.raises(ValueError, match="has an attribute 'intrinsic_dimension' already"):
        restrict_to_subspace(module, dimension=100)
    frozen = FILTERED.module().requires_grad_(False)
    with pytest.raises(ValueError, match="found no pretrained parameter that trains"):
        restrict_to_subspace(frozen, dimension=100)
    model = Recurrent()
    with pytest.raises(ValueError, match="LSTM keeps its weights in a list of its own"):
        restrict_to_subspace(model, dimension=100)
    assert all(p.requires_grad for p in model.parameters())
