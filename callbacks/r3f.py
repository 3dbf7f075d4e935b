"""R3F and R4F: similar answers to a text and to a slightly noisy one."""

from __future__ import annotations

from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ft.callbacks._normalised_head import NormalisedHead
from lightning_ft.callbacks._perturbable import answer_of, check
from lightning_ft.callbacks._perturbing import Perturbing
from lightning_ft.core.layers import Layers
from lightning_ft.core.token_inputs import TokenInputs, as_token_inputs
from lightning_ft.functional.found_logits import Logits
from lightning_ft.functional.passes import Method
from lightning_ft.functional.perturbation import Noise
from lightning_ft.functional.r3f import Dropout, r3f
from lightning_ft.functional.snapshots import Answer


class R3F(Callback):
    """Train on L + λ · mean [KL(p‖q) + KL(q‖p)], with p = f(x) and q = f(x + z), z ~ U(−ε, ε) or N(0, ε²).

    x are the embedded tokens; the noisy pass sees a copy of them that sends no gradient to the table, as published.
    R4F is R3F with ``spectral_norm=True``: the layer that gives the logits computes with W/σ(W) while the fit runs, in
    checkpoints, and after it. (The authors run one power iteration a pass, here σ is exact; their layer for it is
    ``out_proj`` of RoBERTa's head.)

    While the fit runs ``training_step`` is stood in for: it runs as it is, the calls that it made of the model are
    repeated with noise, and the term is added to its loss, so that accumulation, fp16 and DDP treat both alike. For
    logits of tokens the mean is over those that the loss reads (labels other than −100). Validation and prediction are
    plain. Under FSDP2 (ModelParallelStrategy) it runs as it does under DDP. In manual optimisation the term is added to
    the first loss that is given to ``manual_backward``.

    The published code draws new dropout masks in the noisy pass. With dropout at 0.1 these change the answer about
    10⁷ times as much as noise of 1e-5 does, so that what it trains is mostly agreement under dropout, as
    :class:`~lightning_ft.callbacks.RDrop` does. ``dropout="shared"`` gives both passes the same masks: the method as it
    is stated. Say which of the two you ran.

    Costs a second forward pass, and its activations. Logs ``r3f`` (without λ) where the trainer has a logger.

    Args:
        weight: λ; 1.0 in the authors' code, 0.7 in their recipe for RTE.
        epsilon: ε; 1e-5 in their code.
        noise: ``"uniform"`` or ``"normal"``.
        dropout: Masks of the noisy pass: ``"independent"``, as published, or ``"shared"``.
        spectral_norm: R4F. True finds the layer where the head is one linear layer; else its path.
        logits: Where they are, if the model returns nothing with ``logits``: the path of a module that returns them, a
            key of what the model returns, or a function of that. See
            :class:`~lightning_ft.functional.found_logits.FoundLogits`.
        answer: What they mean: ``"single_label"``, ``"multi_label"`` or ``"regression"`` (squared difference in place
            of KL). By default multi_label where a transformers configuration says so, regression of one column.
        inputs: Which embeddings are perturbed, and which tokens are left alone; padding always is.

    Raises:
        ValueError: An argument is out of range; embeddings or logits are not found; half-precision embeddings, to which
            the noise is nothing; FrozenPrefixCache, another perturbation method, a compiled LightningModule, FSDP1,
            DeepSpeed; sharded weights, with ``spectral_norm``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[R3F(0.7, dropout="shared")], logger=False)

    Reference:
        Aghajanyan et al. 2021, "Better Fine-Tuning by Reducing Representational Collapse"; Miyato et al. 2018,
        "Spectral Normalization for Generative Adversarial Networks".
    """

    def __init__(
        self,
        weight: float = 1.0,
        epsilon: float = 1e-5,
        *,
        noise: Noise = "uniform",
        dropout: Dropout = "independent",
        spectral_norm: bool | str = False,
        logits: Logits = None,
        answer: Answer | None = None,
        inputs: TokenInputs | None = None,
    ) -> None:
        check(answer, dropout, weight=weight, epsilon=epsilon)
        if noise not in get_args(Noise):
            raise ValueError(f'noise={noise!r} must be "uniform" or "normal"')
        self.weight, self.epsilon = weight, epsilon
        self.noise: Noise = noise
        self.dropout: Dropout = dropout
        self.logits = logits
        self.answer = answer
        self.inputs = as_token_inputs(inputs)
        self._head = NormalisedHead(spectral_norm) if spectral_norm else None
        self._perturbing = Perturbing(self, self._method)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._head is not None:
            self._head.attach(trainer, pl_module, self.inputs.layers or Layers())

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answer = answer_of(pl_module, self.answer)
        if self.weight:
            self._perturbing.attach(trainer, pl_module, self.inputs, reads_logits=True, logits=self.logits)

    def _method(self) -> Method:
        return r3f(
            self._perturbing.words,
            self.weight,
            self.epsilon,
            noise=self.noise,
            dropout=self.dropout,
            answer=self._answer,
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._perturbing.release()
        if self._head is not None:
            self._head.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._head is None else {"head": self._head.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._head is not None:
            self._head.load(state_dict["head"])
