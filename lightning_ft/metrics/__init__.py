"""Metrics that torchmetrics lacks, or gets wrong in a case that matters here."""

from lightning_ft.metrics.matthews import MatthewsCorrCoef, matthews_from_confusion

__all__ = ["MatthewsCorrCoef", "matthews_from_confusion"]
