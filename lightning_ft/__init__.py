"""PyTorch Lightning plugins for fine-tuning pretrained language models."""

from importlib.metadata import version

__version__ = version("lightning-ft")
__all__ = ["__version__"]
