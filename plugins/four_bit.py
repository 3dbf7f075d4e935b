"""Train beside a backbone in four bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

from lightning.pytorch.plugins.precision import Precision

from lightning_ft.core.layers import Layers
from lightning_ft.functional.quantised_tensor import Format
from lightning_ft.plugins._quantised_precision import Compute, QuantisedPrecision


@final
class FourBit(QuantisedPrecision):
    """Keep the linear layers of the frozen backbone in four bits: w ≈ absmax_b · code[c], b a block of weights.

    At 4.127 bits a weight (nf4, double quantisation) a model takes an eighth of its fp32 memory; adapters, head, norms,
    biases and embeddings stay float and train as they did, and gradients flow through the packed layers. What is
    quantised and what is left alone: :func:`lightning_ft.functional.quantise.quantise`; :attr:`report` says it after
    the fact. With LoRA adapters this is QLoRA.

    The module is quantised once it is built: by the first callback that asks for it (``quantise``), else just before
    the strategy wraps it. Checkpoints keep the names of the model as it was, hold the bits, and resume bit for bit; a
    float checkpoint is quantised on load, and a module without this plugin loads the dequantised weights.

    Against Lightning's ``BitsandbytesPrecision``: it runs on the CPU, too, composes with autocast, leaves the head
    alone, keeps biases in fp32, and restores quantised weights. Under DDP each device holds all; strategies that shard
    are refused. Memory is what is gained: a step takes longer. A plugin is bound to its package: for
    ``lightning.pytorch``, not for ``pytorch_lightning``.

    Args:
        kind: ``"nf4"``, codes at the quantiles of a normal distribution; ``"fp4"``, a float of four bits.
        double: Quantise the scales, too.
        block_size: Weights that share a scale; the paper's 64.
        compute: Of all else: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"``, as the Trainer's argument, which this
            takes the place of; or a precision plugin of these, such as ``MixedPrecision`` with a scaler of its own.
        skip: Regular expressions (``re.search``) on paths of layers to leave alone.
        layers: Where the head is, if it is not found by itself.

    Raises:
        ValueError: An argument is out of range; nothing is there to quantise; nothing is left that trains; the strategy
            shards.
        ImportError: bitsandbytes is not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[FourBit(compute="bf16-mixed")], accelerator="cpu", logger=False)

    Reference:
        Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
    """

    def __init__(
        self,
        kind: Literal["nf4", "fp4"] = "nf4",
        double: bool = True,
        *,
        block_size: int = 64,
        compute: Compute | Precision = "32-true",
        skip: str | Sequence[str] = (),
        layers: Layers | None = None,
    ) -> None:
        if kind not in ("nf4", "fp4"):
            raise ValueError(f'kind={kind!r} must be "nf4" or "fp4"; for 8 bits take EightBit')
        form = Format(kind, block_size, double)
        super().__init__(form, threshold=0.0, compute=compute, skip=skip, layers=layers)
