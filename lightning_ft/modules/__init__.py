"""One LightningModule for each head."""

from lightning_ft.modules.base import Architecture, TransformerModule, load_checkpoint
from lightning_ft.modules.sequence_classification import SequenceClassification

__all__ = ["Architecture", "SequenceClassification", "TransformerModule", "load_checkpoint"]
