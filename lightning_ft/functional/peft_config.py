"""Configurations of peft, and the package itself, which is imported when it is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What these draw takes the largest part out of the base's own weights.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration of peft as plain types, which a weights-only checkpoint may hold.

    Raises:
        TypeError: It is none.
    """
    if not (hasattr(config, "peft_type") and hasattr(config, "to_dict")):
        raise TypeError(f"config must be a configuration of peft, such as peft.LoraConfig(r=8); got {config!r}")

    def plain(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value)
        raise TypeError(f"config holds a {type(value).__name__}, which a checkpoint cannot hold")

    result: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=plain))
    if result.get("init_lora_weights") != "loftq" and "loftq_config" in result:
        result["loftq_config"] = {}  # jsonargparse fills it in, and peft warns that it is ignored
    return result


def read_config(config: Mapping[str, Any]) -> Any:
    """The configuration that :func:`plain_config` made plain.

    Raises:
        ImportError: peft is not installed.
        ValueError: peft has no such method.
    """
    peft = import_peft()
    if config["peft_type"] not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"config: peft {peft.__version__} has no method {config['peft_type']!r}")
    return peft.PeftConfig.from_peft_type(**config)


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether the adapter's first weights are taken out of the base's."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE)


def import_peft() -> Any:
    """The package peft.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import peft
        import peft.functional
    except ImportError as error:
        raise ImportError("parameter-efficient methods need peft: pip install lightning-ft, which brings it") from error
    return peft
