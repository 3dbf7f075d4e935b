"""The pretrained weights θ⁰ of a module, taken at the right moment and once for all callbacks that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_ft.callbacks._anchor_file import anchor_on_disk
from lightning_ft.core.anchor import Anchor, Storage
from lightning_ft.core.fresh import fresh_parameters
from lightning_ft.core.layers import Layers
from lightning_ft.core.sharding import is_piece

Named = Sequence[tuple[str, nn.Parameter]]


class Anchoring:
    """One callback's hold on the anchor of the module that is fitted.

    The pretrained weights are those of ``on_fit_start``, when the model is built, wrapped and sharded. But a
    checkpoint to resume from is restored before that on one device and under DDP: they are then those just before the
    last ``load_state_dict``. On resume they must have the fingerprint that the interrupted run was anchored to, or the
    module has been rebuilt from fine-tuned weights. What several callbacks need is kept once.

    Call :meth:`watch` in ``setup``, :meth:`restoring` in ``on_load_checkpoint``, :meth:`take` in ``on_fit_start``,
    :meth:`recheck` in ``on_train_start``, :meth:`release` in ``teardown`` and ``on_exception``, and keep
    ``fingerprint`` in the callback's state.

    Args:
        owner: The callback.
        choose: Which parameters of the module it needs, by name.
        storage: Where they are kept; None leaves it to other callbacks ("device" if none of them minds).
    """

    def __init__(
        self, owner: Callback, choose: Callable[[LightningModule], Named], storage: Storage | None = None
    ) -> None:
        self.owner = type(owner).__name__
        self.choose = choose
        self.storage = storage
        self.fingerprint: dict[str, float] | None = None
        self._anchor: Anchor | None = None
        self._restored = False
        self._module: LightningModule | None = None

    def watch(self, trainer: Trainer, module: LightningModule) -> None:
        """Be ready for a restore."""
        self.release()
        self.fingerprint, self._anchor, self._restored = None, None, False
        self._module = module
        _KEPT.setdefault(module, _Kept(trainer, module)).join(self)

    def restoring(self) -> None:
        """A checkpoint is restored: the weights are no longer the pretrained ones."""
        self._restored = True

    def take(self, named: Named | None = None) -> Anchor:
        """θ⁰ of the chosen parameters. Call on all processes.

        Args:
            named: What ``choose`` gives for the module as it is, where the caller has it: finding layers takes time.

        Raises:
            ValueError: The anchor cannot be the one that an interrupted run had.
        """
        assert self._module is not None
        chosen = self.choose(self._module) if named is None else named
        self._anchor = _KEPT[self._module].take(chosen, restored=self._restored)
        if self.fingerprint is not None:
            self._anchor.check(self.fingerprint)
        self.fingerprint = self._anchor.fingerprint()
        return self._anchor

    def recheck(self, trainer: Trainer) -> None:
        """Sharded strategies restore callbacks only after ``on_fit_start``."""
        if trainer.strategy.restore_checkpoint_after_setup and self._restored:
            assert self._anchor is not None
            assert self.fingerprint is not None
            self._anchor.check(self.fingerprint)

    def release(self) -> None:
        """Let go of the anchor, and of what waits for a restore."""
        if self._module is not None and (kept := _KEPT.get(self._module)) is not None:
            kept.leave(self)
        self._module, self._anchor = None, None


class _Kept:
    """What all callbacks of a fit need of one module."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer = trainer
        self.module = module
        self.users: list[Anchoring] = []
        self.anchor: Anchor | None = None
        self.final = False
        self.hook: RemovableHandle | None = None

    def join(self, user: Anchoring) -> None:
        wanted = {other.storage: other.owner for other in [*self.users, user] if other.storage is not None}
        if len(wanted) > 1:
            raise ValueError(
                f"the pretrained weights are kept once for all callbacks, and these ask for different places: storage="
                f"{' and '.join(f'{place!r} in {owner}' for place, owner in wanted.items())}: write the same in "
                "all of them, or in one"
            )
        self.users.append(user)
        if self.hook is None:
            # The module may be built, or load its pretrained weights, only in its own `setup` or `configure_model`.
            self.hook = self.module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                lambda *_: self._capture()
            )

    def _capture(self) -> None:
        if self.final:
            return
        chosen = {name: parameter for user in self.users for name, parameter in user.choose(self.module)}
        storage: Storage = next((user.storage for user in self.users if user.storage is not None), "device")
        if storage == "disk":
            self.anchor = anchor_on_disk(self.trainer, self.module, chosen)
        else:
            self.anchor = Anchor.capture(chosen.items(), storage)

    def take(self, chosen: Named, *, restored: bool) -> Anchor:
        if not self.final:
            if self.anchor is None or not restored:
                self._capture()
            self.final = True
        assert self.anchor is not None
        self.anchor.move(chosen)
        self.anchor.like(chosen)
        return self.anchor.select([name for name, _ in chosen])

    def leave(self, user: Anchoring) -> None:
        if user in self.users:
            self.users.remove(user)
        if not self.users:
            if self.hook is not None:
                self.hook.remove()
            _KEPT.pop(self.module, None)


_KEPT: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def pretrained_and_new(
    owner: Callback, module: LightningModule, layers: Layers, *, training: bool = True
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """The parameters that a pretrained value means something for, and those of heads and layers drawn anew.

    The adapters of peft are neither.

    Args:
        owner: The callback, for messages.
        module: The module.
        layers: Where its head is.
        training: Leave out what is frozen.

    Raises:
        ValueError: Weights sharded by FSDP1; nothing pretrained is left, as under LoRA.
    """
    name = type(owner).__name__
    if any(is_piece(parameter) for parameter in module.parameters()):
        raise ValueError(
            f"{name} does not run under FullyShardedDataParallel (FSDP1), whose pieces do not tell which processes "
            "hold the rest: use FSDP2, that is Trainer(strategy=ModelParallelStrategy()) and fully_shard in "
            "configure_model"
        )
    groups = layers.of(module)
    adapters = _adapters(module)
    # Quantised weights are integers, which nothing can pull.
    wanted = [
        (group, parameter_name, parameter)
        for group in groups
        for parameter_name, parameter in groups.named_parameters(group)
        if parameter.is_floating_point() and (parameter.requires_grad or not training) and parameter not in adapters
    ]
    # Layers drawn anew (LayerReinit) have lost the values that they could be pulled to.
    fresh = fresh_parameters(module)
    pretrained = [(n, p) for group, n, p in wanted if group != "head" and p not in fresh]
    if not pretrained:
        raise ValueError(
            f"{name} found no pretrained parameter that trains: everything outside the head is frozen, so there is "
            "nothing to anchor. Under LoRA the change is centred at zero already: use weight decay instead"
        )
    return pretrained, [(n, p) for group, n, p in wanted if group == "head" or p in fresh]


def _adapters(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that peft has put beside pretrained ones: they start at values that mean nothing."""
    adapters: set[nn.Parameter] = set()
    for child in module.modules():
        # By name: peft need not be imported. `base_layer` is the pretrained layer that it stands for.
        if any(kind.__name__ == "BaseTunerLayer" for kind in type(child).__mro__):
            base = getattr(child, "base_layer", None)
            adapters |= set(child.parameters()) - set(base.parameters() if isinstance(base, nn.Module) else ())
    return adapters


def warn_without_head(owner: Callback, module: LightningModule, layers: Layers) -> None:
    """Say it aloud where no head is found: one that is new would be taken for pretrained."""
    if (
        layers.head is None
        and layers.groups is None
        and not any(pretrained_and_new(owner, module, layers, training=False)[1])
    ):
        rank_zero_warn(
            f"{type(owner).__name__} found no head in {type(module).__name__} and anchors every layer. If one of them "
            'is new, its random weights are no anchor: name it, layers=Layers(head="classifier"). If there is none (a '
            "tied LM head), layers=Layers(head=[])"
        )
