"""The command line: refusals before anything starts, and what is handed to Flower."""

import datetime
import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmutual.models.lookup import dotted_path_problem, models_problem
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import ModelSettings, SettingsError
from fedmutual.settings.compose import compose, run_config_overrides
from fedmutual.simulation import request as request_module
from fedmutual.simulation.request import DEFAULT_CLIENTS, VISIONNET, hydra_override, prepare, toml_string

ROOT = Path(__file__).resolve().parents[1]
NOW = datetime.datetime(2026, 1, 31, 12, 0, 7)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedmutual", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


REFUSED = {
    "no such setting": (["train.nosuch=1"], "nosuch"),
    "no number": (["train.batch_size=many"], "train.batch_size"),
    "out of range": (["rounds=0"], "rounds"),
    "no such strategy": (["strategy=nosuch"], "strategy"),
    "no such folder": (["data=folder", "data.root=does/not/exist"], "data.root"),
    "no such model": (["model=custom", "model._target_=torchvision.models.resnet999"], "model._target_"),
    "no such model of a client": (["model.per_client=[visionnet,resnet999]"], "model.per_client"),
    "no such run": (["resume=does/not/exist"], "resume"),
    "too small": (["data.image_size=17"], "data.image_size"),
    "too few weights": (["partition=size", "partition.weights=[1,2]"], "partition.weights"),
    "too many models": (
        ["model.per_client=[visionnet,resnet18,resnet18]", "num_clients=2"],
        "model.per_client",
    ),
    "not writable": (["output_dir=/proc/nosuch/run"], "output_dir"),  # the kernel refuses it also to root
    "below a file": (["output_dir=/dev/null/run"], "output_dir"),
    "nothing private": (["public.size=2000"], "public.size"),
}
REFUSE = """
import contextlib, io, json, sys, time
from fedmutual.cli import main

for name, (overrides, _) in json.load(sys.stdin).items():
    before, said = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["run", *overrides])
    heavy = [name for name in ("torch", "torchvision", "ray", "matplotlib") if name in sys.modules]
    print(json.dumps([name, code, said.getvalue(), time.process_time() - before, heavy]))
"""


HELP = """
import contextlib, io, json, sys, time
from fedmutual.cli import main

with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["--help"])
heavy = [name for name in ("numpy", "hydra", "omegaconf", "flwr", "rich", "psutil") if name in sys.modules]
print(json.dumps([time.process_time(), heavy]))
"""


def test_help_is_there_at_once() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HELP], env=environment, capture_output=True, timeout=120)
    seconds, heavy = json.loads(done.stdout)
    assert heavy == []
    assert seconds < 0.3  # of CPU time, the interpreter's own start included: 0.1


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, float, list[str]]]:
    """What a fresh process makes of each: exit code, stderr, CPU seconds, and what is heavy and imported."""
    folder = tmp_path_factory.mktemp("refusals")
    done = subprocess.run(
        [sys.executable, "-c", REFUSE],
        input=json.dumps(REFUSED),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return {name: tuple(rest) for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_by_name_and_at_once(
    case: str, refusals: dict[str, tuple[int, str, float, list[str]]]
) -> None:
    code, said, seconds, heavy = refusals[case]
    assert code == 2, said
    assert REFUSED[case][1] in said
    assert "Traceback" not in said
    assert heavy == []
    assert seconds < 5  # of CPU time: the first one has half a second of imports


def test_a_refusal_is_the_commands_exit_code() -> None:
    result = command("run", "rounds=0")
    assert result.returncode == 2
    assert "rounds: 0 is below 1" in result.stderr


def test_version_help_and_unknown_options() -> None:
    assert command("--version").stdout.startswith("fedmutual ")
    assert "fedmutual run partition=dirichlet partition.alpha=0.3" in command("run", "--help").stdout
    result = command("run", "rounds=1", "--verbos", "seed=1")
    assert result.returncode == 2
    assert "--verbos" in result.stderr


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.image_size=18"], None),
        (["data.image_size=17"], "data.image_size: 17 is below 18"),
        (["data.image_size=17", "model=resnet18"], None),
        (["data.image_size=17", "model.per_client=[resnet18]"], None),
        (
            ["data.image_size=17", "model=resnet18", "model.per_client=[resnet18,visionnet]"],
            "data.image_size",
        ),
        (["data.image_size=17", f"model.per_client=[resnet18,{VISIONNET[1]}]"], "data.image_size"),
        (["partition=size"], None),
        (["partition=size", "partition.weights=[1,2,3,4,5]"], None),
        (["partition=size", "partition.weights=[1,2]", "num_clients=2"], None),
        (["partition=size", "partition.weights=[1,2]"], "partition.weights: 2 weights for 5 clients"),
        (["model.per_client=[resnet18,visionnet]", "num_clients=2"], None),
        (["model.per_client=[resnet18,visionnet]"], None),  # in turn
        (["model.per_client=[resnet18,visionnet]", "num_clients=1"], "model.per_client: 2 models for 1"),
        (["model.dropout=0"], None),
        (["model.dropout=much"], "model.dropout: 'much' is no float"),
        (["model.dropout=true"], "model.dropout: True is no float"),
        (["+model.width=2"], "model.width: fedmutual.models.visionnet.VisionNet takes no such argument"),
        (
            ["model=vit_small", "model.num_heads=2.5"],
            "model.num_heads: 2.5 is no int",
        ),  # of torchvision's source
        (["model=vit_small", "+model.depth=2"], "model.depth: "),
        (["model=resnet18", "+model.width_per_group=32"], None),  # takes **kwargs
        (["model=vit_small", "data.image_size=40"], None),
        (
            ["model=vit_small", "data.image_size=50"],
            "data.image_size: 50 is no multiple of model.patch_size=8",
        ),
        (["data.pool_size=20", "num_clients=17"], None),
        (["data.pool_size=20", "num_clients=18"], "num_clients: 18 clients cannot share 17 images"),
        (
            ["data.pool_size=20", "public.size=20"],
            "public.size: 20 of the pool's 20 images leaves",
        ),
        (["data.pool_size=146", "experiment=paper"], None),
        (["data.pool_size=145", "experiment=paper"], "partition=stream splits the pool into"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    overrides: list[str], problem: str | None, tmp_path: Path
) -> None:
    if problem is None:
        prepare(overrides, tmp_path, NOW)
        return
    with pytest.raises(SettingsError) as refusal:
        prepare(overrides, tmp_path, NOW)
    assert str(refusal.value).startswith(problem)


def test_folders_are_looked_into_before_anything_starts(tmp_path: Path) -> None:
    def refusal(*overrides: str) -> str:
        with pytest.raises(SettingsError) as error:
            prepare(["data=folder", f"data.root={tmp_path}", *overrides], tmp_path, NOW)
        return str(error.value)

    assert refusal().startswith(f"data.root: {tmp_path} has neither a train nor a public folder")
    (tmp_path / "train/a").mkdir(parents=True)
    assert "1 class folders ['a'], but 2 are needed" in refusal()
    (tmp_path / "train/b").mkdir()
    assert "train has no images" in refusal()
    for name in ("a/1", "a/2", "b/1", "b/2"):  # never opened
        (tmp_path / f"train/{name}.png").touch()
    assert refusal("public.size=4").startswith("public.size: 4 of the pool's 4 images leaves no")
    assert refusal().startswith("num_clients: 5 clients cannot share 3 images")
    (tmp_path / "public").mkdir()
    (tmp_path / "public/1.png").touch()
    prepare(["data=folder", f"data.root={tmp_path}", "num_clients=4", "public.size=9"], tmp_path, NOW)
    assert refusal().startswith("num_clients: 5 clients cannot share 4 images")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SettingsError, match=f"output_dir: .*{tmp_path} is not writable"):
        prepare([], tmp_path, NOW)


class TestQuoting:
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=4))
    def test_overrides_survive_toml_and_shlex(self, overrides: list[str]) -> None:
        text = f"overrides = {toml_string(shlex.join(overrides))}\n"
        assert run_config_overrides(tomllib.loads(text)) == overrides

    @pytest.mark.parametrize(
        "value",
        [
            "plain",
            "two words",
            "it's",
            'say "no"',
            "a,b=[c]{d}",
            "C:\\data\\new",
            "ends\\",
            "größe 图",
            "a#b",
            "~x",
        ],
    )
    def test_hydra_reads_the_very_string(self, value: str) -> None:
        assert compose([hydra_override("experiment_name", value)]).experiment_name == value

    def test_lists_and_spaces_together(self, tmp_path: Path) -> None:
        overrides = ["experiment_name='two words'", "model.per_client=[visionnet, resnet18]"]
        request = prepare(overrides, tmp_path, NOW)
        received = run_config_overrides(tomllib.loads(request.run_config))
        settings = compose(received)
        assert settings == request.settings
        assert settings.experiment_name == "two words"
        assert settings.model.per_client == ["visionnet", "resnet18"]


class TestPaths:
    def test_output_dir_is_named_by_date_time_and_strategy(self, tmp_path: Path) -> None:
        request = prepare([], tmp_path, NOW)
        assert request.output_dir == tmp_path / "outputs" / "2026-01-31" / "12-00-07-mutual"
        assert request.settings.output_dir == str(request.output_dir)
        assert request.settings.state_dir == str(request.output_dir / "clients")
        assert not request.output_dir.exists()

    def test_a_taken_default_gets_a_number(self, tmp_path: Path) -> None:
        prepare([], tmp_path, NOW).output_dir.mkdir(parents=True)
        assert prepare([], tmp_path, NOW).output_dir.name == "12-00-07-mutual-2"

    def test_relative_paths_start_at_the_caller(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a", "b"):
            (tmp_path / "my photos" / "train" / name).mkdir(parents=True)
            for number in range(5):
                (tmp_path / f"my photos/train/{name}/{number}.png").touch()
        overrides = [
            "data=folder",
            "data.root='my photos'",
            "state_dir=../states",
            "cache_dir=cache",
            "output_dir=out",
        ]
        settings = prepare(overrides, tmp_path, NOW).settings
        assert settings.data.root == str(tmp_path / "my photos")
        assert settings.state_dir == str(tmp_path.parent / "states")
        assert settings.cache_dir == str(tmp_path / "cache")
        assert settings.output_dir == str(tmp_path / "out")

    def test_a_tilde_is_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert prepare(["state_dir=~/states"], tmp_path, NOW).settings.state_dir == str(
            tmp_path / "home" / "states"
        )

    def test_a_folder_that_holds_a_run_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "history.jsonl").touch()
        with pytest.raises(SettingsError, match=r"output_dir: .* already holds a run"):
            prepare([f"output_dir={tmp_path}"], tmp_path, NOW)

    def test_a_resumed_run_goes_on_in_its_folder(self, tmp_path: Path) -> None:
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "history.jsonl").touch()
        request = prepare(["resume=old"], tmp_path, NOW)
        assert request.output_dir == tmp_path / "old"
        assert request.settings.resume == str(tmp_path / "old")
        with pytest.raises(SettingsError, match="output_dir"):
            prepare(["resume=old", "output_dir=new"], tmp_path, NOW)

    @pytest.mark.parametrize(
        ("typed", "states"),
        [
            (["output_dir=old"], "new/clients"),
            (["output_dir=old", "state_dir='old/deep down'"], "new/deep down"),
            (["output_dir=old", "state_dir=elsewhere"], "elsewhere"),
            ([], "new/clients"),
        ],
    )
    @pytest.mark.parametrize("how", [os.rename, os.symlink])
    def test_a_folder_that_was_moved_is_resumed_where_it_is(
        self, how: Callable[[Path, Path], None], typed: list[str], states: str, tmp_path: Path
    ) -> None:
        first = prepare([*typed, "rounds=7"], tmp_path, NOW)
        RunDirectory.create(first.output_dir, {}, "r", first.overrides)
        how(first.output_dir, tmp_path / "new")
        request = prepare(["resume=new"], tmp_path, NOW)
        assert request.output_dir == tmp_path / "new"
        assert request.settings.output_dir == str(tmp_path / "new")
        assert request.settings.state_dir == str(tmp_path / states)
        assert request.settings.rounds == 7


class TestResources:
    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(request_module, "available_cores", lambda: 8)
        monkeypatch.setattr(request_module, "_visible_gpus", lambda _: 0)

    @pytest.mark.parametrize(
        ("overrides", "config"),
        [
            ([], (DEFAULT_CLIENTS, 1, "0.0", 5)),  # no more at once than there are
            (["num_clients=20"], (20, 1, "0.0", 8)),
            (["num_clients=20", "simulation.client_cpus=3"], (20, 3, "0.0", 6)),  # two at once
            (["simulation.client_cpus=16"], (5, 16, "0.0", 16)),  # more than there are: one at once
            (["simulation.client_gpus=0.25"], (5, 1, "0.25", 5)),
        ],
    )
    def test_as_many_clients_at_once_as_fit(
        self, overrides: list[str], config: tuple, tmp_path: Path
    ) -> None:
        clients, cpus, gpus, pool = config
        assert prepare(overrides, tmp_path, NOW).federation_config == (
            f"num-supernodes={clients} client-resources-num-cpus={cpus} "
            f"client-resources-num-gpus={gpus} init-args-num-cpus={pool}"
        )

    def test_gpus_are_shared_unless_the_cpu_is_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(request_module, "_visible_gpus", lambda _: 1)
        assert prepare([], tmp_path, NOW).client_gpus == 0.2  # five at once
        assert prepare(["num_clients=3"], tmp_path, NOW).client_gpus == 0.333  # rounded down: three must fit
        assert prepare(["device=cpu"], tmp_path, NOW).client_gpus == 0


class TestLookup:
    @pytest.mark.parametrize(
        "path",
        [
            "torchvision.models.resnet18",  # torchvision/models/__init__.py: from .resnet import *
            "torchvision.models.resnet.ResNet",
            "torchvision.models.quantization.resnet18",
            "fedmutual.models.visionnet.VisionNet",
            "torch.nn.Linear",
            "torchvision.models.detection.fasterrcnn_resnet50_fpn",
            "json.JSONDecoder",
        ],
    )
    def test_what_exists_is_found(self, path: str) -> None:
        assert dotted_path_problem(path) is None

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("torchvision.models.resnet999", "has no 'resnet999'"),
            ("torchvision.modles.resnet18", "has no 'modles'"),
            ("torchvison.models.resnet18", "no package 'torchvison'"),
            ("torchvision.models.vgg", "is a module"),
            ("torchvision.models.detection", "is a module"),
            ("resnet18", "no dotted path"),
            ("torch..nn", "no dotted path"),
        ],
    )
    def test_what_does_not_exist_is_not(self, path: str, reason: str) -> None:
        assert reason in str(dotted_path_problem(path))

    def test_a_close_name_is_offered(self) -> None:
        assert "close: resnet18" in str(dotted_path_problem("torchvision.models.resnet81"))

    def test_a_package_is_read_and_never_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "mynets"
        package.mkdir()
        (package / "__init__.py").write_text("from ._nets import *\nraise RuntimeError('was imported')\n")
        (package / "_nets.py").write_text(
            "try:\n    class Small: ...\nexcept ImportError:\n    Small = 0\n_hidden = Large, Huge = 1, 2\n"
        )
        (package / "open.py").write_text("def __getattr__(name): ...\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in ("Small", "Large", "Huge", "open.anything"):
            assert dotted_path_problem(f"mynets.{name}") is None
        for name in ("Smal", "_hidden"):  # a star import takes no underscore names
            assert dotted_path_problem(f"mynets.{name}") is not None

    def test_every_model_of_conf_exists(self) -> None:
        names = sorted(
            path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem != "custom"
        )
        model = ModelSettings(target="torchvision.models.resnet18", arguments={}, per_client=names)
        assert len(names) > 3
        assert models_problem(model) is None

    def test_custom_is_no_model_of_a_client(self) -> None:
        model = ModelSettings(target="torchvision.models.resnet18", arguments={}, per_client=["custom"])
        assert str(models_problem(model)).startswith("model.per_client: 'custom'")


@pytest.mark.parametrize(("said", "details"), [("N/A", ""), (None, ""), ("no heartbeat", "no heartbeat")])
def test_flowers_word_for_nothing_is_no_reason(
    monkeypatch: pytest.MonkeyPatch, said: str | None, details: str
) -> None:
    from fedmutual.simulation.superlink import SuperLink

    answer = {"runs": [{"status": "finished:failed", "status-details": said}]}
    monkeypatch.setattr(SuperLink, "ask", lambda self, arguments, wait: answer)
    link = SuperLink.__new__(SuperLink)  # nothing is started
    assert link.status("1", lambda: None) == ("finished:failed", details)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["attack.name=random", "attack.clients=[client-9]"],
            r"attack\.clients: there is no client 'client-9': did you mean client-2\? The run has client-0",
        ),
        (
            ["participation.absent=[ward:1-2]"],
            r"participation\.absent: there is no client 'ward': The run has",
        ),
        (["participation.absent=[client-1:3-2]"], r"participation\.absent: 'client-1:3-2' names no round"),
        (["participation.absent=[client-1:0-2]"], r"participation\.absent: 'client-1:0-2' names no round"),
    ],
)
def test_names_of_clients_that_do_not_exist(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        prepare([*overrides, "num_clients=3"], tmp_path, NOW)
    prepare(["participation.absent=[client-2:1-2]", "num_clients=3"], tmp_path, NOW)


def test_a_cache_that_cannot_be_written_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        SettingsError, match=r"cache_dir: .*file/x cannot be made: .*file is a file; set cache_"
    ):
        prepare([f"cache_dir={tmp_path / 'file/x'}"], tmp_path, NOW)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/home"))
    with pytest.raises(SettingsError, match=r"cache_dir: .*home/fedmutual cannot be made"):
        prepare([], tmp_path, NOW)
