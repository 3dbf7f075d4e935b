"""Fine-tuned models as folders that a serving runtime loads, proved equal to the model before they are written."""

from lightning_ft.export.gate import Gate, GateError
from lightning_ft.export.heads import Head
from lightning_ft.export.hf_folder import export_hf
from lightning_ft.export.onnx_folder import export_onnx
from lightning_ft.export.parity import ParityError, load_session
from lightning_ft.export.predictor import Predictor
from lightning_ft.export.timing import measure_latency
from lightning_ft.export.triton import write_triton_repository
from lightning_ft.export.wrappers import GraphWrapper, Logits

__all__ = [
    "Gate",
    "GateError",
    "GraphWrapper",
    "Head",
    "Logits",
    "ParityError",
    "Predictor",
    "export_hf",
    "export_onnx",
    "load_session",
    "measure_latency",
    "write_triton_repository",
]
