"""``fedmutual predict`` and ``fedmutual export``, as typed."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_stored_models import model_folder
from torch import nn

from fedmutual.cli import main
from fedmutual.data.decoding import PictureInput, to_rgb
from fedmutual.inference import export
from fedmutual.inference.export import ExportError, Program, export_model
from fedmutual.inference.pictures import PicturesError, find_pictures, read_pictures
from fedmutual.learning.evaluation import ensemble, predict
from fedmutual.models.stored import load_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with two clients' models."""
    folder = tmp_path_factory.mktemp("models")
    model_folder(folder / "a", seed=1)
    model_folder(folder / "b", "squeezenet1_1", seed=2)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of different kinds, one in a folder below, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, mode in (("one.png", "RGBA"), ("two.jpg", "L"), ("below/three.bmp", "RGB")):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (30, 44, 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def own(folder: Path) -> Path:
    """The one model folder below."""
    (card,) = folder.glob("**/model.json")
    return card.parent


def expected(models: list[Path], picture: Path) -> np.ndarray:
    """Probabilities by way of the learner's own functions."""
    said = []
    for folder in models:
        stored = load_model(folder)
        with Image.open(picture) as opened:
            pixels = torch.from_numpy(to_rgb(opened, stored.picture.size).copy()).permute(2, 0, 1)[None]
        said.append(predict(stored.model, pixels).numpy())
    return np.exp(ensemble(said))[0]


def test_one_model_as_json(models: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = own(models / "run" / "a")
    assert main(["predict", "--model", str(model), str(pictures), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == ["a"]
    names = [Path(p["image"]).relative_to(pictures).as_posix() for p in found["predictions"]]
    assert names == ["below/three.bmp", "one.png", "two.jpg"]
    for prediction in found["predictions"]:
        probabilities = expected([model], Path(prediction["image"]))
        assert list(prediction["probabilities"].values()) == pytest.approx(probabilities.tolist(), abs=2e-6)
        assert prediction["class"] == ("mask", "no_mask")[int(probabilities.argmax())]
        assert prediction["probability"] == max(prediction["probabilities"].values())


def test_the_ensemble_of_a_run_as_csv(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", "--model", str(models), str(pictures / "*.png"), str(pictures / "two.jpg")]
    assert main([*arguments, "--format", "csv", "--batch-size", "1"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(row["image"]).name for row in rows] == ["one.png", "two.jpg"]
    folders = [own(models / "run" / name) for name in ("a", "b")]
    for row in rows:
        probabilities = expected(folders, Path(row["image"]))
        assert float(row["p(mask)"]) == pytest.approx(probabilities[0], abs=2e-6)
        singles = [expected([folder], Path(row["image"])).argmax() for folder in folders]
        assert int(row["votes"]) == singles.count(probabilities.argmax())


def test_table_and_unreadable_pictures(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    model = ["--model", str(own(models / "run" / "a")), "--model", str(own(models / "run" / "b"))]
    assert main(["predict", *model, str(pictures / "notes.txt"), str(pictures / "one.png")]) == 1
    printed = capsys.readouterr()
    assert "notes.txt cannot be read" in printed.err
    assert "one.png" in printed.out
    assert "of 2 models" in printed.out
    assert "notes.txt" not in printed.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "MODELS", "nowhere.png"], "nowhere.png: no such file"),
        (["--model", "MODELS", "EMPTY"], "no image file in it"),
        (["--model", "PICTURES", "PICTURES"], "has no model.json"),
        (["--model", "MODELS", "PICTURES", "--device", "gpu9"], "--device"),
        (["--model", "MODELS", "PICTURES", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    models: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    places = {"MODELS": models, "PICTURES": pictures, "EMPTY": tmp_path}
    assert main(["predict", *(str(places.get(word, word)) for word in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_pictures_count_once_in_the_order_of_the_names(pictures: Path) -> None:
    named = [str(pictures / "two.jpg"), str(pictures), str(pictures / "**" / "*.bmp")]
    found = [path.name for path in find_pictures(named)]
    assert found == ["two.jpg", "three.bmp", "one.png"]
    with pytest.raises(PicturesError, match="no file matches"):
        find_pictures([str(pictures / "*.webp")])


def test_pictures_are_decoded_to_every_size(pictures: Path) -> None:
    paths = [pictures / "notes.txt", pictures / "one.png"]
    pixels, kept, failures = read_pictures(paths, [PictureInput(20), PictureInput(33)])
    assert {wanted.size: array.shape for wanted, array in pixels.items()} == {
        20: (1, 20, 20, 3),
        33: (1, 33, 33, 3),
    }
    assert kept == [pictures / "one.png"]
    assert list(failures) == [pictures / "notes.txt"]


# --- export


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "torch_export"])
@pytest.mark.parametrize("client", ["a", "b"])
def test_the_export_computes_what_the_model_does(
    models: Path, pictures: Path, tmp_path: Path, kind: str, client: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="pip install fedmutual[export]")
    model, file = own(models / "run" / client), tmp_path / f"exported.{kind}"
    command = ["export", "--model", str(model), "--format", kind, "--output", str(file)]
    assert main([*command, "--check", str(pictures)]) == 0
    printed = capsys.readouterr().out
    assert "largest difference of a probability on 3 pictures" in printed
    assert float(printed.rsplit(":", 1)[1]) < 1e-5
    assert list(tmp_path.iterdir()) == [file]
    run, described = _reloaded(kind, file)
    assert json.loads(described["classes"]) == ["mask", "no_mask"]
    assert "resized to 20x20 pixels" in described["preprocessing"]
    pixels, _, _ = read_pictures([pictures / "one.png"] * 5, [PictureInput(20)])
    answer = run(np.ascontiguousarray(pixels[PictureInput(20)].transpose(0, 3, 1, 2)))
    assert answer == pytest.approx(np.tile(expected([model], pictures / "one.png"), (5, 1)), abs=1e-5)


def _reloaded(kind: str, file: Path) -> tuple[Any, dict[str, str]]:
    """The file in its own runtime, and what it says of itself."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file))
        (images,), (out,) = session.get_inputs(), session.get_outputs()
        assert (images.type, images.shape[1:], out.name) == ("tensor(uint8)", [3, 20, 20], "probabilities")
        assert isinstance(images.shape[0], str)  # the batch is free
        described = session.get_modelmeta().custom_metadata_map
        return lambda x: session.run(None, {"images": x})[0], described
    extra: dict[str, Any] = {"model.json": ""}
    if kind == "torchscript":
        program = torch.jit.load(str(file), _extra_files=extra)
    else:
        with file.open("rb") as stream:
            program = torch.export.load(stream, extra_files=extra).module()
    return lambda x: program(torch.from_numpy(x)).numpy(), json.loads(extra["model.json"])


def test_the_default_check_and_file(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = own(models / "run" / "a")
    assert main(["export", "--model", str(model), "--format", "torchscript"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert Path(first) == model / "model.torchscript.pt"
    assert second.startswith("largest difference of a probability on 16 generated portraits: ")
    Path(first).unlink()


def test_an_export_that_differs_is_an_error_and_not_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = export._write_torchscript

    def wrong(program: Program, *rest: Any) -> None:
        other = load_model(own(models / "run" / "b")).model
        original(Program(other).eval(), *rest)

    monkeypatch.setattr(export, "_write_torchscript", wrong)
    file = tmp_path / "model.pt"
    file.write_bytes(b"the one before")
    command = ["export", "--model", str(own(models / "run" / "a")), "--format", "torchscript"]
    assert main([*command, "--output", str(file)]) == 1
    assert "differs from the model by up to" in capsys.readouterr().err
    assert file.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_exported_is_said(models: Path, tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if float(images.mean()) > 0.5:  # depends on the data: no graph
                return images.mean(dim=(2, 3))[:, :2]
            return images.amax(dim=(2, 3))[:, :2]

    stored = load_model(own(models / "run" / "a"))
    broken = type(stored)(stored.folder, stored.card, Branching())
    pixels = np.zeros((2, 20, 20, 3), np.uint8)
    with pytest.raises(ExportError, match="a cannot be exported to torch_export"):
        export_model(broken, "torch_export", tmp_path / "model.pt2", pixels, 1e-4)
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_the_remedy_is_named(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    absent = ("onnx", "onnxruntime")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a)
    )
    command = ["export", "--model", str(own(models / "run" / "a")), "--format", "onnx"]
    assert main([*command, "--output", str(tmp_path / "model.onnx")]) == 1
    error = capsys.readouterr().err
    assert "needs onnx, onnxruntime: install them with pip install 'fedmutual[export]'" in error


def test_several_models_and_unreadable_pictures_are_refused(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model", str(models), "--format", "onnx"]) == 2
    assert "has 2 models, choose one" in capsys.readouterr().err
    model, notes = str(own(models / "run" / "a")), str(pictures / "notes.txt")
    assert main(["export", "--model", model, "--format", "onnx", "--check", notes]) == 2
    assert "notes.txt cannot be read" in capsys.readouterr().err
