"""Damaged files of a run: one line, in every command that reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from local_grid import undisturbed
from PIL import Image

from fedmutual.cli import main
from fedmutual.results.directory import ResultsError, RunDirectory

FILES = ("config.yaml", "overrides.json", "summary.json", "history.jsonl", "evidence.npz")
CHECKPOINTS = ("checkpoint.safetensors", "checkpoint.previous.safetensors")
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "deep": lambda data: b"[" * 100_000 + b"\n",
    "other": lambda data: b'{"a": 1}\n',
    "texts": lambda data: b'["a=[", "b"]\n',
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run with everything that a run leaves, its models one folder up."""
    played = undisturbed()
    folder = tmp_path_factory.mktemp("intact") / "run"
    shutil.copytree(played.path, folder)
    return folder


@pytest.fixture
def run(intact: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(intact, folder, ignore=shutil.ignore_patterns("clients", ".*"))
    return folder


def spoil(file: Path, damage: str) -> None:
    assert file.exists()
    file.write_bytes(DAMAGES[damage](file.read_bytes()))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_report_says_one_line(run: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str) -> None:
    spoil(run / name, damage)
    if name == "config.yaml":  # read where there is no summary
        (run / "summary.json").unlink()
    code = main(["report", str(run)])
    lines = said(capsys)
    harmless = {("overrides.json", "texts")}
    harmless |= {("history.jsonl", kind) for kind in ("empty", "half", "zeros", "noise")}  # a line cut short
    if (name, damage) not in harmless:
        assert code == 2
    if code:
        assert len(lines) == 1
        assert lines[0].startswith("fedmutual report: ")
        assert "damaged" in lines[0] or "is no" in lines[0]
        assert name in lines[0] or run.name in lines[0]
    else:
        assert not lines


@pytest.mark.parametrize("damage", DAMAGES)
def test_report_without_evidence_says_one_line_of_the_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    (run / "evidence.npz").unlink()
    for name in CHECKPOINTS:
        spoil(run / name, damage)
    assert main(["report", str(run)]) == 2
    (line,) = said(capsys)
    assert "checkpoint.safetensors is damaged" in line


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_of_evidence_are_found_at_once(
    run: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    random = np.random.default_rng(seed)
    data = np.frombuffer((run / "evidence.npz").read_bytes(), np.uint8).copy()
    places = random.integers(0, len(data), 8)
    data[places] ^= random.integers(1, 255, 8, dtype=np.uint8)
    (run / "evidence.npz").write_bytes(data.tobytes())
    code = main(["report", str(run)])
    lines = said(capsys)
    assert (code, len(lines)) in ((2, 1), (0, 0))  # some bytes of an archive mean nothing


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "deep", "other", "texts"])
@pytest.mark.parametrize("command", ["config", "run"])
def test_a_resume_with_damaged_overrides_says_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, damage: str
) -> None:
    spoil(run / "overrides.json", damage)
    before = sorted(path.name for path in run.iterdir())
    assert main([command, f"resume={run}"]) == 2
    (line,) = said(capsys)
    assert line.startswith("fedmutual: ")
    assert "overrides.json is damaged" in line
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["history.jsonl", "config.yaml", *CHECKPOINTS[:1]])
def test_a_resume_goes_on_or_says_one_line_and_lets_the_folder_go(run: Path, name: str, damage: str) -> None:
    settings = RunDirectory(run).config()
    spoil(run / name, damage)
    if name not in CHECKPOINTS:
        before = (run / "history.jsonl").read_bytes()
    line = ""
    try:
        RunDirectory.resume(run, settings).close()
    except ResultsError as error:
        line = str(error)
    assert "\n" not in line
    if line:
        assert name not in CHECKPOINTS  # the previous generation takes over
        assert name in line or "repeat the run's settings" in line
        assert (run / "history.jsonl").read_bytes() == before  # nothing was dropped
    else:
        assert name != "config.yaml"
    with pytest.raises(ResultsError):
        RunDirectory.create(run, settings, "r")  # not "in use": it was let go


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("command", ["predict", "export"])
def test_damaged_models_are_one_line(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, damage: str
) -> None:
    (source,) = (intact / "clients").glob("*/client-0")
    shutil.copytree(source, tmp_path / "client-0")
    spoil(tmp_path / "client-0" / name, damage)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    model = ["--model", str(tmp_path / "client-0")]
    rest = [str(tmp_path / "a.png")] if command == "predict" else ["--format", "torchscript"]
    assert main([command, *model, *rest]) == 2
    (line,) = said(capsys)
    assert str(tmp_path / "client-0" / name) in line


def test_clean_reads_none_of_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "outputs" / "2026-01-01" / "12-00-00-mutual"
    shutil.copytree(run, folder)
    for name in (*FILES, *CHECKPOINTS):
        spoil(folder / name, "noise")
    monkeypatch.chdir(tmp_path)
    assert main(["clean", "runs", "--older-than", "0", "--dry-run"]) == 0
    assert "12-00-00-mutual" in capsys.readouterr().out


def test_clean_lists_no_run_that_is_in_use(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "outputs" / "2026-01-01" / "12-00-00-mutual"
    shutil.copytree(run, folder)
    monkeypatch.chdir(tmp_path)
    held = RunDirectory.resume(folder)
    assert main(["clean", "runs", "--older-than", "0", "--dry-run"]) == 0
    assert "12-00-00-mutual" not in capsys.readouterr().out
    held.close()
    assert main(["clean", "runs", "--older-than", "0", "--dry-run"]) == 0
    assert "12-00-00-mutual" in capsys.readouterr().out
