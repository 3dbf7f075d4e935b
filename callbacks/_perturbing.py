"""A module's training step, run several times over a batch by a perturbation method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_ft.callbacks._perturbable import STANDS_IN, refuse
from lightning_ft.callbacks._quiet import metrics_of, quiet
from lightning_ft.core.token_inputs import TokenInputs
from lightning_ft.core.undisturbed import RandomState
from lightning_ft.functional.found_logits import FoundLogits, Logits
from lightning_ft.functional.passes import Method, Pass, Seen, complete, resume
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings, fresh


class Perturbing:
    """Stands in for ``training_step`` while a fit runs, and returns the loss of a perturbation method in its place.

    The first pass is the step as it is. A pass of which the loss is needed calls the step again with the same
    arguments, ``self.log`` silenced and its metrics put back afterwards. One of which only logits are needed repeats
    the calls that the step made of the model; where they come from a module that does not embed the tokens itself, the
    step up to there. Under automatic optimisation the step returns one scalar, which is differentiated once; in manual
    optimisation the first loss that it gives to ``manual_backward`` is replaced, and a repeated step ends there.

    Args:
        callback: For messages.
        start: Makes the method for a batch; None leaves the batch as it is.
    """

    def __init__(self, callback: Callback, start: Callable[[], Method | None]) -> None:
        self._callback = callback
        self.start = start
        self.trainer: Trainer | None = None
        self.module: LightningModule | None = None
        self.found: FoundLogits | None = None
        self._run: _Run | None = None

    def attach(
        self,
        trainer: Trainer,
        module: LightningModule,
        inputs: TokenInputs | None,
        *,
        reads_logits: bool = False,
        logits: Logits = None,
    ) -> None:
        """Call in ``on_train_start``.

        Args:
            trainer: The trainer.
            module: Its module.
            inputs: Which embeddings are perturbed.
            reads_logits: Whether the method reads logits.
            logits: Where they are, if they are not found.

        Raises:
            ValueError: The embeddings are not found; something else runs that goes with no repetition.
        """
        self.release()
        refuse(trainer, module, self._callback)
        self.words = PerturbedEmbeddings(module, inputs)
        self.trainer, self.module = trainer, module
        self.found = FoundLogits(module, self.words.calls, logits) if reads_logits else None
        self.metrics = metrics_of(module)
        own = vars(module)
        self._before = {name: own[name] for name in ("training_step", "manual_backward") if name in own}
        self._stand_ins = {
            "training_step": self._training_step(module.training_step),
            "manual_backward": self._manual_backward(module.manual_backward),
        }
        own.update(self._stand_ins)

    def release(self) -> None:
        """Leave the module as it was. Call in ``teardown`` and ``on_exception``."""
        module, self.module = self.module, None
        if module is None:
            return
        self.words.remove()
        if self.found is not None:
            self.found.remove()
        own = vars(module)
        for name, stand_in in self._stand_ins.items():
            # Something that came later may stand in for this one, which then does nothing.
            if own.get(name) is stand_in:
                del own[name]
                own.update({key: value for key, value in self._before.items() if key == name})

    def log(self, values: Mapping[str, Tensor]) -> None:
        """Log what a method tells of a batch."""
        assert self.module is not None
        assert self.trainer is not None
        if self.trainer.loggers:
            self.module.log_dict({name: value.detach() for name, value in values.items()}, batch_size=1)

    @contextmanager
    def listening(self, *, record: bool = False) -> Iterator[None]:
        """The calls that the step makes are outermost ones: DDP and FSDP call the module around its own step."""
        calls = self.words.calls
        around, calls.calls = calls.calls, []
        if self.found is not None:
            self.found.begin(record=record)
        try:
            yield
        finally:
            calls.calls = around
            if self.found is not None:
                self.found.end()

    def _training_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            method = None if self.module is None else self.start()
            if method is None:
                return step(*args, **kwargs)
            assert self.module is not None
            run = self._run = _Run(self, step, args, kwargs, method)
            self.words.begin()
            try:
                return run.automatic() if self.module.automatic_optimization else run.manual()
            finally:
                self._run = None
                method.close()
                self.words.end()
                if self.found is not None:
                    self.found.forget()

        setattr(training_step, STANDS_IN, self)
        return training_step

    def _manual_backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(backward)
        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            backward(loss if self._run is None else self._run.replaced(loss), *args, **kwargs)

        return manual_backward


class _Run:
    """The passes over one batch."""

    def __init__(self, owner: Perturbing, step: Callable[..., Any], args: Any, kwargs: Any, method: Method) -> None:
        self._owner = owner
        self._first = functools.partial(step, *args, **kwargs)
        kept, named = fresh(args), fresh(kwargs)
        self._step: Callable[[], Any] = lambda: step(*fresh(kept), **fresh(named))
        self._method = method
        self._state: RandomState | None = None
        self._wants_loss = True
        self._repeats = False

    def automatic(self) -> Any:
        beside: dict[str, Any] | None = None

        def first(wanted: Pass) -> Seen:
            nonlocal beside
            with self._owner.listening(record=True):
                output = self._first()
            if output is None:
                raise _SkippedError
            loss = _loss_of(output)
            # Not the loss itself, with its graph: the method may be done with that before the next pass.
            beside = {k: v for k, v in output.items() if k != "loss"} if isinstance(output, Mapping) else None
            return self._seen(loss)

        try:
            total, terms = complete(self._method, first, self._again)
        except _SkippedError:
            return None
        self._owner.log(terms)
        return total if beside is None else {**beside, "loss": total}

    def manual(self) -> Any:
        self._state = RandomState.now() if next(self._method).same_masks else None
        with self._owner.listening(record=True):
            return self._first()

    def replaced(self, loss: Tensor) -> Tensor:
        """What ``manual_backward`` differentiates in the place of ``loss``."""
        if self._repeats:
            raise _Done(loss)
        if not self._wants_loss:
            return loss
        self._wants_loss = False
        total, terms = resume(self._method, self._seen(loss), self._again, self._state)
        self._owner.log(terms)
        return total

    def _seen(self, loss: Tensor | None) -> Seen:
        owner = self._owner
        if not owner.words.places:
            raise ValueError(
                f"{type(owner.module).__name__}.training_step embedded no tokens with the embeddings that were found: "
                'name those that it uses, inputs=TokenInputs(embedding="encoder.tokens"); a model that is compiled as '
                "a whole may run on without them"
            )
        logits = [] if owner.found is None else owner.found.take()
        return Seen(loss, logits, getattr(owner.module, "loss_factor", 1.0))

    def _again(self, wanted: Pass) -> Seen:
        owner = self._owner
        assert owner.trainer is not None
        assert owner.module is not None
        expected = 0 if owner.found is None else len(owner.found.logits)
        self._repeats = True
        try:
            with quiet(owner.trainer, owner.module, owner.metrics), wanted.within(), owner.listening():
                loss = None
                if wanted.whole:
                    loss = self._repeat_step()
                else:
                    self._repeat_model(expected)
            return self._seen(loss)
        finally:
            self._repeats = False

    def _repeat_step(self) -> Tensor:
        try:
            return _loss_of(self._step())
        except _Done as done:
            return done.given()

    def _repeat_model(self, expected: int) -> None:
        found = self._owner.found
        assert found is not None
        if found.path is None:
            for module, args, kwargs in found.calls:
                module(*fresh(args), **fresh(kwargs))
            return

        def enough() -> None:
            if len(found.logits) >= expected:
                raise _Done

        found.enough = enough
        with suppress(_Done):
            self._step()


class _Done(BaseException):
    """Ends a repeated step. No ``except Exception`` in the step may stop it."""

    def __init__(self, loss: Tensor | None = None) -> None:
        super().__init__()
        self._loss = loss

    def given(self) -> Tensor:
        assert self._loss is not None
        return self._loss


class _SkippedError(Exception):
    """The step has skipped its batch."""


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"training_step returned a {type(output).__name__}: perturbation methods need a loss, or a mapping with "
            '"loss", of each pass over a batch'
        )
    return loss
