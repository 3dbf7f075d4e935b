"""Optional packages, imported only by what needs them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(package: str, *, extra: str = "export") -> ModuleType:
    """Import an optional package.

    Args:
        package: Its import name.
        extra: The extra of lightning-ft that installs it.

    Returns:
        The imported module.

    Raises:
        ImportError: The package is missing or broken; the message names the extra.

    Example:
        >>> require("json").dumps([1])
        '[1]'
        >>> require("no_such_package")
        Traceback (most recent call last):
        ImportError: no_such_package is needed here and cannot be imported: pip install "lightning-ft[export]"
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f'{package} is needed here and cannot be imported: pip install "lightning-ft[{extra}]"'
        ) from error
