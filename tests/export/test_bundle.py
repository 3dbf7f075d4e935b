"""Modules put together into one file that needs none of them."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_ft.export.bundle import bundle

ROOT = "lightning_ft.export.predictor"


@pytest.fixture(scope="module")
def text() -> str:
    return bundle(ROOT)


def load(text: str, path: Path) -> ModuleType:
    """As a server may: without registering it."""
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_predictor_needs_numpy_alone_at_its_top(text: str, tmp_path: Path) -> None:
    tree = ast.parse(text)
    roots = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert roots - set(sys.stdlib_module_names) == {"numpy"}
    everywhere = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {str(name).split(".")[0] for name in everywhere} - set(sys.stdlib_module_names) == {
        "jinja2",  # for conversations alone
        "numpy",
        "onnxruntime",
        "tokenizers",
    }
    module = load(text, tmp_path / "predictor.py")
    import lightning_ft.export.predictor as ours

    assert ours.TASKS == module.TASKS
    assert ours.Predictor.__doc__ == module.Predictor.__doc__


def test_ruff_finds_nothing_undefined_or_unused(text: str, tmp_path: Path) -> None:
    (tmp_path / "predictor.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E4,E7,E9", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of a `lightning_ft` of their own names, made of texts."""
    import lightning_ft

    monkeypatch.setattr(lightning_ft, "__path__", [*lightning_ft.__path__, str(tmp_path)])

    def make(**modules: str) -> None:
        for name, body in modules.items():
            (tmp_path / f"{name}.py").write_text(f'"""Of {name}."""\n\nfrom __future__ import annotations\n\n{body}')
        importlib.invalidate_caches()

    return make


def test_modules_come_behind_those_they_need(package: Any, tmp_path: Path) -> None:
    package(
        zz_low=(
            "import math\n\nTWO = 2\n\n\ndef root() -> float:\n"
            "    import numpy as np\n\n    return math.sqrt(np.int64(4))\n"
        ),
        zz_mid=(
            "from math import pi as circle\nfrom typing import TYPE_CHECKING\n\n"
            "from lightning_ft.zz_low import TWO\n\nif TYPE_CHECKING:\n"
            "    import numpy as np\n    from torch import Tensor\n\n\n"
            "def area(of: Tensor) -> np.ndarray:\n    # it stays\n    return circle * of**TWO\n"
        ),
        zz_top=(
            "from lightning_ft.zz_low import root\nfrom lightning_ft.zz_mid import area\n\n\n"
            "def both() -> float:\n    return area(root())\n\n\nif __name__ == '__main__':\n    print(both())\n"
        ),
    )
    text = bundle("lightning_ft.zz_top")
    assert text.startswith('"""Of zz_top."""\n\nfrom __future__ import annotations\n\nimport math\n')
    assert "# it stays" in text
    assert text.index("zz_low.py") < text.index("zz_mid.py") < text.index("zz_top.py")
    assert "lightning_ft." not in text
    assert text.count("import numpy as np") == 1
    assert "Tensor = Any" in text
    file = tmp_path / "alone.py"
    file.write_text(text)
    done = subprocess.run([sys.executable, "-I", str(file)], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(12.56637)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"zz_a": "def f(): ...\n", "zz_top": "def f(): ...\n"}, r"zz_top and lightning_ft.zz_a both define f: rename"),
        ({"zz_a": "X = 1\n", "zz_top": "X = 2\n"}, "both define X"),
        ({"zz_a": "json = 1\n", "zz_top": "import json\n"}, "zz_a defines json, which `import json` imports elsewhere"),
        ({"zz_a": "import torch\n"}, "zz_a: `import torch` at its top: import it in the function"),
        ({"zz_a": "from dataclasses import dataclass\n"}, "zz_a: a dataclass cannot be made in a file"),
        ({"zz_a": "def f():\n    from lightning_ft.core import files\n"}, "in a function: import it at the top"),
        ({"zz_a": "from lightning_ft.zz_b import x as y\n", "zz_b": "x = 1\n"}, "bundled modules are imported from"),
        ({"zz_a": "from lightning_ft import core\n"}, "bundled modules are imported from, by name"),
        ({"zz_a": "from lightning_ft.zz_top import g\n"}, "zz_top imports lightning_ft.zz_a imports lightning_ft.zz_t"),
        ({"zz_a": "if __name__ == '__main__':\n    f()\n"}, "zz_a: only the root may have `if __name__"),
    ],
)
def test_what_cannot_be_put_together_is_refused(modules: dict[str, str], message: str, package: Any) -> None:
    top = modules.pop("zz_top", "") + "\n\ndef top(): ...\n"
    package(**modules, zz_top="from lightning_ft.zz_a import f\n" + top)
    with pytest.raises(ValueError, match=message):
        bundle("lightning_ft.zz_top")
