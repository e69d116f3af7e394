"""Whole runs with a backbone: different ones in one run, heads alone in messages, predict and export."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_grid import Played, play, trains
from rich.console import Console

pytest.importorskip("timm", reason="needs the extra fedmutual[pretrained]")

from fedmutual.backbones.intake import intake_of
from fedmutual.backbones.network import bare_network
from fedmutual.cli import main
from fedmutual.data.site import load_shared
from fedmutual.learning.evaluation import accuracy, predict
from fedmutual.learning.ridge import solve, statistics
from fedmutual.models.stored import load_model
from fedmutual.results.directory import saved_overrides
from fedmutual.settings.compose import compose
from fedmutual.simulation.ahead import compute_features
from fedmutual.simulation.request import prepare

pytestmark = pytest.mark.federation

SMALL = "test_efficientnet"
QUICK = ("rounds=2", "model.image_size=32", "simulation.client_cpus=1")


def weights_file(folder: Path, seed: int) -> Path:
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    network = bare_network(f"timm:{SMALL}")
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "w.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": SMALL}))
    return folder / "w.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_file(tmp_path_factory.mktemp("weights"), 0)


def model(folder: Path) -> Path:
    (card,) = folder.glob("model.json")
    return card.parent


@pytest.fixture(scope="module")
def mixed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Four clients: a head, a last stage, a whole backbone, and VisionNet."""
    base = f"pretrained backbone={small} image_size=32"
    models = [base, f"{base} tune=last", f"{base} tune=all image_size=48", "visionnet"]
    chosen = "[" + ",".join(f"'{name}'" for name in models) + "]"
    run = play(tmp_path_factory.mktemp("mixed") / "run", f"model.per_client={chosen}", "rounds=2", clients=4)
    assert run.error is None
    assert run.rejections() == []
    return run


def test_clients_with_different_backbones_teach_each_other(mixed: Played) -> None:
    assert [client["model"] for client in mixed.summary["clients"].values()] == [
        "w.safetensors (head)",
        "w.safetensors (last)",
        "w.safetensors (all)",
        "VisionNet",
    ]
    lines = [mixed.line(2, client) for client in mixed.summary["clients"]]
    assert all(np.isfinite([line["kl_before"], line["kl_after"]]).all() for line in lines)


@pytest.mark.parametrize(("client", "size"), [(0, 32), (1, 32), (2, 48), (3, 20)])
def test_each_model_predicts_what_its_client_measured(
    mixed: Played, client: int, size: int, tmp_path: Path
) -> None:
    stored = load_model(mixed.states() / f"client-{client}")
    assert stored.picture.size == size
    source = [text for text in saved_overrides(mixed.path) if not text.startswith("model")]
    unseen = load_shared(compose([*source, f"data.image_size={size}"]), 4).unseen
    assert unseen is not None
    log_p = predict(stored.model, torch.from_numpy(np.array(unseen.images)).permute(0, 3, 1, 2))
    measured = mixed.summary["clients"][f"client-{client}"]["unseen_accuracy"]
    assert accuracy(log_p, torch.from_numpy(unseen.labels)) == pytest.approx(measured, abs=0.026)  # of 40


def test_only_what_learns_is_kept_and_the_card_names_the_backbone(mixed: Played) -> None:
    states = [mixed.states() / f"client-{i}" / "state.safetensors" for i in range(3)]
    sizes = [path.stat().st_size for path in states]
    assert sizes[0] < 40_000 < sizes[1] < sizes[2]
    card = json.loads((mixed.states() / "client-1" / "model.json").read_text())
    assert card["backbone"]["source"] == "w.safetensors"
    assert len(card["backbone"]["sha256"]) == 64
    assert card["arguments"]["architecture"] == f"timm:{SMALL}"
    page = (mixed.states() / "client-1" / "README.md").read_text()
    assert "## Backbone" in page
    assert "resized to 32x32 pixels (bicubic" in page


@pytest.mark.parametrize("client", [0, 1, 2])
def test_one_onnx_file_holds_backbone_and_head(
    mixed: Played, client: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="pip install fedmutual[export]")
    folder = mixed.states() / f"client-{client}"
    assert (
        main(["export", "--model", str(folder), "--format", "onnx", "--output", str(tmp_path / "m.onnx")])
        == 0
    )
    assert float(capsys.readouterr().out.rsplit(":", 1)[1]) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_averaging_sends_heads_alone(small: Path, tmp_path: Path) -> None:
    run = play(tmp_path / "run", "model=pretrained", f"model.backbone={small}", "strategy=fedavg", *QUICK)
    assert run.error is None
    assert run.rejections() == []
    reports = [m for m in run.grid.replies if trains(m) and "model" in m.content]
    assert {tuple(sorted(m.content["model"])) for m in reports} == {
        ("centre", "linear.bias", "linear.weight", "spread")
    }
    assert run.summary["traffic"]["uplink_bytes"] < 6 * 12_000
    stored = load_model(run.path / "global_model")
    assert sum(p.numel() for p in stored.model.trunk.parameters()) > 90_000
    assert run.summary["global_model"]["model"] == "w.safetensors (head)"


def test_a_site_whose_backbone_has_other_weights_is_told(small: Path, tmp_path: Path) -> None:
    other = weights_file(tmp_path / "other", 1)

    def node(number: int) -> dict[str, Any]:
        own = {"model": f"pretrained backbone={other} image_size=32"} if number == 2 else {}
        return {"partition-id": number, "num-partitions": 3, "trust-run": True, **own}

    base = ["model=pretrained", f"model.backbone={small}", *QUICK]
    run = play(tmp_path / "run", *base, "strategy=fedavg", node_config=node)
    reasons = {reason for _, _, reason in run.rejections()}
    assert len(reasons) == 1
    assert "client-2: MessageError: model: the run's weights stand on head 32 bicubic" in reasons.pop()
    assert play(tmp_path / "mutual", *base, node_config=node).rejections() == []


def test_a_site_without_the_weights_is_rejected_by_name(small: Path, tmp_path: Path) -> None:
    def node(number: int) -> dict[str, Any]:
        own = {"model": f"pretrained backbone={tmp_path}/none.safetensors"} if number == 0 else {}
        return {"partition-id": number, "num-partitions": 3, "trust-run": True, **own}

    run = play(tmp_path / "run", "model=pretrained", f"model.backbone={small}", *QUICK, node_config=node)
    assert run.error is None  # the others go on
    reasons = [reason for _, _, reason in run.rejections()]
    assert all(reason.startswith("client-0: WeightsError: model") for reason in reasons)
    assert "none.safetensors" in reasons[0]


@pytest.mark.parametrize(
    "strategy", ["fedprox", "fedasync", "feddf", "dsfl", "layerwise", "mutual_async", "local", "centralised"]
)
def test_every_kind_of_strategy_trains_heads(small: Path, tmp_path: Path, strategy: str) -> None:
    run = play(
        tmp_path / "run", "model=pretrained", f"model.backbone={small}", f"strategy={strategy}", *QUICK
    )
    assert run.error is None
    assert run.rejections() == []
    assert run.summary["status"] == "completed"


def test_fed3r_is_the_regression_on_all_images(small: Path, tmp_path: Path) -> None:
    base = ["model=pretrained", f"model.backbone={small}", "strategy=fed3r", *QUICK]
    run = play(tmp_path / "run", *base, "train.validation_fraction=0", "strategy.ridge=0.1")
    assert run.error is None
    assert run.rejections() == []
    settings = compose(saved_overrides(run.path))
    from fedmutual.data.site import load_site

    head = load_model(run.path / "global_model").model.top.head
    sites = [load_site(settings, (i, 3), intake=intake_of(settings)) for i in range(3)]
    features = torch.from_numpy(np.concatenate([site.private.seen for site in sites]))
    labels = np.concatenate([site.private.labels for site in sites])
    weights, _ = solve(*statistics(head.scaled(features).numpy(), labels, 2), 0.1)
    np.testing.assert_allclose(head.linear.weight.detach().numpy(), weights / 0.1, atol=1e-3)
    sent = [m for m in run.grid.replies if trains(m) and "model" in m.content]
    assert {m.content["report"]["round"] for m in sent} == {1}


def test_fed3r_tunes_the_regressions_head(small: Path, tmp_path: Path) -> None:
    base = [
        "model=pretrained",
        f"model.backbone={small}",
        "strategy=fed3r",
        "strategy.fine_tune=true",
        *QUICK,
    ]
    run = play(tmp_path / "run", *base)
    assert run.error is None
    assert run.rejections() == []
    sent = [m.content for m in run.grid.replies if trains(m) and "model" in m.content]
    assert [sorted(content["model"])[0] for content in sent] == ["gram"] * 3 + ["centre"] * 3


def test_a_simulation_computes_features_before_it_starts(small: Path, tmp_path: Path) -> None:
    model = f"pretrained backbone={small} image_size=32"
    request = prepare(
        [
            f"model.per_client=['{model}','{model} tune=last','visionnet']",
            "num_clients=3",
            "data.pool_size=30",
            "data.unseen_size=5",
            f"cache_dir={tmp_path}/cache",
        ],
        tmp_path,
    )
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    compute_features(request, console)
    assert len(list(tmp_path.glob("cache/images/features-*"))) == 4  # two trunks, pool and test images
    assert isinstance(console.file, io.StringIO)
    assert "w.safetensors: features of private and public images" in console.file.getvalue()


def test_doctor_says_what_a_linear_head_reaches(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = f'partition-id=0 num-partitions=2 cache-dir="{tmp_path}" model="pretrained backbone={small}"'
    sizes = ["data.pool_size=60", "data.unseen_size=5", "data.image_size=20"]
    main(["doctor", "--json", "model=pretrained", *sizes, "--node-config", node])
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    said = findings["model"]["text"]
    assert re.search(r"w\.safetensors \(head\): 514 parameters; a linear head alone is right on \d+", said), (
        said
    )
