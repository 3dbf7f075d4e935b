"""Data for fine-tuning: reading, tokenising, batching by length, resuming in the middle of an epoch."""

from lightning_ft.data.base import TextData
from lightning_ft.data.classification import ClassificationData
from lightning_ft.data.encoding import EncodedRows, Padding, encode_once, tokenize, whole_batch
from lightning_ft.data.labels import encode_labels, infer_labels, read_labels
from lightning_ft.data.loader import ResumableDataLoader
from lightning_ft.data.sampler import LengthBucketSampler, padding_waste
from lightning_ft.data.sources import Source, read_source
from lightning_ft.data.windows import WindowRows

__all__ = [
    # data modules
    "TextData",
    "ClassificationData",
    # batching
    "LengthBucketSampler",
    "ResumableDataLoader",
    "padding_waste",
    # rows
    "EncodedRows",
    "WindowRows",
    "Padding",
    "encode_once",
    "tokenize",
    "whole_batch",
    # reading
    "Source",
    "read_source",
    "read_labels",
    "infer_labels",
    "encode_labels",
]
