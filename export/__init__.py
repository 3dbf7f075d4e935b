"""Fine-tuned models as folders that a serving runtime loads, proved equal to the model before they are written."""

from lightning_ft.export.benchmark import benchmark
from lightning_ft.export.engine import load_engine
from lightning_ft.export.fallback import ExportError
from lightning_ft.export.gate import Gate, GateError
from lightning_ft.export.genai import export_genai
from lightning_ft.export.heads import Head
from lightning_ft.export.hf_folder import export_hf
from lightning_ft.export.onnx_folder import export_onnx
from lightning_ft.export.parity import ParityError, load_session
from lightning_ft.export.predictor import Predictor
from lightning_ft.export.profiles import Profile, token_lengths
from lightning_ft.export.reading_settings import reading_settings
from lightning_ft.export.serving.deploy import launch, write_deployment
from lightning_ft.export.static_quantize import Calibration
from lightning_ft.export.tensorrt import EngineError, build_tensorrt
from lightning_ft.export.timing import measure_latency
from lightning_ft.export.triton import write_triton_repository
from lightning_ft.export.verify import VerificationError, verify
from lightning_ft.export.wrappers import GraphWrapper, Logits

__all__ = [
    "Calibration",
    "EngineError",
    "ExportError",
    "Gate",
    "GateError",
    "GraphWrapper",
    "Head",
    "Logits",
    "ParityError",
    "Predictor",
    "Profile",
    "VerificationError",
    "benchmark",
    "build_tensorrt",
    "export_genai",
    "export_hf",
    "export_onnx",
    "launch",
    "load_engine",
    "load_session",
    "measure_latency",
    "reading_settings",
    "token_lengths",
    "verify",
    "write_deployment",
    "write_triton_repository",
]
