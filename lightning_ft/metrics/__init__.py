"""Metrics that torchmetrics lacks, or gets wrong in a case that matters here."""

from lightning_ft.metrics.bert_score import BERTScore
from lightning_ft.metrics.entity_f1 import EntityF1
from lightning_ft.metrics.matthews import MatthewsCorrCoef, matthews_from_confusion
from lightning_ft.metrics.meteor import METEOR, meteor_score
from lightning_ft.metrics.perplexity import LossPerplexity
from lightning_ft.metrics.squad import Squad, squad_scores
from lightning_ft.metrics.text import ROUGE, ChrF

__all__ = [
    "BERTScore",
    "ChrF",
    "EntityF1",
    "LossPerplexity",
    "METEOR",
    "MatthewsCorrCoef",
    "ROUGE",
    "Squad",
    "matthews_from_confusion",
    "meteor_score",
    "squad_scores",
]
