"""Every file of conf/ composes, and what is wrong is refused with the key's name."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from fedmutual.compare.settings import is_study
from fedmutual.data.custom import CustomSettings
from fedmutual.models.build import build_model
from fedmutual.settings import (
    AugmentSettings,
    OptimizerSettings,
    PublicSettings,
    Settings,
    SettingsError,
    as_container,
)
from fedmutual.settings.compose import CONF_DIR, GROUP_KEYS, compose, from_contexts, run_config_overrides
from fedmutual.strategies.mutual import MutualLoss

GROUPS = {
    "strategy",
    "consensus",
    "model",
    "data",
    "partition",
    "public",
    "optimizer",
    "augment",
    "experiment",
}
STUDIES = {
    path.stem for path in CONF_DIR.glob("experiment/*.yaml") if is_study(path.stem)
}  # several runs each
OPTIONS = sorted(
    (path.parent.name, path.stem) for path in CONF_DIR.glob("*/*.yaml") if path.stem not in STUDIES
)  # (group, name of the file)


def yaml_keys(path: Path) -> set[str]:
    values = OmegaConf.load(path)
    return {str(key) for key in values if key not in ("_target_", "defaults")}  # type: ignore[union-attr]


def names(schema: Any) -> set[str]:
    return {entry.name for entry in fields(schema)}


@pytest.fixture
def required(tmp_path: Path) -> dict[tuple[str, str], list[str]]:
    """What an option cannot do without."""
    root = f"data.root='{tmp_path}'"
    return {
        ("data", "folder"): [root],
        ("data", "facemask"): [root],
        ("data", "huggingface"): ["data.dataset=cifar10"],
        ("data", "custom"): ["data._target_=small_data.torch_sets"],
        ("model", "custom"): ["model._target_=torchvision.models.vgg11"],
        ("strategy", "fed3r"): ["model=pretrained"],
        ("strategy", "speaker"): ["model=pretrained"],
    }


# ---------------------------------------------------------------------------------------------------
# conf/


def test_the_groups_are_the_folders_of_conf() -> None:
    assert {group for group, _ in OPTIONS} == GROUPS == set(GROUP_KEYS)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str, required: dict[tuple[str, str], list[str]]) -> None:
    settings = compose([f"{group}={option}", *required.get((group, option), [])])
    if group == "experiment":
        assert settings.experiment_name == option
    if group == "model" and option != "custom":
        assert settings.model.target == OmegaConf.load(CONF_DIR / f"model/{option}.yaml")["_target_"]


def test_what_is_saved_tells_two_classes_with_the_same_fields_apart() -> None:
    iid, natural = (as_container(compose([f"partition={name}"]))["partition"] for name in ("iid", "natural"))
    assert iid.keys() == natural.keys()
    assert iid != natural


@pytest.mark.parametrize(
    ("group", "option"),
    [pair for pair in OPTIONS if pair[0] in ("strategy", "consensus", "data", "partition")],
)
def test_a_targets_file_holds_its_fields_and_no_others(group: str, option: str) -> None:
    path = CONF_DIR / group / f"{option}.yaml"
    if option == "custom":  # its function's arguments are added
        assert yaml_keys(path) == names(CustomSettings) - {"target", "arguments"}
        return
    assert yaml_keys(path) == names(get_class(OmegaConf.load(path)["_target_"]))  # type: ignore[index]


@pytest.mark.parametrize(
    ("group", "option"), [pair for pair in OPTIONS if pair[0] in ("public", "optimizer", "augment")]
)
def test_a_plain_groups_file_holds_its_fields_and_no_others(group: str, option: str) -> None:
    schema = {"public": PublicSettings, "optimizer": OptimizerSettings, "augment": AugmentSettings}[group]
    assert yaml_keys(CONF_DIR / group / f"{option}.yaml") == names(schema)


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "model"])
def test_a_models_file_names_target_and_per_client(option: str) -> None:
    values = OmegaConf.load(CONF_DIR / "model" / f"{option}.yaml")
    assert {"_target_", "per_client"} <= set(values)  # type: ignore[arg-type]


def test_config_yaml_holds_everything_that_is_in_no_group() -> None:
    config = OmegaConf.load(CONF_DIR / "config.yaml")
    assert yaml_keys(CONF_DIR / "config.yaml") == names(Settings) - GROUPS
    for entry in fields(Settings):
        if entry.name in yaml_keys(CONF_DIR / "config.yaml") and OmegaConf.is_config(config[entry.name]):
            schema = get_class(f"fedmutual.settings.{entry.name.capitalize()}Settings")
            assert set(config[entry.name]) == names(schema)


def test_the_defaults() -> None:
    settings = compose()
    assert (settings.strategy.name, settings.data.image_size, settings.rounds) == ("mutual", 40, 12)
    assert settings.model.target == "fedmutual.models.visionnet.VisionNet"
    assert settings.model.arguments == {"dropout": 0.2}
    # the recipe that holds under label skew (METHOD, section 5)
    assert settings.train.prior_correction
    assert settings.train.common_start
    assert settings.strategy.phase == "mixed"
    assert not settings.public.labelled


def test_experiment_paper_is_method_section_3() -> None:
    settings = compose(["experiment=paper"])
    model, arguments = build_model(settings.model, num_classes=2, image_size=100, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 1_862_785
    assert arguments["dropout"] == 0.2
    expected = {
        "data.image_size": 100,
        "partition": {"_target_": "fedmutual.data.partition.Stream"},
        "rounds": 12,
        "public.schedule": "kfold",
        "public.size": None,
        "public.labelled": True,
        # 10 epochs on the warm-start fold, from which all start
        "train": {
            "warm_start_epochs": 10,
            "common_start": True,
            "local_epochs": 10,
            "batch_size": 32,
            "validation_fraction": 0.2,
            "prior_correction": False,
            "prior_smoothing": None,
            "recompute_norm": True,  # its network has nothing of the kind
            "ema_decay": 0.0,
            "class_weights": "none",
            "focal_gamma": 0.0,
            "keep": "last",
        },
        "optimizer": {
            "name": "adam",
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup": 0.0,
            "clip_norm": None,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "keep_state": True,
        },
        # 10 epochs on the public fold: a phase of its own, so a fresh Adam; CE + 1 * mean KL(own || peer)
        "strategy.phase": "separate",
        "strategy.mutual_epochs": 10,
        "strategy.divergence": "own_peer",
        "strategy.temperature": 1.0,
        "strategy.kl_weight": 1.0,
        "strategy.burn_in": 0,
        "strategy.probability_floor": 1e-7,
    }
    container = OmegaConf.create(as_container(settings))
    for key, value in expected.items():
        found = OmegaConf.select(container, key)
        assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value, key
    mutual = settings.strategy
    loss = MutualLoss(mutual.divergence, mutual.temperature, mutual.kl_weight, mutual.burn_in)
    assert [loss.weight(round) for round in (1, 12)] == [1.0, 1.0]


def test_paper_code_differs_from_paper_in_the_divergence_only() -> None:
    paper, code = (
        as_container(compose(["experiment=paper"])),
        as_container(compose(["experiment=paper_code"])),
    )
    assert code["strategy"].pop("divergence") == "published_code"
    assert paper["strategy"].pop("divergence") == "own_peer"
    assert code.pop("experiment_name") == "paper_code"
    assert paper.pop("experiment_name") == "paper"
    assert code == paper


def test_an_override_wins_over_an_experiment() -> None:
    settings = compose(["experiment=paper", "rounds=3", "strategy.mutual_epochs=2"])
    assert (settings.rounds, settings.strategy.mutual_epochs) == (3, 2)


# ---------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # unknown
        ("strategy.kl_weigth=1", "strategy.kl_weigth"),
        ("nosuch=1", "nosuch"),
        ("model.dropuot=0.3", "model.dropuot"),
        ("+nosuch=1", "nosuch: no such setting"),
        ("+train.epochs=1", "train.epochs: no such setting"),
        ("+strategy.nosuch=1", "strategy.nosuch"),
        # what may have been meant
        ("stratgy=mutual", r"stratgy: no such setting: did you mean strategy\?"),
        ("strategy=mutaul", r"'mutaul' is none of .*: did you mean mutual\?"),
        ("train.local_epoch=3", r"no such setting: did you mean train\.local_epochs\?"),
        ("lr=1", r"lr: no such setting: did you mean optimizer\.learning_rate\?"),
        ("batch_size=8", r"did you mean (evaluation|train)\.batch_size or (train|evaluation)\.batch_size\?"),
        ("data.root=x", "no such setting here, but with data=facemask, data=folder: choose one first"),
        ("data=folder data.root=a,b", r"a list is data\.root=\[a,b\], and a text with a comma is quoted"),
        ("optimizer.schedule=cosin", r"is none of .*: did you mean cosine\?"),
        ("seed=${oops}", "there is no setting 'oops'"),
        ("model=nosuch", "model: 'nosuch' is none of .*visionnet"),
        ("experiment=papre", "experiment: 'papre' is none of ablations, architectures, "),
        ("strategy._target_=no_package.Class", "strategy._target_: no class 'no_package.Class'"),
        ("strategy._target_=fedmutual.data.faces.FacesSettings", "strategy._target_: .* no StrategySettings"),
        # missing
        ("~rounds", "rounds: needs a value"),
        ("~train.batch_size", "train.batch_size: a setting cannot be removed"),
        ("~strategy", "strategy: needs a value"),
        ("model=custom", "model._target_: needs a value"),
        # of the wrong type
        ("rounds=abc", "rounds: 'abc' is no whole number"),
        ("rounds=null", "rounds.* not Optional"),
        ("rounds=[1]", "rounds: .* is no whole number"),
        ("train.batch_size=1.5", "train.batch_size: .*1.5.* is no whole number"),
        ("train.prior_correction=maybe", "train.prior_correction: 'maybe' is neither true nor false"),
        ("train=5", "train: "),
        ("strategy=null", "strategy: needs the name of a file"),
        ("strategy.temperature=hot", "strategy.temperature: 'hot' is no number"),
        ("strategy.name=null", "strategy.name: "),
        ("partition=size partition.weights=[1,a]", r"partition.weights\[1\]: .* is no number"),
        ("model=custom model._target_=resnet18", "model._target_: 'resnet18' is no dotted path"),
        ("model.per_client=resnet18", "model.per_client: 'resnet18' is no list"),
        ("model.per_client=[1]", r"model.per_client: \[1\] is no list of model names"),
        # out of range
        ("rounds=0", "rounds: 0 is below 1"),
        ("seed=-1", "seed: -1 is below 0"),
        ("precision=fp8", "precision: 'fp8' is none of fp32, bf16, fp16"),
        ("public.schedule=x", "public.schedule: 'x' is none of static, kfold, sample"),
        ("public.per_round=0", "public.per_round: 0 is below 1"),
        ("strategy.temperature=0", "strategy.temperature: 0.0 is not above 0"),
        ("strategy.temperature=nan", "strategy.temperature: nan is no finite number"),
        ("strategy.kl_weight=inf", "strategy.kl_weight: inf is no finite number"),
        ("strategy.kl_weight=-0.1", "strategy.kl_weight: -0.1 is below 0"),
        ("strategy.probability_floor=0.5", "strategy.probability_floor: 0.5 is above 0.1"),
        ("strategy.wire_dtype=float64", "strategy.wire_dtype: 'float64' is none of"),
        ("train.validation_fraction=0.95", "train.validation_fraction: 0.95 is above 0.9"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: 0.0 is not above 0"),
        ("optimizer=sgd optimizer.momentum=1.1", "optimizer.momentum: 1.1 is above 1"),
        ("partition=dirichlet partition.alpha=-1", "partition.alpha: -1.0 is not above 0"),
        ("data.image_size=4", "data.image_size: 4 is below 8"),
        # what a class checks by itself
        ("partition=size partition.weights=[1,0]", "partition.weights: .* not all above 0"),
        ("data=folder data.root=/no/such/folder", "data.root: /no/such/folder"),
        ("data=huggingface", "data.dataset: no data set"),
        (
            "strategy.divergence=published_code strategy.temperature=2",
            "strategy.temperature: 2, but divergence=published_code",
        ),
        ("strategy.public_epochs=three", "public_epochs: 'three' is none of auto, nor a number"),
        ("strategy.public_epochs=0", "strategy.public_epochs: 0 is below 1"),
        ("strategy.public_epochs=1.5", "strategy.public_epochs: '1.5' is neither a whole number nor a word"),
        ("strategy.public_epochs=[1]", r"strategy.public_epochs: '\[1\]' is neither a whole number"),
        ("strategy.public_epochs=null", "strategy.public_epochs: 'None' is neither a whole number"),
        ("strategy.public_epochs=auto strategy.phase=separate", "strategy.public_epochs: .* phase=mixed"),
        ("strategy.public_epochs=auto strategy.closing=public", "strategy.public_epochs: .* closing=public"),
        ("strategy=fedavg strategy.public_epochs=auto", "strategy.public_epochs: 'auto' is no whole number"),
        ("strategy=speaker strategy.public_epochs=auto", "strategy.public_epochs: 'auto' is no whole number"),
        # not Hydra's grammar
        ("rounds=[1", r"\[1"),
        ("rounds", "rounds"),
        ("seed=1 rounds=1=2", "'rounds=1=2' is no override"),
    ],
)
def test_what_is_wrong_is_refused_by_name(overrides: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        compose(overrides.split())


def test_the_next_composition_is_not_disturbed_by_a_refused_one() -> None:
    with pytest.raises(SettingsError):
        compose(["rounds=abc"])
    assert compose(["rounds=2"]).rounds == 2


def test_a_packed_app_without_conf_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fedmutual.settings.compose.CONF_DIR", tmp_path / "conf")
    with pytest.raises(SettingsError, match="conf is missing"):
        compose(["seed=123456"])


# ---------------------------------------------------------------------------------------------------
# From Flower's contexts


def test_a_composition_is_made_once() -> None:
    first = compose(["rounds=5"], {"device": "cpu", "partition-id": 0})
    assert compose(("rounds=5",), {"partition-id": 1, "device": "cpu"}) is first
    assert compose(["rounds=6"], {"device": "cpu"}) is not first


def test_a_nodes_own_configuration_wins(tmp_path: Path) -> None:
    run_config = {
        "data": "folder",
        "overrides": f"data.root='{tmp_path}' device=cuda state_dir=/run rounds=4",
    }
    site = tmp_path / "site"
    site.mkdir()
    node_config = {
        "data-dir": str(site),
        "state-dir": "/var/state",
        "device": "cpu",
        "model": "resnet18",
        "partition-id": 3,
        "client-name": "ward",
    }
    settings = from_contexts(run_config, node_config)
    assert (settings.data.root, settings.state_dir, settings.device) == (str(site), "/var/state", "cpu")
    assert settings.model.target == "torchvision.models.resnet18"
    assert settings.rounds == 4
    plain = from_contexts(run_config)
    assert (plain.data.root, plain.state_dir, plain.device) == (str(tmp_path), "/run", "cuda")
    assert plain.model.target == "fedmutual.models.visionnet.VisionNet"


@pytest.mark.parametrize(
    ("run", "target", "arguments"),
    [
        (["model=custom", "model._target_=torchvision.models.vgg11"], "resnet18", {}),
        (["model.dropout=0.5", "+model.extra=1"], "resnet18", {}),
        (["model.dropout=0.5"], "visionnet", {"dropout": 0.2}),
        (["model.per_client=[visionnet]"], "torchvision.models.resnet18", {}),
    ],
)
def test_a_nodes_model_leaves_the_runs_behind(run: list[str], target: str, arguments: dict[str, Any]) -> None:
    model = compose(run, {"model": target}).model
    assert model.target.rpartition(".")[2].lower() == target.rpartition(".")[2]
    assert model.arguments == arguments


@pytest.mark.parametrize(
    "name",
    ["a b", "it's", 'a "quoted" one', "a,b={c}(d)", "back\\slash", "end\\", "a\\'b", "null", "é", "[0]"],
)
def test_a_nodes_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    folder = str(tmp_path / name)
    assert compose([], {"state-dir": folder}).state_dir == folder
    assert compose([], {"state-dir": name}).state_dir == name


def test_a_nodes_folder_must_exist_and_suit_the_data(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.root: .*absent"):
        compose(["data=folder"], {"data-dir": str(tmp_path / "absent")})
    with pytest.raises(SettingsError, match="data-dir: this run's data source reads no folder"):
        compose(["data=faces"], {"data-dir": str(tmp_path)})
    hub = compose(["data=huggingface", "data.dataset=cifar10"], {"data-dir": str(tmp_path)})
    assert hub.data.dataset == str(tmp_path)


def test_run_config_chooses_groups_and_empty_strings_do_not() -> None:
    empty = dict.fromkeys((*GROUP_KEYS, "seed", "rounds", "output_dir", "overrides"), "")
    assert run_config_overrides(empty) == []
    assert from_contexts(empty) is compose()
    chosen = {**empty, "partition": "dirichlet", "seed": 7, "overrides": "partition.alpha=0.1 rounds=2"}
    settings = from_contexts(chosen)
    assert (settings.partition.alpha, settings.seed, settings.rounds) == (0.1, 7, 2)
    assert run_config_overrides({**empty, "seed": 0}) == ["seed=0"]  # 0 is a value


@pytest.mark.parametrize("key", ["output_dir", "state_dir", "cache_dir", "resume"])
def test_an_app_refuses_relative_folders(key: str) -> None:
    with pytest.raises(SettingsError, match=f"{key}: 'results' is relative"):
        from_contexts({"overrides": f"{key}=results"})


def test_overrides_come_last_and_win() -> None:
    assert from_contexts({"rounds": 3, "overrides": "rounds=4"}).rounds == 4


def test_overrides_may_be_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    given = ["data=folder", f"data.root='{folder}'", "partition=size", "partition.weights=[1, 2]"]
    assert run_config_overrides({"overrides": shlex.join(given)}) == given
    settings = from_contexts({"overrides": shlex.join(given)})
    assert (settings.data.root, settings.partition.weights) == (str(folder), [1.0, 2.0])
    with pytest.raises(SettingsError, match=r"overrides: No closing quotation.*data\.root"):
        from_contexts({"overrides": "data.root='open"})


def test_the_saved_form_composes_to_the_same_settings() -> None:
    settings = compose(["experiment=paper", "seed=3"])
    saved = as_container(settings)
    assert saved["strategy"]["divergence"] == "own_peer"
    assert OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(saved))) == saved


def test_a_study_is_no_settings_of_a_run() -> None:
    with pytest.raises(SettingsError, match=r"experiment: .*smoke is a study .* `fedmutual compare`"):
        compose(["experiment=smoke"])
