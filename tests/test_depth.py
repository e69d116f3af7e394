"""Grey pictures of more than 8 bits: the same right pixels in training, prediction and export."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from fedmutual.data.decoding import PictureInput, read_picture
from fedmutual.data.folder import FolderSettings
from fedmutual.data.huggingface import HuggingFaceSettings
from fedmutual.data.images import DataError
from fedmutual.inference.pictures import read_pictures
from fedmutual.models.card import picture_of_card, preprocessing
from fedmutual.settings.compose import compose
from fedmutual.settings.schema import SettingsError


def _file(values: np.ndarray, kind: str, tags: dict[int, int] | None = None) -> io.BytesIO:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in (tags or {}).items():
        info[tag] = value
    file = io.BytesIO()
    options: dict[str, Any] = {"tiffinfo": info} if tags else {}
    Image.fromarray(values).save(file, kind, **options)
    file.seek(0)
    return file


def _levels(low: float, high: float, dtype: type) -> np.ndarray:
    """An 8x8 picture whose left half is low and whose right half is high."""
    values = np.full((8, 8), low, dtype)
    values[:, 4:] = high
    return values


def _ends(file: io.BytesIO | Path, window: tuple[float, float] | None = None) -> tuple[int, int]:
    pixels = read_picture(file, 8, 1, window=window)
    return int(pixels[0, 0, 0]), int(pixels[0, 7, 0])


@pytest.mark.parametrize(
    ("values", "kind", "tags", "window", "ends"),
    [
        (_levels(0, 65535, np.uint16), "PNG", {}, None, (0, 255)),
        (_levels(257 * 100, 257 * 101, np.uint16), "PNG", {}, None, (100, 101)),
        (_levels(0, 4095, np.uint16), "PNG", {}, (0, 4095), (0, 255)),  # was (0, 16)
        (_levels(1000, 3095, np.uint16), "PNG", {}, (1000, 3095), (0, 255)),
        (_levels(500, 4000, np.uint16), "TIFF", {}, (1000, 3000), (0, 255)),  # clipped
        (_levels(0, 4095, np.uint16), "TIFF", {281: 4095}, None, (0, 255)),  # MaxSampleValue
        (_levels(512, 1023, np.uint16), "TIFF", {280: 512, 281: 1023}, None, (0, 255)),
        (_levels(0, 4095, np.int32), "TIFF", {}, (0, 4095), (0, 255)),
        (_levels(-1000, 1000, np.int32), "TIFF", {}, (-1000, 1000), (0, 255)),  # Hounsfield units
        (_levels(-1.5, 1.5, np.float32), "TIFF", {}, (-1.5, 1.5), (0, 255)),
        (_levels(float("nan"), 1.0, np.float32), "TIFF", {}, (0, 1), (0, 255)),
        (_levels(7, 200, np.uint8), "PNG", {}, (0, 4095), (7, 200)),  # 8 bits have their range
    ],
)
def test_values_are_scaled_by_the_window_or_what_the_file_states(
    values: np.ndarray,
    kind: str,
    tags: dict[int, int],
    window: tuple[float, float] | None,
    ends: tuple[int, int],
) -> None:
    assert _ends(_file(values, kind, tags), window) == ends


@pytest.mark.parametrize(
    "values", [_levels(0, 511, np.int32), _levels(-1024, 3071, np.int32), _levels(0, 1, np.float32)]
)
def test_a_range_that_no_file_states_is_asked_for(values: np.ndarray) -> None:
    low, high = values.min(), values.max()
    with pytest.raises(
        ValueError, match=rf"values {low:g} to {high:g} of an unknown .*data\.window=\[LOW,HIGH"
    ):
        read_picture(_file(values, "TIFF"), 8, 1)


def test_training_prediction_and_the_card_have_one_window(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / "in/train" / name).mkdir(parents=True)
        values = np.random.default_rng(number).integers(-1000, 3000, (20, 20)).astype(np.int32)
        (tmp_path / f"in/train/{name}/x.tiff").write_bytes(_file(values, "TIFF").getvalue())
    settings = compose(["data=folder", f"data.root={tmp_path / 'in'}", "data.window=[-1000,3000]"])
    data: FolderSettings = settings.data
    pool = data.load(tmp_path / "cache").pool
    assert pool.images.min() < 60
    assert pool.images.max() > 190
    assert pool.facts is not None
    assert pool.facts[0].tolist()[:2] == [20, 20]
    assert pool.facts[0, 2] >= -1000
    assert pool.facts[0, 3] > 2000
    picture = picture_of_card({"image_size": 64, "window": [-1000, 3000]})
    assert picture == data.picture == PictureInput(64, "bilinear", (-1000.0, 3000.0))
    predicted, _, _ = read_pictures([tmp_path / "in/train/a/x.tiff"], [picture])
    assert np.array_equal(predicted[picture][0], pool.images[0])
    assert preprocessing(picture).endswith("more than 8 bits: -1000 to 3000 become 0 to 255")
    data.window = [0, 3000]
    assert not np.array_equal(data.load(tmp_path / "cache").pool.images, pool.images)


def test_without_a_window_the_folder_is_refused_and_says_which(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "in/train" / name).mkdir(parents=True)
        file = _file(_levels(-1024, 3071, np.int32), "TIFF")
        (tmp_path / f"in/train/{name}/x.tiff").write_bytes(file.getvalue())
    settings = compose(["data=folder", f"data.root={tmp_path / 'in'}"])
    with pytest.raises(DataError, match=r"2 of 2 images (.|\n)*x\.tiff: values -1024 to 3071 .*data\.window"):
        settings.data.load(tmp_path / "cache")


@pytest.mark.parametrize("window", ["[1]", "[2,1]", "[0,0]", "[0,inf]"])
def test_what_is_no_window_is_refused(window: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.window: .* is not \[LOW,HIGH\]"):
        compose(["data=folder", f"data.root={tmp_path}", f"data.window={window}"])


def test_a_table_of_deep_pictures_has_the_window(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": _file(_levels(0, 4095, np.uint16), "PNG").getvalue(), "path": None}] * 2
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    settings = compose(
        [
            "data=huggingface",
            f"data.dataset={tmp_path / 'saved'}",
            "data.image_size=8",
            "data.window=[0,4095]",
        ]
    )
    source: HuggingFaceSettings = settings.data
    assert source.load(tmp_path / "cache").pool.images[0, 0, [0, 7], 0].tolist() == [0, 255]


# DICOM


def _dicom(values: np.ndarray, **tags: Any) -> io.BytesIO:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
    file.Rows, file.Columns, file.SamplesPerPixel = *values.shape, 1
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    file.PixelRepresentation = int(values.dtype == np.int16)
    file.PhotometricInterpretation = "MONOCHROME2"
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = values.tobytes()
    written = io.BytesIO()
    pydicom.dcmwrite(written, file, enforce_file_format=True)
    written.seek(0)
    return written


_HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1024}


@pytest.mark.parametrize(
    ("tags", "window", "ends"),
    [
        ({}, None, (0, 255)),  # its 12 stored bits
        ({"PhotometricInterpretation": "MONOCHROME1"}, None, (255, 0)),
        (_HOUNSFIELD, (-1024, 3071), (0, 255)),
        (_HOUNSFIELD, (-1024, 7166), (0, 128)),
        ({**_HOUNSFIELD, "WindowCenter": 0, "WindowWidth": 400}, None, (0, 255)),
        ({**_HOUNSFIELD, "WindowCenter": [1024, 5], "WindowWidth": [8191, 5]}, None, (64, 191)),
    ],
)
def test_dicom_has_its_own_window_or_that_of_the_run(
    tags: dict[str, Any], window: tuple[float, float] | None, ends: tuple[int, int]
) -> None:
    assert _ends(_dicom(_levels(0, 4095, np.uint16), **tags), window) == ends


def test_signed_dicom_and_one_of_many_frames(tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(_dicom(_levels(-2048, 2047, np.int16)).getvalue())
    assert _ends(path) == (0, 255)
    with pytest.raises(ValueError, match="2 frames of 8 x 4 pixels, not one picture"):
        read_picture(_dicom(_levels(0, 1, np.uint16), NumberOfFrames=2, Rows=4), 8, 1)
    with pytest.raises(ValueError, match=r"8 x 8 pixels are 6\.4e-05 megapixels, more than"):
        read_picture(path, 8, 1e-6)


def test_without_pydicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    file = _dicom(_levels(0, 4095, np.uint16))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"pip install 'fedmutual\[dicom\]'"):
        read_picture(file, 8, 1)
