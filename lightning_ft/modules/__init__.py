"""One LightningModule for each head."""

from lightning_ft.modules.base import TransformerModule, load_checkpoint
from lightning_ft.modules.checkpoint import Architecture
from lightning_ft.modules.sequence_classification import SequenceClassification

__all__ = ["Architecture", "SequenceClassification", "TransformerModule", "load_checkpoint"]
