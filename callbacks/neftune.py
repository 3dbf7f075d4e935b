"""NEFTune: noise on the embedded tokens in training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_ft.callbacks._perturbable import check, refuse_prefix_cache
from lightning_ft.core.token_inputs import TokenInputs, as_token_inputs
from lightning_ft.functional.perturbation import even_noise
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings, Place


class NEFTune(Callback):
    """Add U(−1, 1)·α/√(Ld) to the embedded tokens of training batches, with L real tokens in an example, d wide.

    From ``on_train_batch_start`` to ``on_train_batch_end``, whatever mode the embedding is in; one pass, as before.
    Padding is left as it is, and L is each example's own, as in the authors' code; the implementation in transformers
    adds noise to padding, and takes the padded width for L. Goes with the other perturbation methods.

    Args:
        alpha: α; the paper takes 5, 10 and 15.
        inputs: Which embeddings are perturbed, and which tokens are left alone; padding always is.

    Raises:
        ValueError: ``alpha`` is out of range; the embeddings are not found; FrozenPrefixCache.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NEFTune(5.0)], logger=False)

    Reference:
        Jain et al. 2024, "NEFTune: Noisy Embeddings Improve Instruction Finetuning".
    """

    def __init__(self, alpha: float = 5.0, *, inputs: TokenInputs | None = None) -> None:
        check(alpha=alpha)
        self.alpha = alpha
        self.inputs = as_token_inputs(inputs)
        self._words: PerturbedEmbeddings | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        refuse_prefix_cache(trainer, self)
        if self.alpha:
            self._words = PerturbedEmbeddings(pl_module, self.inputs)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._words is not None:
            self._words.begin(self._noise)

    def _noise(self, place: Place) -> Tensor:
        return even_noise(self.alpha, place.real, place.embedded.shape[-1])

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._words is not None:
            self._words.begin()
            self._words.end()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._words is not None:
            self._words.remove()
            self._words = None
