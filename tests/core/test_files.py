from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ft.core.files import atomic_file, atomic_folder, replace


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_halfway(path: Path) -> None:
    path.write_text("new")
    raise RuntimeError("disk")


@pytest.mark.parametrize("target", ["new.txt", "deep/er/new.txt"])
def test_file_appears_whole(tmp_path: Path, target: str) -> None:
    with atomic_file(tmp_path / target) as path:
        path.write_text("half")
        assert not (tmp_path / target).exists()
        assert path.parent == (tmp_path / target).parent  # a rename is atomic within one file system
    assert (tmp_path / target).read_text() == "half"
    assert names((tmp_path / target).parent) == ["new.txt"]


def test_file_keeps_the_old_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "old.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_file(target) as path:
        fail_halfway(path)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["old.txt"]


def test_file_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "x.txt"):
        pass
    assert names(tmp_path) == []


def test_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as path:
        (path / "a").write_text("1")
        assert names(tmp_path) == [path.name] != ["out"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


def test_folder_vanishes_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk"), atomic_folder(tmp_path / "out") as path:
        fail_halfway(path / "a")
    assert names(tmp_path) == []


def full(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("1")


@pytest.mark.parametrize("occupy", [full, Path.touch], ids=["full", "file"])
def test_folder_is_never_replaced(tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    occupy(tmp_path / "out")
    with (
        pytest.raises(FileExistsError, match="out exists and is not an empty folder: name another"),
        atomic_folder(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path) == ["out"]


def test_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as path:
        (path / "a").touch()
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("folders", [True, False])
def test_replace_puts_files_and_folders_in_place(tmp_path: Path, folders: bool) -> None:
    for name in ("new", "old"):
        if folders:
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        else:
            (tmp_path / name).write_text(name)
    replace(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == ["new"] if folders else (tmp_path / "old").read_text() == "new"


def test_replace_clears_what_a_killed_replacement_left(tmp_path: Path) -> None:
    for name in ("new", "old", ".old.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == ["new"]
