"""The HTML report: what it says, what it says where data are missing, and that it needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_grid import Played, play

from fedmutual.cli import main
from fedmutual.report import evidence, leave
from fedmutual.report.comparison import differences, repetitions
from fedmutual.report.evidence import Evidence
from fedmutual.report.page import render, write_report
from fedmutual.report.recorded import RecordedRun, read_run, read_runs
from fedmutual.report.sections import seconds
from fedmutual.results.directory import ResultsError
from fedmutual.results.summary import build_summary

CONFIG: dict[str, Any] = {
    "experiment_name": None,
    "seed": 3,
    "rounds": 2,
    "strategy": {"name": "mutual", "kl_weight": 1.0},
    "cache_dir": "/home/somebody/cache",
}
VOID = {"meta", "link", "br", "img"}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """A whole run with three clients, as the server leaves it."""
    run = play(tmp_path_factory.mktemp("runs") / "first", page=True)
    assert run.error is None
    return run


class Page(HTMLParser):
    """Text, attributes, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data.strip())

    def says(self, words: str) -> bool:
        return words in re.sub(r"\s+", " ", " ".join(self.text))


def recorded(history: list[dict[str, Any]], **changes: Any) -> RecordedRun:
    summary = build_summary(settings=CONFIG, status="completed", history=history, versions={"torch": "2"})
    return replace(RecordedRun("run", summary, history, ["rounds=2"], None), **changes)


def lines(clients: int = 2) -> list[dict[str, Any]]:
    """Two rounds and the closing one."""
    return [
        {
            "round": round,
            "client": f"client-{client}",
            "closing": round == 3,
            "model": "VisionNet",
            "num_examples": 40,
            "validation_accuracy": 0.5,
            "unseen_accuracy": 0.75,
            "uplink_bytes": 1000,
            "downlink_bytes": 1000,
            **(
                {"kl_before": 0.2, "kl_after": 0.1, "loss_before": 1.0, "loss_after": 2.0}
                if round > 1
                else {}
            ),
        }
        for round in (1, 2, 3)
        for client in range(clients)
    ]


# --- a whole run


def test_a_run_leaves_a_report_that_shows_all_of_it(played: Played) -> None:
    html = (played.path / "report.html").read_text()
    page = Page(html)
    for heading in (
        "Clients",
        "Curves",
        "Confusion",
        "Agreement between clients",
        "Unseen images predicted wrong",
        "Public samples in dispute",
    ):
        assert page.says(heading)
    for title in ("Unseen accuracy", "Collaboration: loss", "Collaboration: KL to the peers", "Traffic"):
        assert page.says(title)
    assert not any("missing" in (a.get("class") or "") for _, a in page.tags)  # no section lacks its data
    unseen = played.summary["unseen"]
    assert page.says(f"{100 * unseen['mean_accuracy']:.1f} %")
    assert page.says(f"{100 * unseen['ensemble_accuracy']:.1f}")
    pictures = [a["src"] for tag, a in page.tags if tag == "img"]
    assert pictures
    assert all(src.startswith("data:image/png;base64,") for src in pictures)
    assert str(played.path) not in html
    assert len(html) < 300_000


def test_nothing_is_loaded_and_nothing_runs(played: Played) -> None:
    html = (played.path / "report.html").read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert "@import" not in html
    assert "url(" not in html
    tags = Page(html).tags
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in tags}
    assert all(not name.startswith("on") for _, attributes in tags for name in attributes)
    for _, attributes in tags:
        for name in ("href", "src"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))


def test_command_writes_one_run_or_several(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    twin = tmp_path / "other" / played.path.name
    shutil.copytree(played.path, twin, ignore=shutil.ignore_patterns("clients"))
    (twin / "report.html").unlink()
    assert main(["report", str(twin)]) == 0
    assert Path(capsys.readouterr().out.strip()) == twin / "report.html"
    assert main(["report", str(twin), str(played.path), str(twin)]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert page.says("2 runs side by side")  # a folder that is named twice counts once
    assert page.says(f"other/{twin.name}")
    assert page.says("No setting differs")
    assert main(["report", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_a_report_that_fails_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(evidence, "gather", broken)
    monkeypatch.setattr("fedmutual.report.page.render", broken)
    with caplog.at_level("WARNING", logger="fedmutual"):
        run = play(tmp_path / "run", "rounds=1", page=True)
    assert run.error is None
    assert run.summary["status"] == "completed"
    assert not (run.path / "report.html").exists()
    assert {"evidence.npz", "report.html"} <= {word for m in caplog.messages for word in m.split()}


def test_a_failed_run_leaves_a_report_that_says_so(tmp_path: Path) -> None:
    lost = {"tamper": lambda node, reply: None}
    run = play(tmp_path / "run", "exchange.round_timeout=0.2", clients=1, page=True, **lost)
    assert run.error is not None
    page = Page((run.path / "report.html").read_text())
    assert page.says("failed")
    assert page.says(run.summary["reason"].split(":")[0])
    assert page.says("this run has left none, and the run is failed")


# --- missing data, in words


def test_missing_parts_are_said(tmp_path: Path) -> None:
    page = Page(render([recorded([])]))
    for sentence in (
        "No client has reported.",
        "Confusion matrices need the clients' closing predictions on a shared unseen set",
        "its strategy exchanges none",
        "No mutual step was measured",
        "Nothing has been sent.",
    ):
        assert page.says(sentence)
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG))
    run = read_run(tmp_path)
    assert run.summary["status"] == "stopped"
    assert Page(render([run])).says("the run is still going on, or was killed")


def test_a_run_of_a_comparison_has_its_variants_name(tmp_path: Path) -> None:
    folders = [
        tmp_path / variant / digest
        for variant, digest in (
            ("fedavg-seed_0", "0" * 16),
            ("mutual", "0" * 16),
            ("mutual", "f" * 16),
            ("a", "b"),
        )
    ]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(json.dumps(CONFIG))
    names = [run.name for run in read_runs(folders)]
    assert names == ["fedavg-seed_0", f"mutual/{'0' * 16}", f"mutual/{'f' * 16}", "b"]


def seed_of(seed: int, **config: Any) -> RecordedRun:
    accuracies = {"unseen_accuracy": 0.5 + 0.1 * seed}
    run = recorded([line | accuracies for line in lines()], name=f"run-{config}-{seed}")
    changed = {**run.summary["config"], "seed": seed, **config}
    return replace(run, summary={**run.summary, "config": changed, "seed": seed})


def test_seeds_of_one_thing_are_one_curve_with_a_band() -> None:
    runs = [seed_of(0), seed_of(1), seed_of(0, rounds=5), seed_of(2)]
    groups = repetitions(runs)
    assert {name: len(seeds) for name, seeds in groups.items()} == {
        "mutual, rounds=2 (3 seeds)": 3, runs[2].name: 1,
    }  # fmt: skip
    page = render(runs)
    drawn = Page(page)
    assert drawn.says("mutual, rounds=2 (3 seeds)")
    assert drawn.says("Line and band: mean and range over the seeds.")
    assert page.index("<h2>Curves</h2>") < page.index("<h2>What differs</h2>")
    titles = re.findall(r"<title>mutual, rounds=2 \(3 seeds\), round 3: ([\d.]+)</title>", page)
    assert titles[0] == "60"  # of 50, 60 and 70 per cent
    assert Page(render([seed_of(0, rounds=1), seed_of(0, rounds=2)])).says(runs[0].name) is False
    assert "mean and range over the seeds" not in render(runs[1:3])


def test_a_report_says_when_the_run_was() -> None:
    run = recorded(lines())
    dated = replace(run, summary={**run.summary, "date": "2026-01-31T12:05+01:00"})
    assert Page(render([dated])).says("mutual, 2026-01-31 12:05+01:00")
    assert not Page(render([run])).says("mutual, ")


def test_which_client_knows_which_class() -> None:
    confusions = {"client-0": np.array([[9, 1], [0, 0]]), "client-1": np.array([[5, 5], [1, 3]])}
    run = recorded(lines(), evidence=Evidence(("cats", "dogs"), confusions))
    page = render([run])
    part = page.partition("Recall by class and client")[2].partition("<h2>")[0]
    assert "on the shared unseen set" in part
    cells = re.findall(r'<td style="--s:([\d.]+)">(\d*)</td>', part)
    assert cells == [("0.900", "90"), ("0", ""), ("0.500", "50"), ("0.750", "75")]
    own = [line | {"validation_recall": [1.0, 0.25]} for line in lines(1)]
    part = render([recorded(own)]).partition("Recall by class and client")[2].partition("<h2>")[0]
    assert "on its own held-out images" in part
    assert re.findall(r"<th>(class \d)</th>", part) == ["class 0", "class 1"]
    many = {"client-0": np.diag(np.arange(1, 61)) + np.eye(60, k=1, dtype=int)}
    page = render([recorded(lines(1), evidence=Evidence(tuple(f"k{n}" for n in range(60)), many))])
    assert "The 40 worst of 60 classes." in page
    assert Page(render([recorded([])])).says("No client has said its recall of each class.")


def test_damaged_files_are_named(played: Played, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(played.path, folder, ignore=shutil.ignore_patterns("clients"))
    (folder / "evidence.npz").write_bytes(b"PK nothing of the kind")
    with pytest.raises(ResultsError, match=r"evidence\.npz is damaged"):
        read_runs([folder])
    (folder / "evidence.npz").unlink()
    (folder / "summary.json").write_text("{")
    with pytest.raises(ResultsError, match=r"summary\.json is damaged"):
        read_runs([folder])


def test_what_comes_from_a_client_is_text() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    history = [{**line, "client": hostile, "model": hostile} for line in lines(1)]
    history.append({"round": 2, "client": hostile, "node_id": 1, "rejected": f"bad {hostile}"})
    matrix = np.array([[1, 0], [0, 1]])
    sample = evidence.Sample(hostile, 0, 0.5, np.array([[0.9, 0.1]] * 2), np.zeros((4, 4, 3), np.uint8))
    found = Evidence((hostile, "b"), {hostile: matrix}, matrix, (hostile, "x"), np.eye(2), 4, (sample,))
    run = recorded(history, name=hostile, overrides=[hostile], evidence=found)
    page = Page(render([run, replace(run, name="other")]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.says(hostile)


def test_paths_of_the_machine_stay_out() -> None:
    run = recorded(lines(), overrides=["data.root='/home/somebody/photos'", "rounds=2"])
    html = render([run])
    assert "somebody" not in html
    assert "fedmutual run rounds=2" in html


@pytest.mark.parametrize("clients", [1, 2, 12, 13, 60])
def test_any_number_of_clients(clients: int) -> None:
    matrix = np.full((clients, clients), 0.5)
    names = tuple(f"client-{i}" for i in range(clients))
    confusions = {name: np.array([[3, 1], [2, 2]]) for name in names}
    probabilities = np.tile([0.9, 0.1], (clients, 1))
    sample = evidence.Sample("a.png", -1, 0.1, probabilities, np.zeros((4, 4, 3), np.uint8))
    found = Evidence(("a", "b"), confusions, None, names, matrix, 10, (sample,))
    page = Page(render([recorded(lines(clients), evidence=found)]))
    if clients > 12:
        assert page.says("median of the clients")
        assert page.says(f"12 least accurate of {clients} clients")
        assert page.says(f"{clients} clients")
    else:
        assert page.says(f"client-{clients - 1} 90 %")


def test_many_classes_become_a_list_of_mistakes() -> None:
    classes = tuple(f"class-{i}" for i in range(20))
    matrix = np.diag(np.full(20, 9))
    matrix[3, 7] = 5
    page = Page(render([recorded(lines(), evidence=Evidence(classes, {"client-0": matrix}))]))
    assert page.says("class-3 class-7 5")


# --- side by side, words


def test_only_what_differs_is_listed() -> None:
    other = recorded(lines(), name="other")
    changed = {**other.summary, "config": {**CONFIG, "seed": 4, "strategy": {"name": "mutual"}}}
    found = differences([recorded(lines()), replace(other, summary=changed)])
    assert found == [
        ("seed", ["3", "4"]),
        ("strategy.kl_weight", ["1.0", "-"]),
        ("cache_dir", ["-", "/home/somebody/cache"]),
    ]


@pytest.mark.parametrize(
    ("duration", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7620, "2 h 07 min")],
)
def test_durations(duration: float, text: str) -> None:
    assert seconds(duration) == text


def test_reading_a_report_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fedmutual.report.page, fedmutual.report.recorded; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_leaving_a_report_raises_nothing(tmp_path: Path) -> None:
    broken: Callable[..., Any] = leave.leave_report
    broken(tmp_path / "nowhere", {})
    leave.keep_evidence(None, None, None, 12)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1e308, -1e308])
def test_weird_names_and_figures_cost_no_report(tmp_path: Path, value: float) -> None:
    names = ("$\\frac{$", "\udc80", "\x01", "9" * 5000)
    keys = ("unseen_accuracy", "validation_accuracy", "loss_before", "loss_after", "kl_before", "train_loss")
    history = [
        {**line, "client": name, "model": name, **dict.fromkeys(keys, value)}
        for name in names
        for line in lines()
    ]
    write_report([recorded(history, name="\udc80")], tmp_path / "report.html")
    assert "$\\frac{$" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_summary_is_there_before_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def report(path: Path, summary: object) -> None:
        seen.append((path / "summary.json").exists())
        raise KeyboardInterrupt  # as where the process is killed while it draws

    monkeypatch.setattr("fedmutual.engine.server.leave_report", report)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "run", "rounds=1", page=True)
    assert seen == [True]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
