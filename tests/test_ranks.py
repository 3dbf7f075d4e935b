"""Processes of a test that end in a crash of native code are started once more, and no others."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.ranks import RANKS, run_ranks


def _starts(how: str) -> int:
    """How often this process's rank has been started, now included."""
    file = Path(os.environ["LIGHTNING_FT_STARTS"]) / f"{how}-{os.environ['RANK']}"
    with file.open("a") as log:
        log.write("x")
    return len(file.read_text())


def crashes_once() -> int:
    if (starts := _starts("once")) == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return starts


def crashes() -> None:
    _starts("always")
    os.kill(os.getpid(), signal.SIGSEGV)


def raises() -> None:
    _starts("raises")
    raise ValueError("a fault of ours")


def test_a_crash_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_FT_STARTS", str(tmp_path))
    assert run_ranks("tests.test_ranks:crashes_once", tmp_path) == [2] * RANKS
    with pytest.raises(AssertionError, match="rank 0, exit -11"):
        run_ranks("tests.test_ranks:crashes", tmp_path)
    with pytest.raises(AssertionError, match="a fault of ours"):
        run_ranks("tests.test_ranks:raises", tmp_path)
    assert {file.name: len(file.read_text()) for file in tmp_path.glob("*-0")} == {
        "once-0": 2,
        "always-0": 2,
        "raises-0": 1,
    }
