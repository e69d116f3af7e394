"""From a study to its runs: axes, names, and what is refused before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedmutual.cli import main
from fedmutual.compare.plan import Plan, make_plan
from fedmutual.compare.settings import StudySettings, is_study, load_study
from fedmutual.settings import compose as settings_compose
from fedmutual.settings import hydra_conf
from fedmutual.settings.compose import CONF_DIR

STUDIES = sorted(path.stem for path in CONF_DIR.glob("experiment/*.yaml") if is_study(path.stem))


def plan(*arguments: str, cwd: Path = Path("/")) -> Plan:
    return make_plan(load_study(arguments), cwd)


def test_sweeps_are_hydras_and_every_combination_is_run() -> None:
    made = plan("strategy.kl_weight=0,1", "partition=iid,dirichlet", "seed=range(3)", "rounds=2")
    assert made.variants == ("strategy.kl_weight=0", "strategy.kl_weight=1")
    assert made.conditions == ("iid", "dirichlet")
    assert made.reference == "strategy.kl_weight=0"
    assert [run.seed for run in made.runs] == [0] * 4 + [1] * 4 + [2] * 4  # seed by seed
    assert len({run.folder for run in made.runs}) == 12
    assert {run.rounds for run in made.runs} == {2}
    assert made.runs[0].label == "strategy.kl_weight=0, iid, seed 0"


def test_the_last_folder_of_all_runs_has_one_length() -> None:
    # clients send it as the name of the run: bytes must not depend on the name of a variant
    made = plan("experiment=smoke")
    assert {len(run.folder.split("/")[1]) for run in made.runs} == {16}


def test_a_digest_covers_the_settings_and_not_the_folders() -> None:
    first, again, other = (
        plan("rounds=2", f"cache_dir={cache}", f"train.local_epochs={epochs}").runs[0].digest
        for cache, epochs in (("a", 1), ("b", 1), ("a", 2))
    )
    assert first == again != other


def test_the_command_line_wins_over_the_study() -> None:
    made = plan("experiment=smoke", "seed=7", "rounds=9", "study.reference=local", "study.only=[local]")
    assert made.variants == ("local",)
    assert made.reference == "local"
    assert {(run.seed, run.rounds) for run in made.runs} == {(7, 9)}
    swept = plan("experiment=smoke", "seed=4,5", "study.only=[mutual]")
    assert [run.seed for run in swept.runs] == [4, 4, 5, 5]
    one = plan("experiment=smoke", "study.only=[iid,mutual,local]")
    assert (one.variants, one.conditions) == (("mutual", "local"), ("iid",))
    assert plan("experiment=smoke", "study.only=[iid]").variants == plan("experiment=smoke").variants


def test_a_study_names_its_runs_with_relative_paths_made_absolute(tmp_path: Path) -> None:
    (run,) = plan("rounds=2", "cache_dir=here", cwd=tmp_path).runs
    assert f"cache_dir='{tmp_path}/here'" in run.overrides
    assert not any(override.startswith(("output_dir", "state_dir")) for override in run.overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=smoke", "rounds=0"], "mutual, iid: rounds: 0 is below 1"),
        (["experiment=smoke", 'study.variants.odd=["strategy.nosuch=1"]'], "odd, iid: .*nosuch"),
        (
            ["experiment=smoke", 'study.conditions.odd=["partition=nosuch"]'],
            "mutual, odd: partition: 'nosuch'",
        ),
        (["experiment=smoke", 'study.variants.odd=["rounds=1,2"]'], "study.variants.odd: rounds=1,2: sweeps"),
        (["experiment=smoke", "study.varants={}"], "study.varants"),
        (["experiment=smoke", "study.thresholds=[90]"], "study.thresholds: 90 "),
        (
            ["experiment=smoke", "study.reference=nosuch"],
            "study.reference: 'nosuch' is none of mutual, fedavg, fedasync, local",
        ),
        (
            ["experiment=smoke", "study.only=[nosuch]"],
            "study.only: 'nosuch' is none of mutual, fedavg, fedasync, local, iid, dirichlet-0.3",
        ),
        (["experiment=smoke", "study.axes.seed=0,1"], "study.axes.seed=0,1: .* seed=0,1"),
        (["partition=iid,dirichlet", "partition.alpha=1"], "iid: partition.alpha"),
        (["seed=0,0"], ".* have the same settings"),
        (["seed=0,-1"], "seed: '-1' is no whole number"),
        (["seed=interval(0,1)"], r"study.axes: seed=interval\(0,1\): list the values"),
        (["strategy=glob(*)"], r"study.axes: strategy=glob\(\*\): list the values"),
        (["resume=there"], "resume: every run of a study has its own"),
        (["rounds=[1"], r"'rounds=\[1' is no override"),
        (["experiment=dirichlet", "study.only=[mutual]"], "mutual, .*: data.root: "),
    ],
)
def test_bad_studies_are_refused_by_name(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    assert re.search(f"^fedmutual: {message}", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many files as the studies ask for; nothing opens them."""
    root = tmp_path_factory.mktemp("photographs")
    folders = {f"pool/{kind}": 400 for kind in ("mask", "no_mask")}
    folders |= {f"unseen/{kind}": 10 for kind in ("mask", "no_mask")}
    for part, count in (("train", 100), ("public", 40), ("test", 10)):
        folders |= {f"{part}/{digit}": count for digit in range(10)}
    for folder, count in folders.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{number}.jpg").touch()
    return root


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_expands_to_a_checked_plan(study: str, photographs: Path) -> None:
    content = OmegaConf.load(CONF_DIR / f"experiment/{study}.yaml").study
    own = {"data=facemask", "data=folder"} & set(content.get("overrides", []))
    given = [f"data.root={photographs}"] if own else []
    made = plan(f"experiment={study}", *given)
    assert made.variants == tuple(content.variants)
    points = {run.condition for run in made.runs}
    seeds = {run.seed for run in made.runs}
    assert len(seeds) >= 2
    assert len(made.runs) == len(made.variants) * len(points) * len(
        seeds
    )  # every combination, and none twice
    assert made.reference == content.reference
    compared = {strategy_of(run.overrides) for run in made.runs}
    assert {"mutual"} < compared or study in ("ablations", "closing", "hostile", "late", "public_work")


def test_hundreds_of_runs_are_all_checked_and_hydra_composes_a_few(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[Any] = []
    checked: list[Any] = []
    by_hydra, check = hydra_conf.by_hydra, settings_compose.checked

    def composing(*arguments: Any) -> Any:
        composed.append(arguments)
        return by_hydra(*arguments)

    def checking(config: Any) -> Any:
        checked.append(config)
        return check(config)

    monkeypatch.setattr(hydra_conf, "by_hydra", composing)
    monkeypatch.setattr(settings_compose, "checked", checking)
    hydra_conf._conf.cache_clear()
    settings_compose._compose.cache_clear()
    made = plan("experiment=digits", f"data.root={photographs}")
    seeds = len({run.seed for run in made.runs})
    assert len(made.runs) > 400
    assert len(checked) == 2 * len(made.runs) / seeds  # as it is typed, and with its paths
    assert len(composed) <= 10  # 0.2 to 0.4 CPU seconds each


def strategy_of(overrides: tuple[str, ...]) -> str:
    return next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("strategy=")), "mutual")


def test_the_defaults_are_complete() -> None:
    defaults = OmegaConf.merge(OmegaConf.structured(StudySettings), OmegaConf.load(CONF_DIR / "compare.yaml"))
    assert not OmegaConf.missing_keys(defaults)
