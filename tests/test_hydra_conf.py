"""What is composed from what Hydra made before is what Hydra would make: values, types, flags, messages."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, ListConfig

from fedmutual.compare.settings import is_study
from fedmutual.settings import SettingsError, hydra_conf
from fedmutual.settings import compose as composition
from fedmutual.settings.compose import CONF_DIR, compose
from fedmutual.settings.hydra_conf import by_hydra, config_of

EXPERIMENTS = [
    f"experiment={path.stem}"
    for path in sorted(CONF_DIR.glob("experiment/*.yaml"))
    if not is_study(path.stem)
]
CHOICES = {
    path.name: [f"{path.name}={file.stem}" for file in sorted(path.glob("*.yaml"))]
    for path in sorted(CONF_DIR.iterdir())
    if path.is_dir() and path.name != "experiment"
}
VALUES = (
    "seed=3",
    "rounds=7",
    "experiment_name='a b'",
    "num_clients=null",
    "train.ema_decay=0.5",
    "train.batch_size=32",
    "train={batch_size: 3, local_epochs: 2}",
    "optimizer.learning_rate=1",  # a float by its schema
    "optimizer.keep_state=no",
    "strategy.name=x",
    "strategy={name: y}",
    "model.per_client=[visionnet,resnet18]",
    "participation.absent=[client-4:1-7,client-1:3-3]",
    "emulation.speeds=[1,2.5]",
    "tracking.loggers=[]",
    "cache_dir=${output_dir}/cache",
    "output_dir=/out",
    "data.image_size=${train.batch_size}",
    "state_dir=${nosuch}",
)  # fmt: skip
OTHERS = (
    "+model.x=1",
    "++model.x={a: 1}",
    "~rounds",
    "~strategy",
    "~model.dropout",
    "+train.x=1",
    "hydra.job.name=x",
)
WRONG = (
    "rounds=abc", "nosuch=1", "strategy.nosuch=1", "strategy=nosuch", "strategy=null", "train=5", "seed=1,2",
    "strategy=[mutual,local]", "model=custom", "train.x.y=1", "rounds.x=1", "seed@here=1", "rounds=[1",
    "strategy@here=mutual", "strategy=", "public.size=x", "optimizer.name=null", "experiment=smoke", "rounds",
    "experiment=null", "data/nosuch=1", "participation.absent[0]=client-2:1-1",
)  # fmt: skip


def anatomy(node: Any) -> Any:
    """All of a node that OmegaConf goes by: values as they are written, types, flags, and where it hangs."""
    about = node._metadata
    kept = {name: value for name, value in (about.flags or {}).items() if value is not None}
    own = (type(node), about.ref_type, about.object_type, about.optional, kept, node._get_full_key(None))
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        return own, [(key, anatomy(node._get_node(key))) for key in node]
    if isinstance(node, ListConfig) and not node._is_none():
        return own, [anatomy(child) for child in node._content]
    return own, node._value()


def made(function: Any, overrides: Sequence[str], folder: Path = CONF_DIR) -> Any:
    """A config's anatomy, or the error and what led to it."""
    try:
        return anatomy(function(folder, overrides))
    except Exception as error:
        return [(type(one), str(one)) for one in (error, error.__cause__)]


def same(overrides: Sequence[str], folder: Path = CONF_DIR) -> bool:
    return bool(made(config_of, overrides, folder) == made(by_hydra, overrides, folder))


@pytest.mark.parametrize("experiment", [[], *([name] for name in EXPERIMENTS)], ids=str)
def test_every_experiment_is_hydras(experiment: list[str]) -> None:
    first, last = ([options[i] for options in CHOICES.values()] for i in (0, -1))
    for more in ([], first[:3], last, [*first, *last[::2]], [*last, *VALUES[:-1]]):
        assert same([*experiment, *more]), more
    assert isinstance(
        made(config_of, [*experiment, *last, *VALUES[:-1]]), tuple
    )  # and no error on both sides


@pytest.mark.parametrize("override", [*VALUES, *OTHERS, *WRONG])
def test_every_kind_of_override_is_hydras(override: str) -> None:
    assert same(["partition=dirichlet", "seed=5", override, "rounds=3"])


@settings(max_examples=25)
@given(
    st.sampled_from(["", *EXPERIMENTS]),
    st.lists(st.sampled_from([option for options in CHOICES.values() for option in options]), max_size=5),
    st.lists(st.sampled_from([*VALUES, *OTHERS, *WRONG]), max_size=4),
    st.randoms(use_true_random=False),
)
def test_any_mixture_is_hydras(experiment: str, choices: list[str], values: list[str], order: Random) -> None:
    overrides = [*([experiment] if experiment else []), *choices, *values]
    order.shuffle(overrides)
    assert same(overrides), overrides


@pytest.mark.parametrize("override", WRONG)
def test_what_is_refused_is_refused_in_hydras_words(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as ours:
        compose(["partition=size", override])
    monkeypatch.setattr(composition, "config_of", by_hydra)
    with pytest.raises(SettingsError) as hydras:
        compose(["partition=size", override, "rounds=12"])  # not the remembered one
    assert str(ours.value).replace(" rounds=12", "") == str(hydras.value).replace(" rounds=12", "")


def test_a_config_is_the_callers_own() -> None:
    first = config_of(CONF_DIR, ["partition=dirichlet"])
    first.partition.alpha = 9.0
    first.train.batch_size = 1
    assert same(["partition=dirichlet"])


def test_hydra_is_asked_once_for_a_choice(monkeypatch: pytest.MonkeyPatch, conf: Path) -> None:
    asked = []
    monkeypatch.setattr(hydra_conf, "by_hydra", lambda *given: asked.append(given) or by_hydra(*given))
    for partition, strategy, seed in itertools.product(CHOICES["partition"], CHOICES["strategy"], range(3)):
        config_of(conf, [partition, strategy, f"seed={seed}"])
    assert len(asked) == len(CHOICES["partition"]) + len(CHOICES["strategy"]) - 1


# ---------------------------------------------------------------------------------------------------
# A conf/ of one's own


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(CONF_DIR, tmp_path / "conf"))


def test_a_file_that_changed_is_read_again(conf: Path) -> None:
    assert config_of(conf, ["strategy=mutual"]).strategy.name == "mutual"
    file = conf / "strategy" / "mutual.yaml"
    file.write_text(file.read_text().replace("name: mutual", "name: changed"))
    assert config_of(conf, ["strategy=mutual"]).strategy.name == "changed"
    (conf / "strategy" / "new.yaml").write_text(file.read_text())
    assert config_of(conf, ["strategy=new"]).strategy.name == "changed"


@pytest.mark.parametrize(
    ("group", "odd"),
    [
        ("optimizer", "defaults:\n  - sgd\n  - override /partition@_global_.partition: size\n  - _self_\n"),
        ("strategy", "# @package _global_\nstrategy: {name: odd}\npartition: {alpha: 7}\n"),
        ("strategy", "{defaults: [mutual, _self_], name: odd}\n"),
    ],
)
def test_a_choice_that_draws_in_others_is_hydras(group: str, odd: str, conf: Path) -> None:
    (conf / group / "odd.yaml").write_text(odd)
    for other in ("partition=dirichlet", "public=sample", "partition=iid"):
        assert same([other], conf)
        assert same([f"{group}=odd", other], conf)
        assert by_hydra(conf, [f"{group}=odd", other]) != by_hydra(conf, [other])


@pytest.mark.parametrize("place", ["config.yaml", "experiment/odd.yaml"])
def test_a_choice_by_another_groups_choice_is_hydras(place: str, conf: Path) -> None:
    (conf / "optimizer" / "by_partition").mkdir()
    for partition in ("iid", "dirichlet"):
        text = f"# @package optimizer\nlearning_rate: 0.{len(partition)}\n"
        (conf / "optimizer" / "by_partition" / f"{partition}.yaml").write_text(text)
    (conf / "experiment" / "odd.yaml").write_text("# @package _global_\nrounds: 2\n")
    file = conf / place
    if place == "config.yaml":
        line = "  - experiment: null\n"
        assert line in file.read_text()
        file.write_text(file.read_text().replace(line, "  - optimizer/by_partition: ${partition}\n" + line))
    else:
        file.write_text(
            "# @package _global_\ndefaults:\n  - override /optimizer: by_partition/${partition}\n"
        )
    rates = set()
    for choices in itertools.product(("partition=iid", "partition=dirichlet"), CHOICES["public"]):
        assert same(["experiment=odd", *choices], conf)
        rates.add(config_of(conf, ["experiment=odd", *choices]).optimizer.learning_rate)
    assert rates == {0.3, 0.9}
