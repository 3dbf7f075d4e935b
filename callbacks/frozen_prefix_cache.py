"""Run the frozen lower layers once for each example, and never again."""

from __future__ import annotations

import inspect
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_ft.callbacks._frozen_horizon import depth_that_lasts, thawing_plans
from lightning_ft.callbacks._prefix_hooks import PrefixHooks
from lightning_ft.callbacks._training_rows import column, column_paths, training_batches
from lightning_ft.core.activation_store import parse_size
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.core.undisturbed import same_randomness
from lightning_ft.functional.frozen_prefix import Callee, FrozenPrefix
from lightning_ft.functional.prefix_cache import PrefixCache, all_rows
from lightning_ft.functional.prefix_layout import PrefixLayout, blocks_of, frozen_depth, parameters_of
from lightning_ft.functional.prefix_rows import Inputs, Unsuited, arguments, read_inputs, signature_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FrozenPrefixCache(Callback):
    """Keep what the embeddings and the lowest frozen blocks give for each training row, and skip them from then on.

    Whoever froze them (GradualUnfreezing, Freeze, the module itself): in each training step, when the model is called,
    the lowest k blocks are those that are frozen together with the embeddings. At the first step with a new k the
    training set is read once, its rows are run through the prefix in batches of like length, and their activations are
    kept without padding; every later step starts at block k. Where all but the head is frozen and the model makes one
    vector of each row (a pooler, the first token, a mean in a ``forward`` of its own), only that vector is kept. A thaw
    moves the cache to the lower k, or ends it. Validation and test run the whole model.

    The model stays as it is: no wrapper, no new name in its state dict, and no hook beyond a training step. Rows are
    known by their content (ids, token types, positions, mask, padding on the left), not by their number: data set,
    loader and order are free, with right padding of any width. The weights of the prefix are watched; where they
    change the cache is filled anew. The prefix runs in eval mode for the cache: its dropout is off, that of the part
    that trains is not. Logits and gradients are those of an uncached run with the frozen part in eval mode, to rounding
    (1e-6 with float32). That this holds for a model is proved on a few rows before the cache is used; if not, the model
    runs as if this callback were not there, and a log line says why. The same is done for single calls with embeddings
    in place of ids, a mask of more dimensions, a key-value cache, or flags that ask for hidden states of the prefix;
    and for good when more than half of an epoch's rows are new ones (augmentation, masks drawn anew). Values at padded
    positions are not the model's: one that lets them through, such as a mean without a mask, is not cached. Hooks of
    others on skipped modules see placeholders.

    The fill depends on the set of rows and the weights alone: a resumed run fills again and goes on bit for bit. An
    iterable data set, several loaders, ``limit_train_batches`` or inputs made in the training step cannot be read
    ahead: rows are then kept as they are met, which saves as much from the second epoch on, but a resumed run equals
    only to rounding. Under DDP every process fills a cache of the whole set; on disk all share one. Sharded and
    compiled models run as they are. On a GPU the ids are read by the CPU once a step.

    Args:
        where: ``"memory"`` of the host, or ``"disk"``: memory-mapped files that later runs with the same weights,
            rows and settings use, and others do not.
        budget: Size that the cache may have. When it is full no row is added: those left out are computed in each step.
        dtype: Type in which activations are kept. Half the size with ``"bfloat16"`` or ``"float16"``, and an error of
            4e-3 or 5e-4 of each value.
        dirpath: Folder of the files; ``prefix_cache`` in the trainer's ``default_root_dir`` by default. Files of old
            weights are not removed.
        min_epochs: A fill must serve so many epochs: with GradualUnfreezing the cache starts at a lower block if the
            plan thaws sooner. 2 by default: less than that cannot pay.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FrozenPrefixCache(budget="500 MB")], logger=False)
    """

    def __init__(
        self,
        where: Literal["memory", "disk"] = "memory",
        budget: int | str = "2 GB",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        dirpath: str | os.PathLike[str] | None = None,
        min_epochs: float = 2.0,
        layers: Layers | None = None,
    ) -> None:
        if where not in ("memory", "disk"):
            raise ValueError(f'where={where!r} must be "memory" or "disk"')
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}")
        if not min_epochs >= 0:
            raise ValueError(f"min_epochs={min_epochs!r} must be 0 or more")
        if dirpath is not None and where == "memory":
            raise ValueError('dirpath= is the folder of where="disk": pass both or none')
        self.where, self.dtype, self.min_epochs = where, dtype, min_epochs
        self.budget = parse_size(budget, "budget")
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.layers = layers or Layers()
        self._reset()

    def _reset(self) -> None:
        self._cache: PrefixCache | None = None
        self._old: PrefixCache | None = None
        self._batch: Any = None
        self._trainer: Any = None
        self._signatures: dict[nn.Module, inspect.Signature] = {}
        self._parameters: list[nn.Parameter] = []
        self._refused = ""
        self._hooks: PrefixHooks | None = None
        self._flags: list[bool] = []
        self._busy = False
        self._told: set[str] = set()
        self._phases: list[dict[str, Any]] = []
        self._state: dict[str, Any] = {"frozen": 0, "depth": 0, "off": "", "seen": 0, "hits": 0, "stale": 0, "moves": 0}

    def report(self) -> Report:
        """What the cache did in the last fit: a row for each fill."""
        seen, hits = (sum(phase[name] for phase in self._phases) for name in ("seen", "hits"))
        facts = {"where": self.where, "budget": self.budget, "hit rate": hits / seen if seen else 0.0}
        if self._state["off"]:
            facts["ended"] = self._state["off"]
        return Report("Frozen prefix cache", facts, self._phases)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._plans = thawing_plans(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._parameters = list(pl_module.parameters())
        self._flags = []
        try:
            self._groups = self.layers.of(pl_module)
            self._layout = PrefixLayout.of(pl_module, self._groups)
        except (Unsuited, ValueError) as reason:
            if isinstance(reason, ValueError) and self.layers != Layers():
                raise
            self._tell(f"nothing is cached: {reason}")
            return
        self._signatures = {module: signature_of(module) for module in (self._layout.owner, *self._layout.above)}
        self._hooks = PrefixHooks(self._layout, self._enter, self._leave)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._batch_idx = batch, batch_idx
        if self._hooks is not None and not self._state["off"]:
            self._hooks.attach()
            if self._cache is not None:
                self._attach_entry(self._cache.prefix)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._detach()

    def _enter(self, args: Any, kwargs: Any) -> None:
        if self._busy or self._state["off"] or not self._trainer.training:
            return
        self._busy = True
        try:
            self._follow_flags()
            if self._state["depth"]:
                self._answer(args, kwargs)
        except Unsuited as reason:
            self._tell(f"a call goes through uncached: {reason}")
        finally:
            self._busy = False

    def _leave(self) -> None:
        if not self._busy and self._cache is not None:
            self._cache.prefix.end()

    def _follow_flags(self) -> None:
        """Look at what is frozen: here, where it is used, so that no thaw is missed, whoever does it and when."""
        flags = [p.requires_grad for p in self._parameters]
        if flags == self._flags:
            return
        self._flags = flags
        self._count("moves", 10, "what is frozen changes all the time")
        state, frozen = self._state, frozen_depth(self._groups)
        if frozen != state["frozen"]:
            if frozen < state["depth"] or frozen > state["frozen"] or not state["depth"]:
                state["depth"] = self._depth_for(frozen)
            state["frozen"] = frozen
            if not state["depth"]:
                least = f", none of them for {self.min_epochs:g} epochs" if frozen else ""
                self._tell(f"{frozen} of {len(blocks_of(self._groups))} blocks are frozen{least}: nothing is cached")
        if self._cache is not None:
            self._old, self._cache = self._cache, None
        if not state["depth"]:
            self._drop()
        self._refused = ""

    def _depth_for(self, frozen: int) -> int:
        return depth_that_lasts(
            self._trainer, self._batch_idx, self._groups, self._plans, frozen, epochs=self.min_epochs
        )

    def _answer(self, args: Any, kwargs: Any) -> None:
        values = arguments(self._signatures[self._layout.owner], args, kwargs)
        inputs = read_inputs(values)
        if self._cache is not None and self._cache.is_stale():
            self._drop_stale()
        if self._cache is None:
            self._start(inputs)
        assert self._cache is not None
        self._check_caller(self._cache.prefix, inputs)
        seen, hits = self._cache.answer(inputs)
        for counts in (self._state, self._phases[-1]):
            counts["seen"] += seen
            counts["hits"] += hits
        self._phases[-1] |= {"rows": self._cache.rows, "bytes": self._cache.nbytes}

    def _start(self, inputs: Inputs) -> None:
        """A cache for the prefix as it is now: the one there was, if nothing about it changed."""
        if self._refused:
            raise Unsuited(self._refused)
        began, depth = time.perf_counter(), self._state["depth"]
        try:
            prefix = FrozenPrefix(self._layout, depth, inputs, self._enclosing(), dtype=_DTYPES[self.dtype])
        except Unsuited as reason:
            self._refused = str(reason)
            raise
        cache = PrefixCache(prefix, parameters_of(self._groups, depth), self.budget, self._folder())
        if self._old is None or not cache.takes_over_from(self._old):
            if self._old is not None:
                self._old.close()
            self._fill(cache, inputs)
            self._note(cache, time.perf_counter() - began)
        self._cache, self._old = cache, None
        self._attach_entry(prefix)

    def _fill(self, cache: PrefixCache, inputs: Inputs) -> None:
        paths = column_paths(self._batch, inputs.columns)
        batches = training_batches(self._trainer) if paths is not None else None
        if paths is None or batches is None:
            cache.start_empty()
            self._state |= {"seen": 0, "hits": 0}
            return
        with same_randomness():
            cache.fill(all_rows({name: column(b, path) for name, path in paths.items()} for b in batches))

    def _note(self, cache: PrefixCache, seconds: float) -> None:
        phase: dict[str, Any] = {
            "step": self._trainer.global_step,
            "cached": cache.prefix.place,
            "how": "opened" if cache.reused else "filled" if cache.filled else "as rows come",
            "rows": cache.rows,
            "bytes": cache.nbytes,
            "seconds": round(seconds, 3),
        }
        self._phases.append({**phase, "seen": 0, "hits": 0})
        size = f"{phase['bytes'] / 1e6:,.1f} MB of {self.budget / 1e6:,.1f} MB"
        rest = (
            "" if cache.share == 1 or not cache.filled else f"; {1 - cache.share:.0%} of the rows do not fit the budget"
        )
        rank_zero_info(
            f"FrozenPrefixCache: step {phase['step']}: {phase['cached']} is kept in {self.where} ({phase['how']}: "
            f"{phase['rows']:,} rows, {size}, {seconds:.1f} s){rest}"
        )

    def _check_caller(self, prefix: FrozenPrefix, inputs: Inputs) -> None:
        """A pooled vector is put back outside the owner: only where the call that takes it is under way, and alike."""
        if prefix.pooled:
            calls = dict(self._enclosing())
            values = calls.get(prefix.callee.module)
            if values is None or Callee.around(prefix.callee.module, values, inputs.columns) != prefix.callee:
                raise Unsuited("the model is called in another way than when the cache was made")

    def _enclosing(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        """The calls under way above the owner, innermost first, as far as they can be repeated."""
        assert self._hooks is not None
        calls = []
        for module, args, kwargs in reversed(self._hooks.calls):
            try:
                calls.append((module, arguments(self._signatures[module], args, kwargs)))
            except Unsuited:
                continue
        return calls

    def _attach_entry(self, prefix: FrozenPrefix) -> None:
        if prefix.entry is not None and self._hooks is not None:
            self._hooks.attach_to(prefix.entry, self._on_entry)

    def _on_entry(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return None if self._busy or self._cache is None else self._cache.prefix.on_entry(module, args, kwargs)

    def _drop(self) -> None:
        for cache in (self._cache, self._old):
            if cache is not None:
                cache.close()
        self._cache = self._old = None

    def _drop_stale(self) -> None:
        self._drop()
        self._count("stale", 1, "the frozen weights changed twice in an epoch")

    def _count(self, what: str, most: int, reason: str) -> None:
        """What may happen so often in an epoch that it costs more than it saves ends the cache."""
        self._state[what] += 1
        if self._state[what] > most:
            self._end(reason)
            raise Unsuited(reason)

    def _folder(self) -> Path | None:
        if self.where == "memory":
            return None
        return self.dirpath or Path(self._trainer.default_root_dir) / "prefix_cache"

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state, cache = self._state, self._cache
        if cache is not None and state["seen"]:
            rate, first = state["hits"] / state["seen"], not cache.filled and cache.epochs == 0
            cache.epochs += 1
            if rate < 0.5 * cache.share and not first:
                self._end(f"only {rate:.0%} of the rows of an epoch were there: the inputs change from epoch to epoch")
        state |= {"seen": 0, "hits": 0, "stale": 0, "moves": 0}

    def _end(self, reason: str) -> None:
        self._state["off"] = reason
        self._drop()
        self._tell(f"the cache ends: {reason}")

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            rank_zero_info(f"FrozenPrefixCache: {text}")

    def _detach(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        if self._cache is not None:
            self._cache.prefix.end()
            self._cache.prefix.discard()

    def _release(self) -> None:
        self._detach()
        self._drop()
        self._hooks = self._batch = self._trainer = None
        self._parameters = []
        self._signatures = {}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._phases:
            rank_zero_info(str(self.report()))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict)
