"""Learning rates over depth (discriminative) and over time (warm-up, decay)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.sharding import full_shapes, is_piece

_BLOCK = re.compile(r"(?:(?P<stack>.+)\.)?block\.(?P<index>\d+)")
# 0.29 * 100 is 28.999...: it must count as 29.
_ROUNDING = 1e-9


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


def explicit_multipliers(groups: LayerGroups, rates: Mapping[str, float]) -> dict[str, float]:
    """Learning-rate factors written out: for each group that ``rates`` speaks of, its factor.

    Args:
        groups: The model's groups.
        rates: What :meth:`~lightning_ft.core.LayerGroups.select` takes (``"head"``, ``"top:2"``,
            ``"block.0..block.3"``) to the factor on the learning rate, above 0; more than 1 is faster.

    Raises:
        ValueError: A factor is not above 0 or not finite; two entries speak of one group; one matches none.

    Example:
        >>> from torch import nn
        >>> tower = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> groups = LayerGroups.of(tower, groups={"block.0": "^0", "block.1": "^1", "head": "^2"})
        >>> explicit_multipliers(groups, {"blocks": 0.1, "head": 10.0})
        {'block.0': 0.1, 'block.1': 0.1, 'head': 10.0}
    """
    factors: dict[str, float] = {}
    said: dict[str, str] = {}
    for what, factor in rates.items():
        check_rate(what, factor)
        for name in groups.select(what):
            if name in said:
                raise ValueError(f"rates speaks of {name!r} twice, as {said[name]!r} and as {what!r}: say it once")
            said[name], factors[name] = what, float(factor)
    return {name: factors[name] for name in groups if name in factors}


def check_rate(what: str, factor: float) -> None:
    """Refuse a factor on the learning rate that is none.

    Raises:
        ValueError: It is not above 0, or not finite.
    """
    if not 0 < factor < math.inf:
        raise ValueError(
            f"rates[{what!r}]={factor!r} must be a factor above 0; to keep layers from training use the callback Freeze"
        )


def slanted_triangular(step: int, total: float, *, cut: float = 0.1, ratio: float = 32.0) -> float:
    """The factor on the learning rate in a slanted triangle: a short steep rise to 1, a long fall.

    factor = (1 + p (ratio − 1)) / ratio, with p = t / n for t < n, else 1 − (t − n) / (T − n), never below 0, where
    t = ``step``, T = ``total`` and n = ⌊T · ``cut``⌋, at least 1. It starts and ends at 1 / ratio, not at 0, and stays
    there after T. A pure function of the step, so that a resumed run continues exactly.

    The paper divides the fall by n (1 / cut − 1), which is T − n where T · cut is a whole number; elsewhere that would
    not end at T, and this does, as in AllenNLP.

    Args:
        step: Optimiser steps done, from 0.
        total: Optimiser steps in all.
        cut: Share of them in which the rate rises, in (0, 1); 0.1 in the paper.
        ratio: How much smaller the lowest rate is than the highest, 1 or more; 32 in the paper.

    Raises:
        ValueError: ``cut`` or ``ratio`` is out of range, or training has no end.

    Example:
        >>> [0.01 * slanted_triangular(step, 100) for step in (0, 5, 10, 55, 100)]
        [0.0003125, 0.00515625, 0.01, 0.00515625, 0.0003125]

    Reference:
        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification".
    """
    if not 0 < cut < 1:
        raise ValueError(f"cut={cut!r} must be a share of training in (0, 1), such as 0.1: the rate rises in it")
    if not 1 <= ratio < math.inf:
        raise ValueError(f"ratio={ratio!r} must be 1 or more: the highest rate over the lowest (32 in the paper)")
    if not 1 <= total < math.inf:
        raise ValueError(
            f"total={total!r} must be the number of optimiser steps, 1 or more: a slanted triangle falls to the end of "
            "training. Set Trainer(max_epochs=...) or Trainer(max_steps=...)"
        )
    rise = max(1, math.floor(total * cut + _ROUNDING))
    p = step / rise if step < rise else max(0.0, 1 - (step - rise) / max(1, total - rise))
    return (1 + p * (ratio - 1)) / ratio


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
