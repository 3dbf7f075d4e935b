"""What is climbed is differentiated once and forgotten; where it cannot be, its graph is kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_ft.callbacks import FGM, PGD, FreeLB
from lightning_ft.functional.climbed_losses import ClimbedLosses, leaves_of
from lightning_ft.functional.passes import Seen
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings
from tests.perturbing import Gradients, Project, assert_same, batch, bert, gpt2, step

FREE_LB: Callable[[], Callback] = lambda: FreeLB(0.3, 3, magnitude=0.0)  # noqa: E731


class Graphs:
    """Counts the backward passes that reach the logits, and the graphs that are alive when a pass begins."""

    def __init__(self, net: nn.Module) -> None:
        self.backward, self.alive = 0, 0
        self._graphs: list[weakref.ref[Any]] = []
        net.register_forward_pre_hook(self._begins)
        net.register_forward_hook(self._ends)

    def _begins(self, *_: Any) -> None:
        self.alive = max(self.alive, sum(graph() is not None for graph in self._graphs))

    def _ends(self, net: Any, inputs: Any, output: Any) -> None:
        output.logits = _Marked.apply(output.logits, self)
        output.logits.register_hook(self._reached)

    def _reached(self, gradient: Tensor) -> None:
        self.backward += 1


class _Marked(torch.autograd.Function):
    """Nothing, with something that lives as long as the graph."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, graphs: Graphs) -> Tensor:
        ctx.mark = nn.Module()
        graphs._graphs.append(weakref.ref(ctx.mark))
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Own(Project):
    """The loss from the logits, which is where :class:`Graphs` looks."""

    mapping = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        rows = dict(batch)
        loss = nn.functional.cross_entropy(self.net(labels=None, **_without_labels(rows)).logits, rows["labels"])
        return {"loss": loss, "rows": len(rows)} if self.mapping else loss


class OwnMapping(Own):
    mapping = True


def _without_labels(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in rows.items() if name != "labels"}


def watched(callback: Callback, kind: type[Own] = Own, **options: Any) -> tuple[Gradients, Graphs]:
    net = bert()
    graphs = Graphs(net)
    return step(kind(net, batch()), callback, **options), graphs


@pytest.mark.parametrize("kind", [Own, OwnMapping])
@pytest.mark.parametrize(
    ("make", "passes", "alive"),
    # Of PGD's passes in between, which serve the ascent alone, nodes outlive what they had saved.
    [(FREE_LB, 3, 0), (lambda: FGM(0.5), 2, 0), (lambda: PGD(0.5, steps=3), 4, 1)],
    ids=["free-lb", "fgm", "pgd"],
)
def test_each_pass_is_differentiated_once_and_its_graph_is_gone_before_the_next(
    kind: type[Own], make: Callable[[], Callback], passes: int, alive: int
) -> None:
    _, graphs = watched(make(), kind)
    assert len(graphs._graphs) == passes
    assert (graphs.backward, graphs.alive) == (passes, alive)


def kept(net: nn.Module) -> list[Tensor]:
    """Has a weight's gradient hooked, so that graphs are kept; what the hook saw."""
    seen: list[Tensor] = []
    weight = net.get_submodule("classifier").weight
    assert isinstance(weight, Tensor)
    weight.register_hook(lambda gradient: seen.append(gradient))
    return seen


@pytest.mark.parametrize("make", [FREE_LB, lambda: FGM(0.5)], ids=["free-lb", "fgm"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_those_of_graphs_that_are_kept(make: Callable[[], Callback], precision: Any) -> None:
    net = bert(dropout=0.2)
    kept(net)
    graphs = Graphs(net)
    wanted = step(Own(net, batch()), make(), precision=precision)
    assert graphs.alive > 0
    found = step(Own(bert(dropout=0.2), batch()), make(), precision=precision)
    assert_same(found, wanted, 1e-5 if precision == "32-true" else 1e-2)


def test_a_hook_on_a_weight_sees_its_whole_gradient_once() -> None:
    net = bert()
    seen = kept(net)
    found = step(Own(net, batch()), FREE_LB())
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], found["classifier.weight"])


def test_a_hook_that_changes_a_gradient_changes_it_once() -> None:
    net = bert()
    net.classifier.weight.register_hook(lambda gradient: 2 * gradient)
    wanted = step(Own(bert(), batch()), FREE_LB())
    wanted["classifier.weight"] *= 2
    assert_same(step(Own(net, batch()), FREE_LB()), wanted)


def test_fp16_keeps_graphs_for_the_loss_scale() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    found, graphs = watched(FREE_LB(), plugins=plugin)
    assert (graphs.backward, graphs.alive) == (5, 2)
    for name, value in watched(FREE_LB())[0].items():
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=0.02)


def test_passes_may_share_weights_that_are_computed_once() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.exp()  # whose backward needs what forward saved

    class Shared(Own):
        def on_train_batch_start(self, *args: Any) -> None:
            super().on_train_batch_start(*args)
            self.cached = parametrize.cached()
            self.cached.__enter__()

        def on_train_batch_end(self, *args: Any) -> None:
            self.cached.__exit__(None, None, None)

    def computed() -> Any:
        net = bert()
        parametrize.register_parametrization(net.classifier, "weight", Doubled())
        return net

    assert_same(step(Shared(computed(), batch()), FREE_LB()), step(Own(computed(), batch()), FREE_LB()))


def test_a_sparse_gradient_stays_sparse() -> None:
    def sparse(net: Any) -> Any:
        net.bert.embeddings.word_embeddings.sparse = True
        return net

    found = step(Own(sparse(bert()), batch()), FREE_LB())
    name = "bert.embeddings.word_embeddings.weight"
    assert found[name].is_sparse
    found[name] = found[name].to_dense()
    assert_same(found, step(Own(bert(), batch()), FREE_LB()))


def test_two_weights_may_be_given_one_tensor() -> None:
    def doubled(hooked: bool) -> Any:
        net = bert()
        net.one, net.other = (nn.Parameter(torch.zeros(4, 2)) for _ in range(2))
        net.classifier.register_forward_hook(lambda module, inputs, output: output + net.one + net.other)
        if hooked:
            kept(net)
        return net

    assert_same(step(Own(doubled(False), batch()), FREE_LB()), step(Own(doubled(True), batch()), FREE_LB()))


def test_a_weight_that_no_pass_uses_has_no_gradient() -> None:
    net = bert()
    net.spare = nn.Linear(2, 2)
    assert "spare.weight" not in step(Own(net, batch()), FREE_LB())


def test_a_weight_whose_gradient_is_nothing_has_none() -> None:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, weight: Tensor) -> Tensor:
            return logits + weight

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient, None

    net = bert()
    net.cut = nn.Parameter(torch.ones(()))
    net.classifier.register_forward_hook(lambda module, inputs, output: Cut.apply(output, net.cut))
    assert "cut" not in step(Own(net, batch()), FREE_LB())


def test_the_gradients_may_not_be_differentiated() -> None:
    net = bert()
    words = PerturbedEmbeddings(net)
    words.begin(lambda place: torch.zeros_like(place.embedded).requires_grad_())
    seen = Seen(net(**batch()).loss)
    climbed = ClimbedLosses(words)
    climbed.add(seen)
    assert not seen.scalar.requires_grad
    weight = net.classifier.weight
    (gradient,) = torch.autograd.grad(climbed.total().square(), [weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_leaves_are_what_a_backward_pass_gives_gradients_to() -> None:
    net = gpt2()
    net.transformer.wpe.weight.requires_grad_(False)
    rows = batch()
    loss = net(**{**rows, "labels": rows["input_ids"]}).loss
    leaves = leaves_of(loss)
    loss.backward()
    assert {id(leaf) for leaf in leaves} == {id(p) for p in net.parameters() if p.grad is not None}
    assert len(leaves) == len(set(map(id, leaves)))
    assert leaves_of(loss, without=leaves) == []
