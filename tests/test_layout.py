"""The package's shape: who imports whom, what an import costs, and the wheel away from the tree."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_ft"

# What each part may import of the others; `cli`, `commands`, `plan`, `fisher_pass` and `demo` may import everything.
ALLOWED = {
    "core": set(),
    "functional": {"core"},
    "metrics": set(),
    "callbacks": {"core", "functional"},
    "plugins": {"core", "functional"},
    "data": {"core", "functional"},
    "modules": {"core", "functional", "metrics"},
    "export": {"core", "functional", "modules", "data", "metrics"},
}
# What may be imported at the top of a file: the rest is imported inside what needs it.
THIRD_PARTY = {
    "core": {"torch"},
    "functional": {"torch"},
    "metrics": {"torch", "torchmetrics"},
    "callbacks": {"torch", "lightning"},
    "plugins": {"torch", "lightning"},
    "data": {"torch", "lightning"},
    "modules": {"torch", "lightning", "torchmetrics"},
    "export": {"torch", "lightning", "numpy"},
}


def _imports(path: Path) -> tuple[set[str], set[str]]:
    """Every module imported anywhere in a file, and those that importing the file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    everywhere, at_top = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        everywhere.update(names)
        if node not in lazy:
            at_top.update(names)
    return everywhere, at_top


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_only_what_lies_below_them(part: str) -> None:
    files = sorted((PACKAGE / part).glob("**/*.py"))
    assert files
    for path in files:
        everywhere, at_top = _imports(path)
        ours = {name.split(".")[1] for name in everywhere if name.startswith("lightning_ft.")}
        assert ours <= ALLOWED[part] | {part, part.split(".")[0]}, f"{path} imports {ours}"
        roots = {name.split(".")[0] for name in at_top} - set(sys.stdlib_module_names)
        assert roots <= THIRD_PARTY[part] | {"lightning_ft", "typing_extensions"}, f"{path} imports {roots}"


def test_importing_callbacks_is_as_light_as_lightning() -> None:
    code = (
        "import json, sys, lightning.pytorch; before = set(sys.modules); import lightning_ft.callbacks; "
        "print(json.dumps(sorted({n.split('.')[0] for n in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    added = set(json.loads(done.stdout.splitlines()[-1]))
    assert "lightning_ft" in added
    assert not added & {"transformers", "onnx", "onnxruntime", "bitsandbytes", "datasets", "peft", "sklearn"}


def test_wheel_imports_every_subpackage_away_from_the_tree(tmp_path: Path) -> None:
    run = [sys.executable, "-m"]
    # A copy, since a build in the tree would take along what an earlier one left there.
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    build = [*run, "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*run, "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([str(python), *install], check=True, capture_output=True)
    # The dependencies come from this environment; its link to the working tree does not (PYTHONPATH reads no .pth).
    site = Path(pytest.__file__).parents[1]
    parts = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    code = "; ".join(f"import lightning_ft.{part}" for part in [*parts, "cli", "demo", "fisher_pass", "plan"])
    code += "; print(lightning_ft.__file__); print(lightning_ft.demo.CONFIG.is_file())"
    done = subprocess.run(
        [str(python), "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    location, has_config = done.stdout.split()[-2:]
    assert Path(location).is_relative_to(tmp_path / "venv")
    assert has_config == "True"
    assert {"callbacks", "core", "data", "export", "functional", "metrics", "modules", "plugins", "seeds"} == set(parts)
