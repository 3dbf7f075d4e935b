"""The Triton model repository: what is in it, and the step from texts to answers, without a server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import transformers as hf

from lightning_ft.export import Predictor, export_onnx, triton_sources, write_triton_repository
from lightning_ft.modules import MultipleChoice, SequenceClassification
from tests.export.test_predictor import TEXTS, folder
from tests.export.triton_backend.fake import Fake, parse

KINDS = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}


def config(repository: Path, name: str) -> dict[str, Any]:
    return parse((repository / name / "config.pbtxt").read_text("utf-8"))


def files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("triton")
    path = folder(place, "bert", hf.AutoModelForSequenceClassification)
    export_onnx(SequenceClassification(path, ["no", "yes", "ćma"]), place / "out", max_length=32)
    return place / "out"


def changed(exported: Path, place: Path, **files: Any) -> Path:
    """A copy with other JSON files; None removes one."""
    shutil.copytree(exported, place)
    for name, value in files.items():
        path = place / f"{name}.json"
        path.unlink() if value is None else path.write_text(json.dumps(value))
    return place


def head(exported: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((exported / "head.json").read_text("utf-8"))
    return known


def test_a_repository_is_complete(exported: Path, tmp_path: Path) -> None:
    told: list[str] = []
    report = write_triton_repository(
        exported, tmp_path / "out", name="sentiment", instances=2, max_batch_size=8, progress=told.append
    )
    assert told == ["writing sentiment and sentiment_graph"]
    assert files(tmp_path / "out") == {
        "README.md",
        "Dockerfile",
        "serve.py",
        "sentiment/config.pbtxt",
        *(f"sentiment/1/{name}" for name in ("model.py", "predictor.py", "tokenizer.json", "head.json")),
        "sentiment_graph/config.pbtxt",
        "sentiment_graph/1/model.onnx",
        *(
            f"sentiment_graph/warmup/{name}.{length}"
            for name in ("input_ids", "attention_mask", "token_type_ids")
            for length in (16, 64, 130)
        ),
    }
    assert report.facts["max_batch_size"] == 8
    assert [row["model"] for row in report.rows] == ["sentiment", "sentiment_graph"]
    assert report.rows[1]["warmups"] == 6
    for name in ("tokenizer.json", "head.json", "predictor.py"):
        assert (tmp_path / "out/sentiment/1" / name).read_bytes() == (exported / name).read_bytes()
    readme = (tmp_path / "out/README.md").read_text("utf-8")
    assert "localhost:8000/v2/models/sentiment/infer" in readme
    assert "$" not in readme


def test_the_graph_is_configured_as_onnx_runtime_sees_it(exported: Path, tmp_path: Path) -> None:
    write_triton_repository(exported, tmp_path / "out", max_batch_size=8, warmup_lengths=(5, 40))
    found = config(tmp_path / "out", "model_graph")
    session = onnxruntime.InferenceSession(
        tmp_path / "out/model_graph/1/model.onnx", providers=["CPUExecutionProvider"]
    )
    for kind, entries in (("input", session.get_inputs()), ("output", session.get_outputs())):
        wanted = [
            {
                "name": [entry.name],
                "data_type": [KINDS[entry.type]],
                "dims": [size if isinstance(size, int) else -1 for size in entry.shape[1:]],
            }
            for entry in entries
        ]
        assert found[kind] == wanted
    assert found["name"] == ["model_graph"]
    assert found["backend"] == ["onnxruntime"]
    assert found["max_batch_size"] == [8]
    assert found["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    assert found["version_policy"] == [{"latest": [{"num_versions": [1]}]}]
    # Neither a queue policy, which refused requests that only waited, nor ragged batches, which the graph cannot read.
    assert found["dynamic_batching"] == [{}]
    assert found["optimization"] == [{"graph": [{"level": [-1]}]}]
    samples = {(row["batch_size"][0], row["name"][0]) for row in found["model_warmup"]}
    assert samples == {(1, "1x5"), (8, "8x5"), (1, "1x40"), (8, "8x40")}
    for row in found["model_warmup"]:
        feed = {}
        for entry in row["inputs"]:
            [value] = entry["value"]
            raw = (tmp_path / "out/model_graph/warmup" / value["input_data_file"][0]).read_bytes()
            feed[entry["key"][0]] = np.frombuffer(raw, np.int64).reshape(1, *value["dims"])
        assert feed["input_ids"].shape[1] in (5, 40)
        assert feed["attention_mask"].all()
        assert len(np.unique(feed["input_ids"])) > 4  # a text, not zeros
        assert np.isfinite(session.run(None, feed)[0]).all()


def test_the_step_is_configured_for_its_task(exported: Path, tmp_path: Path) -> None:
    write_triton_repository(exported, tmp_path / "out", instances=3, max_length=50, max_queue_delay_us=7, max_bytes=99)
    found = config(tmp_path / "out", "model")
    assert found["backend"] == ["python"]
    assert [row["name"][0] for row in found["input"]] == ["text", "text_pair"]
    assert [row.get("optional") for row in found["input"]] == [None, [True]]
    names = {row["name"][0]: (row["data_type"][0], *row["dims"]) for row in found["output"]}
    string, number = ("TYPE_STRING", 1), ("TYPE_FP32", 1)
    assert names == {"answer": string, "label": string, "score": number, "probabilities": ("TYPE_FP32", 3)}
    assert found["dynamic_batching"] == [{"max_queue_delay_microseconds": [7]}]
    assert found["instance_group"] == [{"count": [4], "kind": ["KIND_CPU"]}]
    parameters = {row["key"][0]: row["value"][0]["string_value"][0] for row in found["parameters"]}
    assert parameters == {
        "graph": "model_graph",
        "inputs": "input_ids,attention_mask,token_type_ids",
        "batch_size": "16",
        "max_bytes": "99",
        "max_length": "50",
    }


def test_merged_requests_are_answered_as_the_predictor_does(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_triton_repository(exported, tmp_path / "out", max_length=24)
    server = Fake(tmp_path / "out", monkeypatch)
    wanted = Predictor(exported, max_length=24)(TEXTS)
    found = server.execute({"text": TEXTS[:3]}, *({"text": [text]} for text in TEXTS[3:]))
    answers = [json.loads(text) for tensors in found for text in tensors["answer"].reshape(-1)]
    for answer, row in zip(answers, wanted, strict=True):
        assert answer["label"] == row["label"]
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    assert [text.decode() for text in found[0]["label"].reshape(-1)] == [row["label"] for row in wanted[:3]]
    assert found[0]["score"].shape == (3, 1)
    assert found[0]["probabilities"].shape == (3, 3)
    assert found[0]["probabilities"].dtype == np.float32
    assert [shapes["input_ids"][0] for shapes in server.runs] == [16, 16, len(TEXTS) - 32]
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    [found] = server.execute({"text": TEXTS, "text_pair": TEXTS[::-1]}, outputs=["answer"])
    assert found.keys() == {"answer"}
    for text, row in zip(found["answer"].reshape(-1), Predictor(exported, max_length=24)(pairs), strict=True):
        assert json.loads(text)["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)


@pytest.fixture(scope="module")
def chooser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chooser")
    export_onnx(MultipleChoice(folder(place, "roberta", hf.AutoModelForMultipleChoice)), place / "out", max_length=32)
    return place / "out"


@pytest.mark.parametrize("case", ["regression", "multi_label", "multiple-choice", "feature-extraction"])
def test_tasks(case: str, exported: Path, chooser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = TEXTS[:5]
    source = tmp_path / "served"
    if case == "multiple-choice":
        source = chooser
        rows = [{"context": text, "choices": TEXTS[: 2 + i % 2]} for i, text in enumerate(rows)]
    elif case == "feature-extraction":
        export_onnx(folder(tmp_path, "bert", hf.AutoModel), source, max_length=32)
    else:
        changed(exported, source, head={**head(exported), "settings": {"problem": case}})
    write_triton_repository(source, tmp_path / "out")
    server = Fake(tmp_path / "out", monkeypatch)
    outputs = {
        "regression": ["score"],
        "multi_label": ["probabilities"],
        "multiple-choice": ["choice", "score"],
        "feature-extraction": ["embedding"],
    }[case]
    assert server.outputs == ["answer", *outputs]
    choice = case == "multiple-choice"
    assert len(config(tmp_path / "out", "model_graph")["model_warmup"]) == 6
    found = server.execute(*({"row": [json.dumps(row)]} if choice else {"text": [row]} for row in rows))
    for tensors, wanted in zip(found, Predictor(source)(rows), strict=True):
        answer = json.loads(tensors["answer"][0, 0])
        assert answer.keys() == wanted.keys()
        for name in outputs:
            assert np.squeeze(tensors[name]) == pytest.approx(np.array(wanted[name]), abs=1e-5)
            assert answer[name] == pytest.approx(wanted[name], abs=1e-5)


def test_bad_requests_fail_alone(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_triton_repository(exported, tmp_path / "out", max_bytes=20)
    server = Fake(tmp_path / "out", monkeypatch)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"text": ["good", b"\xff"]}, "row 1: text is not UTF-8: invalid start byte at byte 0"),
        ({"text": ["x" * 21]}, "row 0: text has 21 bytes, and at most 20 are taken"),
        ({"text": ["good"], "text_pair": ["é" * 11]}, "row 0: text_pair has 22 bytes"),
        ({"text_pair": ["good"]}, "the input text is missing"),
        ({}, "the input text is missing"),
        ({"text": ["a", "b"], "text_pair": ["a"]}, "argument"),
    ]
    good = {"text": ["a film"]}
    found = server.execute(good, *(columns for columns, _ in bad), good)
    for fault, (columns, message) in zip(found[1:-1], bad, strict=True):
        assert message in fault.message(), columns
        assert fault.code == "INVALID_ARG"
    assert found[0].keys() == found[-1].keys() == set(server.outputs)
    assert [shapes["input_ids"][0] for shapes in server.runs] == [2]
    assert not server.logged


def test_rows_of_json_that_are_none(chooser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_triton_repository(chooser, tmp_path / "out")
    server = Fake(tmp_path / "out", monkeypatch)
    texts = ["", "no", "[1", "NaN", '"text"', "{}", '{"context": 1, "choices": ["a", "b"]}', "[" * 100_000]
    for fault, text in zip(server.execute(*({"row": [text]} for text in texts)), texts, strict=True):
        assert fault.code == "INVALID_ARG", (text[:20], fault.message())
    assert "expected a row as JSON" in server.execute({"row": ["no"]})[0].message()
    assert not server.runs


def test_a_graph_that_fails(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_triton_repository(exported, tmp_path / "out")
    server = Fake(tmp_path / "out", monkeypatch)
    # What fails together is run one by one: memory may suffice for that.
    server.fail = lambda feed: "out of memory" if len(feed["input_ids"]) > 1 else ""
    found = server.execute({"text": ["a film"]}, {"text": ["good", "bad"]})
    assert found[0].keys() == set(server.outputs)
    assert (found[1].message(), found[1].code) == ("RuntimeError: model_graph: out of memory", "INTERNAL")
    assert len(server.logged) == 1
    # A server that stops refuses all of them: asking again one by one would only delay it.
    server.runs.clear()
    server.fail = lambda feed: "Server not ready"
    found = server.execute({"text": ["a film"]}, {"text": ["good"]})
    assert [fault.code for fault in found] == ["UNAVAILABLE"] * 2
    assert len(server.runs) == 1


def test_numbers_that_json_does_not_know(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_triton_repository(exported, tmp_path / "out")
    server = Fake(tmp_path / "out", monkeypatch)
    monkeypatch.setattr(server.model.predictor, "answer", lambda items: [{"score": float("nan")} for _ in items])
    [fault] = server.execute({"text": ["a film"]}, outputs=["answer"])
    assert fault.code == "INTERNAL"
    assert "not JSON compliant" in fault.message()


def test_weights_beside_the_graph_and_several_heads(exported: Path, tmp_path: Path) -> None:
    for task in ("first", "second"):
        changed(exported, tmp_path / "in" / task)
    path = tmp_path / "in/first/model.onnx"
    external = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 1024}
    onnx.save(onnx.load(path), path, **external)
    write_triton_repository(tmp_path / "in", tmp_path / "out", name="m")
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert names == {"m_first", "m_first_graph", "m_second", "m_second_graph"}
    session = onnxruntime.InferenceSession(tmp_path / "out/m_first_graph/1/model.onnx")
    assert session.get_outputs()[0].name == "logits"


def test_a_number_for_each_row(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input of the graph with no axis but the batch, such as the pattern of a cloze: Triton has no such tensors."""
    source = changed(exported, tmp_path / "in")
    graph = onnx.load(source / "model.onnx")
    del graph.graph.input[2].type.tensor_type.shape.dim[1]
    onnx.save(graph, source / "model.onnx")
    write_triton_repository(source, tmp_path / "out", device="gpu", engine_cache="/c", warmup_lengths=[8])
    found = config(tmp_path / "out", "model_graph")
    assert found["input"][2]["dims"] == [1]
    assert found["input"][2]["reshape"] == [{}]
    assert "token_type_ids:64'" in str(found["optimization"])
    server = Fake(tmp_path / "out", monkeypatch)
    server.fail = lambda feed: "seen"
    with pytest.raises(RuntimeError, match="model_graph: seen"):
        server.shipped.Graph("model_graph", []).run([], {"input_ids": np.zeros((3, 4)), "token_type_ids": np.zeros(3)})
    assert server.runs == [{"input_ids": (3, 4), "token_type_ids": (3, 1)}]


def test_on_a_gpu(exported: Path, tmp_path: Path) -> None:
    write_triton_repository(exported, tmp_path / "a", device="gpu")
    found = config(tmp_path / "a", "model_graph")
    assert found["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"]}]
    assert "optimization" not in found
    assert max(row["batch_size"][0] for row in found["model_warmup"]) == 64
    write_triton_repository(exported, tmp_path / "b", device="gpu", engine_cache="/cache", max_length=100)
    [accelerators] = config(tmp_path / "b", "model_graph")["optimization"][0]["execution_accelerators"]
    [accelerator] = accelerators["gpu_execution_accelerator"]
    assert accelerator["name"] == ["tensorrt"]
    found = {row["key"][0]: row["value"][0] for row in accelerator["parameters"]}
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert found == {
        "precision_mode": "FP32",
        "trt_engine_cache_enable": "true",
        "trt_engine_cache_path": "/cache",
        "trt_timing_cache_enable": "true",
        "trt_timing_cache_path": "/cache",
        "trt_profile_min_shapes": ",".join(f"{name}:1x1" for name in names),
        "trt_profile_opt_shapes": ",".join(f"{name}:32x100" for name in names),
        "trt_profile_max_shapes": ",".join(f"{name}:64x100" for name in names),
    }
    readme = (tmp_path / "b/README.md").read_text("utf-8")
    assert "-v engines:/cache" in readme
    assert "--gpus all" in readme


def test_what_is_quantised_while_it_is_loaded_keeps_all_optimisations(exported: Path, tmp_path: Path) -> None:
    report = json.loads((exported / "report.json").read_text("utf-8"))
    for precision, wanted in (("int8", True), ("int8-static", False), ("fp16", False)):
        report["facts"]["precision"] = precision
        source = changed(exported, tmp_path / f"{precision}-in", report=report)
        write_triton_repository(source, tmp_path / precision)
        assert ("optimization" in config(tmp_path / precision, "model_graph")) is wanted


ENGINE = {
    "format": 1,
    "runtime": "tensorrt",
    "version": "10.9.0",
    "gpu": "NVIDIA L4",
    "capabilities": ["SM89"],
    "engines": {
        "model": {
            "file": "model.engine",
            "precision": "fp16",
            "inputs": [{"name": name, "type": "INT64", "shape": [-1, -1]} for name in ("input_ids", "attention_mask")],
            "outputs": [{"name": "logits", "type": "FLOAT", "shape": [-1, 3]}],
            "profiles": [
                {name: [[1, 1], [8, 32], [16, 48]] for name in ("input_ids", "attention_mask")},
                {name: [[1, 49], [8, 64], [16, 90]] for name in ("input_ids", "attention_mask")},
            ],
        }
    },
}


def engine(exported: Path, place: Path, **facts: Any) -> Path:
    """A folder as `build_tensorrt` writes it; what is in the engine plays no part."""
    changed(exported, place, engine={**ENGINE, **facts})
    (place / "model.onnx").rename(place / "model.engine")
    return place


def test_an_engine(exported: Path, tmp_path: Path) -> None:
    report = write_triton_repository(engine(exported, tmp_path / "in"), tmp_path / "out", backend="tensorrt")
    assert report.facts["device"] == "gpu"
    assert (tmp_path / "out/model_graph/1/model.plan").is_file()
    found = config(tmp_path / "out", "model_graph")
    assert found["backend"] == ["tensorrt"]
    assert found["default_model_filename"] == ["model.plan"]
    assert found["max_batch_size"] == [16]
    assert found["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"], "profile": ["0", "1"]}]
    assert [row["dims"] for row in found["input"]] == [[-1], [-1]]
    assert found["output"] == [{"name": ["logits"], "data_type": ["TYPE_FP32"], "dims": [3]}]
    assert {row["name"][0] for row in found["model_warmup"]} == {"1x16", "16x16", "1x64", "16x64", "1x90", "16x90"}
    parameters = {row["key"][0]: row["value"] for row in config(tmp_path / "out", "model")["parameters"]}
    assert parameters["max_length"] == [{"string_value": ["90"]}]
    assert "TensorRT 10.9.0 and the GPU that it was built on (NVIDIA L4)" in (tmp_path / "out/README.md").read_text()


def test_refusals(exported: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"backend": "pytorch"}, "backend='pytorch': expected one of onnxruntime, tensorrt"),
        ({"device": "tpu"}, "device='tpu': expected one of cpu, gpu"),
        ({"name": "a/b"}, "name='a/b': expected letters, digits"),
        ({"name": ""}, "name='': expected letters"),
        ({"max_batch_size": 0}, "max_batch_size=0 must be 1 or more"),
        ({"instances": 0}, "instances=0 must be 1 or more"),
        ({"max_bytes": 0}, "max_bytes=0 must be 1 or more"),
        ({"max_queue_delay_us": -1}, "max_queue_delay_us=-1 must be 0 or more"),
        ({"max_length": 131}, "max_length=131: expected 1 to the 130 tokens that the model takes"),
        ({"warmup_lengths": (8, 131)}, r"warmup_lengths=\[8, 131\]: expected 1 to 130 tokens each"),
        ({"backend": "tensorrt", "device": "cpu"}, "device='cpu': an engine of TensorRT runs on a GPU"),
        ({"engine_cache": "/c"}, "engine_cache='/c': ONNX Runtime builds engines on a GPU alone"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            write_triton_repository(exported, tmp_path / "out", **options)
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx: give one that lightning-ft export wrote"):
        write_triton_repository(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"has no model\.engine: give one that build_tensorrt wrote"):
        write_triton_repository(exported, tmp_path / "out", backend="tensorrt")
    source = changed(exported, tmp_path / "a", tokenizer=None)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, which turns texts into the graph's inputs"):
        write_triton_repository(source, tmp_path / "out")
    source = changed(exported, tmp_path / "b", report={"facts": {"precision": "int8"}})
    with pytest.raises(ValueError, match=r"device='gpu': the graph of .* is quantised for a CPU"):
        write_triton_repository(source, tmp_path / "out", device="gpu")
    source = engine(exported, tmp_path / "c", runtime="tensorrt_rtx")
    with pytest.raises(ValueError, match="was built by tensorrt_rtx, and Triton reads plans of the full TensorRT"):
        write_triton_repository(source, tmp_path / "out", backend="tensorrt")
    source = engine(exported, tmp_path / "d")
    with pytest.raises(ValueError, match="max_batch_size=17: the engine was built for up to 16 rows"):
        write_triton_repository(source, tmp_path / "out", backend="tensorrt", max_batch_size=17)
    assert not (tmp_path / "out").exists()


def test_what_writes_text_is_served_elsewhere(exported: Path, tmp_path: Path) -> None:
    writer = tmp_path / "writer"
    shutil.copytree(exported, writer)
    head = json.loads((writer / "head.json").read_text("utf-8"))
    head["settings"]["graphs"] = {"decoder": "model.onnx"}
    (writer / "head.json").write_text(json.dumps(head), "utf-8")
    with pytest.raises(ValueError, match=r"writes text, token by token, .*lightning-ft serve"):
        write_triton_repository(writer, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_graphs_that_cannot_be_served(exported: Path, tmp_path: Path) -> None:
    source = changed(exported, tmp_path / "in")
    graph = onnx.load(source / "model.onnx")
    axis = graph.graph.input[0].type.tensor_type.shape.dim[0]
    axis.dim_value = 4
    onnx.save(graph, source / "model.onnx")
    with pytest.raises(ValueError, match=r"input_ids has the shape \[4, -1\], whose first axis is not a dynamic batch"):
        write_triton_repository(source, tmp_path / "out")
    axis.dim_param = "batch"
    graph.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.COMPLEX64
    onnx.save(graph, source / "model.onnx")
    with pytest.raises(ValueError, match="input_ids is of the type COMPLEX64, which Triton cannot be given"):
        write_triton_repository(source, tmp_path / "out")


def test_a_server_that_does_not_start_or_listen(exported: Path, tmp_path: Path) -> None:
    """What `serve.py` does then: its status is the server's, and it can be stopped."""
    write_triton_repository(exported, tmp_path / "out")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tritonserver"
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, str(tmp_path / "out" / "serve.py"), "--http-port=1", "--x=y"]
    program.write_text('#!/bin/sh\necho "$@"\nexit 3\n')
    program.chmod(0o755)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert f"--model-repository={tmp_path / 'out'} --model-control-mode=explicit --load-model=*" in done.stdout
    assert done.stdout.rstrip().endswith("--http-port=1 --x=y")
    program.write_text("#!/bin/sh\ntrap 'exit 0' TERM\necho up\nwhile :; do sleep 0.1; done\n")
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == "up\n"
        run.terminate()
        assert run.wait(60) == 0
        assert "stopping at once" in run.stderr.read()


def test_whole_or_absent(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        write_triton_repository(exported, tmp_path / "full")
    monkeypatch.setattr(triton_sources, "_rows", lambda *_: [])
    with pytest.raises(ValueError, match=r"warmup_lengths=\[9\]: no row is known of so few tokens for text-class"):
        write_triton_repository(exported, tmp_path / "out", warmup_lengths=[9])
    assert {path.name for path in tmp_path.iterdir()} == {"full"}
