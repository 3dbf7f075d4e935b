"""Learning rates over depth (discriminative) and over time (warm-up, decay)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn

from lightning_ft.core.sharding import full_shapes, is_piece

_BLOCK = re.compile(r"(?:(?P<stack>.+)\.)?block\.(?P<index>\d+)")


def depth_multipliers(groups: Sequence[str], *, decay: float = 0.9, head_gap: int = 1) -> dict[str, float]:
    """Learning-rate factors that fall with depth: decay^e, with e = 0 for head and tail.

    The top block has e = ``head_gap``, every block below it one more, the embeddings one more than the bottom block.
    The stacks of an encoder-decoder are numbered each by itself.

    Args:
        groups: Group names from bottom to top, as in :class:`~lightning_ft.core.LayerGroups`.
        decay: Factor from one block to the block below, in (0, 1]. Practice for transformers is 0.8 to 0.95;
            ULMFiT's is 1/2.6, for 4 groups.
        head_gap: Exponent of the top block: 1 in ULMFiT and BEiT, 2 in ELECTRA's code.

    Raises:
        ValueError: ``decay`` lies outside (0, 1], or ``head_gap`` is not a whole number of 0 or more.

    Example:
        >>> depth_multipliers(["embeddings", "block.0", "block.1", "tail", "head"], decay=0.5)
        {'embeddings': 0.125, 'block.0': 0.25, 'block.1': 0.5, 'tail': 1.0, 'head': 1.0}

    Reference:
        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification".
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay!r} must lie in (0, 1]: it multiplies the rate once a block downwards")
    if not isinstance(head_gap, int) or head_gap < 0:
        raise ValueError(f"head_gap={head_gap!r} must be a whole number of 0 or more (ULMFiT 1, ELECTRA 2)")
    body = [name for name in groups if name not in ("tail", "head")]
    exponents = dict.fromkeys(groups, 0)
    deepest = head_gap
    below: dict[str | None, int] = {}
    for name in reversed(body):
        if name == "embeddings":
            exponents[name] = deepest
            continue
        # Explicit groups ("stem", "layer1", ...) are one stack together.
        stack = match["stack"] if (match := _BLOCK.fullmatch(name)) else None
        exponents[name] = below.get(stack, head_gap)
        below[stack] = exponents[name] + 1
        deepest = max(deepest, below[stack])
    return {name: decay**exponent for name, exponent in exponents.items()}


def decay_groups(parameters: Iterable[nn.Parameter] | nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups: matrices, which decay, and vectors (biases, norms), which do not.

    Every parameter is taken, frozen or not: an optimiser skips what has no gradient, and groups that are complete
    from the start are what keeps schedulers and resumed runs right when something is thawed later.

    Args:
        parameters: The model's parameters; tied ones are taken once. Or the model: under FSDP1 (Lightning's
            ``FSDPStrategy``) it alone knows which of the 1-D pieces that a process holds are of matrices.
        weight_decay: λ of the first group.

    Raises:
        ValueError: Parameters of FSDP1 without their model.
    """
    shapes = full_shapes(parameters) if isinstance(parameters, nn.Module) else {}
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    unique = list({id(p): p for p in given}.values())
    if any(is_piece(p) and p not in shapes for p in unique):
        raise ValueError(
            "parameters must be the model itself under FullyShardedDataParallel, whose parameters are 1-D pieces that "
            "do not tell matrices from vectors: decay_groups(model, weight_decay)"
        )
    matrices = {id(p) for p in unique if len(shapes.get(p, p.shape)) >= 2}
    groups = [
        {"params": [p for p in unique if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in unique if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def warmup_then(
    shape: Literal["linear", "cosine", "constant"], *, total_steps: float, warmup_steps: int
) -> Callable[[int], float]:
    """The factor on the learning rate at each step: a linear rise from 0 to 1, then ``shape`` down to 0.

    A pure function of the step, so that a resumed run continues exactly. The values are those of
    ``transformers.get_linear_schedule_with_warmup`` and its siblings.

    Args:
        shape: What follows the warm-up.
        total_steps: Optimiser steps in all; may be infinite for ``constant``.
        warmup_steps: Steps of the rise.

    Raises:
        ValueError: Training has no end and the shape falls towards it.

    Example:
        >>> factor = warmup_then("linear", total_steps=10, warmup_steps=2)
        >>> [factor(step) for step in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if shape != "constant" and math.isinf(total_steps):
        raise ValueError(
            f'schedule="{shape}" falls to 0 at the end of training, and this training has none: '
            'set Trainer(max_epochs=...) or Trainer(max_steps=...), or use schedule="constant"'
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if shape == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    return factor
