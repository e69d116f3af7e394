"""``fedmutual config``: every value has a source, and the source really says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedmutual.cli import main
from fedmutual.commands.config import RESUMED, RUN, resolved
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import CONF_DIR, compose
from fedmutual.settings.origins import COMMAND_LINE, NODE, meanings, origins

TRICKY = (
    [],
    ["experiment=paper"],
    ["experiment=paper_code", "rounds=3", "optimizer=sgd"],
    ["partition=dirichlet", "public=sample", "public.per_round=7", "model=resnet18"],
    ["experiment=paper", "partition=iid", "train.batch_size=4"],
)


def by_key(overrides: list[str], **more: Any) -> dict[str, tuple[Any, str]]:
    return {entry.key: (entry.value, entry.source) for entry in origins(overrides, **more)}


@pytest.mark.parametrize("overrides", TRICKY, ids=" ".join)
def test_a_file_named_as_source_holds_the_value(overrides: list[str]) -> None:
    found = by_key(overrides)
    files = 0
    for key, (value, source) in found.items():
        if not source.startswith("conf/") or key in {
            "data",
            "model",
            "strategy",
            "consensus",
            "partition",
            "public",
        }:
            continue
        path = CONF_DIR.parent / source
        content = OmegaConf.load(path)
        group = path.parent.name
        short = key if group in ("conf", "experiment") else key.removeprefix(f"{group}.")
        if key in ("optimizer", "augment", "experiment"):  # a choice, named in a defaults list
            continue
        said = OmegaConf.select(content, short)
        assert (OmegaConf.to_container(said) if OmegaConf.is_config(said) else said) == value, key
        files += 1
    assert files > 40


@pytest.mark.parametrize("overrides", TRICKY, ids=" ".join)
def test_the_values_are_those_of_the_run(overrides: list[str]) -> None:
    settings = compose(overrides)
    found = by_key(overrides)
    for key in ("rounds", "train.batch_size", "optimizer.name", "public.schedule", "strategy.phase"):
        holder, _, name = key.rpartition(".")
        assert found[key][0] == getattr(getattr(settings, holder) if holder else settings, name)


def test_the_last_one_that_names_a_key_is_its_source() -> None:
    found = by_key(["experiment=paper_code", "rounds=3", "optimizer=sgd"])
    assert found["rounds"] == (3, COMMAND_LINE)
    assert found["experiment"] == ("paper_code", COMMAND_LINE)
    assert found["optimizer"] == ("sgd", COMMAND_LINE)
    assert found["optimizer.momentum"] == (0.9, "conf/optimizer/sgd.yaml")
    assert found["strategy.divergence"] == ("published_code", "conf/experiment/paper_code.yaml")
    assert found["strategy.phase"][1] == "conf/experiment/paper.yaml"  # which paper_code builds on
    assert found["strategy.kl_weight"][1] == "conf/strategy/mutual.yaml"
    assert found["seed"] == (0, "conf/config.yaml")


def test_a_node_wins_over_the_command_line(tmp_path: Path) -> None:
    node = {"model": "resnet18", "device": "cpu", "data-dir": str(tmp_path), "client-name": "ward"}
    overrides = ["data=folder", "data.root=/", "device=cuda", "model.dropout=0.5", "seed=4"]
    found = by_key(overrides, node_config=node)
    assert found["data.root"] == (str(tmp_path), NODE)
    assert found["device"] == ("cpu", NODE)
    assert found["model"] == ("resnet18", NODE)
    assert found["model._target_"] == ("torchvision.models.resnet18", "conf/model/resnet18.yaml")
    assert "model.dropout" not in found  # an argument of the run's model
    assert found["seed"] == (4, COMMAND_LINE)


def test_what_fedmutual_run_fills_in_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("round", "square"):
        (tmp_path / "photos" / "train" / kind).mkdir(parents=True)
        for number in range(20):  # as many as five clients and a public set need; nothing opens them
            (tmp_path / "photos" / "train" / kind / f"{number}.png").touch()
    _, entries = resolved(["data=folder", "data.root=photos", "seed=1"], tmp_path, {})
    found = {entry.key: (entry.value, entry.source) for entry in entries}
    assert found["num_clients"] == (5, RUN)
    assert found["output_dir"][1] == RUN
    assert found["data.root"] == (str(tmp_path / "photos"), COMMAND_LINE)  # made absolute, but typed
    assert found["seed"] == (1, COMMAND_LINE)


def test_a_resumed_run_s_settings_are_told_apart(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "old", {}, "r", ["rounds=7", "seed=2"])
    _, entries = resolved(["resume=old", "seed=3"], tmp_path, {})
    found = {entry.key: (entry.value, entry.source) for entry in entries}
    assert (found["rounds"], found["seed"]) == ((7, RESUMED), (3, COMMAND_LINE))


def test_every_setting_has_a_meaning() -> None:
    known = meanings(compose(["partition=dirichlet"]))
    shown = [entry.key for entry in origins(["partition=dirichlet"]) if "." in entry.key]
    plain = [key for key in shown if not key.endswith("_target_") and not key.startswith("model.")]
    assert len(plain) > 30
    assert [key for key in plain if not known.get(key)] == []


def test_what_is_wrong_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="nosuch"):
        origins(["nosuch=1"])
    assert main(["config", "rounds=0"]) == 2
    assert "rounds: 0 is below 1" in capsys.readouterr().err
    assert main(["config", "--node-config", "device"]) == 2
    assert "--node-config" in capsys.readouterr().err


def test_the_command_prints_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["config", "seed=3", "--changed", "--format", "json", "output_dir=out"]) == 0
    rows = json.loads(capsys.readouterr().out)
    shown = {row["key"]: row["source"] for row in rows}
    assert shown == {
        "seed": COMMAND_LINE, "num_clients": RUN, "output_dir": COMMAND_LINE, "state_dir": RUN,
    }  # fmt: skip
    assert main(["config", "--meaning", "seed=3", "--node-config", 'device="cpu"']) == 0
    table = capsys.readouterr().out
    line = next(row for row in table.splitlines() if row.startswith("seed "))
    assert line.split() == ["seed", "3", "command", "line", "seed", "of", "all", "randomness"]
    assert list(tmp_path.iterdir()) == []
