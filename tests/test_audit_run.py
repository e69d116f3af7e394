"""``fedmutual audit RUN``: what a run keeps of what its server received, and what can be told from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_grid import CACHE, TINY
from small_data import image_set

from fedmutual.audit import attacks
from fedmutual.audit.class_mix import class_mix
from fedmutual.audit.collusion import reconstructed
from fedmutual.audit.leak import centred, measured
from fedmutual.audit.membership import likelihood_ratios, log_odds
from fedmutual.audit.run import _findings, audit_run
from fedmutual.audit.tables import study_table
from fedmutual.audit.truth import RecordedTruth
from fedmutual.cli import main
from fedmutual.commands.audit import _named
from fedmutual.data.images import ImageSet
from fedmutual.data.public import PublicSet
from fedmutual.data.site import SharedData, SiteData
from fedmutual.learning.consensus import log_softmax
from fedmutual.results import received
from fedmutual.results.errors import ResultsError
from fedmutual.results.received import Heard, Received, Recorder, read_received
from fedmutual.settings.compose import compose
from fedmutual.simulation.inprocess import run_inprocess


def log_p(*shape: int, seed: int = 0) -> np.ndarray:
    return np.log(np.random.default_rng(seed).dirichlet([1.0] * shape[-1], shape[:-1])).astype(np.float32)


def test_what_was_received_is_read_back(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    assert read_received(tmp_path) is None
    positions = np.array([1, 5, 6], np.int32)
    said = {"a": log_p(3, 2), "b": log_p(3, 2, seed=1)}
    for round in (2, 10, 1):
        recorder.add(round, positions, said)
    recorder.add(3, positions[:0], {"a": log_p(0, 2)})
    recorder.close({"a": log_p(7, 2)})
    recorder.add_weights("a", {"fc.weight": np.arange(3.0)})
    recorder.add_weights("a", {"fc.weight": np.arange(4.0)})
    found = read_received(tmp_path)
    assert found is not None
    assert [heard.round for heard in found.rounds] == [1, 2, 10]
    assert found.rounds[0].view == 1
    assert found.rounds[2].predictions.keys() == said.keys()
    np.testing.assert_array_equal(found.rounds[1].predictions["b"], said["b"])
    np.testing.assert_array_equal(found.unseen["a"], log_p(7, 2))
    assert found.weights["a"]["fc.weight"].tolist() == [0, 1, 2, 3]


def test_the_first_and_the_newest_rounds_are_kept_when_they_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path)
    recorder.add(1, np.arange(50, dtype=np.int32), {"a": log_p(50, 2)})
    size = (tmp_path / received.FOLDER / "0001.npz").stat().st_size
    monkeypatch.setattr(received, "MOST_BYTES", int(3.5 * size))
    for round in range(2, 7):
        recorder.add(round, np.arange(50, dtype=np.int32), {"a": log_p(50, 2)})
    found = read_received(tmp_path)
    assert found is not None
    assert [heard.round for heard in found.rounds] == [1, 5, 6]
    recorder.add_weights("a", {"w": np.zeros(4 * size)})
    assert read_received(tmp_path).weights == {}  # type: ignore[union-attr]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    Recorder(tmp_path).add(1, np.arange(3, dtype=np.int32), {"a": log_p(3, 2)})
    (tmp_path / received.FOLDER / "0001.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ResultsError, match=r"0001\.npz is damaged"):
        read_received(tmp_path)


def test_area_and_rate_by_hand() -> None:
    leak = measured(np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, True, False, False]))
    assert leak.auc == 0.75  # three of the four pairs
    assert leak.tpr == 0.5
    assert (leak.members, leak.others) == (2, 2)
    tied = measured(np.zeros(6), np.arange(6) < 2)
    assert tied.auc == 0.5
    assert tied.tpr == 0
    with pytest.raises(ValueError, match="no members"):
        measured(np.zeros(3), np.zeros(3, bool))


def test_an_interval_is_of_images_and_not_of_scores() -> None:
    """Five scores of one image are no five images: the interval must be as wide as with one of each."""
    rng = np.random.default_rng(0)
    member = np.arange(60) < 30
    scores = rng.normal(0, 1, 60) + member
    once = measured(scores, member)
    often = measured(np.repeat(scores, 5), np.repeat(member, 5), np.repeat(np.arange(60), 5))
    assert often.auc == pytest.approx(once.auc)
    assert np.diff(often.auc_interval) == pytest.approx(np.diff(once.auc_interval), rel=0.1)
    assert once.auc_interval == measured(scores, member).auc_interval


def test_how_easy_the_images_of_a_group_are_is_no_leak() -> None:
    scores = np.array([5.0, 6.0, 7.0, 0.0, 1.0, 2.0])
    assert centred(scores, np.array([0, 0, 0, 1, 1, 1])).tolist() == [-1, 0, 1, -1, 0, 1]


Change = Callable[[np.ndarray], np.ndarray]


def mirrored(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, :, ::-1]


def paler(pixels: np.ndarray) -> np.ndarray:
    return pixels // 2 + 90


def recorded(leak: float, rounds: int = 4, change: Sequence[Change] = ()) -> RecordedTruth:
    """Three clients, each with 20 of the 100 public images; ``leak``: how much surer it is of these.

    ``change``: what each client's own copies of these are like.
    """
    rng = np.random.default_rng(1)
    public = image_set([0, 1] * 50, seed=9)
    sites, received, easy = {}, [], rng.normal(0, 2, 100)
    for number in range(3):
        own = np.arange(20 * number, 20 * number + 20)
        other = image_set([0, 1] * 20, seed=number)
        copies = change[number](public.images[own]) if change else public.images[own]
        private = ImageSet(
            np.concatenate([copies, other.images]),
            np.concatenate([public.labels[own], other.labels]),
            None,
            tuple(f"{number}.{i}" for i in range(60)),
        )
        parts = np.arange(60)
        shared = PublicSet(public, None, None, "d")
        sites[f"client-{number}"] = SiteData(("a", "b"), private, shared, None, (parts[:50],), (parts[50:],))
    for round in range(1, rounds + 1):
        said = {}
        for number in range(3):
            odds = easy + rng.normal(0, 0.3, 100)
            odds[20 * number : 20 * number + 20] += leak
            signed = np.where(public.labels == 1, odds, -odds)
            said[f"client-{number}"] = log_softmax(np.stack([0 * signed, signed], axis=1))
        received.append(Heard(round, np.arange(100, dtype=np.int32), said, round))
    settings = compose(["num_clients=3", "privacy.overlap=allow", f"cache_dir={CACHE.name}"])
    shared_data = SharedData(("a", "b"), PublicSet(public, None, None, "d"), None)
    return RecordedTruth(Path(), (), settings, Received(tuple(received)), [], shared_data, sites)


def public_copies(truth: RecordedTruth) -> tuple[dict[str, Any], str]:
    return attacks.public_copies(truth, truth.received.rounds)


def test_copies_of_held_out_images_are_no_members() -> None:
    """They were not trained on, so that a model cannot know them."""
    truth = recorded(2.0)
    last = np.arange(60)  # of which the first 20 are public
    sites = {
        n: replace(s, train_parts=(last[10:],), held_out_parts=(last[:10],)) for n, s in truth.sites.items()
    }
    figures, _ = public_copies(replace(truth, sites=sites))
    assert (figures["members"], figures["others"]) == (30, 120)


def test_a_known_leak_of_public_copies_is_found() -> None:
    figures, note = public_copies(recorded(2.0))
    assert figures["auc"] > 0.98
    assert figures["tpr"] > 0.8
    assert (figures["members"], figures["others"]) == (60, 120)
    assert note == "privacy.overlap=allow"


def test_without_a_leak_there_is_none() -> None:
    figures, _ = public_copies(recorded(0.0))
    low, high = figures["auc_interval"]
    assert low < 0.5 < high
    assert abs(figures["auc"] - 0.5) < 0.12


@pytest.mark.parametrize("change", [mirrored, paler])
def test_a_known_leak_of_changed_copies_is_found(change: Change) -> None:
    truth = recorded(2.0, change=[change] * 3)
    figures, _ = attacks.public_copies(truth, truth.received.rounds, changed=True)
    assert figures["auc"] > 0.98
    assert (figures["members"], figures["others"]) == (60, 120)
    with pytest.raises(ValueError, match="no public image is private as well"):
        public_copies(truth)


def test_without_a_leak_changed_copies_tell_nothing() -> None:
    truth = recorded(0.0, change=[paler] * 3)
    figures, _ = attacks.public_copies(truth, truth.received.rounds, changed=True)
    assert abs(figures["auc"] - 0.5) < 0.12


def test_exact_copies_are_no_changed_ones_and_no_strangers() -> None:
    truth = recorded(2.0, change=[lambda pixels: pixels, paler, mirrored])
    figures, _ = attacks.public_copies(truth, truth.received.rounds, changed=True)
    assert (figures["members"], figures["others"]) == (40, 120)  # of 60 that are private somewhere
    exact = recorded(2.0)
    with pytest.raises(ValueError, match="no public image is a changed copy of a private one"):
        attacks.public_copies(exact, exact.received.rounds, changed=True)


def test_changed_copies_of_held_out_images_are_no_members() -> None:
    truth, last = recorded(2.0, change=[paler] * 3), np.arange(60)
    sites = {
        n: replace(s, train_parts=(last[10:],), held_out_parts=(last[:10],)) for n, s in truth.sites.items()
    }
    figures, _ = attacks.public_copies(replace(truth, sites=sites), truth.received.rounds, changed=True)
    assert (figures["members"], figures["others"]) == (30, 120)


def test_why_there_is_no_figure_is_said() -> None:
    truth = recorded(1.0)
    silent = replace(truth, received=Received())
    found = attacks.attempt("public", "copies", lambda: public_copies(silent))
    assert found.figures == {}
    assert found.note == "not computed: no predictions of public images were received"
    heard = truth.received.rounds[0]
    summed = replace(truth, received=Received((replace(heard, predictions={"(sum)": log_p(100, 2)}),)))
    with pytest.raises(ValueError, match="only the sum"):
        attacks.classes_of_clients(summed)
    assert "only the sum" in attacks.peers(summed)[0].note
    apart = replace(truth, sites={"client-0": replace(truth.sites["client-0"], private=image_set([0] * 60))})
    with pytest.raises(ValueError, match="no public image is private"):
        public_copies(apart)


@pytest.mark.parametrize(("shift", "low", "high"), [(3.0, 0.95, 1.0), (0.0, 0.3, 0.7)])
def test_training_images_are_told_from_held_out_ones(shift: float, low: float, high: float) -> None:
    truth, rng = recorded(0.0), np.random.default_rng(2)
    odds = {}
    for client in truth.sites:
        easy = rng.normal(0, 3, 60)  # the same to every model: the others are the reference
        by_model = {name: easy + rng.normal(0, 0.5, 60) for name in truth.sites}
        by_model[client][:50] += shift
        odds[client] = by_model
    figures = attacks.private_images(truth, attacks.compared(odds))
    assert low <= figures["auc"] <= high
    together = attacks.private_images(truth, attacks.summed(odds))
    assert together["auc"] < max(figures["auc"], 0.7)  # how easy an image is hides what one of them knows
    assert (figures["members"], figures["others"]) == (90, 30)  # without the 20 public ones of each


@pytest.mark.parametrize("shadows", [2, 40])
def test_lira_finds_what_is_remembered(shadows: int) -> None:
    rng = np.random.default_rng(3)
    easy, kept = rng.normal(0, 4, 400), np.abs(rng.normal(2, 0.5, 400))
    inside = rng.random((shadows, 400)) < 0.5
    inside[:, 0], inside[:, 1] = True, False  # one that no shadow lacks, and one that none has
    values = easy + inside * kept + rng.normal(0, 0.4, (shadows, 400))
    member = rng.random(400) < 0.5
    odds = easy + member * kept + rng.normal(0, 0.4, 400)
    assert measured(odds, member).auc < 0.75
    assert measured(likelihood_ratios(odds, values, inside), member).auc > 0.95


def test_log_odds_of_three_classes() -> None:
    odds = log_odds(np.log([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]), np.array([0, 2]))
    np.testing.assert_allclose(odds, [0, np.log(0.25)], atol=1e-12)


def test_class_shares_are_read_off_predictions_that_follow_them() -> None:
    shares = {name: np.array([s, 1 - s]) for name, s in zip("abcde", (0.1, 0.9, 0.4, 0.6, 0.5), strict=True)}
    naive = class_mix({name: np.log(np.tile(s, (30, 1))) for name, s in shares.items()}, shares)
    assert naive.at_face_value == pytest.approx(1)
    assert naive.calibrated == pytest.approx(1)
    assert 0.1 < naive.chance < 0.4  # five clients: 1 / 4
    weak = {name: np.log(np.tile(0.5 + 0.1 * (s - 0.5), (30, 1))) for name, s in shares.items()}
    hidden = class_mix(weak, shares)
    assert hidden.at_face_value is not None
    assert hidden.at_face_value < 0.3
    assert hidden.calibrated == pytest.approx(1)


@pytest.mark.parametrize("divergence", ["peer_own", "own_peer"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("clients", "peers"), [(2, 1), (3, 2), (5, 4)])
def test_all_others_together_know_a_client_exactly(
    divergence: str, temperature: float, clients: int, peers: int
) -> None:
    said = {f"c{i}": np.maximum(log_p(40, 3, seed=i), -5) for i in range(clients)}
    said = {name: log_softmax(values) for name, values in said.items()}
    found = reconstructed(said, divergence, temperature, peers)
    assert found.largest_error < 0.02  # a target travels in float16
    assert found.explained > 0.999


def test_one_of_many_peers_knows_little() -> None:
    found = reconstructed({f"c{i}": log_p(200, 2, seed=i) for i in range(5)}, "peer_own", 1.0, 1)
    assert found.explained < 0.2
    assert found.largest_error > 0.3
    with pytest.raises(ValueError, match="5 of 5"):
        reconstructed({f"c{i}": log_p(9, 2) for i in range(5)}, "peer_own", 1.0, 5)


TWO = ("rounds=2", "privacy.record=true", "tracking.loggers=[]", "train.validation_fraction=0.2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audited") / "run"
    assert run_inprocess([*TINY, *TWO], path, num_clients=3) == 0
    return path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmutual.audit.copies.STEPS", 3)


def test_with_differential_privacy_what_is_proven_is_said() -> None:
    truth = recorded(3.0)
    private = replace(truth.settings.privacy, epsilon=2.0, delta=1e-3)
    found = _findings(replace(truth, settings=replace(truth.settings, privacy=private)), 0)
    assert found[0].figures["auc_at_most"] == pytest.approx(0.8818, abs=1e-4)  # e^2 / (1 + e^2) + delta
    assert found[0].figures["tpr_at_most"] == pytest.approx(0.0749, abs=1e-4)
    assert all(not entry.figures for entry in found[1:])  # what a simulation measures besides is not sent


def test_a_study_is_audited_run_by_run(tmp_path: Path) -> None:
    for name in ("mutual-iid-seed_0", "mutual-iid-seed_1", "local-seed_0"):
        (tmp_path / "runs" / name / "0123").mkdir(parents=True)
        (tmp_path / "runs" / name / "0123" / "summary.json").touch()
    (tmp_path / "runs" / "unfinished" / "0123").mkdir(parents=True)
    named = _named([tmp_path])
    assert [name for name, _ in named] == ["local-seed_0", "mutual-iid-seed_0", "mutual-iid-seed_1"]
    audits = [
        (name, {"findings": [{"attack": "private", "figures": {"auc": 0.5 + 0.1 * i}}]})
        for i, (name, _) in enumerate(named)
    ]
    cells = list(study_table(audits).columns)
    assert list(cells[0].cells) == ["local", "mutual-iid"]
    assert list(cells[1].cells) == ["1", "2"]
    assert list(cells[4].cells) == ["0.500", "0.650 [0.600, 0.700]"]
    assert list(cells[2].cells) == ["-", "-"]


@pytest.mark.federation
@pytest.mark.usefixtures("short")
def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["run"]
    assert found == json.loads((run / "audit.json").read_bytes())
    by_name = {entry["attack"]: entry for entry in found["findings"]}
    assert by_name["private"]["figures"]["members"] == 78
    assert by_name["private"]["figures"]["others"] == 18
    assert by_name["peers-2"]["figures"]["largest_error"] < 0.01
    assert by_name["classes"]["figures"]["clients"] == 3
    assert "--shadows" in by_name["lira"]["note"]
    page = (run / "report.html").read_text()
    assert "What the server could tell" in page
    assert "78 members" in page
    assert main(["audit", str(run), str(run)]) == 0
    assert "What the server could tell: run" in capsys.readouterr().out


@pytest.mark.federation
@pytest.mark.usefixtures("short")
def test_shadow_runs(run: Path) -> None:
    found = {entry["attack"]: entry for entry in audit_run(run, shadows=2)["findings"]}
    assert found["lira"]["note"] == "LiRA, 2 shadow runs"
    assert found["lira"]["figures"]["members"] == 78


@pytest.mark.federation
@pytest.mark.parametrize(
    ("own", "note"),
    [
        (["strategy=fedavg"], "from the clients' weights"),
        (["strategy=local"], "from copies of the clients' models"),
        (["privacy.secagg=true"], "from a copy of the clients' mean"),
        (["strategy=mutual_async"], "from copies of the clients' models"),
        (["public=sample"], "from copies of the clients' models"),
    ],
)
@pytest.mark.usefixtures("short")
def test_other_runs(own: list[str], note: str, tmp_path: Path) -> None:
    kept = [o for o in TINY if not (o.startswith("strategy.") and own[0].startswith("strategy"))]
    assert run_inprocess([*kept, *TWO, *own], tmp_path / "run", num_clients=3) == 0
    found = {entry["attack"]: entry for entry in audit_run(tmp_path / "run")["findings"]}
    assert found["private"]["note"].startswith(note)
    assert found["private"]["figures"]


@pytest.mark.federation
def test_what_cannot_be_audited_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)

    def said(*arguments: str) -> str:
        assert main(["audit", *arguments]) == 2
        return capsys.readouterr().err

    assert "holds no config.yaml" in said(str(tmp_path / "nowhere"))
    assert "--sent" in said()
    assert "the public images here are not those" in said(str(copy), "seed=1")
    (copy / "audit.json").write_text("{}")
    (copy / "received" / "0001.npz").write_bytes(b"nothing")
    assert "0001.npz is damaged" in said(str(copy))
    shutil.rmtree(copy / "received")
    assert "run it again with privacy.record=true" in said(str(copy))
    history = (copy / "history.jsonl").read_text()
    lines = [json.loads(line) | {"private_digest": "0" * 32} for line in history.splitlines()]
    (copy / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(run / "received", copy / "received")
    assert "the private images of client-0 here are not those" in said(str(copy))
    (copy / "summary.json").unlink()
    assert "the run is still going on" in said(str(copy))
