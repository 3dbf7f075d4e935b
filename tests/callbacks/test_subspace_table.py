"""DiffPruning and IntrinsicDimension in the table of methods: every property on each kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ft.callbacks.diff_pruning import DiffPruning
from lightning_ft.callbacks.intrinsic_dimension import IntrinsicDimension
from lightning_ft.plugins import FourBit
from tests.methods import KINDS, Method, fit, measure
from tests.pretrained import Kind

ROWS = {
    "diff-pruning": Method(lambda: ([DiffPruning(0.005, seed=1)], [])),
    "said": Method(lambda: ([IntrinsicDimension(300, rate=0.1, seed=1)], [])),
    "did": Method(lambda: ([IntrinsicDimension(100, said=False, rate=0.1, seed=1)], [])),
}
slow = pytest.mark.slow


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("kind", "exports"),
    [("t5", False), *(pytest.param(kind, True, marks=slow) for kind in KINDS)],
)
def test_keeps_every_promise(name: str, kind: Kind, exports: bool) -> None:
    found = measure(ROWS[name], kind, exports=exports)
    assert found["saves"] < 0.05  # bytes of the checkpoint's weights over the base's
    if name != "diff-pruning":  # whose gates and offsets train where a share of them is kept
        assert found["share"] < 0.05


@pytest.mark.parametrize("name", ROWS)
def test_quantised_weights_are_refused(name: str, tmp_path: Path) -> None:
    make, (kind, *_) = ROWS[name].make, KINDS
    over_four_bits = Method(lambda: (make()[0], [FourBit()]))
    with pytest.raises(ValueError, match=r"has quantised weights \(QuantisedLinear\), and .* computes with floats"):
        fit(kind, over_four_bits, tmp_path)
