"""How much the loss needs each head of attention, and heads that are silenced for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.core.report import Report
from lightning_ft.core.undisturbed import same_randomness
from lightning_ft.functional._batch_rows import prepare, row_count, take_rows
from lightning_ft.functional.attention_heads import HeadProjection, find_heads
from lightning_ft.functional.fisher import Loss, as_measured, training_step_loss
from lightning_ft.functional.picture import new_figure, save_figure


@dataclass(frozen=True)
class HeadScores:
    """I_h of all heads.

    Args:
        importance: Path of each layer's output projection to I_h ``(heads,)`` on the CPU, of length 1 in each layer.
        examples: Over how many examples it is a mean.
        loss: The mean loss of these.
        silent: Heads that had been silenced before.
    """

    importance: Mapping[str, Tensor]
    examples: int
    loss: float
    silent: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def ranking(self) -> list[tuple[str, int, float]]:
        """Layer, head and I_h, from the least needed to the most; without what is silent already."""
        rows = [
            (name, head, value)
            for name, values in self.importance.items()
            for head, value in enumerate(values.tolist())
            if head not in self.silent.get(name, ())
        ]
        return sorted(rows, key=lambda row: row[2])

    def report(self) -> Report:
        """The ranking as a table."""
        rows = [{"rank": i + 1, "layer": n, "head": h, "importance": v} for i, (n, h, v) in enumerate(self.ranking())]
        return Report("Importance of heads", {"examples": self.examples, "loss": self.loss}, rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw layers, bottom to top, against heads; silent ones are crossed out.

        Args:
            path: The picture's file; its ending says which format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: The file's ending is unknown.
        """
        most = max(len(values) for values in self.importance.values())
        figure = new_figure(path, 3.5 + 0.45 * most, 1.6 + 0.3 * max(len(self.importance), 3))
        axes = figure.subplots()
        table = [[*values.tolist(), *[float("nan")] * (most - len(values))] for values in self.importance.values()]
        mesh = axes.pcolormesh(range(most + 1), range(len(table) + 1), table, cmap="viridis", vmin=0)
        for i, name in enumerate(self.importance):
            for head in self.silent.get(name, ()):
                axes.plot([head, head + 1], [i, i + 1], color="red")
        axes.set_yticks([i + 0.5 for i in range(len(table))], list(self.importance), fontsize=8)
        axes.set_xticks([i + 0.5 for i in range(most)], range(most))
        axes.set_xlabel("head")
        figure.colorbar(mesh, ax=axes, label="importance (length 1 in each layer)", pad=0.02)
        figure.suptitle(f"Importance of heads, {self.examples} examples")
        save_figure(figure, path)


def head_importance(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    heads: Mapping[str, int] | None = None,
    limit: int | None = None,
    silent: Mapping[str, Sequence[int]] | None = None,
) -> HeadScores:
    """I_h = E_x |∂L(x)/∂ξ_h|, where ξ_h = 1 multiplies head h; divided by its length in each layer.

    ξ stands before the output projection of attention, one for each row and head, so that one backward pass over a
    batch gives the gradients of its examples each by itself. (The absolute value of a batch's gradient is something
    else: there examples cancel out.) ``nn.MultiheadAttention`` has no place for that; it takes batches of one. All runs
    in eval mode and fp32, and the module is left as it was.

    Args:
        module: A trained module, on its device.
        batches: Of its task.
        loss: A function of module and batch that returns the mean loss of the batch's rows; by default what
            ``module.training_step(batch, 0)`` returns.
        heads: Path of each output projection to its number of heads, where they are not found by themselves.
        limit: Number of examples at which to stop.
        silent: Heads to leave out of the ranking, of :func:`silence_heads`.

    Raises:
        ValueError: There is no example; what :func:`~lightning_ft.functional.attention_heads.find_heads` refuses; rows
            of a batch cannot be told apart.

    Reference:
        Michel, Levy and Neubig 2019, "Are Sixteen Heads Really Better than One?".
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be 1 or more: it is a number of examples")
    measure = _Measure(module, loss or training_step_loss(module), heads)
    with torch.inference_mode(False), torch.enable_grad(), same_randomness(), as_measured(module):
        for batch in batches:
            measure.add(batch, limit)
            if limit is not None and measure.examples >= limit:
                break
    if measure.examples == 0:
        raise ValueError("batches gave no example: give a list or a loader of batches of the task")
    tiny = torch.finfo(torch.float32).tiny
    importance = {name: total / total.norm().clamp(min=tiny) for name, total in measure.totals.items()}
    return HeadScores(importance, measure.examples, measure.loss / measure.examples, dict(silent or {}))


class _Measure:
    """Adds |∂L/∂ξ| up, batch by batch."""

    def __init__(self, module: nn.Module, loss: Loss, heads: Mapping[str, int] | None) -> None:
        self._module, self._loss, self._heads = module, loss, heads
        self._projections: list[HeadProjection] | None = None
        self.totals: dict[str, Tensor] = {}
        self.examples = 0
        self.loss = 0.0

    def add(self, batch: Any, limit: int | None) -> None:
        batch = prepare(batch, next(self._module.parameters()).device)
        rows = row_count(batch)
        if rows is None:
            raise ValueError(
                "the rows of this batch cannot be told apart, since its tensors differ in their first dimension: give "
                "batches of one, DataLoader(batch_size=1), with every tensor's first dimension 1"
            )
        wanted = rows if limit is None else min(rows, limit - self.examples)
        if wanted < rows:
            batch, rows = take_rows(batch, slice(0, wanted), rows), wanted
        if self._projections is None:
            self._projections = find_heads(self._module, lambda: self._loss(self._module, batch), heads=self._heads)
        single = any(not projection.called for projection in self._projections)
        parts = [(take_rows(batch, slice(i, i + 1), rows), 1) for i in range(rows)] if single else [(batch, rows)]
        for part, size in parts:
            self._add(part, size)

    def _add(self, batch: Any, rows: int) -> None:
        assert self._projections is not None
        with gated(self._projections, lambda projection, size: _ones(projection, size)) as gates:
            loss = self._loss(self._module, batch)
        used = [(projection, gate) for projection, of in gates.items() for gate in of]
        found = torch.autograd.grad(loss, [gate for _, gate in used], allow_unused=True)
        sums: dict[str, Tensor] = {}
        for (projection, gate), gradient in zip(used, found, strict=True):
            each = _by_example(projection, torch.zeros_like(gate) if gradient is None else gradient, rows)
            sums[projection.name] = sums.get(projection.name, 0) + each
        for projection in self._projections:
            # Of the mean over rows: a row's own gradient is as many times larger.
            total = (sums.get(projection.name, torch.zeros(1, projection.heads)) * rows).abs().sum(0).cpu()
            self.totals[projection.name] = self.totals.get(projection.name, 0) + total
        self.loss += float(loss.detach()) * rows
        self.examples += rows


def _ones(projection: HeadProjection, size: int) -> Tensor:
    shape = (size, projection.heads) if projection.called else (projection.heads,)
    return torch.ones(shape, device=projection.weight.device, requires_grad=True)


def _by_example(projection: HeadProjection, gradient: Tensor, rows: int) -> Tensor:
    """The gradient of each example's gates ``(rows, heads)``: an example may be several rows (choices of an answer)."""
    if not projection.called:
        return gradient[None]
    if len(gradient) % rows:
        raise ValueError(
            f"{projection.name} is called with {len(gradient)} rows for a batch of {rows}, so that its rows are no "
            "examples (or its first dimension is the sequence): give batches of one, DataLoader(batch_size=1)"
        )
    return gradient.view(rows, -1, projection.heads).sum(1)


@contextmanager
def gated(
    projections: Sequence[HeadProjection], gate: Callable[[HeadProjection, int], Tensor]
) -> Iterator[dict[HeadProjection, list[Tensor]]]:
    """Multiply the heads' outputs before their projection.

    Args:
        projections: Of :func:`~lightning_ft.functional.attention_heads.find_heads`.
        gate: For a projection and the number of rows of its input, the gates: ``(rows, heads)`` or ``(heads,)``.

    Yields:
        The gates of all calls so far, by projection.
    """
    gates: dict[HeadProjection, list[Tensor]] = {projection: [] for projection in projections}

    def multiply(projection: HeadProjection, args: tuple[Any, ...]) -> tuple[Any, ...]:
        values = args[0]
        gates[projection].append(factor := gate(projection, len(values)))
        units = factor.to(values.dtype).repeat_interleave(projection.width, -1)
        between = (1,) * (values.ndim - 2) if factor.ndim == 2 else ()
        return (values * units.view(*units.shape[:-1], *between, units.shape[-1]), *args[1:])

    with ExitStack() as stack:
        for projection in projections:
            if projection.called:
                hook = projection.layer.register_forward_pre_hook(lambda _, args, p=projection: multiply(p, args))
                stack.callback(hook.remove)
            else:
                gates[projection].append(factor := gate(projection, 1))
                # It stands before the parameter of this name, which stays registered.
                vars(projection.layer)["weight"] = projection.scaled(factor)
                stack.callback(vars(projection.layer).pop, "weight", None)
        yield gates


@torch.no_grad()
def silence_heads(projections: Sequence[HeadProjection], silent: Mapping[str, Sequence[int]]) -> Report:
    """Zero the input slices of output projections, in place: those heads give nothing, here and in what is exported.

    The model keeps its shape and takes as long as before.

    Args:
        projections: Of :func:`~lightning_ft.functional.attention_heads.find_heads`.
        silent: A projection's path to its heads' indices.

    Raises:
        ValueError: There is no such projection or head; none would be left in a layer.
    """
    known = {projection.name: projection for projection in projections}
    for name, heads in silent.items():
        if name not in known or any(not 0 <= head < known[name].heads for head in heads):
            raise ValueError(f"silent={{{name!r}: {list(heads)}}} must name heads of one of {', '.join(known)}")
        if len(set(heads)) == known[name].heads:
            raise ValueError(f"silent={{{name!r}: {list(heads)}}} would leave no head there: keep one or more")
    for name, heads in silent.items():
        gates = torch.ones(known[name].heads, device=known[name].weight.device, dtype=known[name].weight.dtype)
        gates[list(heads)] = 0
        known[name].weight.copy_(known[name].scaled(gates))
    rows = [
        {"layer": p.name, "heads": p.heads, "silent": str(sorted(set(silent.get(p.name, ()))))} for p in projections
    ]
    total = sum(projection.heads for projection in projections)
    return Report("Silenced heads", {"heads": total, "silent": sum(len(set(h)) for h in silent.values())}, rows)


def prune_heads(
    module: nn.Module,
    batches: Sequence[Any],
    share: float,
    *,
    per_round: float = 0.1,
    loss: Loss | None = None,
    heads: Mapping[str, int] | None = None,
    limit: int | None = None,
) -> tuple[Report, HeadScores]:
    """Silence the least needed heads in rounds, in place, measuring anew before each; one a layer is kept at least.

    For a trained module: what trains on may give silent heads a voice again.

    Args:
        module: The module.
        batches: Of its task; read once a round.
        share: Of all heads, how many are silenced in the end, in (0, 1).
        per_round: Share of all heads that go in one round; about 0.1 in the paper.
        loss: See :func:`head_importance`.
        heads: See :func:`head_importance`.
        limit: See :func:`head_importance`.

    Returns:
        The table of layers, with the loss before each round and at the end; and the importance of what is left.

    Raises:
        ValueError: A share is out of range; a layer would be left without a head; what :func:`head_importance` refuses.
    """
    check_shares(share, per_round)
    options: dict[str, Any] = {"loss": loss, "heads": heads, "limit": limit}
    silent: dict[str, list[int]] = {}
    losses = []
    while True:
        found = head_importance(module, batches, **options, silent=silent)
        losses.append(found.loss)
        sizes = {name: len(values) for name, values in found.importance.items()}
        total, gone = sum(sizes.values()), sum(map(len, silent.values()))
        target = int(share * total + 1e-6)
        if target > total - len(sizes):
            raise ValueError(f"share={share} of {total} heads leaves fewer than one for each of {len(sizes)} layers")
        if gone >= target:
            break
        chosen = _lowest(found, silent, sizes, min(target - gone, max(1, round(per_round * total))))
        for name, head in chosen:
            silent.setdefault(name, []).append(head)
        silence_heads(_projections(module, sizes), silent)
    report = silence_heads(_projections(module, sizes), silent)
    return Report(report.title, {**report.facts, "loss by round": losses}, report.rows), found


def check_shares(share: float, per_round: float) -> None:
    """Refuse bad arguments.

    Raises:
        ValueError: One is out of range.
    """
    for argument, value in {"share": share, "per_round": per_round}.items():
        if not 0 < value < 1:
            raise ValueError(f"{argument}={value!r} must be in (0, 1), a share of all heads")


def _lowest(
    found: HeadScores, silent: Mapping[str, Sequence[int]], sizes: Mapping[str, int], count: int
) -> list[tuple[str, int]]:
    left = {name: size - len(silent.get(name, ())) for name, size in sizes.items()}
    chosen: list[tuple[str, int]] = []
    for name, head, _ in found.ranking():
        if len(chosen) < count and left[name] > 1:
            left[name] -= 1
            chosen.append((name, head))
    return chosen


def _projections(module: nn.Module, sizes: Mapping[str, int]) -> list[HeadProjection]:
    return find_heads(module, lambda: None, heads=sizes)
