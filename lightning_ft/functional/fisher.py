"""The diagonal Fisher information, from the gradients of single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_ft.core.anchor import Anchor
from lightning_ft.core.fisher import Fisher, Variant
from lightning_ft.core.sharding import is_sharded, named_plain_parameters
from lightning_ft.core.undisturbed import eval_mode, same_randomness
from lightning_ft.functional._batch_rows import first_size, prepare, row_count, take_rows
from lightning_ft.functional._per_example import LayerUses, UnfitError, add_squares_, gradients
from lightning_ft.functional.likelihood import Likelihood

Loss = Callable[[Any, Any], Tensor]
LikelihoodOf = Callable[[Any, Any], Likelihood]
MOST_PASSES = 2048
"""Backward passes a batch beyond which the exact variant is refused."""
_PROOF = 3
_TOLERANCE = 1e-3


@runtime_checkable
class TellsLikelihood(Protocol):
    """A module that says what its outputs mean, as those of ``lightning_ft.modules`` do."""

    def log_likelihood_terms(self, batch: Any) -> Likelihood:
        """The likelihood of a batch's labels, with the graph of the outputs."""
        ...


def fisher_diagonal(
    module: nn.Module,
    batches: Iterable[Any],
    variant: Variant = "exact",
    *,
    parameters: Iterable[str] | None = None,
    likelihood: LikelihoodOf | None = None,
    loss: Loss | None = None,
    limit: int | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
    vectorise: bool | None = None,
) -> Fisher:
    """Fᵢ = 1/n Σₓ E_y (∂ log p(y|x; θ) / ∂θᵢ)² over n examples x, at the module's present weights θ.

    - ``exact``: the expectation over the model's own p(y|x), with no label drawn and none needed;
    - ``sampled``: one y from p(y|x) for each x, an unbiased estimate of the same for a fraction of the cost;
    - ``empirical``: the y of the data. Not an estimate of the others: it is small where the model is right.

    An example is a row of a batch, or what a module says is one (a window of a question's context). Its log p is the
    *sum* over its terms: the labelled tokens of a language model or tagger, of which each gets a label of its own where
    labels are drawn; start and end of an answer; the labels of a multi-label problem. Terms are independent given x
    (of a decoder: given the true tokens before), so the exact variant adds up terms and outcomes: C − 1 backward passes
    a term for C classes, see :meth:`Likelihood.scores`. n counts examples and not terms, so F of a language model grows
    with the length of rows. Factors of a loss that are none of the likelihood's (label smoothing, class weights, the
    mean over tokens) are left out; a Gaussian's gradient is half that of the squared error.

    Gradients are squared example by example. The square of a batch's mean gradient is something else: 33 times too
    small at batch 16 on a small BERT. How it is computed: the linear, embedding and norm layers' per-example gradients
    follow from one pass over the batch, and other layers' from ``vmap``; that is compared with the plain way, batches
    of one, on the first examples, and where they differ, or a parameter belongs to no such layer, batches of one it is.

    Everything runs in eval mode and fp32 (weights of half precision are converted for the time being, autocast is off).
    The module is left as it was: modes, flags, ``.grad``, buffers, random states.

    Args:
        module: The module, on its device.
        batches: Of the *old* task, whose loss it is about.
        variant: Whose labels.
        parameters: Names (without those of wrappers), by default all that require grad.
        likelihood: A function of module and batch that calls the module and says what its outputs mean. Modules of
            this library need none, nor any that has a method ``log_likelihood_terms(batch)``.
        loss: For modules without a likelihood, and the empirical variant alone: a function of module and a batch of
            one row that returns −log p, by default ``module.training_step(batch, 0)``.
        limit: Number of examples at which to stop, 200 to 2000 in practice.
        generator: Draws labels for ``sampled``; by default one with seed 0.
        progress: Is told, after each batch, how many examples there were.
        vectorise: False for batches of one, True to raise where they would be needed; by default what is possible.

    Raises:
        ValueError: There is no example, no parameter, or no likelihood where one is needed; too many backward passes;
            weights that are sharded; rows that cannot be told apart.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.fill_(0.4620981)  # p = sigmoid(3 · 0.462…) = 0.8
        >>> def bernoulli(model, x):
        ...     return Likelihood(model(x), torch.ones(len(x), 1), "bernoulli")
        >>> fisher = fisher_diagonal(model, [torch.tensor([[1.0, 2.0]])], likelihood=bernoulli)
        >>> [round(value, 4) for value in fisher.tensors["weight"][0].tolist()]
        [0.16, 0.64]

    Reference:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks"; van de Ven 2025, "On the
        Computation of the Fisher Information in Continual Learning".
    """
    estimate = FisherEstimate(
        module,
        variant,
        parameters=parameters,
        likelihood=likelihood,
        loss=loss,
        limit=limit,
        generator=generator,
        vectorise=vectorise,
    )
    for batch in batches:
        counted = estimate.add(batch)
        if progress is not None:
            progress(counted)
        if estimate.done:
            break
    if estimate.examples == 0:
        raise ValueError("batches gave no example: give a list or a loader of batches of the old task")
    return estimate.result()


class _UnprovenError(Exception):
    """Layers were called of which it was not shown yet that they can be taken whole."""


class FisherEstimate:
    """:func:`fisher_diagonal`, batch by batch, for whoever does not hold all batches: see there.

    Args:
        module: The module.
        variant: Whose labels.
        parameters: Names, by default all that require grad.
        likelihood: What the outputs mean.
        loss: −log p of a batch of one.
        limit: Number of examples at which to stop.
        generator: Draws labels.
        vectorise: Whether batches are taken whole.
    """

    def __init__(
        self,
        module: nn.Module,
        variant: Variant = "exact",
        *,
        parameters: Iterable[str] | None = None,
        likelihood: LikelihoodOf | None = None,
        loss: Loss | None = None,
        limit: int | None = None,
        generator: torch.Generator | None = None,
        vectorise: bool | None = None,
    ) -> None:
        self._parameters = _chosen(module, parameters)
        with torch.inference_mode(False):  # they are added to outside of it
            zeros = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._parameters.items()}
        # Checks the variant, too.
        self._sums = Fisher(zeros, 0, variant)
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} must be 1 or more: it is a number of examples")
        if likelihood is None and isinstance(module, TellsLikelihood) and loss is None:
            likelihood = _terms
        if likelihood is None and variant != "empirical":
            raise ValueError(
                f"variant={variant!r} asks what {type(module).__name__} itself says of its inputs: give likelihood=, a "
                "function of module and batch such as lambda module, batch: Likelihood(module(batch[0]), batch[1]), or "
                'take variant="empirical", which needs only a loss'
            )
        if likelihood is None and loss is None:
            loss = training_step_loss(module)
        self.module = module
        self.variant: Variant = variant
        self.limit = limit
        self.examples = 0
        self.vectorised: bool | None = False if vectorise is False or likelihood is None else None
        """Whether batches are taken whole; None before the first."""
        self.why_not: str | None = None if likelihood is not None else "there is only a loss"
        self._strict = vectorise is True
        self._likelihood = likelihood
        self._loss = loss
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._uses = LayerUses(module, self._parameters)
        self._called: set[int] = set()
        self._proven: set[int] = set()
        if self._strict and likelihood is None:
            raise ValueError(
                "vectorise=True needs a likelihood: of a batch's loss it is not known what it is a mean of"
            )

    @property
    def done(self) -> bool:
        """Whether there were as many examples as were asked for."""
        return self.limit is not None and self.examples >= self.limit

    def add(self, batch: Any) -> int:
        """Take in a batch, or as much of it as is wanted yet.

        Returns:
            The number of its examples that were taken in.
        """
        device = next(iter(self._parameters.values())).device
        with torch.inference_mode(False), torch.enable_grad(), as_measured(self.module):
            batch = prepare(batch, device)
            rows = self._rows(batch)
            wanted = rows if self.limit is None else min(rows, self.limit - self.examples)
            if wanted < rows:
                batch = take_rows(batch, slice(0, wanted), rows)
            if wanted > 0:
                self._add(batch, wanted)
        self.examples += wanted
        return wanted

    def result(self) -> Fisher:
        """F over all examples so far; of zeros where there were none."""
        with torch.inference_mode(False):
            tensors = {name: total / max(1, self.examples) for name, total in self._sums.tensors.items()}
        squares = Anchor({name: p.detach() for name, p in self._parameters.items()}).squares
        weights = {name: float(square) for name, square in squares.items()}
        return Fisher(tensors, self.examples, self.variant, weights)

    # ---- one batch

    def _rows(self, batch: Any) -> int:
        rows = first_size(batch) if self._likelihood is not None else row_count(batch)
        if rows is None:
            raise ValueError(
                "the rows of this batch cannot be told apart, since its tensors differ in their first dimension: give "
                "batches of one, DataLoader(batch_size=1), with every tensor's first dimension 1"
            )
        return rows

    def _add(self, batch: Any, rows: int) -> None:
        if rows > 1 and self.vectorised is None:
            self._prove(batch, rows)
        for _ in range(2):
            if not self.vectorised or rows == 1:
                break
            try:
                self._add_whole(batch, rows, self._sums.tensors, self._generator)
                return
            except _UnprovenError:  # a layer that earlier batches did not call: the head of another task
                self._prove(batch, rows)
            except UnfitError as error:
                self._give_up(str(error))
        self._add_singly(batch, rows, self._sums.tensors, self._generator)

    def _give_up(self, why: str) -> None:
        if self._strict:
            raise ValueError(f"vectorise=True, but {why}: leave it out, and batches of one are taken")
        self.vectorised, self.why_not = False, why

    def _prove(self, batch: Any, rows: int) -> None:
        """Compare both ways on some examples: what a stranger's layers do with their rows cannot be known."""
        some = take_rows(batch, slice(0, _PROOF), rows)
        ways = []
        for way in (self._add_singly, self._add_whole):
            found = {name: torch.zeros_like(total) for name, total in self._sums.tensors.items()}
            try:
                way(some, min(_PROOF, rows), found, torch.Generator().manual_seed(0), proof=True)
            except UnfitError as error:
                self._give_up(str(error))
                return
            ways.append(found)
        peak = max(float(total.max()) for total in ways[0].values() if total.numel())
        for name, plain in ways[0].items():
            scale = max(float(plain.max()) if plain.numel() else 0.0, 1e-7 * peak)
            if float((plain - ways[1][name]).abs().max() if plain.numel() else 0.0) > _TOLERANCE * scale:
                self._give_up(f"{name} is used in a way that its layer's inputs do not tell")
                return
            if float(plain.max() if plain.numel() else 0.0) > 0 and id(self._parameters[name]) not in self._uses.owned:
                self._give_up(f"{name} belongs to no layer of its own")
                return
        self.vectorised = True
        self._proven |= self._called

    def _add_whole(
        self,
        batch: Any,
        rows: int,
        sums: Mapping[str, Tensor],
        generator: torch.Generator,
        *,
        proof: bool = False,
    ) -> None:
        with self._uses.noted(rows):
            terms = self._terms(batch, rows)
        if self._uses.problem is not None:
            raise UnfitError(self._uses.problem)
        uses, self._uses.uses = self._uses.uses, []
        self._called = {id(use.layer) for use in uses}
        if not (proof or self._called <= self._proven):
            raise _UnprovenError
        names = {id(p): name for name, p in self._parameters.items()}
        scores = self._scores(terms, generator, proof)
        for score, last in _with_last(scores):
            found = gradients(uses, terms.outputs, score, keep=not last)
            try:
                with torch.no_grad():
                    add_squares_(sums, names, uses, found, rows)
            except UnfitError as error:
                if proof:
                    raise
                raise ValueError(f"{error}: give vectorise=False, and batches of one are taken") from error

    def _add_singly(
        self,
        batch: Any,
        rows: int,
        sums: Mapping[str, Tensor],
        generator: torch.Generator,
        *,
        proof: bool = False,
    ) -> None:
        parameters, totals = list(self._parameters.values()), list(sums.values())
        for row in range(rows):
            one = batch if rows == 1 else take_rows(batch, slice(row, row + 1), rows)
            for found in self._gradients(one, parameters, generator, proof):
                known = [(t, g.float()) for t, g in zip(totals, found, strict=True) if g is not None]
                if known:
                    squared = [g for _, g in known]
                    torch._foreach_addcmul_([t for t, _ in known], squared, squared)

    def _gradients(
        self, one: Any, parameters: list[nn.Parameter], generator: torch.Generator, proof: bool
    ) -> Iterator[tuple[Tensor | None, ...]]:
        if self._likelihood is None:
            assert self._loss is not None
            value = self._loss(self.module, one)
            if not (isinstance(value, Tensor) and value.requires_grad and value.numel() == 1):
                raise ValueError(
                    f"the loss of a batch of one is {value!r}: it must be one number that depends on the parameters"
                )
            yield torch.autograd.grad(value, parameters, allow_unused=True)
            return
        terms = self._terms(one, 1)
        for score, last in _with_last(self._scores(terms, generator, proof)):
            yield torch.autograd.grad(terms.outputs, parameters, score, retain_graph=not last, allow_unused=True)

    def _terms(self, batch: Any, rows: int) -> Likelihood:
        assert self._likelihood is not None
        terms = self._likelihood(self.module, batch)
        if terms.examples != rows:
            raise ValueError(
                f"the likelihood of a batch of {rows} rows is of {terms.examples} examples: a row must be an example; "
                "give batches of one example, DataLoader(batch_size=1), if its tensors have another first dimension"
            )
        return terms

    def _scores(self, terms: Likelihood, generator: torch.Generator, proof: bool) -> Iterator[Tensor]:
        if proof:  # one pass will do, whatever the variant
            return terms.scores("sampled", generator)
        if self.variant == "exact" and terms.passes() > MOST_PASSES:
            raise ValueError(
                f'variant="exact" would take {terms.passes()} backward passes for this batch '
                f"({terms.outputs.shape[1]} outcomes for each term), and at most {MOST_PASSES} are done: take "
                'variant="sampled", which takes one and has the same mean'
            )
        return terms.scores(self.variant, generator)


@contextmanager
def as_measured(module: nn.Module) -> Iterator[None]:
    """Eval mode, fp32 and no autocast; all of it, buffers and random states are as before afterwards."""
    half = [t for t in (*module.parameters(), *module.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    kept = [(t, t.data) for t in half]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = {p.device.type for p in module.parameters()}
    with ExitStack() as stack:
        stack.enter_context(same_randomness())
        stack.enter_context(eval_mode(module.modules()))
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for tensor in half:
                tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, data in kept:
                tensor.data = data
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def merge_ranks(fisher: Fisher) -> Fisher:
    """The Fisher information over the examples of all processes: their means, weighted by their examples.

    Call on every process. Without a process group it is what was given. A process without examples gives zeros.

    Args:
        fisher: Of this process's examples.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return fisher
    device = next(iter(fisher.tensors.values())).device
    examples = torch.tensor([fisher.examples], device=device)
    distributed.all_reduce(examples)
    merged = {}
    for name, tensor in fisher.tensors.items():
        total = tensor * fisher.examples
        distributed.all_reduce(total)
        merged[name] = total / examples.clamp(min=1)
    return Fisher(merged, int(examples), fisher.variant, fisher.weights, fisher.gammas)


def _chosen(module: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    trained = {name: p for name, p in named_plain_parameters(module) if p.requires_grad}
    if names is not None:
        wanted = list(names)
        if missing := [name for name in wanted if name not in trained]:
            raise ValueError(
                f"parameters names {missing[:3]}, which {type(module).__name__} has not, or which do not require grad: "
                f"its own are {list(trained)[:3]} and so on"
            )
        trained = {name: trained[name] for name in wanted}
    if not trained:
        raise ValueError(f"no parameter of {type(module).__name__} requires grad: there is nothing to weigh")
    if any(is_sharded(p) for p in trained.values()):
        raise ValueError(
            "the weights are sharded, and a process holds pieces of them: compute the Fisher information beforehand on "
            "one device (lightning-ft fisher), or in configure_model before sharding"
        )
    return trained


def _terms(module: Any, batch: Any) -> Likelihood:
    terms: Likelihood = module.log_likelihood_terms(batch)
    return terms


def training_step_loss(module: Any) -> Loss:
    """A loss that is what the module's ``training_step`` returns, while it logs nothing.

    Raises:
        ValueError: It has none that only computes.
    """
    if not callable(getattr(module, "training_step", None)):
        raise ValueError(
            f"{type(module).__name__} has no training_step: give loss=, a function of module and batch, or likelihood="
        )
    if getattr(module, "automatic_optimization", True) is False:
        raise ValueError(
            f"{type(module).__name__} steps its optimisers in training_step (manual optimisation): give loss=, a "
            "function of module and batch that only computes"
        )

    def loss(module: Any, batch: Any) -> Tensor:
        with _no_logging(module):
            value = module.training_step(batch, 0)
        found: Tensor = value["loss"] if isinstance(value, Mapping) else value
        return found

    return loss


@contextmanager
def _no_logging(module: nn.Module) -> Iterator[None]:
    """``self.log`` of a LightningModule does nothing: it raises or warns outside of a trainer's loops."""
    names = ("log", "log_dict")
    loggers = [(vars(m), name) for m in module.modules() for name in names if callable(getattr(m, name, None))]
    before = [(own, name, own.get(name)) for own, name in loggers]
    for own, name in loggers:
        own[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for own, name, value in before:
            if value is None:
                del own[name]
            else:
                own[name] = value


def _with_last(items: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each, and whether none follows."""
    iterator = iter(items)
    item = next(iterator, None)
    while item is not None:
        following = next(iterator, None)
        yield item, following is None
        item = following
