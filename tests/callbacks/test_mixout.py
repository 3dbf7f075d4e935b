from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_ft.callbacks import L2SP, ExactResume, FrozenPrefixCache, GradualUnfreezing, LayerReinit
from lightning_ft.callbacks.mixout import Mixout
from lightning_ft.core import Layers
from tests.strangers import BATCHES, FILTERED, STILL, STRANGERS, WIDTH, Filtered, Stranger, identical, outcome, weights

LATE = next(stranger for stranger in STRANGERS if stranger.name == "late")
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


class Mixed(Callback):
    """Which weights were mixed, in how many forwards and at which p, by the name of the parameter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning_ft.functional import mixed_layers

        self.names: dict[int, str] = {}
        self.rates: list[float] = []
        self.seen: dict[str, int] = {}
        self.references: dict[str, Tensor] = {}
        real = mixed_layers.MixedLayers.mixed

        def mixed(layers: Any, weight: Tensor, reference: Tensor, like: Any) -> Tensor:
            self.rates.append(layers.p)
            if name := self.names.get(id(weight)):
                self.seen[name] = self.seen.get(name, 0) + 1
                self.references[name] = reference
            return real(layers, weight, reference, like)

        monkeypatch.setattr(mixed_layers.MixedLayers, "mixed", mixed)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.names = {id(p): name for name, p in pl_module.named_parameters()}


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> Mixed:
    return Mixed(monkeypatch)


# --- what is mixed -----------------------------------------------------------------------------------------------


@each_stranger
def test_mixes_every_linear_weight_outside_the_head_once_a_batch(stranger: Stranger, mixed: Mixed) -> None:
    start = weights(stranger.fit(max_epochs=0).lightning_module)
    trainer = stranger.fit(mixed, Mixout(0.5), max_epochs=1)
    head = ("classifier", "bert.classifier", "verdict")
    embeddings = ("tokens", "embeddings")
    expected = {
        name
        for name, p in trainer.lightning_module.named_parameters()
        if p.ndim == 2 and not name.startswith(head) and not any(word in name for word in embeddings)
    }
    assert mixed.seen == dict.fromkeys(expected, BATCHES)
    assert all(torch.equal(mixed.references[name], start[name]) for name in expected)


def test_layers_drawn_anew_and_frozen_ones_are_not_mixed(mixed: Mixed) -> None:
    FILTERED.fit(mixed, LayerReinit(1), Mixout(0.5), max_epochs=1)
    assert {name.split(".")[2] for name in mixed.seen} == {"0", "1"}
    mixed.seen.clear()
    FILTERED.fit(mixed, Mixout(0.5), GradualUnfreezing("3 steps"), max_epochs=1)
    assert {name: count for name, count in mixed.seen.items() if "linear1" in name} == {
        "encoder.layers.2.linear1.weight": BATCHES - 3
    }


def test_an_evaluation_in_mid_fit_uses_the_weights_themselves() -> None:
    differences = []

    class Evaluate(Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
            plain = STILL.module()
            plain.load_state_dict(pl_module.state_dict())
            differences.append((pl_module(batch[0]) - plain.eval()(batch[0])).abs().max().item())

    FILTERED.fit(Mixout(0.9), Evaluate())
    assert max(differences) == 0
    assert len(differences) == 2 + 2 * 2


def test_one_step_is_that_of_the_formula_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient by autograd through a model whose weights are mixed by hand, from the same draws, θ ≠ θ⁰."""

    class Away(Filtered):
        def __init__(self) -> None:
            super().__init__(dropout=0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_start(self) -> None:
            for p in self.parameters():
                p.data.mul_(1.5)

    def even(shape: Tensor, *_: Any) -> Tensor:
        """Every second input unit is kept."""
        kept = torch.zeros_like(shape)
        kept[..., ::2] = 1
        return shape.copy_(kept)

    start = weights(Away())
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "bernoulli_", even)
        trained = weights(FILTERED.fit(Mixout(0.25), module=Away(), max_steps=1).lightning_module)

    by_hand = Away()
    by_hand.on_train_start()
    theta = {name: p.detach().clone().requires_grad_() for name, p in by_hand.named_parameters()}
    mix = {}
    for name, p in theta.items():
        if p.ndim == 2 and name.startswith("encoder.layers"):
            mask = even(torch.empty(1, p.shape[1]))
            mix[name] = (mask * p + (1 - mask) * start[name] - 0.25 * start[name]) / (1 - 0.25)
        else:
            mix[name] = p
    first = FirstBatch()
    FILTERED.fit(first, module=Away(), max_steps=1)
    logits = torch.func.functional_call(by_hand, mix, (first.batch[0],))
    torch.nn.functional.cross_entropy(logits, first.batch[1]).backward()
    for name, p in theta.items():
        assert p.grad is not None
        torch.testing.assert_close(trained[name], p.detach() - 0.1 * p.grad, rtol=1e-5, atol=1e-6)


class FirstBatch(Callback):
    batch: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = self.batch or batch


def test_p_rises_over_the_warmup(mixed: Mixed) -> None:
    FILTERED.fit(mixed, Mixout(0.8, warmup="4 steps"), max_epochs=1)
    assert sorted(set(mixed.rates)) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    mixed.rates.clear()
    FILTERED.fit(mixed, Mixout(0.8), max_epochs=1)
    assert set(mixed.rates) == {0.8}


def test_dropout_is_set_for_the_fit_in_the_pretrained_part() -> None:
    rates = []

    class Read(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            inside = {c.p for c in pl_module.encoder.modules() if isinstance(c, nn.Dropout)}
            attention = {c.dropout for c in pl_module.modules() if isinstance(c, nn.MultiheadAttention)}
            rates.append((inside, attention, pl_module.classifier[0].p))

    module = Filtered(dropout=0.3)
    module.classifier = nn.Sequential(nn.Dropout(0.4), module.classifier)
    FILTERED.fit(Mixout(0.5, dropout=0.0), Read(), module=module, max_epochs=1)
    assert rates == [({0.0}, {0.0}, 0.4)] * BATCHES
    Read().on_train_batch_start(None, module)
    assert rates[-1] == ({0.3}, {0.3}, 0.4)
    FILTERED.fit(Mixout(0.5), Read(), module=module, max_epochs=1)
    assert rates[-1] == ({0.3}, {0.3}, 0.4)


# --- no trace ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@each_stranger
def test_checkpoints_and_state_dicts_are_those_of_a_run_without(stranger: Stranger, tmp_path: Path) -> None:
    keys = list(stranger.fit(max_epochs=0).lightning_module.state_dict())

    class Look(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            assert list(pl_module.state_dict()) == list(copy.deepcopy(pl_module).state_dict()) == keys

    checkpoint = ModelCheckpoint(tmp_path)
    options = {"enable_checkpointing": True, "max_epochs": 1}
    if stranger.name == "legacy":
        import pytorch_lightning as legacy

        checkpoint = legacy.callbacks.ModelCheckpoint(tmp_path)
    trainer = stranger.fit(Mixout(0.5), Look(), checkpoint, **options)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert list(saved["state_dict"]) == keys
    assert not any("weight" in vars(child) for child in trainer.lightning_module.modules())
    resumed = stranger.fit(ckpt_path=checkpoint.best_model_path, max_epochs=2)
    assert resumed.current_epoch == 2


def test_a_folder_saved_in_mid_fit_opens_in_transformers(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.bert.save_pretrained(tmp_path)
            self.saved = weights(pl_module.bert)

    save = Save()
    LATE.fit(Mixout(0.5), save, max_epochs=1)
    opened, told = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert identical(weights(opened), save.saved)


# --- the anchor and resuming -------------------------------------------------------------------------------------


@each_stranger
def test_a_resumed_run_ends_as_the_uninterrupted_one(stranger: Stranger, tmp_path: Path) -> None:
    """The same draws, and W⁰ is not what the checkpoint holds."""

    def fit(epochs: int, **options: Any) -> Any:
        callbacks = [ExactResume(dirpath=tmp_path), Mixout(0.5, warmup="9 steps"), GradualUnfreezing("3 steps")]
        return stranger.fit(*callbacks, max_epochs=epochs, **options)

    whole = outcome(fit(3))
    assert not identical(whole, outcome(stranger.fit(ExactResume(dirpath=tmp_path), GradualUnfreezing("3 steps"))))
    fit(2)
    torch.manual_seed(99)
    assert identical(outcome(fit(3, ckpt_path=tmp_path / "last.ckpt")), whole)


def test_weights_are_put_back_to_the_pretrained_ones_after_a_resume(mixed: Mixed, tmp_path: Path) -> None:
    start = weights(FILTERED.module())
    FILTERED.fit(Mixout(0.5), max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    FILTERED.fit(mixed, Mixout(0.5), ckpt_path=tmp_path / "first.ckpt")
    assert mixed.references
    assert all(torch.equal(reference, start[name]) for name, reference in mixed.references.items())


def test_refuses_to_resume_from_other_pretrained_weights(tmp_path: Path) -> None:
    trainer = FILTERED.fit(Mixout(0.5), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match=r"fingerprint .* build the model from the same pretrained weights"):
        FILTERED.fit(Mixout(0.5), module=trainer.lightning_module, ckpt_path=tmp_path / "first.ckpt")


@pytest.mark.parametrize("storage", ["cpu", "bf16"])
def test_references_kept_elsewhere(storage: Any) -> None:
    ours = weights(FILTERED.fit(Mixout(0.5, storage=storage)).lightning_module)
    device = weights(FILTERED.fit(Mixout(0.5)).lightning_module)
    assert identical(ours, device) == (storage == "cpu")
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())


# --- with others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        lambda: GradualUnfreezing("2 steps"),
        lambda: GradualUnfreezing("2 steps", previous="freeze"),
        lambda: L2SP(0.1, "decoupled"),
        lambda: LayerReinit(1),
    ],
    ids=["unfreezing", "chain-thaw", "l2-sp", "reinit"],
)
def test_order_with_others_does_not_matter(other: Callable[[], Callback]) -> None:
    outcomes = [outcome(FILTERED.fit(*order)) for order in permutations([Mixout(0.5), other()])]
    assert identical(*outcomes)


def test_a_cached_frozen_prefix_is_not_mixed() -> None:
    """The cache serves frozen blocks, which mixing leaves alone."""
    phases = {"every": "2 steps"}
    plain = LATE.fit(Mixout(0.5, dropout=0.0), GradualUnfreezing(**phases))
    cached = LATE.fit(Mixout(0.5, dropout=0.0), GradualUnfreezing(**phases), FrozenPrefixCache())
    for name, tensor in weights(plain.lightning_module).items():
        torch.testing.assert_close(weights(cached.lightning_module)[name], tensor, rtol=1e-3, atol=1e-4)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_refuses_layers_in_eval_mode() -> None:
    module = FILTERED.module()
    module.encoder.eval()
    with pytest.raises(RuntimeError, match=r"9 layers that train are in eval mode .*encoder.* Call .train\(\)"):
        FILTERED.fit(Mixout(0.5), module=module)


def test_refuses_a_model_that_reads_the_weights_around_the_layers() -> None:
    class Around(Filtered):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.encoder.tokens(tokens)
            for layer in self.encoder.layers:
                hidden = nn.functional.linear(hidden, layer.linear1.weight)[..., :WIDTH]
            return self.classifier(hidden[:, 0])

    with pytest.raises(RuntimeError, match="mixed no weight in a training batch: Around reads the weights"):
        FILTERED.fit(Mixout(0.5), module=Around())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_refuses_adapters() -> None:
    peft = pytest.importorskip("peft")
    module = LATE.module()
    module.configure_model()
    module.bert = peft.get_peft_model(module.bert, peft.LoraConfig(target_modules=["query"])).train()
    with pytest.raises(ValueError, match=r"is an adapter of peft: .*lora_dropout"):
        LATE.fit(Mixout(0.5), module=module)


def test_refuses_quantised_weights() -> None:
    module = FILTERED.module()
    quantised = nn.Parameter(torch.zeros(2 * WIDTH, WIDTH, dtype=torch.int8), requires_grad=False)
    module.encoder.layers[0].linear1.weight = quantised
    with pytest.raises(ValueError, match=r"encoder.layers.0.linear1 has quantised weights .* without quantisation"):
        FILTERED.fit(Mixout(0.5), module=module)


def test_refuses_a_model_without_linear_layers_to_mix() -> None:
    module = FILTERED.module()
    for name, p in module.encoder.named_parameters():
        p.requires_grad_("norm" in name)
    with pytest.raises(ValueError, match="found no linear layer that trains outside the head of Filtered"):
        FILTERED.fit(Mixout(0.5), module=module)


def test_refuses_a_fraction_of_endless_training() -> None:
    with pytest.raises(ValueError, match="fraction of a training that has no end"):
        FILTERED.fit(Mixout(0.5, warmup=0.1), max_epochs=-1)


def test_a_model_in_which_no_head_is_found_is_anchored_aloud() -> None:
    class Bare(Filtered):
        """Its first two outputs are the classes: there is no head."""

        def __init__(self) -> None:
            super().__init__()
            del self.classifier

        def forward(self, tokens: Tensor) -> Tensor:
            return self.encoder(tokens)[:, 0, :2]

    with pytest.warns(UserWarning, match=r"Mixout found no head in Bare .*head=\[\]"):
        FILTERED.fit(Mixout(0.5), module=Bare(), max_epochs=1)
    FILTERED.fit(Mixout(0.5, layers=Layers(head=[])), module=Bare(), max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.0}, r"p=1.0 must be in \[0, 1\)"),
        ({"per": "row"}, "per='row' must be \"column\""),
        ({"warmup": 100}, "warmup=100 has no unit"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_refuses_bad_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixout(**arguments)
