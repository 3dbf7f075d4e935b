"""When a callback may change a model: it is built, and neither restored, wrapped nor optimised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule


def when_built(module: LightningModule, act: Callable[[], object]) -> Callable[[], None]:
    """Call ``act`` once the module is built: now, or at the end of its ``configure_model``. For use in ``setup``.

    A callback's ``setup`` runs before the module's ``setup`` and ``configure_model``, in which the model may be built
    or its weights loaded, and no hook of callbacks lies between these and the restore of a checkpoint. So where the
    module overrides one of them its ``configure_model`` is shadowed on the instance, until it has run once. Several
    callbacks act in their own order.

    Args:
        module: The module that the trainer has connected.
        act: The change.

    Returns:
        What takes the shadow away, if the hook never ran; harmless otherwise. For ``teardown`` and ``on_exception``.
    """

    def act_on_cpu() -> None:
        # Lightning builds models under its own default device; helper tensors on it do not mix with meta tensors.
        with torch.device("cpu"):
            act()

    hooks = ("setup", "configure_model", "configure_sharded_model")
    if "configure_model" not in vars(module) and all(_is_default(module, hook) for hook in hooks):
        act_on_cpu()
        return lambda: None
    build = module.configure_model

    def configure_model() -> None:
        forget()
        build()
        act_on_cpu()

    def forget() -> None:
        vars(module).pop("configure_model", None)

    module.configure_model = configure_model  # type: ignore[method-assign]
    return forget


def _is_default(module: LightningModule, hook: str) -> bool:
    # By where it is defined: a module of pytorch_lightning does not derive from the class imported here.
    default = getattr(type(module), hook, None)
    return default is None or default.__module__ in ("lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks")
