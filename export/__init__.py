"""Fine-tuned models as folders that a serving runtime loads, proved equal to the model before they are written."""

from lightning_ft.export.parity import ParityError, load_session
from lightning_ft.export.timing import measure_latency
from lightning_ft.export.to_onnx import to_onnx
from lightning_ft.export.wrappers import GraphWrapper, Logits

__all__ = ["GraphWrapper", "Logits", "ParityError", "load_session", "measure_latency", "to_onnx"]
