"""R3F and R-Drop against loops written out with ``inputs_embeds``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ft.callbacks.r3f import R3F
from lightning_ft.callbacks.r_drop import RDrop
from tests.perturbing import SEED, Keep, Project, assert_same, backward, batch, bert, gpt2, logged, step, t5, trainer


def both_ways(one: Tensor, other: Tensor) -> Tensor:
    """The symmetric KL of each row, as fairseq has it."""
    a, b = (F.log_softmax(x, -1, dtype=torch.float32) for x in (one, other))
    return (F.kl_div(a, b, reduction="none", log_target=True) + F.kl_div(b, a, reduction="none", log_target=True)).sum(
        -1
    )


def tokens(first: int, width: int = 5, classes: int = 50) -> Tensor:
    labels = torch.randint(classes, (4, width), generator=torch.Generator().manual_seed(3))
    labels[:, :first] = -100
    labels[2] = -100
    return labels


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]], Callable[[Tensor], Tensor] | None]] = {
    "bert": (bert, batch, None),
    "bert-dropout": (lambda: bert(dropout=0.2), batch, None),
    "tokens": (
        lambda: bert("TokenClassification", num_labels=3),
        lambda: batch(labels=tokens(2, 6, 3)),
        lambda labels: labels != -100,
    ),
    # The token at t is told by the logits at t − 1.
    "gpt2": (gpt2, lambda: batch(labels=tokens(2, 6)), lambda labels: F.pad(labels[:, 1:], (0, 1), value=-100) != -100),
    "t5": (t5, lambda: batch(labels=tokens(1)), lambda labels: labels != -100),
}


def written_out_r3f(
    model: Any, rows: dict[str, Tensor], counted: Tensor | None, *, dropout: str, epsilon: float
) -> dict[str, Tensor]:
    rest = {name: value for name, value in rows.items() if name != "input_ids"}
    words = model.get_input_embeddings()
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    clean = model(inputs_embeds=words(rows["input_ids"]), **rest)
    noise = torch.empty(*rows["input_ids"].shape, words.embedding_dim).uniform_(-epsilon, epsilon)
    noise *= rows["attention_mask"].unsqueeze(-1)
    if dropout == "shared":
        torch.set_rng_state(before)
    noisy = model(inputs_embeds=words(rows["input_ids"]).detach() + noise, **rest)
    apart = both_ways(noisy.logits, clean.logits)
    return backward(model, clean.loss + 0.7 * (apart.mean() if counted is None else apart[counted].mean()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dropout", ["independent", "shared"])
def test_r3f_has_the_gradients_of_the_loop_written_out(name: str, dropout: Any) -> None:
    make, make_rows, counted = MODELS[name]
    rows = make_rows()
    found = step(Project(make(), rows), R3F(0.7, 0.1, dropout=dropout))
    labelled = None if counted is None else counted(rows["labels"])
    assert_same(found, written_out_r3f(make(), rows, labelled, dropout=dropout, epsilon=0.1))


def term(*callbacks: Any) -> float:
    return logged(Project(bert(dropout=0.3), batch()), *callbacks)["r3f"][-1]


def test_with_the_masks_of_the_first_pass_and_no_noise_the_term_is_exactly_zero() -> None:
    assert term(R3F(1.0, 0.0, dropout="shared")) == 0
    # With masks of its own the published code measures dropout, and noise of 1e-5 is nothing beside it.
    assert term(R3F(1.0, 0.0)) > 1e3 * term(R3F(1.0, 1e-5, dropout="shared")) > 0


def test_a_weight_of_zero_is_the_base_loss() -> None:
    rows = batch()
    found = step(Project(bert(dropout=0.2), rows), R3F(0.0))
    plain = step(Project(bert(dropout=0.2), rows))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_the_noisy_pass_sends_the_table_no_gradient() -> None:
    class WithoutLoss(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            output = self.net(**batch)
            return 0 * output.loss

    rows = batch()
    # Of the clean pass alone: what the table gets is ∂/∂x of the first side, and its noisy twin would add as much.
    found = step(WithoutLoss(bert(), rows), R3F(1.0, 0.5))
    wanted = written_out_r3f(bert(), rows, None, dropout="shared", epsilon=0.5)
    plain = step(Project(bert(), rows))
    name = "bert.embeddings.word_embeddings.weight"
    torch.testing.assert_close(0.7 * found[name], wanted[name] - plain[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("noise", "size"), [("uniform", 0.1), ("normal", 0.1)])
def test_padding_is_left_as_it_is(noise: Any, size: float) -> None:
    seen: list[Tensor] = []
    callback = R3F(1.0, size, noise=noise)

    class Spy(Project):
        def on_before_backward(self, loss: Tensor) -> None:
            seen.extend(callback._perturbing.words.deltas)

    rows = batch()
    step(Spy(bert(), rows), callback)
    padding = rows["attention_mask"] == 0
    assert seen[0][padding].abs().max() == 0
    assert (seen[0][~padding] != 0).all()
    assert bool(seen[0].abs().max() > size) == (noise == "normal")


def test_r_drop_has_the_gradients_of_two_passes() -> None:
    rows = batch()
    found = step(Project(bert(dropout=0.2), rows), RDrop(3.0))
    model = bert(dropout=0.2)
    torch.manual_seed(SEED)
    one, two = model(**rows), model(**rows)
    wanted = (one.loss + two.loss) / 2 + 3.0 * both_ways(one.logits, two.logits).mean() / 2
    assert_same(found, backward(model, wanted))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_r_drop_in_eval_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"RDrop acts in train mode only.*Call .train\(\)"):
        step(Project(bert().eval(), batch()), RDrop())


def test_regression_is_compared_by_its_squares() -> None:
    rows = batch(labels=torch.randn(4))
    found = step(Project(bert(dropout=0.2, num_labels=1), rows), RDrop(3.0))
    model = bert(dropout=0.2, num_labels=1)
    torch.manual_seed(SEED)
    one, two = model(**rows), model(**rows)
    wanted = (one.loss + two.loss) / 2 + 3.0 * (one.logits - two.logits).square().mean() / 2
    assert_same(found, backward(model, wanted))


def test_several_labels_at_once_are_told_by_the_configuration() -> None:
    options = {"num_labels": 3, "problem_type": "multi_label_classification", "dropout": 0.2}
    rows = batch(labels=(torch.rand(4, 3) > 0.5).float())
    found = step(Project(bert(**options), rows), RDrop(3.0))
    model = bert(**options)
    torch.manual_seed(SEED)
    one, two = model(**rows), model(**rows)
    apart = ((one.logits.sigmoid() - two.logits.sigmoid()) * (one.logits - two.logits)).sum(-1)
    assert_same(found, backward(model, (one.loss + two.loss) / 2 + 3.0 * apart.mean() / 2))


def test_embeddings_of_half_precision_are_refused_where_the_noise_is_nothing() -> None:
    with pytest.raises(ValueError, match=r"epsilon=1e-05 rounds to nothing beside embeddings in torch\.bfloat16"):
        step(Project(bert().bfloat16(), batch()), R3F())


# ---- R4F


def largest(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight, 2))


def test_r4f_trains_a_head_of_spectral_norm_one_and_leaves_it_so() -> None:
    rows = batch()
    module = Project(bert(dropout=0.2), rows, batches=3, lr=0.1)
    keep, saved = Keep(), {}
    run = trainer(R3F(1.0, spectral_norm=True), keep)

    class Save(Keep):
        def on_train_batch_end(self, *_: Any) -> None:
            saved["trained"] = largest(module.net.classifier.weight.detach())
            # A copy, as a file is one: the module itself is changed when the fit ends.
            saved["checkpoint"] = copy.deepcopy(run._checkpoint_connector.dump_checkpoint(weights_only=False))

    run.callbacks.append(Save())
    run.fit(module)
    assert saved["trained"] != pytest.approx(1, abs=1e-3)
    checkpoint = saved["checkpoint"]
    assert largest(checkpoint["state_dict"]["net.classifier.weight"]) == pytest.approx(1, abs=1e-3)
    [state] = [state for key, state in checkpoint["callbacks"].items() if key.startswith("R3F")]
    assert largest(state["head"]) == pytest.approx(saved["trained"])
    assert largest(module.net.classifier.weight.detach()) == pytest.approx(1, abs=1e-3)


def test_r4f_goes_on_from_the_weight_that_trained() -> None:
    callback, module = R3F(1.0, spectral_norm="net.classifier"), Project(bert(), batch())
    raw = 3 * torch.ones_like(module.net.classifier.weight)
    callback.load_state_dict({"head": raw})
    seen: list[Tensor] = []

    class Spy(Keep):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.net.classifier.weight.detach().clone())

    step(module, callback, Spy())
    assert torch.equal(seen[0], raw)


def test_r4f_asks_for_the_layer_where_the_head_has_several() -> None:
    net = bert()
    net.classifier = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    with pytest.raises(ValueError, match=r'spectral_norm=True must name the linear layer.*"net.classifier.1"'):
        step(Project(net, batch()), R3F(spectral_norm=True))
    step(Project(net, batch()), R3F(spectral_norm="net.classifier.1"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: R3F(-1.0), "weight=-1.0 must be a number, 0 or more"),
        (lambda: R3F(epsilon=float("nan")), "epsilon=nan must be"),
        (lambda: R3F(noise="pink"), 'noise=\'pink\' must be "uniform" or "normal"'),  # type: ignore[arg-type]
        (lambda: R3F(dropout="off"), "dropout='off' must be"),  # type: ignore[arg-type]
        (lambda: R3F(answer="labels"), "answer='labels' must be one of single_label, multi_label, regression"),  # type: ignore[arg-type]
        (lambda: RDrop(-0.5), "weight=-0.5 must be"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
