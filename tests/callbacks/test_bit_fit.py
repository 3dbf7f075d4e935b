"""What is BitFit's alone; the contract of changed models is in test_bottleneck_adapters.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from transformers import Adafactor

from lightning_ft.callbacks import DiscriminativeLR
from lightning_ft.callbacks.bit_fit import BitFit
from lightning_ft.callbacks.bottleneck_adapters import BottleneckAdapters
from lightning_ft.functional.adapter_layers import BottleneckConfig
from tests.strangers import FILTERED, STILL, Filtered, identical, outcome, weights


class Decaying(Filtered):
    """No gradient reaches anything: only decay could move a weight."""

    decay = 0.5

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=self.decay)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * 0


class Look(Callback):
    """The optimiser's groups between steps."""

    def __init__(self) -> None:
        self.sizes: set[tuple[int, ...]] = set()

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.sizes.add(tuple(len(group["params"]) for group in trainer.optimizers[0].param_groups))


@pytest.mark.parametrize("more", [(), (lambda: DiscriminativeLR(0.5),)], ids=["alone", "with rates by depth"])
@pytest.mark.parametrize("first", [True, False])
def test_biases_are_not_decayed_and_the_head_is(more: Any, first: bool) -> None:
    module, look = Decaying(), Look()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(1)
    callbacks = [BitFit(), *(make() for make in more)]
    trainer = FILTERED.fit(*(callbacks if first else reversed(callbacks)), look, module=module)
    after = weights(module)
    assert torch.equal(after["classifier.weight"], torch.full((2, 8), 1.0) * after["classifier.weight"][0, 0])
    assert after["classifier.weight"][0, 0].item() == pytest.approx((1 - 0.1 * 0.5) ** 12, rel=1e-4)
    assert all(after[n].eq(1).all() for n in after if n != "classifier.weight")
    assert len(look.sizes) == 1
    assert [len(g["params"]) for g in trainer.optimizers[0].param_groups] == list(look.sizes.pop())
    assert [g["weight_decay"] for g in trainer.optimizers[0].param_groups] == [0.5]


def test_without_decay_it_is_the_plain_step() -> None:
    """The groups are split for a step only, and a bias gets the same update there."""

    class Plain(Filtered):
        def __init__(self) -> None:
            super().__init__(dropout=0)
            for name, p in self.named_parameters():
                p.requires_grad_(name.endswith(("bias", "classifier.weight")))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)

    class Same(Plain):
        def configure_optimizers(self) -> Any:
            biases = [p for n, p in self.named_parameters() if n.endswith("bias")]
            others = [p for n, p in self.named_parameters() if not n.endswith("bias")]
            return torch.optim.AdamW([{"params": others}, {"params": biases}], lr=1e-2, weight_decay=0.0)

    ours = STILL.fit(BitFit(), module=Plain())
    by_hand = STILL.fit(module=Same())
    assert identical(weights(ours.lightning_module), weights(by_hand.lightning_module))
    again = STILL.fit(BitFit(), module=Plain())
    assert identical(outcome(ours), outcome(again))


def test_a_rate_for_all_weights_is_warned_of() -> None:
    class Slow(Filtered):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=2e-5)

    with pytest.warns(UserWarning, match=r"biases at a learning rate of 2e-05.* alone need 1e-4 to 1e-2"):
        FILTERED.fit(BitFit(), module=Slow(), max_steps=1)


def test_an_optimiser_that_finds_its_own_rate() -> None:
    class Relative(Filtered):
        def configure_optimizers(self) -> Any:
            return Adafactor(self.parameters(), weight_decay=0.1)

    trainer = FILTERED.fit(BitFit(), module=Relative())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [None]


def test_adapters_above_it() -> None:
    module = FILTERED.fit(BitFit(), BottleneckAdapters(config=BottleneckConfig(2))).lightning_module
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert "encoder.layers.0.norm1.bias" in trained
    assert "encoder.layers.0.linear2.adapters.default.up.weight" in trained
    assert "encoder.layers.0.norm1.weight" not in trained
    with pytest.raises(ValueError, match="list BitFit before the other callback"):
        FILTERED.fit(BottleneckAdapters(config=BottleneckConfig(2)), BitFit())
