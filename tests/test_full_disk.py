"""A full or forbidden disk: file and remedy are named, what was there stays, no process dies."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmutual.data.cache import cached, new_array
from fedmutual.files import disk
from fedmutual.files.atomic import append, atomic_write
from fedmutual.files.checkpoint import load_checkpoint, save_checkpoint
from fedmutual.files.disk import WriteError, allocate, create, make_private, writing
from fedmutual.results.directory import RESERVED, RunDirectory

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = {"seed": 7, "rounds": 2, "strategy": {"name": "mutual"}}
ROOM = 2_000_000  # bytes of the small disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM},mode=700", "none", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int = 0) -> None:
    """Leave ``left`` bytes free."""
    with (folder / "filler").open("wb") as file:
        status = os.statvfs(folder)
        size = status.f_bavail * status.f_bsize - left
        os.posix_fallocate(file.fileno(), 0, max(size, 1))


# --- the message


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room for 2.5 MB in {folder}"),
        (errno.EDQUOT, "make room for 2.5 MB in {folder}"),
        (errno.EROFS, "make {folder} writable, or name another folder"),
        (errno.EIO, "see whether this disk is in order"),
    ],
)
def test_the_message_names_file_reason_and_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(WriteError) as error, writing(path, 2_500_000):
        raise OSError(number, os.strerror(number), "/somewhere/else")
    expected = f"{path} cannot be written ({os.strerror(number)}): {remedy.format(folder=tmp_path)}"
    assert str(error.value) == expected
    assert error.value.errno == number


def test_the_innermost_file_is_the_one_that_is_named(tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    with pytest.raises(WriteError, match="inner cannot"), writing(outer), writing(inner):
        raise OSError(errno.ENOSPC, "full")


# --- files of their owner


def test_new_files_and_folders_are_their_owners(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    os.chmod(shared, 0o755)
    atomic_write(shared / "a" / "b" / "file", b"x")
    append(shared / "a" / "lines", b"x\n")
    modes = {str(p.relative_to(shared)): stat.S_IMODE(p.stat().st_mode) for p in shared.rglob("*")}
    assert modes == {"a": 0o700, "a/b": 0o700, "a/b/file": 0o600, "a/lines": 0o600}
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755  # what was there keeps its permissions
    before = os.umask(0o022)
    try:
        atomic_write(shared / "page.html", b"x", private=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((shared / "page.html").stat().st_mode) == 0o644


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_private(tmp_path / "file" / "below")


# --- room that is reserved


@pytest.mark.parametrize("how", ["system", "refused", "absent"])
def test_reserved_room_is_zeros_after_the_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not on this file system")

    if how == "refused":
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    if how == "absent":
        monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(disk, "_BLOCK", 1000)
    with create(tmp_path / "file") as file:
        file.write(b"head")
        allocate(file, 2500)
        assert file.tell() == 4
    assert (tmp_path / "file").read_bytes() == b"head" + bytes(2500)
    assert (tmp_path / "file").stat().st_blocks * 512 >= 2500


def test_a_full_disk_refuses_the_reservation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WriteError, match=r"images\.npy cannot be written \(No space left.*make room for"):
        new_array(tmp_path, 100, 64)


# --- what a full disk leaves


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.jsonl"
    append(path, b'{"round": 1}\n')
    write = os.write

    def short(descriptor: int, data: bytes) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, bytes(data)[:5])

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(WriteError, match=r"history\.jsonl cannot be written \(No space left"):
        append(path, b'{"round": 2}\n')
    assert path.read_bytes() == b'{"round": 1}\n'


def test_a_full_disk_leaves_checkpoint_history_and_a_summary(small_disk: Path) -> None:
    folder = small_disk / "run"
    run = RunDirectory.create(folder, SETTINGS, "r")
    assert (folder / ".reserve").stat().st_blocks * 512 >= RESERVED
    run.append([{"round": 1, "client": "a", "validation_accuracy": 0.5}])
    run.save_checkpoint({"round": 1}, {"x": np.arange(5)})
    fill(small_disk)
    big = [{"round": 2, "client": "a", "prediction_shares": [0.125] * 2000}]
    with pytest.raises(WriteError, match=rf"{folder}/history\.jsonl cannot be written .*make room for"):
        run.append(big)
    with pytest.raises(WriteError, match=rf"{folder}/checkpoint\.safetensors cannot be written"):
        run.save_checkpoint({"round": 2}, {"x": np.arange(50_000)})
    assert [line["round"] for line in run.history()] == [1]
    assert run.load_checkpoint()[0] == {"round": 1}
    run.write_summary({"status": "failed", "reason": "x" * 50_000})
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert not (folder / ".reserve").exists()
    assert not list(folder.glob(".*.tmp"))


def test_a_run_does_not_begin_where_no_summary_would_fit(small_disk: Path) -> None:
    fill(small_disk, left=RESERVED // 2)
    with pytest.raises(WriteError, match=r"\.reserve cannot be written .*make room for 0\.262 MB"):
        RunDirectory.create(small_disk / "run", SETTINGS, "r")


def test_a_checkpoint_that_does_not_fit_leaves_both_generations(small_disk: Path) -> None:
    path = small_disk / "checkpoint.safetensors"
    for round in (1, 2):
        save_checkpoint(path, {"round": round}, {})
    with pytest.raises(WriteError, match="make room for 4 MB"):
        save_checkpoint(path, {"round": 3}, {"x": np.zeros(1_000_000, np.float32)})
    assert load_checkpoint(path)[0] == {"round": 2}
    assert len(list(small_disk.iterdir())) == 2


CACHE = """
import sys
from pathlib import Path
from fedmutual.data.cache import cached, new_array
from fedmutual.files.disk import WriteError

def build(folder):
    new_array(folder, 300, 64)[:] = 7  # 3.7 MB
    return {}

try:
    cached(Path(sys.argv[1]), "key", build)
except WriteError as error:
    print(error)
"""


def test_images_that_do_not_fit_are_an_error_and_no_dead_process(small_disk: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CACHE, str(small_disk)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # -7: SIGBUS
    assert "images.npy cannot be written (No space left on device): make room for 3.69 MB" in done.stdout
    assert not list((small_disk / "images").iterdir())

    def small(folder: Path) -> dict[str, np.ndarray]:
        new_array(folder, 10, 64)[:] = 7
        return {}

    assert len(cached(small_disk, "key", small).images) == 10  # there is room again
