from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_ft.callbacks import TrainingModeCheck
from tests.strangers import FILTERED, Encoder, Filtered, Late, Stranger

# Lightning only warns of what this callback refuses.
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")


class FromPretrained(Late):
    def configure_model(self) -> None:
        super().configure_model()
        self.bert.eval()


def test_refuses_a_model_in_eval_mode_and_says_what_to_do() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"modules train in eval mode.*: bert\.dropout, bert\.bert\.\S+, .* and 36 more.*call \.train\(\)",
    ):
        Stranger("hub", FromPretrained).fit(TrainingModeCheck())


def test_refuses_a_dropout_in_eval_mode_beside_something_that_trains() -> None:
    module = FILTERED.module()
    module.encoder.layers[1].dropout1.eval()
    with pytest.raises(RuntimeError, match=r"1 modules train in eval mode.*: encoder\.layers\.1\.dropout1\. "):
        FILTERED.fit(TrainingModeCheck(), module=module)


def test_refuses_a_mode_that_changed_between_epochs() -> None:
    class Forgetful(Filtered):
        def on_train_epoch_end(self) -> None:
            self.encoder.norm.eval()

    with pytest.raises(RuntimeError, match=r"1 modules train in eval mode.*: encoder\.norm\. "):
        FILTERED.fit(TrainingModeCheck(), module=Forgetful())


class WithTeacher(Filtered):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = Encoder().requires_grad_(False).eval()


def asleep_without_consequence(module: Any) -> Any:
    module.encoder.layers[0].requires_grad_(False).eval()
    module.encoder.layers[1].dropout = nn.Dropout(0.0).eval()
    return module


@pytest.mark.parametrize(
    "module",
    [FILTERED.module(), WithTeacher(), asleep_without_consequence(FILTERED.module())],
    ids=lambda m: type(m).__name__,
)
def test_lets_pass_what_trains_in_train_mode_and_what_is_frozen_in_eval_mode(module: Any) -> None:
    FILTERED.fit(TrainingModeCheck(), module=module, max_epochs=1)
