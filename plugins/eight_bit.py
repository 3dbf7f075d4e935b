"""Train beside a backbone in eight bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from lightning.pytorch.plugins.precision import Precision

from lightning_ft.core.layers import Layers
from lightning_ft.functional.quantised_tensor import Format
from lightning_ft.plugins._quantised_precision import Compute, QuantisedPrecision


@final
class EightBit(QuantisedPrecision):
    """Keep the linear layers of the frozen backbone in eight bits and multiply in them: LLM.int8.

    y = x Wᵀ with x and W rounded to int8, each row over its largest magnitude; features of x in which some value
    reaches the threshold are multiplied apart, in the precision of x. The gradient is that of x Ŵᵀ. All else is as in
    :class:`~lightning_ft.plugins.FourBit`; errors are some twenty times smaller, the memory twice as large.

    Args:
        threshold: The paper's 6; 0: none is multiplied apart.
        compute: Of all else, see :class:`~lightning_ft.plugins.FourBit`.
        skip: Regular expressions (``re.search``) on paths of layers to leave alone.
        layers: Where the head is, if it is not found by itself.

    Raises:
        ValueError: See :class:`~lightning_ft.plugins.FourBit`.
        ImportError: bitsandbytes is not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[EightBit(skip="query$")], accelerator="cpu", logger=False)

    Reference:
        Dettmers, Lewis, Belkada and Zettlemoyer 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
        Scale".
    """

    def __init__(
        self,
        threshold: float = 6.0,
        *,
        compute: Compute | Precision = "32-true",
        skip: str | Sequence[str] = (),
        layers: Layers | None = None,
    ) -> None:
        if not 0 <= threshold < math.inf:
            raise ValueError(f"threshold={threshold!r} must be 0 or more, and finite: 6 in the paper")
        super().__init__(Format("int8"), threshold=float(threshold), compute=compute, skip=skip, layers=layers)
