"""The adapter of a freeze plan: its audit, and what it warns of."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback
from torch import nn

from lightning_ft.callbacks import GradualUnfreezing
from lightning_ft.callbacks._audit import checksum
from lightning_ft.callbacks._freezing import Freezing
from lightning_ft.core import FreezePlan, Layers
from lightning_ft.core.norms import is_norm, norm_parameters, tied_embeddings
from tests.strangers import FILTERED, STRANGERS, VOCABULARY, Filtered, Stranger
from tests.tiny import TINY, tiny

MANUAL = next(stranger for stranger in STRANGERS if stranger.name == "manual")


class Do(Callback):
    """Calls a function on the module at the start of one batch, behind the callback that freezes."""

    def __init__(self, batch: int, action: Any) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == self.batch:
            self.action(pl_module)


class Frozen(Callback):
    """Applies one stage through the adapter, as every callback that freezes does."""

    def __init__(self, *phases: str) -> None:
        self.phases = phases

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.freezing = Freezing("Frozen", FreezePlan(Layers().of(pl_module), [self.phases]))
        self.freezing.enter(trainer, 0)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.freezing.finish(trainer)
        self.freezing.release()


# --- in an optimiser ---------------------------------------------------------------------------------------------


class Forgetful(Filtered):
    """Its optimiser holds the classifier alone."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.classifier.parameters(), lr=0.1)


def test_refuses_at_once_to_train_what_no_optimiser_holds() -> None:
    message = r"GradualUnfreezing: 39 parameters are to train and are in no optimiser, .*: encoder\.norm\.weight, "
    with pytest.raises(
        ValueError, match=message + r".* and 34 more. Return them in configure_optimizers, or call requires_grad_"
    ):
        Stranger("forgetful", Forgetful).fit(GradualUnfreezing(every="1 epoch"))


def test_refuses_an_optimiser_of_another_model() -> None:
    class Mistaken(Filtered):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(Filtered().parameters(), lr=0.1)

    with pytest.raises(ValueError, match="41 parameters are to train and are in no optimiser"):
        Stranger("mistaken", Mistaken).fit(GradualUnfreezing())


def test_parts_that_never_train_need_no_optimiser() -> None:
    Stranger("forgetful", Forgetful).fit(Frozen("head"), max_epochs=1)
    module = Forgetful()
    module.encoder.requires_grad_(False)
    Stranger("forgetful", Forgetful).fit(GradualUnfreezing(), module=module, max_epochs=1)


@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer:UserWarning")
def test_optimisers_that_the_trainer_does_not_see_are_not_judged() -> None:
    class Hidden(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> None:
            self.own = [torch.optim.SGD(self.parameters(), lr=0.1)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.own[0].zero_grad()
            self.loss(batch).backward()
            self.own[0].step()

    Stranger("hidden", Hidden).fit(GradualUnfreezing("1 epoch"))


# --- gradients -----------------------------------------------------------------------------------------------------


class Idle(Filtered):
    """Owns a layer that its forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def test_tells_of_parameters_without_gradient() -> None:
    with pytest.warns(UserWarning, match=r"2 parameters train in phase 1, .* no gradient: spare\.weight") as caught:
        Stranger("idle", Idle).fit(Frozen("head"))
    assert sum("no gradient" in str(warning.message) for warning in caught) == 1


def test_tells_of_a_parameter_once_in_a_fit() -> None:
    with pytest.warns(UserWarning, match="spare") as caught:
        Stranger("idle", Idle).fit(GradualUnfreezing("2 steps"))
    assert sum("no gradient" in str(warning.message) for warning in caught) == 1


def test_tells_of_reentrant_checkpointing_above_frozen_layers() -> None:
    class Checkpointed(Filtered):
        def forward(self, tokens: Any) -> Any:
            hidden = self.encoder.tokens(tokens)
            for layer in self.encoder.layers:
                hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=True)
            return self.classifier(self.encoder.norm(hidden)[:, 0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Frozen")
        with pytest.raises(UserWarning, match=r"12 parameters train in phase 1, .*use_reentrant=False cures"):
            Stranger("checkpointed", Checkpointed).fit(Frozen("block.2", "tail", "head"))


def test_a_step_without_any_gradient_is_not_judged() -> None:
    class Skips(Filtered):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.trainer.global_step == 0 and batch_idx == 0 else self.loss(batch)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned `?None`?.*")
        Stranger("skips", Skips).fit(GradualUnfreezing("1 epoch"))


@pytest.mark.parametrize("stranger", [FILTERED, MANUAL], ids=lambda stranger: stranger.name)
def test_refuses_that_other_code_thaws_or_freezes(stranger: Stranger) -> None:
    message = "in the first step of phase {} these are not frozen, or not training, as the phase has it: {}"
    thaw = Do(0, lambda module: module.encoder.tokens.requires_grad_(True))
    with pytest.raises(RuntimeError, match=message.format(1, r"encoder\.tokens\.weight")):
        stranger.fit(GradualUnfreezing("1 epoch"), thaw)
    freeze = Do(4 if stranger is MANUAL else 2, lambda module: module.encoder.layers[2].requires_grad_(False))
    with pytest.raises(RuntimeError, match=message.format(2, r"encoder\.layers\.2\.self_attn") + ".* and 7 more"):
        stranger.fit(GradualUnfreezing("2 steps"), freeze)


def test_judges_the_optimiser_that_steps_alone() -> None:
    """``toggle_optimizer`` switches off requires_grad of the others' parameters."""

    class Two(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.encoder, self.classifier)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[batch_idx % 2]
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    trainer = Stranger("two", Two).fit(GradualUnfreezing("4 steps"))
    assert trainer.global_step == 12


# --- log, tied embeddings -----------------------------------------------------------------------------------------


def test_logs_one_line_a_phase(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        FILTERED.fit(GradualUnfreezing("4 steps"))
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("GradualUnfreezing")]
    assert lines == [
        "GradualUnfreezing: step 0, phase 1 of 5: tail, head train (34 parameters)",
        "GradualUnfreezing: step 4, phase 2 of 5: block.2, tail, head train (634 parameters)",
        "GradualUnfreezing: step 8, phase 3 of 5: block.1, block.2, tail, head train (1,234 parameters)",
    ]


class Writer(Filtered):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(self.encoder.tokens.embedding_dim, VOCABULARY, bias=False)
        self.classifier.weight = self.encoder.tokens.weight


def test_warns_that_a_tied_output_layer_freezes_too() -> None:
    message = r"one tensor \(encoder\.tokens\.weight = classifier\.weight\), .*tie_word_embeddings=False"
    with pytest.warns(UserWarning, match=message) as caught:
        Stranger("writer", Writer).fit(GradualUnfreezing("3 steps"))
    assert sum("one tensor" in str(warning.message) for warning in caught) == 1
    Stranger("writer", Writer).fit(Frozen("embeddings", "block.0"))  # no word when it trains


def test_tied_embeddings_are_told_from_shared_ones() -> None:
    assert not tied_embeddings(tiny("bart"))  # encoder and decoder share an embedding, and there is no output layer
    config = hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8)
    assert list(tied_embeddings(hf.GPT2LMHeadModel(config))) == ["transformer.wte.weight = lm_head.weight"]


# --- norms, checksum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_norms_are_what_their_classes_say(name: str) -> None:
    model = tiny(name)
    norms = {path for path, m in model.named_modules() if is_norm(m)}
    named = {path for path, m in model.named_modules() if "Norm" in type(m).__name__}
    assert norms == named
    assert norms
    expected = {id(p) for path in norms for p in model.get_submodule(path).parameters()}
    assert {id(p) for p in norm_parameters(model)} == expected
    assert len(norm_parameters(model)) == len(expected)


def test_norms_are_not_known_by_vectors_or_an_epsilon_alone() -> None:
    class Scale(nn.Module):
        def __init__(self, eps: Any) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            if eps is not None:
                self.eps = eps

    assert is_norm(Scale(1e-6))
    assert not is_norm(Scale(None))
    assert not is_norm(nn.Linear(3, 3))
    assert is_norm(nn.BatchNorm1d(3, affine=False))
    assert not is_norm(nn.Identity())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_checksum_sees_one_bit_and_an_exchange(dtype: torch.dtype) -> None:
    def parameters(*values: float) -> list[nn.Parameter]:
        return [nn.Parameter(torch.full((2, 3), v).to(dtype), requires_grad=False) for v in values]

    one, other = parameters(1.0, -2.0), parameters(-2.0, 1.0)
    assert checksum(one).equal(checksum(parameters(1.0, -2.0)))
    assert not checksum(one).equal(checksum(other))
    bits = one[0].view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one[0].element_size()])
    before = checksum(one)
    bits[1, 2] ^= 1
    assert int(checksum(one) - before) in (-1, 1)


def test_checksum_is_a_sum_modulo_two_to_the_sixty_four() -> None:
    (wide,) = [nn.Parameter(torch.tensor([-1.0, 3.0], dtype=torch.float64))]
    bits = [0xBFF0000000000000 - (1 << 64), 0x4008000000000000]
    assert int(checksum([wide])) == sum(bits)
    narrow = nn.Parameter(torch.tensor(1.0))
    assert int(checksum([wide, narrow])) == sum(bits) + 3 * 0x3F800000
