"""The Fisher information against closed forms, and against a loop over single examples and classes."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_ft.core.fisher import Fisher
from lightning_ft.functional.fisher import FisherEstimate, fisher_diagonal, merge_ranks
from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.modules import SequenceClassification
from tests.ranks import RANKS, run_ranks
from tests.strangers import FILTERED, dataset

Batch = Any


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal to 1e-5 of each tensor's largest value; of 1e-7 of the model's where a gradient is 0 but for rounding."""
    assert found.keys() == expected.keys()
    peak = max(float(value.max()) for value in expected.values())
    assert peak > 0
    for name, value in expected.items():
        limit = tolerance * max(float(value.max()), 1e-5 * peak)
        assert float((found[name] - value).abs().max()) <= limit, name


def reference(
    module: nn.Module, rows: list[Batch], log_p: Callable[[Batch], list[tuple[Tensor, Tensor]]]
) -> dict[str, Tensor]:
    """F = 1/n Σ_rows Σ_(weight, log p) weight (∂ log p)²: a loop that shares no line with what it checks."""
    module.eval()
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    for row in rows:
        for weight, value in log_p(row):
            found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    sums[name] += weight.double() * gradient.double() ** 2
    return {name: (total / len(rows)).float() for name, total in sums.items()}


def all_classes(logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The exact variant as the papers write it: each class of each term ``(terms, classes)``, by its probability."""
    log_p = logits.log_softmax(-1)
    return [(value.detach().exp(), value) for value in log_p.flatten()]


class Logistic(nn.Module):
    """p = sigmoid(w · x) = 0.8 at x = (1, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.w.weight.fill_(torch.logit(torch.tensor(0.8)).item() / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x)


def bernoulli(module: nn.Module, batch: Batch) -> Likelihood:
    return Likelihood(module(batch[0]), batch[1][:, None], "bernoulli")


def two_classes(module: nn.Module, batch: Batch) -> Likelihood:
    logits = module(batch[0])
    return Likelihood(torch.cat([torch.zeros_like(logits), logits], 1), batch[1])


@pytest.mark.parametrize("likelihood", [bernoulli, two_classes])
@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize(
    ("variant", "label", "expected"),
    [("exact", 0, [0.16, 0.64]), ("empirical", 1, [0.04, 0.16]), ("empirical", 0, [0.64, 2.56])],
)
def test_logistic_regression(likelihood: Any, copies: int, variant: Any, label: int, expected: list[float]) -> None:
    batch = [torch.tensor([[1.0, 2.0]]).repeat(copies, 1), torch.full((copies,), label)]
    found = fisher_diagonal(Logistic(), [batch, batch], variant, likelihood=likelihood)
    torch.testing.assert_close(found.tensors["w.weight"], torch.tensor([expected]))
    assert found.examples == 2 * copies
    assert found.weights is not None


def test_gradients_that_cancel_in_a_batch_do_not_cancel_here() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)  # p = 0.5: gradients −0.5 for the label 0 and +0.5 for 1
    batch = [torch.ones(2, 1), torch.tensor([0, 1])]
    found = fisher_diagonal(layer, [batch], "empirical", likelihood=bernoulli)
    assert found.tensors["weight"].item() == 0.25


def test_sampled_labels_are_the_models_own() -> None:
    batch = [torch.tensor([[1.0, 2.0]]).repeat(4000, 1), torch.zeros(4000)]
    for likelihood in (bernoulli, two_classes):
        found = fisher_diagonal(Logistic(), [batch], "sampled", likelihood=likelihood)
        torch.testing.assert_close(found.tensors["w.weight"], torch.tensor([[0.16, 0.64]]), rtol=0.1, atol=0)
    gaussian = lambda module, batch: Likelihood(module(batch[0]), batch[1][:, None], "gaussian")  # noqa: E731
    found = fisher_diagonal(Logistic(), [batch], "sampled", likelihood=gaussian)
    torch.testing.assert_close(found.tensors["w.weight"], torch.tensor([[1.0, 4.0]]), rtol=0.1, atol=0)
    found = fisher_diagonal(Logistic(), [batch], "exact", likelihood=gaussian)
    torch.testing.assert_close(found.tensors["w.weight"], torch.tensor([[1.0, 4.0]]))


def test_a_seed_fixes_the_drawn_labels_whatever_the_batches() -> None:
    x, nothing = torch.randn(24, 2), torch.zeros(24)
    draws = []
    for seed, size in ((1, 24), (1, 24), (1, 5), (2, 24)):
        batches = list(zip(x.split(size), nothing.split(size), strict=True))
        generator = torch.Generator().manual_seed(seed)
        found = fisher_diagonal(Logistic(), batches, "sampled", likelihood=two_classes, generator=generator)
        draws.append(found.tensors["w.weight"])
    assert torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws[0], draws[2])
    assert not torch.allclose(draws[0], draws[3])


# ---- whole batches against single examples


@pytest.fixture(scope="module")
def classifier(minilm: str) -> SequenceClassification:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.utils.logging, "disable_progress_bar", lambda: None)
        return SequenceClassification(minilm, num_labels=3)


def texts(lengths: list[int], width: int | None = None, classes: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1000, 20000, (len(lengths), 16), generator=generator)
    ids, mask = (t[:, : width or max(lengths)] for t in (ids, torch.arange(16) < torch.tensor(lengths)[:, None]))
    labels = torch.arange(len(lengths)) % classes
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: v[i : i + 1] for name, v in batch.items()} for i in range(len(batch["labels"]))]


@pytest.mark.parametrize("variant", ["exact", "empirical"])
def test_minilm_equals_the_loop_over_examples_and_classes(classifier: SequenceClassification, variant: Any) -> None:
    batch = texts([16, 7, 3, 11, 9])

    def log_p(row: Batch) -> list[tuple[Tensor, Tensor]]:
        real = int(row["attention_mask"].sum())  # without any padding at all
        logits = classifier({name: v[:, :real] if v.ndim == 2 else v for name, v in row.items()})
        if variant == "exact":
            return all_classes(logits)
        return [(torch.ones(()), -F.cross_entropy(logits, row["labels"]))]

    estimate = FisherEstimate(classifier, variant)
    assert estimate.add(batch) == 5
    assert estimate.vectorised
    found = estimate.result()
    assert_same(found.tensors, reference(classifier, rows_of(batch), log_p))
    # Not the square of the mean gradient.
    mean = torch.autograd.grad(F.cross_entropy(classifier(batch), batch["labels"]), classifier.model.classifier.weight)
    assert found.tensors["model.classifier.weight"].sum() > 1.5 * mean[0].square().sum()
    # Neither padding nor the composition of batches matters.
    wide = texts([16, 7, 3, 11, 9], width=16)
    parts = [{name: v[some] for name, v in wide.items()} for some in ([0, 3, 1], [4, 2])]
    again = fisher_diagonal(classifier, parts, variant)
    assert_same(again.tensors, found.tensors, 2e-5)


def test_a_tiny_gpt2_equals_the_loop(tmp_path: Path) -> None:
    from lightning_ft.modules import Architecture, CausalLM
    from tests.tiny import GPT2

    module = CausalLM(Architecture(hf.GPT2Config(**{**GPT2, "vocab_size": 11}, pad_token_id=0)))
    assert module.model.lm_head.weight is module.model.transformer.wte.weight  # whose two uses add up before the square
    ids = torch.randint(1, 11, (4, 6))
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 2:] = -100
    labels[2] = -100  # an example without a label counts, and adds nothing
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def told(row: Batch) -> tuple[Tensor, Tensor]:
        chosen = row["labels"][:, 1:] != -100
        return module(row)[:, :-1][chosen], row["labels"][:, 1:][chosen]

    def log_p(row: Batch) -> list[tuple[Tensor, Tensor]]:
        return [(torch.ones(()), -F.cross_entropy(*told(row), reduction="sum"))]

    for vectorise in (True, False):
        found = fisher_diagonal(module, [batch], "empirical", vectorise=vectorise)
        assert_same(found.tensors, reference(module, rows_of(batch), log_p))
        found = fisher_diagonal(module, [batch], "exact", vectorise=vectorise)
        assert_same(found.tensors, reference(module, rows_of(batch), lambda row: all_classes(told(row)[0])))
    drawn = [fisher_diagonal(module, [batch], "sampled", vectorise=vectorise) for vectorise in (True, False)]
    assert_same(drawn[0].tensors, drawn[1].tensors)


class Convolutions(pl.LightningModule):
    """A stranger's: a residual network with batch norm and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.act(self.norm(self.stem(images)))
        hidden = self.act(hidden + self.body(hidden))
        return self.out(self.drop(hidden.mean((2, 3))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss


def images() -> list[Tensor]:
    return [torch.randn(6, 3, 5, 5), torch.arange(6) % 3]


def told_by_logits(module: nn.Module, batch: Batch) -> Likelihood:
    return Likelihood(module(batch[0]), batch[1])


def one_by_one(batch: list[Tensor]) -> list[list[Tensor]]:
    return [[part[i : i + 1] for part in batch] for i in range(len(batch[0]))]


def test_a_strangers_network_equals_the_loop() -> None:
    module, batch = Convolutions(), images()
    with torch.no_grad():
        module(torch.randn(32, 3, 5, 5))  # running statistics other than 0 and 1
    estimate = FisherEstimate(module, "exact", likelihood=told_by_logits)
    estimate.add(batch)
    assert estimate.vectorised, estimate.why_not
    exact = reference(module, one_by_one(batch), lambda row: all_classes(module(row[0])))
    assert_same(estimate.result().tensors, exact)
    # Of its own training_step nothing is known but the loss.
    estimate = FisherEstimate(module, "empirical")
    estimate.add(batch)
    assert estimate.vectorised is False
    log_p = lambda row: [(torch.ones(()), -F.cross_entropy(module(row[0]), row[1]))]  # noqa: E731
    assert_same(estimate.result().tensors, reference(module, one_by_one(batch), log_p))
    whole = fisher_diagonal(module, [batch], "empirical", likelihood=told_by_logits, vectorise=True)
    assert_same(whole.tensors, estimate.result().tensors)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=0)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.mix(self.embed(ids))))
        return self.logits(hidden.mean(1))

    def logits(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class TiedByLayer(Words):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 9)
        self.out.weight = self.embed.weight

    def logits(self, hidden: Tensor) -> Tensor:
        return self.out(hidden)


class TiedByHand(Words):
    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.weight)


class Twice(Words):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.norm(torch.relu(self.mix(hidden)) + self.mix(hidden))


class Unknown(Words):
    """A parameter of its own, used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale.exp()


class TimeFirst(Words):
    """Its layers see ``(time, batch, width)``, in which the first dimension may happen to fit."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.mix(self.embed(ids.T))))
        return hidden.mean(0)


class Root(nn.Module):
    """A norm that no library has, with one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, hidden: Tensor) -> Tensor:
        return (1 + self.gain) * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


class OwnNorm(Words):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Root()  # type: ignore[assignment]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize(
    ("kind", "whole"),
    [(TiedByLayer, True), (Twice, True), (OwnNorm, True), (TiedByHand, False), (Unknown, False), (TimeFirst, False)],
)
def test_whatever_the_layers_do_the_loop_is_equalled(kind: type[Words], whole: bool) -> None:
    module = kind()
    batch = [torch.randint(0, 9, (6, 6)), torch.arange(6)]
    estimate = FisherEstimate(module, "exact", likelihood=told_by_logits)
    estimate.add(batch)
    assert estimate.vectorised is whole, estimate.why_not
    assert_same(
        estimate.result().tensors,
        reference(module, one_by_one(batch), lambda row: all_classes(module(row[0]))),
    )
    if not whole:
        with pytest.raises(ValueError, match=r"vectorise=True, but .*: leave it out"):
            fisher_diagonal(module, [batch], likelihood=told_by_logits, vectorise=True)


# ---- left as found


def test_the_module_is_left_as_it_was() -> None:
    module = Convolutions().train()
    module.norm.eval()
    module.stem.bias.requires_grad_(False)
    module.out.weight.grad = torch.ones_like(module.out.weight)
    before = copy.deepcopy(module.state_dict())
    states = torch.get_rng_state(), random.getstate()
    for options in ({"likelihood": told_by_logits}, {"variant": "empirical"}):
        found = fisher_diagonal(module, [images()], limit=4, **options)  # type: ignore[arg-type]
        assert found.examples == 4
    torch.set_rng_state(states[0])
    images()  # the only numbers that were drawn
    images()
    drawn = torch.get_rng_state()
    torch.set_rng_state(states[0])
    for _ in range(2):
        fisher_diagonal(module, [images()], likelihood=told_by_logits)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert random.getstate() == states[1]
    assert [m.training for m in module.children()] == [True, False, True, True, True, True]
    assert "stem.bias" not in found.tensors
    assert not module.stem.bias.requires_grad
    assert torch.equal(module.out.weight.grad, torch.ones_like(module.out.weight))
    assert all(p.grad is None for name, p in module.named_parameters() if name != "out.weight")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(m._forward_hooks for m in module.modules())
    assert "log" not in vars(module)


def test_what_a_loss_draws_and_counts_is_undone() -> None:
    module = Convolutions()

    def loss(module: Any, batch: Batch) -> Tensor:
        module.norm.running_mean.add_(random.random() + torch.rand(()))
        return F.cross_entropy(module(batch[0]), batch[1])

    batch = images()
    states = torch.get_rng_state(), random.getstate()
    first, second = (fisher_diagonal(module, [batch], "empirical", loss=loss) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not module.norm.running_mean.any()
    assert first.trace() == second.trace()


def test_dropout_is_off_and_found_again() -> None:
    module = FILTERED.module().train()
    batch = list(dataset().tensors)
    runs = [fisher_diagonal(module, [batch], "empirical") for _ in range(2)]
    assert all(torch.equal(value, runs[1].tensors[name]) for name, value in runs[0].tensors.items())
    assert module.encoder.layers[0].dropout.training
    log_p = lambda row: [(torch.ones(()), -F.cross_entropy(module(row[0]), row[1]))]  # noqa: E731
    assert_same(runs[0].tensors, reference(module, one_by_one(batch), log_p))
    told = fisher_diagonal(module, [batch], "empirical", likelihood=told_by_logits)
    assert_same(told.tensors, runs[0].tensors)


def test_only_what_is_asked_for() -> None:
    module = Convolutions()
    names = ["stem.weight", "norm.weight"]
    batch = images()
    found = fisher_diagonal(module, [batch], likelihood=told_by_logits, parameters=names)
    assert list(found.tensors) == names
    everything = fisher_diagonal(module, [batch], likelihood=told_by_logits)
    assert_same(found.tensors, {name: everything.tensors[name] for name in names})
    squares = {name: module.get_parameter(name).detach().double().square().sum().item() for name in names}
    assert found.weights == pytest.approx(squares)


def test_half_precision_is_converted_for_the_time_being() -> None:
    module, batch = Convolutions().to(torch.bfloat16), images()
    stored = {name: value.data_ptr() for name, value in module.state_dict(keep_vars=True).items()}
    found = fisher_diagonal(module, [batch], likelihood=told_by_logits)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert stored == {name: value.data_ptr() for name, value in module.state_dict(keep_vars=True).items()}
    assert {value.dtype for value in found.tensors.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        single = fisher_diagonal(copy.deepcopy(module).float(), [batch], likelihood=told_by_logits)
    assert_same(found.tensors, single.tensors, 1e-6)


def test_progress_and_limit() -> None:
    seen: list[int] = []
    batches = [images() for _ in range(3)]
    found = fisher_diagonal(Convolutions(), batches, likelihood=told_by_logits, limit=8, progress=seen.append)
    assert seen == [6, 2]
    assert found.examples == 8


@torch.inference_mode()
def test_batches_made_under_inference_mode() -> None:
    with torch.inference_mode(False):
        module = Convolutions()
    assert fisher_diagonal(module, [images()], likelihood=told_by_logits).trace() > 0


# ---- refusals


def test_what_cannot_be_is_refused() -> None:
    module, batch = Convolutions(), images()
    with pytest.raises(ValueError, match="variant='batched' must be one of"):
        fisher_diagonal(module, [batch], "batched")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"variant='exact' asks what Convolutions itself says.*give likelihood="):
        fisher_diagonal(module, [batch])
    with pytest.raises(ValueError, match="batches gave no example"):
        fisher_diagonal(module, [], likelihood=told_by_logits)
    with pytest.raises(ValueError, match="limit=0 must be 1 or more"):
        fisher_diagonal(module, [batch], likelihood=told_by_logits, limit=0)
    with pytest.raises(ValueError, match=r"parameters names \['head.weight'\], which Convolutions has not"):
        fisher_diagonal(module, [batch], likelihood=told_by_logits, parameters=["stem.weight", "head.weight"])
    with pytest.raises(ValueError, match="Linear has no training_step: give loss="):
        fisher_diagonal(nn.Linear(2, 1), [batch], "empirical")
    with pytest.raises(ValueError, match="no parameter of Linear requires grad"):
        fisher_diagonal(nn.Linear(2, 1).requires_grad_(False), [batch], likelihood=told_by_logits)
    with pytest.raises(ValueError, match=r"rows of this batch cannot be told apart.*batch_size=1"):
        fisher_diagonal(module, [[batch[0], torch.zeros(2)]], "empirical")
    one = lambda module, batch: Likelihood(module(batch[0]).mean(0, keepdim=True), None)  # noqa: E731
    unlabelled = lambda module, batch: Likelihood(module(batch[0]), None)  # noqa: E731
    with pytest.raises(ValueError, match=r"the likelihood of a batch of . rows is of 1 examples"):
        fisher_diagonal(module, [batch], likelihood=one)
    with pytest.raises(ValueError, match="the data have none"):
        fisher_diagonal(module, [batch], "empirical", likelihood=unlabelled)
    with pytest.raises(ValueError, match="the loss of a batch of one is None"):
        fisher_diagonal(module, [batch], "empirical", loss=lambda module, batch: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="vectorise=True needs a likelihood"):
        fisher_diagonal(module, [batch], "empirical", vectorise=True)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"manual optimisation.*give loss="):
        fisher_diagonal(module, [batch], "empirical")


def test_many_outcomes_are_to_be_drawn() -> None:
    layer = nn.Linear(2, 3000)
    told = lambda module, x: Likelihood(module(x), None)  # noqa: E731
    with pytest.raises(ValueError, match=r'would take 2999 backward passes.*variant="sampled"'):
        fisher_diagonal(layer, [torch.randn(2, 2)], likelihood=told)
    assert fisher_diagonal(layer, [torch.randn(2, 2)], "sampled", likelihood=told).trace() > 0


def test_likelihoods_check_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"outputs has shape \(3,\)"):
        Likelihood(torch.zeros(3), None)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\), and for categorical outputs"):
        Likelihood(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="give the number of the example"):
        Likelihood(torch.zeros(3, 2), None, example=torch.zeros(3))


def sample_weighted_mean() -> dict[str, Any]:
    """On each of two processes: the rows of a data set of which the first has two and the second five."""
    from torch import distributed

    torch.manual_seed(0)
    module = Convolutions()
    rows = torch.randn(7, 3, 5, 5)
    distributed.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=RANKS)
    mine = rows[:2] if distributed.get_rank() == 0 else rows[2:]
    estimate = FisherEstimate(module, likelihood=lambda module, x: Likelihood(module(x), None))
    estimate.add(mine)
    merged = merge_ranks(estimate.result())
    empty = merge_ranks(FisherEstimate(module, likelihood=estimate._likelihood).result())
    distributed.destroy_process_group()
    whole = FisherEstimate(module, likelihood=estimate._likelihood)
    whole.add(rows)
    return {
        "merged": merged.tensors,
        "whole": whole.result().tensors,
        "counts": [merged.examples, empty.examples],
        "fingerprints": [merged.weights, whole.result().weights],
    }


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_processes_are_weighted_by_their_examples(tmp_path: Path) -> None:
    ranks = run_ranks(f"{__name__}:sample_weighted_mean", tmp_path)
    for rank in ranks:
        assert_same(rank["merged"], rank["whole"], 2e-6)
        assert rank["counts"] == [7, 0]
        assert rank["fingerprints"][0] == rank["fingerprints"][1]
    assert all(torch.equal(value, ranks[1]["merged"][name]) for name, value in ranks[0]["merged"].items())


@pytest.mark.parametrize("spread", [1.0, 30.0, 200.0])
def test_the_factor_of_the_covariance_of_a_score(spread: float) -> None:
    logits = spread * torch.randn(5, 7)
    logits[0, 3] = -torch.inf
    columns = torch.stack(list(Likelihood(logits, None).scores("exact")))  # (columns, terms, classes)
    assert len(columns) == 6
    p = logits.double().softmax(-1)
    covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(
        torch.einsum("ktc,ktd->tcd", columns, columns).double(), covariance, rtol=1e-4, atol=1e-7
    )


def test_fisher_is_a_value() -> None:
    found = fisher_diagonal(Logistic(), [[torch.ones(2, 2), torch.ones(2)]], likelihood=bernoulli)
    assert isinstance(found, Fisher)
    assert found.variant == "exact"
