"""What a run keeps for its report, and what can be found of a run that kept nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from local_grid import Played, play
from small_data import image_set

from fedmutual.report import evidence
from fedmutual.report.evidence import gather
from fedmutual.report.opinions import mistakes_context
from fedmutual.report.page import render
from fedmutual.report.recorded import read_runs
from fedmutual.results.directory import ResultsError


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """A whole run with three clients, as the server leaves it."""
    run = play(tmp_path_factory.mktemp("runs") / "first")
    assert run.error is None
    return run


def test_evidence_is_what_the_clients_predicted(played: Played) -> None:
    found = evidence.load(played.path)
    assert found is not None
    assert list(found.confusions) == ["client-0", "client-1", "client-2"]
    for name, matrix in found.confusions.items():
        assert matrix.sum() == 40
        share = np.trace(matrix) / 40
        assert share == pytest.approx(played.summary["clients"][name]["unseen_accuracy"])
    assert found.ensemble is not None
    assert np.trace(found.ensemble) / 40 == pytest.approx(played.summary["unseen"]["ensemble_accuracy"])
    assert found.num_public == 24
    assert len(found.samples) == 12
    divergences = [sample.divergence for sample in found.samples]
    assert divergences == sorted(divergences, reverse=True)
    assert all(sample.thumbnail.shape == (20, 20, 3) for sample in found.samples)


def test_a_killed_run_is_read_from_its_checkpoint(played: Played, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(
        played.path, folder, ignore=shutil.ignore_patterns("clients", "evidence.npz", "summary.json")
    )
    left = evidence.load(played.path)
    assert left is not None
    overrides = json.loads((folder / "overrides.json").read_text())
    found = read_runs([folder])[0].evidence
    assert found is not None
    assert (found.clients, found.num_public, found.confusions) == (left.clients, 24, {})
    assert np.array_equal(found.agreement, left.agreement)
    assert [sample.name for sample in found.samples] == [sample.name for sample in left.samples]
    overrides += ["data=folder", f"data.root={tmp_path}/gone"]
    kept = [o for o in overrides if not o.startswith(("data.pool_size", "data.unseen_size"))]
    (folder / "overrides.json").write_text(json.dumps(kept))
    page = render(read_runs([folder]))
    assert "The run&#39;s public set cannot be read here: " in page
    assert "Share of the 24 public samples" in page
    (folder / "checkpoint.safetensors").unlink()
    (folder / "checkpoint.previous.safetensors").unlink()
    assert read_runs([folder])[0].evidence is None


def test_evidence_never_unpickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "evidence.npz", meta=np.array([{"a": print}], dtype=object))
    with pytest.raises(ResultsError, match="damaged"):
        evidence.load(tmp_path)


def test_evidence_survives_its_file(tmp_path: Path) -> None:
    shared = SimpleNamespace(
        classes=("a", "b"),
        unseen=image_set([0, 1, 1]),
        public=SimpleNamespace(images=image_set([0, 1, 0, 1])),
    )
    surely = lambda *p: np.log(np.array([[1 - x, x] for x in p]))  # noqa: E731
    checkpoint = {
        "predictions.b/c": surely(0.1, 0.9),
        "predictions.a": surely(0.1, 0.2),
        "predicted": np.array([3, 1], np.int32),
    }
    found = gather(shared, {"a": surely(0.1, 0.2, 0.9)}, checkpoint)  # type: ignore[arg-type]
    evidence.save(found, tmp_path)
    back = evidence.load(tmp_path)
    assert back is not None
    assert back.classes == ("a", "b")
    assert back.clients == ("a", "b/c")
    assert back.confusions["a"].tolist() == [[1, 0], [1, 1]]
    assert back.agreement is not None
    assert back.agreement.tolist() == [[1, 0.5], [0.5, 1]]
    (sample,) = back.samples  # on the other one they say the same
    assert (sample.name, sample.label) == (shared.public.images.names[1], 1)
    assert np.array_equal(sample.thumbnail, shared.public.images.images[1])
    assert sample.probabilities[:, 1].tolist() == pytest.approx([0.2, 0.9], abs=1e-3)
    (mistake,) = back.mistakes
    assert (mistake.name, mistake.label, mistake.predicted) == (shared.unseen.names[1], 1, 0)
    assert mistake.probability == pytest.approx(0.8)
    assert np.array_equal(mistake.thumbnail, shared.unseen.images[1])


def test_the_most_certain_mistakes_are_shown_if_they_may_be() -> None:
    shared = SimpleNamespace(classes=("a", "b"), unseen=image_set([1, 1, 0, 1]), public=None)
    said = {"a": np.log(np.array([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]))}
    found = gather(shared, said, {}, most_mistakes=2)  # type: ignore[arg-type]
    assert [m.name for m in found.mistakes] == [shared.unseen.names[1], shared.unseen.names[3]]
    shown = mistakes_context(found)
    assert "3 unseen images" in shown["note"]
    assert [m["probability"] for m in shown["mistakes"]] == ["90.0", "70.0"]
    none = mistakes_context(gather(shared, said, {}, most_mistakes=0))  # type: ignore[arg-type]
    assert "evaluation.mistakes" in none["missing"]


def test_a_strategy_without_predictions_has_no_agreement() -> None:
    shared = SimpleNamespace(classes=("a", "b"), unseen=None, public=None)
    found = gather(shared, {}, {"model.weight": np.zeros(3)})  # type: ignore[arg-type]
    assert (found.agreement, found.confusions, found.samples) == (None, {}, ())
