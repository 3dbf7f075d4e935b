"""onnxruntime-genai: its tokens are those of ``generate``, and what it does not know is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lightning_ft.data import LanguageModelingData
from lightning_ft.export import Gate, GateError, ParityError
from lightning_ft.export.genai import GenaiDecoder, export_genai
from lightning_ft.modules import CausalLM
from tests.export.conftest import Written
from tests.export.test_generation_export import lines
from tests.pretrained import config, pretrained


def llama(folder: Path) -> Path:
    """One of the sizes that its attention takes: heads of 16 or more, several of them."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return Path(pretrained(folder, "llama", hf.AutoModelForCausalLM, initializer_range=0.2, **sizes))


def test_fp32(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    report = export_genai(source, tmp_path / "out", max_length=24)
    assert report.facts["written alike"]["tokens"] >= 20
    assert report.facts["worst relative difference"] < 1e-5
    head = json.loads((tmp_path / "out" / "head.json").read_text("utf-8"))
    assert (head["task"], head["settings"]["runtime"]) == ("text-generation", "onnxruntime-genai")
    model = hf.AutoModelForCausalLM.from_pretrained(source).eval()
    decoder = GenaiDecoder(tmp_path / "out")
    ids = [5, 77, 30, 12]
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    assert decoder.write(ids, max_new_tokens=9) == wanted


def test_int4_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama(tmp_path / "source")
    data = LanguageModelingData(str(source), val=lines(6), text="source", objective="clm", max_length=16)
    report = export_genai(source, tmp_path / "out", precision="int4", gate=Gate(data, max_drop=0.5))
    model, small = report.facts["gate"]
    assert small["precision"] == "int4"
    assert small["drop"] == pytest.approx(small["val_perplexity"] / model["val_perplexity"] - 1)
    assert 0 < abs(small["drop"]) < 0.5
    # Random weights may lose nothing.
    monkeypatch.setattr("lightning_ft.export.genai.drop", lambda *_: 0.3)
    with pytest.raises(GateError, match=r"in int4 the graph loses 0\.3 of val_perplexity, more than max_drop=0\.2"):
        export_genai(source, tmp_path / "none", precision="int4", gate=Gate(data, max_drop=0.2))
    assert not (tmp_path / "none").exists()


def test_a_graph_that_errs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = GenaiDecoder.logits
    monkeypatch.setattr(GenaiDecoder, "logits", lambda self, ids, steps=0: 1.001 * logits(self, ids, steps))
    with pytest.raises(ParityError, match="differs from the model"):
        export_genai(llama(tmp_path / "source"), tmp_path / "out", max_length=16)
    assert not (tmp_path / "out").exists()


def test_what_it_does_not_know(written: Callable[[str], Written], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="does not know 'gpt2' models; it knows llama"):
        export_genai(written("gpt2").source, tmp_path / "out")
    with pytest.raises(TypeError, match="expected a decoder that writes text, got one for text2text-generation"):
        export_genai(written("t5").source, tmp_path / "out")
    module = CausalLM(llama(tmp_path / "source"))
    with pytest.raises(ValueError, match="precision='fp8': expected one of fp32, int8, int4"):
        export_genai(module, tmp_path / "out", precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a graph in fewer bits needs one, and fp32 none"):
        export_genai(module, tmp_path / "out", precision="int4")
    model: Any = hf.AutoModelForCausalLM.from_config(config("llama"))
    with pytest.raises(ValueError, match="holds none: pass the one that the model was trained with"):
        export_genai(model, tmp_path / "out")
