"""The cache of decoded images: made once whatever number of processes ask, whole or not at all."""

from __future__ import annotations

import builtins
import logging
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_data import write_images

from fedmutual.data import cache, decoding
from fedmutual.data.cache import cached, new_array
from fedmutual.data.decoding import decode_files, list_images, to_rgb
from fedmutual.data.images import DataError, pixel_hashes

ROOT = Path(__file__).resolve().parents[1]

PROCESS = """
import sys, time
from pathlib import Path
import numpy as np
from fedmutual.data.cache import cached, new_array

cache, started = Path(sys.argv[1]), Path(sys.argv[2])

def build(folder):
    with started.open("a") as file:
        file.write("x")
    new_array(folder, 3, 8)[:] = 7
    time.sleep(0.5)
    return {"labels": np.arange(3)}

entry = cached(cache, "key", build)
assert entry.images.shape == (3, 8, 8, 3) and (entry.images == 7).all() and len(entry.hashes) == 3
"""

DIES = """
import os, sys
from pathlib import Path
from fedmutual.data.cache import cached, new_array

def build(folder):
    new_array(folder, 3, 8)[:] = 1
    os._exit(9)

cached(Path(sys.argv[1]), "key", build)
"""


def _start(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment)


def test_three_processes_at_once_decode_once(tmp_path: Path) -> None:
    started = tmp_path / "started"
    processes = [_start(PROCESS, tmp_path / "cache", started) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert started.read_text() == "x"


def test_a_writer_that_died_leaves_neither_a_lock_nor_half_a_file(tmp_path: Path) -> None:
    assert _start(DIES, tmp_path).wait(60) == 9
    assert not (tmp_path / "images" / "key").exists()

    def build(folder: Path) -> dict[str, np.ndarray]:
        new_array(folder, 2, 8)[:] = 5
        return {}

    assert (cached(tmp_path, "key", build).images == 5).all()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["key"]


def test_images_are_mapped_read_only_and_hashed(tmp_path: Path) -> None:
    def build(folder: Path) -> dict[str, np.ndarray]:
        new_array(folder, 2, 8)[:] = np.arange(2, dtype=np.uint8)[:, None, None, None]
        return {}

    entry = cached(tmp_path, "key", build)
    assert isinstance(entry.images, np.memmap)
    assert not entry.images.flags.writeable
    assert np.array_equal(entry.hashes, pixel_hashes(np.asarray(entry.images)))
    assert not np.array_equal(entry.hashes[0], entry.hashes[1])


def test_a_failed_build_leaves_nothing_and_a_damaged_entry_is_named(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, np.ndarray]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached(tmp_path, "key", fail)
    assert not list((tmp_path / "images").iterdir())
    (tmp_path / "images" / "key").mkdir()
    with pytest.raises(DataError, match="delete that folder"):
        cached(tmp_path, "key", fail)


@pytest.mark.parametrize("damage", ["zeroed", "one bit", "cut", "hashes", "index", "garbage"])
def test_pixels_that_are_not_those_that_were_stored_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def build(folder: Path) -> dict[str, np.ndarray]:
        new_array(folder, 5, 8)[:] = 7
        return {}

    cached(tmp_path, "key", build)
    images, index = (tmp_path / "images" / "key" / name for name in ("images.npy", "index.npz"))
    whole = images.read_bytes()
    if damage == "zeroed":
        images.write_bytes(whole[:128] + bytes(len(whole) - 128))
    if damage == "one bit":
        images.write_bytes(whole[:-1] + b"\x06")
    if damage == "cut":
        images.write_bytes(whole[:-1])
    if damage == "hashes":
        np.savez(index, hashes=np.zeros((4, 16), np.uint8))
    if damage == "index":
        np.savez(index, other=np.zeros(1))
    if damage == "garbage":
        index.write_bytes(b"PK")
    monkeypatch.setattr(cache, "_verified", set())  # as in another process
    with pytest.raises(DataError, match=r"cached images in .*key are damaged .*delete that folder") as error:
        cached(tmp_path, "key", build)
    if damage == "one bit":
        assert "1 of 5 images are not those that were stored" in str(error.value)


def test_pixels_are_compared_once_a_process_and_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> dict[str, np.ndarray]:
        new_array(folder, 5, 8)[:] = 7
        return {}

    cached(tmp_path, "key", build)
    calls: list[int] = []

    def counted(images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        return pixel_hashes(images)

    monkeypatch.setattr(cache, "pixel_hashes", counted)
    cached(tmp_path, "key", build)
    assert not calls  # this process has made it
    monkeypatch.setattr(cache, "_verified", set())
    for _ in range(3):
        cached(tmp_path, "key", build)
    assert calls == [5]
    os.utime(tmp_path / "images" / "key" / "images.npy", ns=(1, 1))
    cached(tmp_path, "key", build)
    assert calls == [5, 5]


def test_only_the_owner_can_read_cached_images(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "in", 3)
    decode_files(list_images(paths[0].parent), 8, tmp_path / "cache")
    kinds = {path.is_dir(): set[int]() for path in (tmp_path, paths[0])}
    for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")):
        kinds[path.is_dir()].add(stat.S_IMODE(path.stat().st_mode))
    assert kinds == {True: {0o700}, False: {0o600}}


def test_a_damaged_index_of_files_is_made_again(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 3)
    first, _ = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    (pointer,) = (tmp_path / "cache" / "files").iterdir()
    whole = pointer.read_bytes()
    for damage in (b"", bytes(32), b"../../x"):
        pointer.write_bytes(damage)
        again, _ = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
        assert np.array_equal(first.images, again.images)
        assert pointer.read_bytes() == whole


def test_unchanged_files_are_not_read_again_and_changed_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_images(tmp_path / "in", 6)
    first, _ = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")

    def refuse(*arguments: object) -> str:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_content_key", refuse)
        again, _ = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    assert np.array_equal(first.images, again.images)

    os.utime(paths[0], ns=(1, 1))  # touched, equal content: hashed again, found again, not decoded again
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_decode_all", refuse)
        decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")

    Image.new("RGB", (9, 12), "red").save(paths[0])
    changed, _ = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    assert (changed.images[0] == [255, 0, 0]).all()
    assert np.array_equal(changed.images[1:], first.images[1:])


@pytest.mark.parametrize("replaced", ["in place", "by renaming"])
def test_a_file_of_the_same_size_and_time_gives_its_own_pixels(tmp_path: Path, replaced: str) -> None:
    (tmp_path / "in").mkdir()
    path, other = tmp_path / "in/a.bmp", tmp_path / "other.bmp"
    Image.new("RGB", (8, 8), "red").save(path)
    Image.new("RGB", (8, 8), "blue").save(other)
    before = path.stat()
    first, _ = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    time.sleep(0.02)  # times of change have the granularity of the system's clock
    if replaced == "in place":
        path.write_bytes(other.read_bytes())
    else:
        other.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again, _ = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    assert first.images[0, 0, 0].tolist() == [255, 0, 0]
    assert again.images[0, 0, 0].tolist() == [0, 0, 255]


def test_one_unreadable_image_of_200_is_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_images(tmp_path / "in", 200)
    paths[17].write_bytes(paths[17].read_bytes()[:40])
    with caplog.at_level(logging.WARNING):
        entry, kept = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    assert kept.tolist() == [i for i in range(200) if i != 17]
    assert entry.images.shape == (199, 8, 8, 3)
    assert [record.getMessage().count("0017.png") > 0 for record in caplog.records] == [True]
    with Image.open(paths[18]) as picture:
        assert np.array_equal(entry.images[17], to_rgb(picture, 8))


def test_a_dangling_link_and_a_forbidden_file_are_skipped_and_named_until_they_are_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_images(tmp_path / "in", 200)
    content = paths[17].read_bytes()
    paths[17].unlink()
    paths[17].symlink_to(tmp_path / "gone.png")
    opened = open

    def forbid(path: object, *arguments: Any, **options: Any) -> Any:
        if str(path) == str(paths[18]):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:  # root may read what is forbidden, so chmod would not do
        patch.setattr(builtins, "open", forbid)
        _, kept = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
        assert kept.tolist() == [i for i in range(200) if i not in (17, 18)]
        assert "0017.png: [Errno 2]" in caplog.text
        assert "0018.png: [Errno 13]" in caplog.text

    _, kept = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    assert kept.tolist() == [i for i in range(200) if i != 17]  # though neither its size nor its time changed
    (tmp_path / "gone.png").write_bytes(content)
    assert len(decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")[1]) == 200


def test_dangling_links_count_into_the_share_that_stops(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "in", 100)
    for path in paths[3:5]:
        path.unlink()
        path.symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"2 of 100 images cannot be read(.|\n)*0003\.png(.|\n)*0004\.png"):
        decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")


def test_two_percent_unreadable_images_stop_and_are_named(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "in", 100)
    for path in paths[3:5]:
        path.write_text("no image")
    with pytest.raises(DataError, match=r"2 of 100 images cannot be read(.|\n)*0003\.png(.|\n)*0004\.png"):
        decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")


def test_transparency_lies_over_white_and_exif_turns_the_picture() -> None:
    clear = Image.new("RGBA", (10, 10), (200, 0, 0, 0))
    assert (to_rgb(clear, 8) == 255).all()
    half = Image.new("RGBA", (10, 10), (0, 0, 0, 128))
    assert np.unique(to_rgb(half, 8)).tolist() == [127]

    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))  # the upper half is white
    picture.getexif()[0x0112] = 6  # shown turned by 90 degrees clockwise: white to the right
    turned = to_rgb(picture, 8)
    assert (turned[:, 4:] > 200).all()
    assert (turned[:, :4] < 50).all()


def test_sixteen_bit_greyscale_keeps_its_range() -> None:
    deep = Image.fromarray(np.full((10, 10), 128 * 257, dtype=np.uint16))
    assert np.unique(to_rgb(deep, 8)).tolist() == [128]


def test_floating_point_pixels_are_refused_and_not_cut() -> None:
    with pytest.raises(ValueError, match=r"values 0\.5 to 0\.5 of an unknown range"):
        to_rgb(Image.fromarray(np.full((4, 4), 0.5, np.float32)), 8)


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    for name in ("in/a", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").touch()
    (tmp_path / "in/a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    assert [file.name for file in list_images(tmp_path / "in")] == ["a/1.png", "a/link/1.png"]


def test_hidden_and_foreign_files_are_no_images(tmp_path: Path) -> None:
    write_images(tmp_path / "b", 1)
    write_images(tmp_path / "a", 1, suffix="JPG")
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    assert [file.name for file in list_images(tmp_path)] == ["a/0000.JPG", "b/0000.png"]


def test_photographs_are_decoded_once_then_opened(
    facemask_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmutual.data.folder import FacemaskSettings

    settings = FacemaskSettings(
        image_size=32, max_megapixels=64, interpolation="bilinear", window=None, root=str(facemask_root)
    )
    first = settings.load(tmp_path)

    def refuse(*arguments: object) -> None:
        raise AssertionError("read again")

    for reader in ("_content_key", "_decode_all", "decode_into"):
        monkeypatch.setattr(decoding, reader, refuse)
    data = settings.load(tmp_path)
    assert first.pool.images.shape == data.pool.images.shape == (3832, 32, 32, 3)
    assert np.bincount(data.pool.labels).tolist() == [1914, 1918]
    assert data.unseen is not None
    assert np.bincount(data.unseen.labels).tolist() == [2994, 2994]
    assert len(list((tmp_path / "images").iterdir())) == 2
