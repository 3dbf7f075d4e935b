"""The folder that an export leaves: replaced whole, and checked against what it says of itself."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from lightning_ft.core.anchor import Anchor
from lightning_ft.export import ParityError, VerificationError, export_hf, export_onnx, verify
from lightning_ft.export.manifest import weights_sha256
from lightning_ft.modules import MultipleChoice, MultiTask, SequenceClassification
from tests.export.test_export_onnx import tiny_model, tiny_tokenizer
from tests.export.test_heads import _bert
from tests.steps import Steps

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny classifier, from a checkpoint's file, and the folder made of it."""
    place = tmp_path_factory.mktemp("folder")
    module = SequenceClassification(_bert(), ["no", "yes"])
    export_hf(module, place / "source")
    report = export_onnx(place / "source", place / "out", max_length=8)
    return SimpleNamespace(module=module, source=place / "source", folder=place / "out", report=report)


@pytest.fixture
def copied(exported: SimpleNamespace, tmp_path: Path) -> Path:
    shutil.copytree(exported.folder, tmp_path / "out")
    return tmp_path / "out"


# ---- what it says of itself


def test_weights_are_named(exported: SimpleNamespace) -> None:
    facts, model = exported.report.facts, exported.module.model
    source = facts["source"]
    assert source["path"] == str(exported.source)
    assert list(source["files"]) == ["model.safetensors"]
    done = subprocess.run(
        ["sha256sum", exported.source / "model.safetensors"], capture_output=True, text=True, check=True
    )
    assert source["files"]["model.safetensors"] == done.stdout.split()[0]
    assert source["fingerprint"] == Anchor.capture(model.named_parameters()).fingerprint()
    assert source["weights_sha256"] == weights_sha256(model.state_dict())
    assert facts["version"] == 1
    assert facts["written"].endswith("+00:00")
    assert set(facts["files"]) == set(names(exported.folder)) - {"report.json"}


def test_hash_of_weights_tells_everything_apart() -> None:
    one = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(1, dtype=torch.int64)}
    others = [
        {"a": one["a"].T, "b": one["b"]},
        {"a": one["a"].reshape(4), "b": one["b"]},
        {"a": one["a"].view(torch.int32), "b": one["b"]},
        {"c": one["a"], "b": one["b"]},
        {"a": one["a"], "b": one["b"] + 1},
    ]
    digests = {weights_sha256(state) for state in [one, *others]}
    assert len(digests) == 6
    assert weights_sha256(dict(reversed(one.items()))) == weights_sha256(one)
    assert weights_sha256({"a": one["a"].T.contiguous().T, "b": one["b"]}) == weights_sha256(one)
    assert weights_sha256({"a": torch.zeros(0), "b": torch.ones(2).bfloat16()})


def test_versions_count_up(tmp_path: Path) -> None:
    module = SequenceClassification(_bert(), ["no", "yes"])
    for number in (1, 2, 3):
        assert export_hf(module, tmp_path / "out").facts["version"] == number
    assert verify(tmp_path / "out").facts["version"] == 3
    assert verify(tmp_path / "out.previous").facts["version"] == 2
    assert names(tmp_path) == ["out", "out.previous"]


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    module = SequenceClassification(_bert(), ["no", "yes"])
    for content in ("{}", '{"title": "Frozen", "facts": {}, "rows": []}', "half", '["Exported"]'):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "report.json").write_text(content)
        with pytest.raises(FileExistsError, match="is not an empty folder, nor one that was written here"):
            export_hf(module, tmp_path / "out")
        assert (tmp_path / "out" / "report.json").read_text() == content


# ---- verified


def test_verified(exported: SimpleNamespace) -> None:
    for source in (exported.source, exported.module):
        report = verify(exported.folder, source=source)
        assert report.facts["version"] == 1
        assert 0 < report.facts["parity"] <= 1e-5
        assert {row["file"] for row in report.rows} == set(exported.report.facts["files"])
    assert "parity" not in verify(exported.folder).facts
    assert verify(exported.source).facts["version"] == 1  # a Hugging Face folder


def test_several_heads_are_verified(tmp_path: Path) -> None:
    module = MultiTask({"mood": SequenceClassification(_bert(), ["no", "yes"]), "choice": MultipleChoice(_bert())})
    export_onnx(module, tmp_path / "out", max_length=8)
    assert verify(tmp_path / "out", source=module).facts["parity"].keys() == {"mood", "choice"}
    assert verify(tmp_path / "out" / "mood", source=module.heads["mood"]).facts["version"] == 1
    with pytest.raises(VerificationError, match=r"it holds \[''\].*was made of \['choice', 'mood'\]"):
        verify(tmp_path / "out", source=module.heads["mood"])
    (tmp_path / "out" / "mood" / "model.onnx").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"mood/model.onnx +[\d,]+ +0 bytes"):
        verify(tmp_path / "out")
    export_hf(module, tmp_path / "hf")
    assert verify(tmp_path / "hf", source=module).facts["parity"] == {"mood": "same weights", "choice": "same weights"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: flip(out / "model.onnx"), r"model.onnx +[\d,]+ +another hash"),
        (lambda out: (out / "head.json").unlink(), r"head.json +\d+ +missing"),
        (lambda out: (out / "config.json").write_text("{}"), r"config.json +[\d,]+ +2 bytes"),
    ],
)
def test_damage_is_found(copied: Path, damage: Any, message: str) -> None:
    damage(copied)
    with pytest.raises(VerificationError, match=rf"is not what was exported \(version 1\)(?s:.)*{message}"):
        verify(copied)


def rerecord(folder: Path, **facts: Any) -> None:
    """Let the report say what is there now."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    report["facts"].update(facts)
    shutil.copy(folder / "report.json", folder.parent / "kept.json")
    for name in report["facts"]["files"]:
        path = folder / name
        digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        report["facts"]["files"][name] = {"bytes": path.stat().st_size, "sha256": digest}
    (folder / "report.json").write_text(json.dumps(report))


def test_a_graph_that_does_not_load_or_is_another_one(copied: Path) -> None:
    rerecord(copied, inputs=["input_ids"])
    with pytest.raises(VerificationError, match=r"out/model.onnx: inputs .*\['input_ids', 'attention_mask'"):
        verify(copied)
    (copied / "model.onnx").write_bytes(b"no graph")
    rerecord(copied)
    with pytest.raises(VerificationError, match=r"out/model.onnx: loads"):
        verify(copied)


def test_a_graph_that_computes_something_else(copied: Path, exported: SimpleNamespace) -> None:
    graph = onnx.load(copied / "model.onnx")
    bias = next(tensor for tensor in graph.graph.initializer if list(tensor.dims) == [2] and tensor.data_type == 1)
    values = onnx.numpy_helper.to_array(bias) + 0.01
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(graph, copied / "model.onnx")
    rerecord(copied)
    verify(copied)  # the folder agrees with itself
    with pytest.raises(ParityError, match="differs from the model by more than tolerance=1e-05"):
        verify(copied, source=exported.module)


def test_another_source_is_told(exported: SimpleNamespace) -> None:
    other = SequenceClassification(_bert(), ["no", "yes"])
    with torch.no_grad():
        other.model.load_state_dict(exported.module.model.state_dict())
        other.model.classifier.bias[0] += 1e-6
    with pytest.raises(VerificationError, match=r"its weights are not those that .*(?s:.)*sum_of_squares"):
        verify(exported.folder, source=other)


def test_files_added_later_are_named(copied: Path) -> None:
    (copied / "Dockerfile").touch()
    assert verify(copied).facts["added later"] == ["Dockerfile"]


def test_verify_refuses_what_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no report\.json of an export with checksums: export it"):
        verify(tmp_path)


# ---- stopped


def test_stopped_at_every_file_operation(tmp_path: Path) -> None:
    module = SequenceClassification(_bert(), ["no", "yes"])
    export_hf(module, tmp_path / "out")
    stopped, version = 0, 1
    for number in range(1, 400, 3):
        steps = Steps(tmp_path, stop_at=number)
        with steps, suppress(OSError):
            export_hf(module, tmp_path / "out")
        stopped += steps.stopped
        found = verify(tmp_path / "out").facts["version"]
        assert found in (version, version + 1)
        if number % 4 == 0 or not steps.stopped:
            assert export_hf(module, tmp_path / "out").facts["version"] == found + 1
            assert names(tmp_path) == ["out", "out.previous"], number
            found += 1
        version = found
        if not steps.stopped:
            break
    assert not steps.stopped
    assert stopped >= 10


DRIVER = """
import json, os, signal, sys, threading, time
import onnx, onnxscript, onnxruntime, torch, transformers, torch.onnx
from pathlib import Path
from lightning_ft.export import export_onnx, verify
from tests.export.test_export_onnx import tiny_model, tiny_tokenizer
from tests.steps import Steps

out, model = Path(sys.argv[1]), tiny_model()

def run(step, seconds):
    if seconds is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    steps = Steps(out.parent, stop_at=step or 0, kill=True)
    with steps:
        export_onnx(model, out, tokenizer=tiny_tokenizer(), max_length=8)
    print(json.dumps({"steps": steps.count}), flush=True)

def check():
    found = {p.name: verify(p).facts["version"] for p in (out, out.with_name("out.previous")) if p.exists()}
    print(json.dumps({"found": found, "names": sorted(p.name for p in out.parent.iterdir())}), flush=True)

for line in sys.stdin:
    # The interpreter with all that was imported is forked: importing it takes longer than an export.
    child = os.fork()
    if child == 0:
        command = json.loads(line)
        run(command["step"], command["seconds"]) if "step" in command else check()
        os._exit(0)
    print(json.dumps({"status": os.waitpid(child, 0)[1]}), flush=True)
"""


class Driver:
    """Exports and verifications, each in a process of its own, which may be killed."""

    def __init__(self, out: Path) -> None:
        self.errors = out.parent.with_name("errors.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        result: dict[str, Any] = {}
        while "status" not in result:
            line = self.process.stdout.readline()
            if not line:
                self.errors.seek(0)
                pytest.fail(f"the driver ended: {self.errors.read()[-3000:]}")
            if line.startswith("{"):
                result.update(json.loads(line))
        return result

    def close(self) -> None:
        self.process.communicate("", timeout=60)
        self.errors.close()


@pytest.mark.kill
@pytest.mark.timeout(1800)
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """At each step of the swap, at steps before it, and at random times."""
    (tmp_path / "in").mkdir()
    driver = Driver(tmp_path / "in" / "out")
    started = time.perf_counter()
    assert driver(step=None, seconds=None)["status"] == 0
    steps = driver(step=None, seconds=None)["steps"]
    duration = (time.perf_counter() - started) / 2
    draw = random.Random(0)
    moments: list[dict[str, Any]] = [{"step": step, "seconds": None} for step in range(max(1, steps - 15), steps + 1)]
    moments += [{"step": draw.randrange(1, steps), "seconds": None} for _ in range(4)]
    moments += [{"step": None, "seconds": draw.uniform(0.05, duration)} for _ in range(6)]
    version, killed, kept, replaced = 2, 0, 0, 0
    for moment in moments:
        was_killed = driver(**moment)["status"] == signal.SIGKILL
        killed += was_killed
        state = driver()
        assert state["status"] == 0, moment
        found = state["found"]["out"]
        assert found in (version, version + 1), moment
        assert state["found"].get("out.previous", 0) < found, moment
        kept += found == version
        replaced += was_killed and found > version
        if was_killed:
            assert driver(step=None, seconds=None)["status"] == 0, moment
            state = driver()
            assert state["found"] == {"out": found + 1, "out.previous": found}, moment
            assert state["names"] == ["out", "out.previous"], moment
            found += 1
        version = found
    driver.close()
    assert killed >= 20  # a random time may come after the end
    assert kept >= 5
    assert replaced >= 2


@pytest.mark.kill
def test_several_exports_at_once(tmp_path: Path) -> None:
    """Two processes that export to one folder: the last to finish wins, whole."""
    (tmp_path / "in").mkdir()
    drivers = [Driver(tmp_path / "in" / "out") for _ in range(2)]
    for driver in drivers:
        assert driver.process.stdin is not None
        for _ in range(3):
            print(json.dumps({"step": None, "seconds": None}), file=driver.process.stdin, flush=True)
    for driver in drivers:
        assert driver.process.stdout is not None
        done = 0
        while done < 3:
            line = driver.process.stdout.readline()
            if '"status"' in line:
                assert json.loads(line) == {"status": 0}
                done += 1
    state = drivers[0]()
    assert state["names"] == ["out", "out.previous"]
    assert 3 <= state["found"]["out"] <= 6
    for driver in drivers:
        driver.close()


def test_two_exports_of_one_process(tmp_path: Path) -> None:
    """One begun while another writes."""
    model = tiny_model()
    begun: list[Any] = []

    def progress(line: str) -> None:
        if not begun:
            begun.append(None)
            begun.append(export_hf(SequenceClassification(_bert(), ["no", "yes"]), tmp_path / "out"))

    export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8, progress=progress)
    assert verify(tmp_path / "out").facts["version"] == 2
    assert verify(tmp_path / "out.previous").facts["version"] == 1
    assert names(tmp_path) == ["out", "out.previous"]
