"""Pictures and folders from elsewhere: what is decoded, what is skipped, and what a bad file can do."""

from __future__ import annotations

import io
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import EpsImagePlugin, Image
from small_data import write_images

from fedmutual.commands import predict as predict_command
from fedmutual.data import decoding
from fedmutual.data.decoding import (
    MAX_MEGAPIXELS,
    PictureInput,
    decode_files,
    list_images,
    read_picture,
    scan_images,
    to_rgb,
)
from fedmutual.data.dicom import SUFFIXES as DICOM_SUFFIXES
from fedmutual.data.folder import FolderSettings
from fedmutual.data.huggingface import HuggingFaceSettings
from fedmutual.data.images import DataError
from fedmutual.inference.pictures import PicturesError, find_pictures, read_pictures
from fedmutual.settings.compose import CONF_DIR

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    b"0 0 8 8 rectfill\nshowpage\n%%Trailer\n%%EOF\n"
)


def _folder(root: Path, max_megapixels: float = 1) -> FolderSettings:
    return FolderSettings(
        image_size=8,
        max_megapixels=max_megapixels,
        interpolation="bilinear",
        window=None,
        root=str(root),
        classes=None,
    )


def _turned_with_a_bad_tag() -> bytes:
    """A JPEG whose EXIF turns it and has a resolution that is text: Pillow raises TypeError."""
    tags = [(0x0112, 3, 1, b"\0\6\0\0"), (0x011A, 2, 4, b"abc\0")]
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(tags))
    exif += b"".join(struct.pack(">HHI", *tag[:3]) + tag[3] for tag in tags) + bytes(4)
    file = io.BytesIO()
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_an_eps_named_jpg_starts_no_ghostscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: started.append(arguments))
    paths = write_images(tmp_path / "in", 100)
    paths[7].rename(tmp_path / "in/0007.jpg").write_bytes(EPS)
    bad = tmp_path / "in/0007.jpg"
    with Image.open(bad) as picture:  # without a list of formats, Pillow does start it
        assert picture.format == "EPS"
    _, kept = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    assert len(kept) == 99
    assert "0007.jpg: damaged, or none of JPEG, PNG" in caplog.text
    assert list(read_pictures([bad, paths[0]], [PictureInput(8)])[2]) == [bad]
    assert not started


@pytest.mark.parametrize("suffix", sorted(decoding.SUFFIXES - DICOM_SUFFIXES))
def test_every_supported_suffix_is_read(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / f"a/picture{suffix}"
    Image.new("RGB", (9, 9), "white").save(path, "JPEG" if suffix in (".jpe", ".jfif") else None)
    (file,) = list_images(tmp_path)
    assert (read_picture(file.path, 8, 1) >= 250).all()


@pytest.mark.parametrize("kind", ["png", "webp", "gif", "tiff", "jpeg", "bmp"])
def test_the_pixel_limit_holds_before_anything_is_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"large.{kind}"
    Image.new("L", (1001, 1000)).save(path)
    assert read_picture(path, 8, 1.001).shape == (8, 8, 3)
    monkeypatch.setattr(decoding, "to_rgb", lambda *arguments: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"1001 x 1000 pixels are 1\.001 megapixels, .* max_megapixels=1$"):
        read_picture(path, 8, 1)


def test_the_setting_limits_training_and_its_change_is_noticed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "in/train" / name, 1, seed=ord(name))
    Image.new("L", (1500, 1000)).save(tmp_path / "in/train/a/large.png")
    assert len(_folder(tmp_path / "in", 2).load(tmp_path / "cache").pool) == 3
    with pytest.raises(DataError, match=r"1 of 3 images cannot be read(.|\n)*large\.png: 1500 x 1000 pixels"):
        _folder(tmp_path / "in").load(tmp_path / "cache")


def test_training_and_prediction_have_one_default_limit() -> None:
    for name in ("folder", "facemask", "huggingface"):
        assert OmegaConf.load(CONF_DIR / "data" / f"{name}.yaml").max_megapixels == MAX_MEGAPIXELS
    import argparse

    parser = argparse.ArgumentParser()
    predict_command.add_arguments(parser.add_subparsers())
    arguments = parser.parse_args(["predict", "x.png", "--model", "m"])
    assert arguments.max_megapixels == MAX_MEGAPIXELS


_PEAK = """
import resource, sys
from fedmutual.data.decoding import read_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_picture(sys.argv[1], 8, 64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_the_largest_allowed_picture_needs_less_than_a_gigabyte(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new(mode, (8000, 8000)).save(path, compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 800  # MiB; 1,300 and 1,700 with copies of all pixels


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_bands_of_rows_give_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (50, 30)).astype(np.uint16))
    else:
        picture = Image.fromarray(rng.integers(0, 256, (50, 30, 4)).astype(np.uint8), "RGBA").convert(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    whole = to_rgb(picture, 16)
    monkeypatch.setattr(decoding, "_BAND", 7)
    assert np.array_equal(to_rgb(picture, 16), whole)


@pytest.mark.parametrize("error", [TypeError("x"), KeyError(274), MemoryError(), RecursionError("deep")])
def test_any_exception_of_a_decoder_is_one_bad_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_images(tmp_path / "in", 100)
    real = decoding.to_rgb

    def convert(picture: Image.Image, size: int, interpolation: str, window: object) -> object:
        if str(getattr(picture, "filename", "")).endswith("0042.png"):
            raise error
        return real(picture, size, interpolation, None)

    monkeypatch.setattr(decoding, "to_rgb", convert)
    _, kept = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    assert kept.tolist() == [i for i in range(100) if i != 42]
    assert f"0042.png: {type(error).__name__}" in caplog.text
    pixels, kept_paths, failures = read_pictures(paths[40:44], [PictureInput(8)])
    assert (len(pixels[PictureInput(8)]), len(kept_paths), list(failures)) == (3, 3, [paths[42]])


def test_an_exif_tag_of_the_wrong_type_is_one_bad_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "in", 100)
    bad = tmp_path / "in/bad.jpg"
    bad.write_bytes(_turned_with_a_bad_tag())
    _, kept = decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")
    assert len(kept) == 100
    assert "bad.jpg: TypeError: bad operand" in caplog.text
    assert "TypeError" in read_pictures([bad], [PictureInput(8)])[2][bad]
    bad.with_name("worse.jpg").write_bytes(bad.read_bytes())
    with pytest.raises(DataError, match=r"2 of 102 images cannot be read(.|\n)*bad\.jpg(.|\n)*worse\.jpg"):
        decode_files(list_images(tmp_path / "in"), 8, tmp_path / "cache")


def test_a_bad_picture_of_a_table_is_one_bad_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    cells = []
    for value in range(100):
        file = io.BytesIO()
        Image.new("L", (8, 8), value).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    cells[3] = {"bytes": _turned_with_a_bad_tag(), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": cells, "label": [0, 1] * 50}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "data" / "huggingface.yaml"))
    assert isinstance(values, dict)
    del values["_target_"]
    settings = HuggingFaceSettings(**{**values, "image_size": 8, "dataset": str(tmp_path / "saved")})
    assert len(settings.load(tmp_path / "cache").pool) == 99
    assert "train-3: TypeError" in caplog.text


# folders


def _litter(root: Path) -> None:
    """What archives, file servers and systems leave among the classes."""
    for place in ("__MACOSX/a", "@eaDir", "a/@eaDir", ".ipynb_checkpoints", "a/.cache", "$RECYCLE.BIN"):
        write_images(root / place, 1, seed=9)
    for name in ("a/._0000.png", "a/.DS_Store", "a/Thumbs.db", "desktop.ini", "Thumbs.db"):
        (root / name).write_bytes(b"x")


def test_hidden_and_system_names_are_no_class_and_no_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "in/train" / name, 2, seed=ord(name))
    write_images(tmp_path / "in/public", 2, seed=5)
    _litter(tmp_path / "in/train")
    write_images(tmp_path / "in/public/__MACOSX", 1)
    data = _folder(tmp_path / "in").load(tmp_path / "cache")
    assert data.classes == ("a", "b")
    assert data.pool.names == ("a/0000.png", "a/0001.png", "b/0000.png", "b/0001.png")
    assert data.public is not None
    assert len(data.public) == 2
    assert "skipped" not in caplog.text


def test_files_of_unsupported_kinds_are_counted_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "in/train" / name, 1, seed=ord(name))
    for name in ("a/one.heic", "a/two.HEIC", "b/nothing", "b/list\x1b[31m.csv"):
        (tmp_path / "in/train" / name).write_bytes(b"x")
    for _ in range(2):
        assert len(_folder(tmp_path / "in").load(tmp_path / "cache").pool) == 2
    (line,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert "skipped 4 files below" in line
    assert ".heic" in line
    assert "2 .heic" in line
    assert "1 no suffix" in line
    assert "first a/one.heic" in line
    assert "\x1b" not in line
    (tmp_path / "in/train/b/three.heic").write_bytes(b"x")
    _folder(tmp_path / "in").load(tmp_path / "cache")
    assert "skipped 5 files" in caplog.text


def test_a_folder_of_unsupported_files_only_says_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "in/train" / name).mkdir(parents=True)
        (tmp_path / "in/train" / name / "x.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"train has no images: .*skipped 2 files .*\(2 \.heic\), first a/x"):
        _folder(tmp_path / "in").load(tmp_path / "cache")


def test_prediction_reads_what_training_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "in/a", 2)
    (tmp_path / "in/a/0000.png").rename(tmp_path / "in/a/0000.jfif")
    _litter(tmp_path / "in")
    (tmp_path / "in/a/x.heic").write_bytes(b"x")
    trained = [Path(file.path) for file in scan_images(tmp_path / "in").files]
    assert [path.name for path in trained] == ["0000.jfif", "0001.png"]
    caplog.set_level(logging.WARNING)
    for names in ([tmp_path / "in"], [tmp_path / "in/**/*"], [tmp_path / "in/a/0*", tmp_path / "in"]):
        caplog.clear()
        assert find_pictures(map(str, names)) == trained
        assert "skipped 1 file " in caplog.text
    assert find_pictures([str(tmp_path / "in/a/x.heic")]) == [tmp_path / "in/a/x.heic"]  # named itself
    with pytest.raises(PicturesError, match="no image file"):
        find_pictures([str(tmp_path / "in/a/*.heic")])


def test_class_names_with_control_characters_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b\x1b[2J", "c\u202e"):
        write_images(tmp_path / "in/train" / name, 1)
    with pytest.raises(DataError, match=r"class name 'b\\x1b\[2J' has control characters"):
        _folder(tmp_path / "in").load(tmp_path / "cache")


def _two_classes(root: Path, names: tuple[str, str] = ("a", "b")) -> None:
    for name in names:
        write_images(root / "in/train" / name, 2, seed=len(name))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("public/images", r"public/images' is not one .*a folder too many: move what is in it one level up"),
        ("public/fox", r"public/fox' is not one of the classes \['a', 'b'\].*set data\.classes=\[a,b,fox\]"),
        ("test/fox", r"test/fox' is not one of .*rename or remove it"),
        ("public/A", r"public/A' .*rename it to 'a' \(they differ only in case or spaces\)"),
        ("test/b ", r"test/b ' .*rename it to 'b'"),
        ("train/B", r"train/B' and '.*train/b' differ only in case or spaces"),
        ("train/a ", r"train/a' and '.*train/a ' differ only in case or spaces"),
    ],
)
def test_a_folder_that_is_no_class_is_never_one(place: str, message: str, tmp_path: Path) -> None:
    _two_classes(tmp_path)
    write_images(tmp_path / "in" / place, 1)
    with pytest.raises(DataError, match=message):
        _folder(tmp_path / "in").load(tmp_path / "cache")


def test_classes_that_only_public_has_are_named_by_the_setting(tmp_path: Path) -> None:
    _two_classes(tmp_path)
    write_images(tmp_path / "in/public/fox", 1)
    settings = _folder(tmp_path / "in")
    settings.classes = ["a", "b", "fox"]
    data = settings.load(tmp_path / "cache")
    assert data.public is not None
    assert data.public.labels.tolist() == [2]


def test_a_class_is_the_same_in_every_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    _two_classes(tmp_path, ("bar", decomposed))
    write_images(tmp_path / "in/test" / composed, 1)
    data = _folder(tmp_path / "in").load(tmp_path / "cache")
    assert data.classes == ("bar", composed)
    assert data.unseen is not None
    assert data.unseen.labels.tolist() == [1]
    write_images(tmp_path / "in/train" / composed, 1)
    with pytest.raises(DataError, match=r"train has 2 folders 'caf\u00e9' .*Unicode normal forms"):
        _folder(tmp_path / "in").load(tmp_path / "cache")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["Train/a", "Train/b", "Test/a"], r"has a folder Test among 2 that would be classes"),
        (["Train/a"], r"rename Train to train"),
        (["x/train/a", "x/train/b"], r"did you mean .*in/x\?"),
        (["images/1", "labels"], r"has a folder images among 2"),
    ],
)
def test_a_level_too_many_is_named(folders: list[str], message: str, tmp_path: Path) -> None:
    for folder in folders:
        write_images(tmp_path / "in" / folder, 1)
    with pytest.raises(DataError, match=message):
        _folder(tmp_path / "in").load(tmp_path / "cache")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_that_are_no_utf8_are_read_and_such_classes_are_refused(tmp_path: Path) -> None:
    _two_classes(tmp_path)
    folder = os.fsencode(tmp_path / "in/train/a")
    os.rename(folder + b"/0000.png", folder + b"/\xff.png")
    assert "a/\udcff.png" in _folder(tmp_path / "in").load(tmp_path / "cache").pool.names
    os.rename(folder, folder + b"\xe9")
    with pytest.raises(DataError, match=r"class name 'a\\xe9' is no UTF-8: rename the class"):
        _folder(tmp_path / "in").count()
