"""Learning-rate schedulers that step once an optimiser step, for ``--lr_scheduler`` and for any project."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_ft.functional.learning_rates import slanted_triangular, warmup_then
from lightning_ft.functional.snapshots import cycle_length, cyclic_cosine

# Until the length is known only step 0 is asked for, whose factor is the same for every long enough training.
_ANY = 10**9


@final
class SlantedTriangular(LambdaLR):
    """A short steep rise of the learning rate and a long fall, ULMFiT's: see
    :func:`lightning_ft.functional.slanted_triangular`.

    Step it once an optimiser step (``"interval": "step"``), as the command line does.

    Args:
        optimizer: Its groups' rates are the peaks of their triangles; they keep their ratios.
        total_steps: Optimiser steps in all. None leaves it to the command line, which fills in
            ``trainer.estimated_stepping_batches``; everywhere else it must be given.
        cut: Share of the steps in which the rate rises; 0.1 in the paper.
        ratio: How much smaller the lowest rate is than the highest; 32 in the paper.
        last_epoch: Steps done less one, as in every scheduler of torch.

    Raises:
        ValueError: A number is out of range, or the second step comes and ``total_steps`` is still None.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
        >>> scheduler = SlantedTriangular(optimizer, total_steps=100)
        >>> scheduler.get_last_lr()
        [0.0003125]

    Reference:
        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification".
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        *,
        cut: float = 0.1,
        ratio: float = 32.0,
        last_epoch: int = -1,
    ) -> None:
        slanted_triangular(0, total_steps or 1, cut=cut, ratio=ratio)  # refuses bad numbers now
        factor = _known(total_steps, lambda total, step: slanted_triangular(step, total, cut=cut, ratio=ratio))
        super().__init__(optimizer, factor, last_epoch)


@final
class WarmupThen(LambdaLR):
    """A linear rise of the learning rate, then ``shape``: see :func:`lightning_ft.functional.warmup_then`.

    Step it once an optimiser step (``"interval": "step"``), as the command line does. The strongest cheap recipe for
    small data sets is long training with it: 20 epochs, η = 2e-5, batch 16, ``warmup=0.1``, ``shape="linear"``, AdamW
    (which corrects the bias of its averages) with ε = 1e-6 and λ = 0.01, gradients clipped at 1.

    Args:
        optimizer: Its groups' rates are those at the end of the warm-up.
        shape: What follows the warm-up: ``"linear"`` or ``"cosine"`` down to 0, or ``"constant"``.
        warmup: Share of all steps in which the rate rises from 0, in [0, 1).
        total_steps: Optimiser steps in all. None leaves it to the command line, which fills in
            ``trainer.estimated_stepping_batches``; everywhere else it must be given.
        last_epoch: Steps done less one, as in every scheduler of torch.

    Raises:
        ValueError: A number is out of range, or the second step comes and ``total_steps`` is still None.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = WarmupThen(optimizer, warmup=0.2, total_steps=10)
        >>> for _ in range(3):
        ...     print(scheduler.get_last_lr())
        ...     optimizer.step()
        ...     scheduler.step()
        [0.0]
        [0.5]
        [1.0]

    Reference:
        Mosbach, Andriushchenko and Klakow 2021, "On the Stability of Fine-tuning BERT".
    """

    def __init__(
        self,
        optimizer: Optimizer,
        shape: Literal["linear", "cosine", "constant"] = "linear",
        *,
        warmup: float = 0.1,
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup!r} must be a share of training in [0, 1), such as 0.1")
        if shape not in ("linear", "cosine", "constant"):
            raise ValueError(f'shape={shape!r} must be "linear", "cosine" or "constant"')

        def factor(total: int, step: int) -> float:
            return warmup_then(shape, total_steps=total, warmup_steps=round(warmup * total))(step)

        super().__init__(optimizer, _known(total_steps, factor), last_epoch)


@final
class CyclicCosine(LambdaLR):
    """A learning rate that falls along half a cosine, again and again, for
    :class:`~lightning_ft.callbacks.SnapshotEnsemble`: see :func:`lightning_ft.functional.cyclic_cosine`.

    Step it once an optimiser step (``"interval": "step"``), as the command line does.

    Args:
        optimizer: Its groups' rates are those at the beginning of each cycle.
        cycles: Falls in all.
        warmup: Share of a cycle in which the rate rises first, in [0, 1); 0 in the paper.
        total_steps: Optimiser steps in all. None leaves it to the command line, which fills in
            ``trainer.estimated_stepping_batches``; everywhere else it must be given.
        last_epoch: Steps done less one, as in every scheduler of torch.

    Raises:
        ValueError: A number is out of range, or the second step comes and ``total_steps`` is still None.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scheduler = CyclicCosine(optimizer, cycles=4, total_steps=20)
        >>> rates = []
        >>> for _ in range(6):
        ...     rates.append(round(scheduler.get_last_lr()[0], 4))
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.1, 0.0905, 0.0655, 0.0345, 0.0095, 0.1]

    Reference:
        Huang et al. 2017, "Snapshot Ensembles: Train 1, Get M for Free".
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycles: int = 5,
        *,
        warmup: float = 0.0,
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup!r} must be a share of a cycle in [0, 1), such as 0.1")
        cycle_length(1, cycles)  # refuses a bad number now

        def factor(total: int, step: int) -> float:
            rise = int(warmup * cycle_length(total, cycles))
            return cyclic_cosine(step, total, cycles=cycles, warmup=rise)

        super().__init__(optimizer, _known(total_steps, factor), last_epoch)


def _known(total: int | None, factor: Callable[[int, int], float]) -> Callable[[int], float]:
    """The factor on the rate at a step, once the number of steps is known."""
    if total is not None and total < 1:
        raise ValueError(f"total_steps={total!r} must be the number of optimiser steps, 1 or more")

    def at(step: int) -> float:
        if total is None and step > 0:
            raise ValueError(
                "total_steps=None is filled in by the command line alone: pass "
                "total_steps=int(self.trainer.estimated_stepping_batches) in configure_optimizers"
            )
        return factor(_ANY if total is None else total, step)

    return at
