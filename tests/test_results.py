"""A run's directory: what a kill, a damaged file or a second start may not break."""

from __future__ import annotations

import json
import logging
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmutual.files import atomic
from fedmutual.files.checkpoint import CheckpointError, load_checkpoint, previous_path, save_checkpoint
from fedmutual.results.directory import (
    ResultsError,
    RunDirectory,
    build_summary,
    leave_summary,
    read_history,
    read_summary,
    saved_overrides,
    user_runs_dir,
)
from fedmutual.results.hold import held_by_command, in_use
from fedmutual.results.summary import mean, natural_key
from fedmutual.settings.described import without_paths

SETTINGS: dict[str, Any] = {
    "experiment_name": None,
    "seed": 7,
    "rounds": 2,
    "output_dir": "/somewhere/out",
    "strategy": {"name": "mutual", "kl_weight": 1.0},
    "data": {"root": "/somewhere/images", "image_size": 32},
}


class Killed(BaseException):
    """Stands for a process that dies: nothing catches it."""


def line(round: int, client: str, **figures: Any) -> dict[str, Any]:
    return {"round": round, "client": client, "model": "VisionNet", "num_examples": 10, **figures}


def full_history() -> list[dict[str, Any]]:
    """Two clients, two rounds and the closing message, with hand-made figures."""
    history = []
    for round in (1, 2, 3):
        for client, accuracy in (("client-0", 0.8), ("client-1", 0.6)):
            history.append(
                line(
                    round,
                    client,
                    validation_accuracy=0.9,
                    validation_recall=[0.8, 1.0],
                    unseen_accuracy=accuracy if round == 3 else 0.1,
                    unseen_balanced_accuracy=accuracy - 0.1,
                    unseen_auroc=0.7,
                    unseen_recall=[0.5, 0.9],
                    unseen_num_examples=500 if round == 3 else 50,
                    uplink_bytes=100,
                    downlink_bytes=10 * round,
                    evaluation_bytes=1,
                    seconds=1.0 if client == "client-0" else 2.0,
                    **({"closing": True} if round == 3 else {}),
                )
            )
    return history


# --- atomic files


def test_atomic_write_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.json"
    atomic.atomic_write(file, b"one")
    atomic.atomic_write(file, b"two")
    assert file.read_bytes() == b"two"
    assert [entry.name for entry in file.parent.iterdir()] == ["a.json"]


def test_kill_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    atomic.atomic_write(file, b"old")

    def die(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"new"  # the temporary file was complete
        raise Killed

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        atomic.atomic_write(file, b"new")
    assert file.read_bytes() == b"old"


def test_real_kill_between_write_and_rename(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"old")
    script = (
        "import os, signal, sys; from pathlib import Path; from fedmutual.files import atomic\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic.atomic_write(Path(sys.argv[1]), b'new')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], check=False)
    assert done.returncode == -9
    assert file.read_bytes() == b"old"


# --- checkpoint

DTYPES = st.sampled_from(["?", "i1", "u1", "<i4", ">i4", "<i8", "<f2", "<f4", ">f4", "<f8"])


@given(
    arrays=st.dictionaries(
        st.text("abc./-_ä", min_size=1, max_size=5),
        DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))),
        max_size=3,
    ),
    seconds=st.floats(),
)
def test_checkpoint_gives_back_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray], seconds: float
) -> None:
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    transposed = {name: array.T for name, array in arrays.items()}  # not C-ordered
    save_checkpoint(path, {"round": 1, "seconds": seconds, "rng": [2**127, "ä"]}, transposed)
    meta, loaded = load_checkpoint(path)
    assert meta["rng"] == [2**127, "ä"]
    assert meta["seconds"] == seconds or math.isnan(seconds)
    assert loaded.keys() == arrays.keys()
    for name, array in transposed.items():
        assert loaded[name].dtype == array.dtype.newbyteorder("<")
        assert loaded[name].shape == array.shape
        little = array.astype(array.dtype.newbyteorder("<"))
        assert loaded[name].tobytes() == little.tobytes()  # bits, so that NaN compares too


def two_generations(folder: Path) -> Path:
    path = folder / "checkpoint.safetensors"
    for round in (1, 2):
        save_checkpoint(path, {"round": round}, {"w": np.full(100, round, np.float32)})
    return path


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "forged"])
def test_damaged_checkpoint_gives_way_to_the_previous_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = two_generations(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        forged = data.replace(b'\\"round\\": 2', b'\\"round\\": 3')
        assert forged != data
        path.write_bytes({"cut": data[:200], "flip": flipped, "empty": b"", "forged": forged}[damage])
    with caplog.at_level(logging.WARNING):
        meta, arrays = load_checkpoint(path)
    assert meta == {"round": 1}
    assert arrays["w"].tolist() == [1.0] * 100
    assert "previous generation" in caplog.text
    assert str(path) in caplog.text
    # the good generation is now the current one: saving again must not lose it
    assert not previous_path(path).exists()
    save_checkpoint(path, {"round": 2}, {})
    path.write_bytes(b"")
    assert load_checkpoint(path)[0] == {"round": 1}


def test_no_generation_left(tmp_path: Path) -> None:
    path = two_generations(tmp_path)
    path.write_bytes(b"")
    previous_path(path).write_bytes(b"\0" * 50)
    with pytest.raises(CheckpointError, match=r"damaged.*previous generation is no better"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint is there"):
        load_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize("kill_at", [1, 2])
def test_kill_while_saving_loses_one_round_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    path = two_generations(tmp_path)
    replace, calls = os.replace, 0

    def die_at(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_at)
    with pytest.raises(Killed):
        save_checkpoint(path, {"round": 3}, {})
    assert load_checkpoint(path)[0] == {"round": 2}


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([object()]), np.array([1j])])
def test_checkpoint_refuses_what_it_cannot_hold(tmp_path: Path, array: np.ndarray) -> None:
    path = two_generations(tmp_path)
    with pytest.raises(TypeError, match="'w'"):
        save_checkpoint(path, {"round": 3}, {"w": array})
    assert load_checkpoint(path)[0] == {"round": 2}


# --- directory


def test_create_saves_the_config_and_refuses_a_second_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", SETTINGS, "r1")
    assert run.config() == SETTINGS
    run.close()
    run = RunDirectory.create(tmp_path / "run", SETTINGS, "r1")  # nothing was computed: may be started again
    run.append([line(1, "a")])
    run.close()
    with pytest.raises(ResultsError, match=r"history\.jsonl.*choose another folder.*resume="):
        RunDirectory.create(tmp_path / "run", SETTINGS, "r2")


def test_create_refuses_a_summary_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ResultsError, match=r"summary\.json"):
        RunDirectory.create(tmp_path, SETTINGS, "r")
    with pytest.raises(ResultsError, match="is a file"):
        RunDirectory.create(tmp_path / "summary.json", SETTINGS, "r")


def test_default_folder_is_in_the_users_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert RunDirectory.create(None, SETTINGS, "r1").path == tmp_path / "fedmutual" / "runs" / "r1"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_runs_dir() == tmp_path / ".local" / "share" / "fedmutual" / "runs"


def test_history_is_valid_json_also_with_nan(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, SETTINGS, "r")
    bad = {
        "a": float("nan"),
        "b": [np.float32("inf"), 1],
        "c": np.array([1.0, -np.inf]),
        "d": {"e": np.int64(3)},
    }
    run.append([line(1, "ä", **bad), line(1, "b")])
    run.append([line(2, "ä")])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(text, parse_constant=refuse) for text in lines]
    assert parsed == run.history()
    assert [entry["round"] for entry in parsed] == [1, 1, 2]
    assert (parsed[0]["a"], parsed[0]["b"], parsed[0]["c"], parsed[0]["d"]) == (
        None,
        [None, 1],
        [1.0, None],
        {"e": 3},
    )


def test_torn_last_line_is_left_out_and_other_damage_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.create(tmp_path, SETTINGS, "r")
    run.append([line(1, "a")])
    file = tmp_path / "history.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"round": 2, "cli')
    with caplog.at_level(logging.WARNING):
        assert len(run.history()) == 1
    assert "cut short" in caplog.text
    file.write_text(whole + "garbage\n" + whole)
    with pytest.raises(ResultsError, match="line 2 is no JSON"):
        run.history()


def test_resume_drops_the_interrupted_round(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, SETTINGS, "r")
    for round in (1, 2):
        run.append([line(round, "a"), line(round, "b")])
        run.save_checkpoint({"round": round}, {"x": np.arange(round)})
    run.append([line(3, "a")])
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"round": 3, "cl')
    run.write_summary({"status": "stopped"})
    (tmp_path / ".checkpoint.safetensors.0123456789ab.tmp").write_bytes(b"half")
    run.close()

    again = RunDirectory.resume(tmp_path)
    assert [(entry["round"], entry["client"]) for entry in again.history()] == [
        (1, "a"),
        (1, "b"),
        (2, "a"),
        (2, "b"),
    ]
    again.append([line(3, "a")])
    assert len(again.history()) == 5
    # the figures of the first attempt are kept aside, so that they are not taken for the new ones
    assert not (tmp_path / "summary.json").exists()
    assert json.loads((tmp_path / "summary.previous.json").read_text()) == {"status": "stopped"}
    assert again.load_checkpoint()[1]["x"].tolist() == [0, 1]
    assert not list(tmp_path.glob(".*.tmp"))


def test_resume_from_the_previous_generation_goes_back_a_round(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, SETTINGS, "r")
    for round in (1, 2):
        run.append([line(round, "a")])
        run.save_checkpoint({"round": round}, {})
    (tmp_path / "checkpoint.safetensors").write_bytes(b"rubbish")
    run.close()
    again = RunDirectory.resume(tmp_path)
    assert again.load_checkpoint()[0] == {"round": 1}
    assert [entry["round"] for entry in again.history()] == [1]


def test_resume_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="start a new run"):
        RunDirectory.resume(tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ResultsError, match="cannot be resumed"):
        RunDirectory.resume(tmp_path)


def test_checkpoint_without_a_round_is_a_mistake(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, SETTINGS, "r")
    with pytest.raises(TypeError, match="round"):
        run.save_checkpoint({}, {})


# --- one run at a time

HOLDS = """
import sys, time
from pathlib import Path
from fedmutual.results.directory import RunDirectory

run = RunDirectory.create(Path(sys.argv[1]), {"seed": 7, "rounds": 2, "strategy": {"name": "mutual"}}, "r")
run.save_checkpoint({"round": 1}, {})
print("holds", flush=True)
time.sleep(60)
"""


def test_a_folder_is_one_run_s_until_its_process_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDS, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
        busy = f"{folder} is in use by a run that is still going on"
        with pytest.raises(ResultsError, match=busy):
            RunDirectory.create(folder, SETTINGS, "r")
        with pytest.raises(ResultsError, match=busy):
            RunDirectory.resume(folder)
        with pytest.raises(ResultsError, match=busy), held_by_command(folder):
            raise AssertionError
        assert in_use(folder)
        after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
        assert after == before
        process.kill()
    assert not in_use(folder)
    RunDirectory.resume(folder).close()


def test_the_server_of_a_command_s_own_run_may_use_its_folder(tmp_path: Path) -> None:
    with held_by_command(tmp_path):
        RunDirectory.create(tmp_path, SETTINGS, "r").close()
        with pytest.raises(ResultsError, match="is in use"), held_by_command(tmp_path):
            raise AssertionError
    assert not in_use(tmp_path)


def test_to_ask_whether_a_folder_is_in_use_changes_nothing(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_refused_run_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ResultsError, match="already holds"):
        RunDirectory.create(tmp_path, SETTINGS, "r")
    (tmp_path / "summary.json").unlink()
    run = RunDirectory.create(tmp_path, SETTINGS, "r")
    run.save_checkpoint({"round": 1}, {})
    run.close()
    with pytest.raises(ResultsError, match="seed is 8 now"):
        RunDirectory.resume(tmp_path, SETTINGS | {"seed": 8})
    RunDirectory.resume(tmp_path, SETTINGS).close()


def test_only_the_owner_can_read_results(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = RunDirectory.create(folder, SETTINGS, "r")
    run.append([line(1, "a")])
    run.save_checkpoint({"round": 1}, {})
    run.write_summary({})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


# --- damage


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is no JSON"),
        ("[" * 100_000, "line 1 is no JSON"),
        ("[1]", "it has no round"),
        ('{"round": true}', "it has no round"),
        ('{"round": -1}', "it has no round"),
        ('{"round": 1000000001}', "it has no round"),
        ('{"round": 1, "client": 5}', "client is not what a run writes there"),
        ('{"round": 1, "seconds": "4"}', "seconds is not what"),
        ('{"round": 1, "uplink_bytes": [4]}', "uplink_bytes is not what"),
        ('{"round": 1, "unseen_accuracy": {"a": 1}}', "unseen_accuracy is not what"),
        ('{"round": 1, "kl_before": NaN}', "kl_before is not what"),
        (f'{{"round": 1, "num_examples": {"9" * 400}}}', "num_examples is not what"),
        ('{"round": 1, "client": "\xff"}', "line 1 is no JSON"),
    ],
)
def test_a_damaged_history_line_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "history.jsonl"
    file.write_bytes(text.encode("latin-1") + b"\n")
    with pytest.raises(ResultsError, match=message) as error:
        read_history(tmp_path)
    assert f"{file}, line 1" in str(error.value)
    assert "put it back from a copy" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b"{", b'{"a": 1}', b"[1]", b"\xff", b"[" * 100_000])
def test_damaged_overrides_are_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "overrides.json").write_bytes(text)
    with pytest.raises(ResultsError, match=r"overrides\.json is damaged .*or delete it, and give") as error:
        saved_overrides(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", [b"", b"- a", b"a: [", b"\xff\x00", b"a: ${", b"!!python/object:os.system {}"]
)
def test_a_damaged_configuration_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(ResultsError, match=r"config\.yaml is damaged .*put it back") as error:
        RunDirectory(tmp_path).config()
    assert "\n" not in str(error.value)


def test_a_damaged_count_of_bytes_is_named(tmp_path: Path) -> None:
    (tmp_path / "public_data.json").write_text('{"bytes": null}')
    with pytest.raises(ResultsError, match=r"public_data\.json is damaged .*or delete it to count from 0"):
        RunDirectory(tmp_path).public_bytes()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint.safetensors", {"owner": {}}, {})
    with pytest.raises(ResultsError, match=r"checkpoint\.safetensors is no run's"):
        RunDirectory.resume(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": None}, "strategy is missing"),
        ({"clients": []}, "clients is missing or of another kind"),
        ({"clients": {"a": {}}}, "uplink_bytes is missing"),
        ({"clients": {"a": None}}, "uplink_bytes is missing"),
        ({"unseen": {"mean_accuracy": "0.5"}}, "mean_accuracy is no number"),
        ({"seconds": {}}, "total is missing"),
        ({"rejected": [1]}, "rejected is no list of reports"),
        ({"global_model": {"folder": "g"}}, "global_model is of another kind"),
    ],
)
def test_a_damaged_summary_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    summary = build_summary(settings=SETTINGS, status="completed", history=full_history())
    RunDirectory(tmp_path).write_summary(summary)
    assert read_summary(tmp_path) == json.loads(json.dumps(summary))
    RunDirectory(tmp_path).write_summary({**summary, **changes})
    with pytest.raises(ResultsError, match=message) as error:
        read_summary(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/summary.json is damaged (")


@pytest.mark.parametrize("values", [[1e308] * 4, [-1.7e308] * 3, [1.7e308, 1.7e308, -1e308]])
def test_figures_near_the_largest_number_have_a_mean(values: list[float]) -> None:
    found = mean(values)
    assert found == pytest.approx(math.fsum(value / 4 for value in values) / len(values) * 4)


def test_a_name_that_is_no_text_and_one_of_digits_reach_the_summary(tmp_path: Path) -> None:
    names = ["\udc80", "9" * 5000, "$\\frac{$"]
    run = RunDirectory(tmp_path)
    run.append([line(1, name, kl_before=1e308, unseen_accuracy=1e308) for name in names])
    run.write_summary(build_summary(settings=SETTINGS, status="completed", history=run.history()))
    summary = read_summary(tmp_path)
    assert summary is not None
    assert set(summary["clients"]) == set(names)


# --- summary


def test_summary_keeps_the_contract() -> None:
    summary = build_summary(
        settings=SETTINGS,
        status="completed",
        history=full_history(),
        ensemble={"accuracy": 0.85, "balanced_accuracy": 0.84, "auroc": 0.95},
        global_model={"folder": "global_model", "model": "VisionNet", "unseen_accuracy": 0.75},
        public_digest="abc",
        public_data_bytes=5,
        seconds={"total": 9.0, "startup": 2.0, "training": 6.0},
        warnings=["careful"],
    )
    versions = summary.pop("versions")
    assert set(versions) == {"fedmutual", "flwr", "torch"}
    figures = {
        "model": "VisionNet",
        "num_examples": 10,
        "unseen_auroc": 0.7,
        "unseen_f1": None,
        "unseen_ece": None,
        "unseen_recall": [0.5, 0.9],
        "validation_accuracy": 0.9,
        "validation_balanced_accuracy": None,
        "validation_auroc": None,
        "validation_f1": None,
        "validation_ece": None,
        "validation_recall": [0.8, 1.0],
        "private_digest": None,
        "uplink_bytes": 300,
        "downlink_bytes": 60,
        "evaluation_bytes": 3,
        "rejected": 0,
        "finished": True,
    }
    assert summary == {
        "strategy": "mutual",
        "experiment": None,
        "date": None,
        "seed": 7,
        "rounds": 2,
        "rounds_completed": 2,
        "status": "completed",
        "reason": "",
        "clients": {
            "client-0": {**figures, "unseen_accuracy": 0.8, "unseen_balanced_accuracy": 0.8 - 0.1},
            "client-1": {**figures, "unseen_accuracy": 0.6, "unseen_balanced_accuracy": 0.5},
        },
        "unseen": {
            "mean_accuracy": 0.7,
            "worst_accuracy": 0.6,
            "ensemble_accuracy": 0.85,
            "num_examples": 500,
            "ensemble_balanced_accuracy": 0.84,
            "ensemble_auroc": 0.95,
        },
        "global_model": {"folder": "global_model", "model": "VisionNet", "unseen_accuracy": 0.75},
        "traffic": {
            "uplink_bytes": 600,
            "downlink_bytes": 120,
            "evaluation_bytes": 6,
            "public_data_bytes": 5,
        },
        "seconds": {"total": 9.0, "startup": 2.0, "training": 6.0},
        "public_digest": "abc",
        "warnings": ["careful"],
        "rejected": [],
        "config": {
            "experiment_name": None,
            "seed": 7,
            "rounds": 2,
            "strategy": {"name": "mutual", "kl_weight": 1.0},
            "data": {"image_size": 32},
        },
    }


def test_client_that_died_keeps_its_last_figures() -> None:
    history = [
        line(1, "a", unseen_accuracy=0.5, unseen_auroc=0.6, validation_accuracy=0.7),
        line(2, "a", validation_accuracy=0.8),
        line(3, "a", rejected="round 2 instead of 3", uplink_bytes=4),
    ]
    summary = build_summary(settings=SETTINGS, status="failed", reason="lost", history=history)
    client = summary["clients"]["a"]
    assert not client["finished"]
    assert (client["unseen_accuracy"], client["unseen_auroc"], client["validation_accuracy"]) == (
        0.5,
        0.6,
        0.8,
    )
    assert (client["rejected"], client["uplink_bytes"]) == (1, 4)
    assert summary["rejected"] == [
        {"client": "a", "node_id": None, "round": 3, "reason": "round 2 instead of 3"}
    ]
    assert summary["rounds_completed"] == 2
    assert summary["unseen"]["mean_accuracy"] == 0.5


def test_no_unseen_set_and_nameless_rejections() -> None:
    history = [
        line(1, "a", validation_accuracy=0.7),
        {"round": 1, "node_id": 9, "rejected": "no name", "uplink_bytes": 3},
    ]
    summary = build_summary(settings=SETTINGS, status="failed", history=history)
    assert summary["unseen"] is None
    assert list(summary["clients"]) == ["a"]
    assert summary["traffic"]["uplink_bytes"] == 3
    assert summary["rejected"][0]["node_id"] == 9


def test_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match="'done'"):
        build_summary(settings=SETTINGS, status="done", history=[])


@given(st.permutations(full_history()))
def test_summary_does_not_depend_on_the_order_of_arrival(history: list[dict[str, Any]]) -> None:
    assert build_summary(settings=SETTINGS, status="completed", history=history) == build_summary(
        settings=SETTINGS, status="completed", history=full_history()
    )


def test_clients_are_in_natural_order() -> None:
    history = [line(1, name) for name in ("client-10", "b", "client-2", "1", "client-1")]
    names = list(build_summary(settings=SETTINGS, status="completed", history=history)["clients"])
    assert names == ["1", "b", "client-1", "client-2", "client-10"]


@given(st.lists(st.text("ab01-", max_size=5)))
def test_natural_order_is_total(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == sorted(sorted(names), key=natural_key)


def test_paths_stay_at_home() -> None:
    settings = {"a": "/x", "b": ["C:\\x", "y", "~/z"], "c": {"d": "file:///q", "e": "models.x", "f": 1}}
    assert without_paths(settings) == {"b": ["y"], "c": {"e": "models.x", "f": 1}}


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_leave_summary_builds_from_what_there_is(status: str, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, SETTINGS, "r")
    run.append(full_history()[:4])
    path = leave_summary(tmp_path, status, "cut off")
    summary = json.loads(path.read_text())
    assert (summary["status"], summary["reason"]) == (status, "cut off")
    assert summary["strategy"] == "mutual"
    assert summary["rounds_completed"] == 2
    assert summary["unseen"]["mean_accuracy"] == pytest.approx(0.1)
    assert summary["seconds"]["training"] == 4.0  # the slower client, two rounds
    assert not any(client["finished"] for client in summary["clients"].values())


def test_leave_summary_leaves_a_summary_alone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, SETTINGS, "r")
    run.write_summary({"status": "completed", "x": float("nan")})
    leave_summary(tmp_path, "failed", "late")
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "completed", "x": None}


def test_leave_summary_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no run was started"):
        leave_summary(tmp_path, "failed", "early")


def test_results_import_neither_torch_nor_flower() -> None:
    script = (
        "import sys, fedmutual.results.directory, fedmutual.results.diagnostics\n"
        "import fedmutual.report.plots, fedmutual.report.tables\n"
        "heavy = {'torch', 'flwr', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
