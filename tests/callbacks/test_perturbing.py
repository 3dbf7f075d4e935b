"""What perturbation methods do with a training step that they have never seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_ft.callbacks import ActivationCheckpointing, FrozenPrefixCache, TemporalEnsembling
from lightning_ft.callbacks.fgm import FGM
from lightning_ft.callbacks.free_lb import FreeLB
from lightning_ft.callbacks.neftune import NEFTune
from lightning_ft.callbacks.pgd import PGD
from lightning_ft.callbacks.r3f import R3F
from lightning_ft.callbacks.r_drop import RDrop
from lightning_ft.callbacks.smart import SMART
from lightning_ft.core.token_inputs import TokenInputs, as_token_inputs
from lightning_ft.functional.free_lb import free_lb
from lightning_ft.functional.passes import perturbed_loss
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings
from tests.perturbing import Project, assert_same, backward, batch, bert, step
from tests.strangers import FILTERED, STRANGERS, Encoder, Filtered, Manual, Stranger, outcome, weights
from tests.tiny import TINY

METHODS: dict[str, Callable[..., Callback]] = {
    "r3f": lambda **o: R3F(1.0, 0.05, dropout="shared", **o),
    "r-drop": lambda **o: RDrop(2.0, **o),
    "smart": lambda **o: SMART(1.0, 1.0, dropout="shared", **o),
    "free-lb": lambda **o: FreeLB(0.3, 3, magnitude=0.0, **o),
    "fgm": lambda **o: FGM(0.5, **o),
    "pgd": lambda **o: PGD(0.5, **o),
}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


# ---- where the logits are


class Scores(nn.Module):
    """Returns its logits as a plain tensor, or under names that no list of names would hold."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = bert(), form

    def forward(self, tokens: Tensor) -> Any:
        logits = self.inner(tokens).logits
        return {"tensor": logits, "mapping": {"scores": logits}, "tuple": (logits, logits.sum(0))}[self.form]


class Wrapped(Project):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.net(batch["input_ids"])
        logits = {"tensor": lambda: output, "mapping": lambda: output["scores"], "tuple": lambda: output[0]}
        return F.cross_entropy(logits[self.net.form](), batch["labels"])


class Inline(Project):
    """Its head is called in the step itself: no module gives logits from ids."""

    def __init__(self, rows: Any) -> None:
        super().__init__(bert(), rows)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        pooled = self.net.bert(batch["input_ids"]).pooler_output
        return F.cross_entropy(self.net.classifier(pooled), batch["labels"])


@pytest.mark.parametrize(
    ("form", "logits"),
    [("tensor", None), ("mapping", "scores"), ("tuple", "0"), ("mapping", lambda output: output["scores"])],
)
def test_logits_are_found_where_they_are(form: str, logits: Any) -> None:
    rows = batch()
    found = step(Wrapped(Scores(form), rows), METHODS["r3f"](logits=logits))
    assert_same(found, step(Wrapped(Scores("tensor"), rows), METHODS["r3f"]()))


@pytest.mark.parametrize("name", ["r3f", "r-drop", "smart"])
def test_a_head_that_the_step_calls_itself_is_named_by_its_path(name: str) -> None:
    rows = batch()
    rows["attention_mask"][:] = 1
    found = step(Inline(rows), METHODS[name](logits="net.classifier"))
    plain = dict(rows)
    plain.pop("attention_mask")
    assert_same(found, step(Project(bert(), plain), METHODS[name]()))


@pytest.mark.parametrize(
    ("module", "logits", "said"),
    [
        (
            lambda: Inline(batch()),
            None,
            r"the logits are not found: the model returned a .*Output.*logits=\"classifier\"",
        ),
        (lambda: Wrapped(Scores("mapping"), batch()), None, "returned a dict of scores, and none has `logits`"),
        (lambda: Wrapped(Scores("mapping"), batch()), "answers", "logits='answers' names none of it"),
        (lambda: Wrapped(Scores("mapping"), batch()), lambda output: None, "gave no tensor of floats"),
    ],
)
def test_logits_that_are_not_found_name_the_argument(module: Any, logits: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        step(module(), R3F(logits=logits))


def test_a_hidden_state_is_not_taken_for_logits() -> None:
    class Late(Filtered):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            tokens, labels = batch
            return F.cross_entropy(self.classifier(self.encoder(tokens)[:, 0]), labels)

    with pytest.raises(ValueError, match=r"the model returned a tensor \(4, 5, 8\)"):
        FILTERED.fit(RDrop(), module=Late())
    FILTERED.fit(RDrop(logits="classifier"), module=Late(), max_epochs=1)


def test_token_logits_that_the_loss_does_not_read_are_refused() -> None:
    class Detached(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            output = self.net(**batch)
            return F.cross_entropy(
                output.logits.clone().detach().requires_grad_().flatten(0, 1), batch["labels"].flatten()
            )

    net = bert("TokenClassification", num_labels=3)
    with pytest.raises(ValueError, match=r"the loss is not computed from the logits .* logits="):
        step(Detached(net, batch(labels=torch.randint(3, (4, 6)))), R3F())


# ---- a step that is called again


class Counting(Project):
    """Logs, counts, takes items out of its batch, and returns a mapping."""

    def __init__(self) -> None:
        super().__init__(bert(dropout=0.2), batch(), batches=2)
        self.mean = MeanMetric()
        self.logged: list[float] = []

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.append(float(torch.as_tensor(value).detach()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        labels = batch.pop("labels")
        output = self.net(**batch, labels=labels)
        self.mean.update(output.loss.detach())
        self.log("loss", output.loss)
        return {"loss": output.loss, "seen": len(labels)}


@each_method
def test_nothing_is_logged_or_counted_twice(make: Callable[..., Callback]) -> None:
    module, ended = Counting(), []

    class End(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            ended.append(outputs)

    step(module, make(), End())
    assert len(module.logged) == 2
    assert module.mean._update_count == 2
    assert float(module.mean.compute()) == pytest.approx(sum(module.logged) / 2)
    assert [outputs["seen"] for outputs in ended] == [4, 4]
    assert "log" not in vars(module)
    assert "training_step" not in vars(module)


@pytest.mark.filterwarnings("ignore:.*returned .None.")
def test_a_step_that_skips_its_batch_skips_it() -> None:
    class Skips(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    module = Skips(bert(), batch(), batches=2)
    assert_same(step(module, FGM(0.5)), step(Project(bert(), batch()), FGM(0.5)))


def test_a_step_that_returns_something_else_is_refused() -> None:
    class Odd(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            return {"losses": 1}

    with pytest.raises(ValueError, match='need a loss, or a mapping with "loss"'):
        step(Odd(bert(), batch()), FGM())


def test_a_step_that_embeds_other_tokens_the_second_time_is_refused() -> None:
    class Fickle(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.steps += 1
            width = 6 - self.steps
            cut = {name: value[:, :width] if value.ndim > 1 else value for name, value in batch.items()}
            return self.net(**cut).loss

    with pytest.raises(ValueError, match="embedded other tokens than the first"):
        step(Fickle(bert(), batch()), FGM())


@each_method
def test_manual_optimisation_does_what_automatic_does(make: Callable[..., Callback]) -> None:
    class Still(Filtered):
        def __init__(self) -> None:
            super().__init__(dropout=0.1)

    class ManualStill(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch) / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()
                self.lr_schedulers().step()

    class Doubled(Filtered):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    def run(stranger: Any, callback: Callback, **options: Any) -> dict[str, Tensor]:
        class Seeded(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                torch.manual_seed(batch_idx)

        return weights(FILTERED.fit(Seeded(), callback, module=stranger(), max_epochs=1, **options).lightning_module)

    # A term that is added has the step's own factor in automatic optimisation; here it halves both losses itself.
    if isinstance(make(), R3F | RDrop | SMART):
        halved = {"r3f": lambda: R3F(0.5, 0.05, dropout="shared"), "r-drop": lambda: RDrop(1.0)}
        callback = {R3F: halved["r3f"], RDrop: halved["r-drop"], SMART: lambda: SMART(0.5, 0.5, dropout="shared")}
        manual = run(ManualStill, callback[type(make())]())
    else:
        manual = run(ManualStill, make())
    automatic = run(Doubled, make(), accumulate_grad_batches=2)
    for name, value in automatic.items():
        torch.testing.assert_close(manual[name], value, rtol=1e-4, atol=1e-5)


def test_a_manual_step_that_steps_first_is_refused() -> None:
    class StepsFirst(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx:
                self.optimizers().step()
            self.manual_backward(self.loss(batch))

    with pytest.raises(ValueError, match="steps an optimiser before its first manual_backward"):
        FILTERED.fit(FGM(), module=StepsFirst())


def test_a_step_of_one_s_own_runs_the_methods_as_functions() -> None:
    rows, module = batch(), bert()
    words = PerturbedEmbeddings(module)
    with torch.random.fork_rng():
        loss = perturbed_loss(free_lb(words, 0.3, 3, magnitude=0.0), lambda: module(**rows).loss)
    words.remove()
    assert_same(backward(module, loss), step(Project(bert(), rows), METHODS["free-lb"]()))


# ---- beside others


@pytest.mark.parametrize("name", ["free-lb", "r3f", "smart"])
def test_blocks_that_are_computed_again_give_the_same_gradients(name: str) -> None:
    rows = batch()
    found = step(Project(bert(dropout=0.2), rows), ActivationCheckpointing(), METHODS[name]())
    assert_same(found, step(Project(bert(dropout=0.2), rows), METHODS[name]()))


def test_re_entrant_checkpointing_is_refused_by_name() -> None:
    net = bert()
    net.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r're-entrant gradient checkpointing.*"use_reentrant": False'):
        step(Project(net, batch()), FGM())


def test_embeddings_that_are_computed_again_are_refused() -> None:
    class Whole(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            call = torch.utils.checkpoint.checkpoint
            return F.cross_entropy(
                call(lambda ids: self.net(ids).logits, batch["input_ids"], use_reentrant=False), batch["labels"]
            )

    with pytest.raises(ValueError, match="embeddings are computed again in the backward pass"):
        step(Whole(bert(), batch()), FGM())


@each_method
def test_noise_of_neftune_goes_with_all(make: Callable[..., Callback]) -> None:
    step(Project(bert(), batch()), NEFTune(), make())


def test_what_goes_with_no_repetition_is_refused() -> None:
    rows = batch()
    with pytest.raises(ValueError, match="FrozenPrefixCache does not compute again"):
        step(Project(bert(), rows), FGM(), FrozenPrefixCache())
    with pytest.raises(ValueError, match="FrozenPrefixCache does not compute again"):
        step(Project(bert(), rows), NEFTune(), FrozenPrefixCache())
    with pytest.raises(ValueError, match="FGM beside another perturbation method"):
        step(Project(bert(), rows), R3F(), FGM())
    with pytest.raises(ValueError, match=r"list FGM before it in callbacks="):
        FILTERED.fit(TemporalEnsembling(1.0), FGM())
    FILTERED.fit(FGM(), TemporalEnsembling(1.0), max_epochs=1)


def test_a_compiled_lightning_module_is_refused() -> None:
    with pytest.raises(ValueError, match="compile the model inside instead"):
        step(torch.compile(Project(bert(), batch()), backend="eager"), FGM())


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, at a graph break
@pytest.mark.parametrize("make", [METHODS["smart"], METHODS["free-lb"]], ids=["smart", "free-lb"])
def test_a_compiled_model_does_what_the_plain_one_does(make: Callable[..., Callback]) -> None:
    rows = batch()
    net = bert()
    compiled = Project(net, rows)
    compiled.net = torch.compile(net, backend="eager")
    found = step(compiled, make())
    wanted = step(Project(bert(), rows), make())
    assert_same({name.removeprefix("_orig_mod."): value for name, value in found.items()}, wanted)


# ---- where it acts


def test_validation_and_prediction_are_plain() -> None:
    seen: list[int] = []
    callback = FreeLB(0.5, 2)

    class Spy(Filtered):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            seen.append(batch_idx)
            assert not callback._perturbing.words._active

    FILTERED.fit(callback, module=Spy(), max_epochs=1, num_sanity_val_steps=0)
    assert seen


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("deberta-full", "qwen3")])
def test_the_embeddings_of_the_input_are_found_and_padding_in_them(name: str) -> None:
    model = TINY[name]()
    ids = torch.randint(3, 40, (2, 6))
    mask = torch.ones_like(ids)
    ids[:, 3], mask[1, 4:] = 2, 0  # T5 classifies at the end of the text
    if name == "bart":
        ids[:, 4:] = torch.where(mask[:, 4:] == 1, ids[:, 4:].clamp(min=3), 1)
    words = PerturbedEmbeddings(model)
    words.begin(lambda place: place.mask * torch.randn_like(place.embedded))
    moved = model(input_ids=ids, attention_mask=mask).logits
    assert len(words.places) == 1
    assert torch.equal(words.places[0].real, mask.bool())
    words.remove()
    assert not torch.allclose(model(input_ids=ids, attention_mask=mask).logits, moved)


def test_padding_is_told_by_the_table_where_the_model_is_told_of_none() -> None:
    module = nn.Sequential(nn.Embedding(9, 2, padding_idx=0))
    words = PerturbedEmbeddings(module, TokenInputs("0", exclude=[3]))
    words.begin()
    module(torch.tensor([[1, 3, 0]]))
    assert words.places[0].real.tolist() == [[True, False, False]]


def test_masks_of_torch_s_own_layers_say_which_positions_are_padding() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(9, 2)

        def forward(self, ids: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            return self.tokens(ids)

    module = Model()
    words = PerturbedEmbeddings(module, TokenInputs("tokens"))
    words.begin()
    module(torch.tensor([[1, 3]]), torch.tensor([[False, True]]))
    assert words.places[0].real.tolist() == [[True, False]]


def test_one_table_for_both_sides_is_perturbed_for_the_input_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(20, 8)
            self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2))
            self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(8, 2, 8, batch_first=True) for _ in range(2))

        def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
            hidden, target = self.tokens(input_ids), self.tokens(decoder_input_ids)
            for layer in self.encoder:
                hidden = layer(hidden)
            for layer in self.decoder:
                target = layer(target, hidden)
            return target

    from lightning_ft.core.layers import Layers

    module = Both().eval()
    words = PerturbedEmbeddings(module, TokenInputs(layers=Layers(blocks=["encoder", "decoder"])))
    for _ in range(2):
        words.begin(lambda place: torch.ones_like(place.embedded))
        module(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
        assert [place.real.shape[1] for place in words.places] == [3]


def test_embeddings_that_are_not_found_name_the_argument() -> None:
    class Two(Project):
        def __init__(self) -> None:
            super().__init__(nn.ModuleDict({"a": nn.Embedding(50, 2), "b": nn.Embedding(50, 2)}), batch())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net["a"](batch["input_ids"]).sum()

    with pytest.raises(ValueError, match=r'name them, inputs=TokenInputs\(embedding="encoder.tokens"\)'):
        step(Two(), FGM())
    with pytest.raises(ValueError, match=r"embedding='c' must be the path of a module; embeddings are: net\.a, net\.b"):
        step(Two(), FGM(inputs=TokenInputs("c")))
    with pytest.raises(ValueError, match="embedded no tokens with the embeddings that were found"):
        step(Two(), FGM(inputs=TokenInputs("net.b")))
    step(Two(), FGM(inputs=TokenInputs("net.a")))


def test_plain_arguments_come_from_a_configuration_file() -> None:
    assert as_token_inputs({"exclude": [1]}) == TokenInputs(exclude=[1])
    assert as_token_inputs(None) == TokenInputs()


def test_an_encoder_without_blocks_has_its_one_embedding() -> None:
    module = nn.ModuleDict({"tokens": nn.Embedding(9, 2), "lstm": nn.LSTM(2, 2)})
    assert TokenInputs().of(module).modules == (module["tokens"],)
    assert isinstance(TokenInputs().of(Encoder()).modules[0], nn.Embedding)


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
@pytest.mark.parametrize("name", ["free-lb", "smart"])
def test_it_changes_what_a_stranger_learns(stranger: Stranger, name: str) -> None:
    found = outcome(stranger.fit(METHODS[name](), max_epochs=1))["weights"]
    plain = outcome(stranger.fit(max_epochs=1))["weights"]
    assert any(not torch.equal(found[key], plain[key]) for key in plain)
