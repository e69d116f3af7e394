"""The model that is the run's own: left in the results, measured, shown, and ready to predict."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from local_grid import Played, play
from PIL import Image
from rich.console import Console

from fedmutual.cli import main
from fedmutual.data.site import load_shared
from fedmutual.learning.evaluation import accuracy, predict
from fedmutual.models.stored import load_model
from fedmutual.report.tables import clients_table
from fedmutual.results.directory import saved_overrides
from fedmutual.settings.compose import compose

QUICK = ("rounds=2", "evaluation.unseen_every=0")
SAME_FOR_ALL = ("fedavg", "fedprox", "fedasync", "fedbuff")


def weights(folder: Path) -> dict[str, np.ndarray]:
    return dict(safetensors.numpy.load_file(folder / "model.safetensors"))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module", params=[*SAME_FOR_ALL, "layerwise", "feddf"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    played = play(folder, f"strategy={request.param}", *QUICK, page=True)
    assert played.error is None
    return played


def test_it_is_in_the_summary_with_its_figures(run: Played) -> None:
    said = run.summary["global_model"]
    assert (said["folder"], said["model"]) == ("global_model", "VisionNet")
    recall = said["unseen_recall"]
    assert said["unseen_balanced_accuracy"] == pytest.approx(sum(recall) / 2)
    assert said["unseen_accuracy"] == pytest.approx(sum(recall) / 2)  # 20 + 20 unseen images
    assert 0 <= said["unseen_auroc"] <= 1


def test_it_is_the_clients_where_they_all_end_with_it(run: Played) -> None:
    shared = weights(run.path / "global_model")
    clients = [weights(run.states() / name) for name in run.summary["clients"]]
    if run.summary["strategy"] in SAME_FOR_ALL:
        assert all(same(shared, client) for client in clients)
        measured = {client["unseen_accuracy"] for client in run.summary["clients"].values()}
        assert measured == {run.summary["global_model"]["unseen_accuracy"]}
    else:
        assert not any(same(shared, client) for client in clients)


def test_it_is_loaded_and_predicts_what_was_measured(run: Played, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.path / "global_model"
    stored = load_model(folder)
    assert stored.name == "global model"
    unseen = load_shared(compose(saved_overrides(run.path)), 3).unseen
    assert unseen is not None
    log_p = predict(stored.model, torch.from_numpy(np.array(unseen.images)).permute(0, 3, 1, 2))
    assert accuracy(log_p, torch.from_numpy(unseen.labels)) == run.summary["global_model"]["unseen_accuracy"]
    picture = run.path / "picture.png"
    Image.fromarray(unseen.images[0]).save(picture)
    assert main(["predict", "--model", str(folder), str(picture), "--format", "json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["predictions"]
    assert list(said["probabilities"].values()) == pytest.approx(log_p[0].exp().tolist(), abs=1e-4)
    page = (folder / "README.md").read_text()
    assert "# VisionNet, the global model" in page
    assert "the server of a federation trained" in page


def test_the_table_and_the_report_have_it(run: Played) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(clients_table(run.summary))
    figure = f"{100 * run.summary['global_model']['unseen_accuracy']:.1f}"
    assert re.search(rf"global +VisionNet .*{figure}", console.export_text())
    report = re.sub(r"\s+", "", (run.path / "report.html").read_text())
    assert f"<td>global</td><td>-</td><td>{figure}</td>" in report


def test_a_strategy_without_one_says_so(tmp_path: Path) -> None:
    run = play(tmp_path / "run", "strategy=local", *QUICK)
    assert run.summary["global_model"] is None
    assert not (run.path / "global_model").exists()
