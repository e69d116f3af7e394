"""Runs with differential privacy: what leaves a site, the ledger across kills, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_grid import Played, play, trains
from test_pretrained_runs import weights_file

pytest.importorskip("timm", reason="needs the extra fedmutual[pretrained]")
pytest.importorskip("opendp", reason="needs the extra fedmutual[privacy]")

from fedmutual.client.budget import FOLDER, Asked, BudgetError, BudgetLedger
from fedmutual.learning.gaussian import multiplier_for
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.wire.masks import unpack
from fedmutual.wire.orders import read_order
from fedmutual.wire.records import METRICS, MODEL, REPORT

PRIVATE = ("strategy=speaker", "privacy.epsilon=2", "rounds=2", "public.size=24", "strategy.axes=6")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = weights_file(tmp_path_factory.mktemp("weights"), 0)
    return f"model=pretrained model.backbone={file} model.image_size=32"


def reports(played: Played) -> list[Any]:
    return [reply.content for reply in played.grid.replies if trains(reply) and reply.has_content()]


@pytest.fixture(scope="module")
def run(small: str, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """As at sites: the clients say nothing that a simulation alone may know."""
    path = tmp_path_factory.mktemp("private") / "run"
    played = play(path, *small.split(), *PRIVATE, "privacy.metrics=none")
    assert played.error is None
    assert played.rejections() == []
    return played


@pytest.mark.federation
def test_nothing_leaves_but_the_noisy_sums(run: Played) -> None:
    public = {"protocol", "client", "round", "public-digest", "architecture", "dtype", "predictions"}
    for content in reports(run):
        report = content[REPORT]
        assert set(report) <= public
        assert report["predictions"] == b""
        assert dict(content[METRICS]) == {"num-examples": 1}
        assert set(content.get(MODEL, {})) == ({"sums"} if report["round"] == 1 else set())
    assert len(reports(run)) == 3 * 3
    assert not any("would leave no site" in text for text in run.summary["warnings"])


@pytest.mark.federation
def test_reports_are_a_function_of_the_release_and_of_public_data(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has which private images, with the same releases every byte that leaves is the same."""
    drawn: list[int] = []

    def same(values: np.ndarray, scale: float) -> np.ndarray:
        drawn.append(len(values))
        return np.arange(len(values)) * 1000

    monkeypatch.setattr("fedmutual.methods.joint_speaker.noisy", same)
    said = []
    for name, partition in (("a", "partition=iid"), ("b", "partition=pathological")):
        played = play(tmp_path / name, *small.split(), *PRIVATE, partition, "privacy.metrics=none")
        assert played.error is None
        said.append([{k: dict(record) for k, record in content.items()} for content in reports(played)])
    assert len(drawn) == 6
    assert [{k: repr(v) for k, v in one.items()} for one in said[0]] == [
        {k: repr(v) for k, v in one.items()} for one in said[1]
    ]


@pytest.mark.federation
def test_the_listeners_listen_and_the_server_measures_the_speaker(small: str, tmp_path: Path) -> None:
    played = play(tmp_path / "run", *small.split(), *PRIVATE)
    assert played.error is None
    orders = played.orders()
    for (_, round), order in orders.items():
        assert order.has_target == (round == 2)
    line = played.line(2, "client-0")
    assert np.isfinite(line["kl_before"])
    assert 0 <= line["speaker_accuracy"] <= 1
    assert played.summary["clients"]["client-0"]["unseen_accuracy"] is not None
    assert any("have no noise, and would leave no site" in text for text in played.summary["warnings"])
    (file,) = (played.path / "clients").glob("run-*/client-0/model.json")
    card = json.loads(file.read_text())
    assert "epsilon 2, delta 0.001 for each image" in (file.parent / "README.md").read_text()
    assert card["settings"]["privacy.epsilon"] == 2
    assert card["privacy"]["epsilon"] == pytest.approx(2, rel=0.01)
    assert card["privacy"]["delta"] == 1e-3


@pytest.mark.federation
def test_a_kill_between_spending_and_sending_sends_the_same_release(small: str, tmp_path: Path) -> None:
    """The client dies after the ledger was written; asked again, it draws nothing new."""
    import fedmutual.client.answer as client

    saved = client.StateFolder.save
    killed: list[str] = []

    def save(self: Any, state: Any) -> None:
        if not killed and state.report.client == "client-1":
            killed.append(str(self.path))
            raise OSError("killed")
        saved(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.StateFolder, "save", save)
        played = play(tmp_path / "run", *small.split(), *PRIVATE, "rounds=3", "exchange.min_clients=2")
    assert played.error is None
    assert killed
    folder = tmp_path / "run" / "clients" / FOLDER / "client-1"
    (entry,) = folder.glob("*.safetensors")
    from fedmutual.files.checkpoint import read_generation

    kept = read_generation(entry)[1]["sums"]
    sent = [
        content[MODEL]["sums"].numpy()
        for content in reports(played)
        if content.get(REPORT, {}).get("client") == "client-1" and MODEL in content
    ]
    assert len(sent) == 1
    np.testing.assert_array_equal(sent[0], kept)


# ---------------------------------------------------------------------------------------------------
# A speaker of each site's own, whose predictions leave it

OWN = (*PRIVATE, "privacy.speaker=own", "strategy.features=hog")


@pytest.mark.federation
def test_own_speakers_send_their_predictions_once_and_all_listen(tmp_path: Path) -> None:
    more = ("rounds=3", "privacy.metrics=none", "model.per_client=[visionnet,'visionnet dropout=0.0']")
    played = play(tmp_path / "run", *OWN, *more)
    assert played.error is None
    assert played.rejections() == []
    for content in reports(played):
        first = content[REPORT]["round"] == 1
        assert content[REPORT]["predictions"] == b""
        assert dict(content[METRICS]) == {"num-examples": 1}
        assert set(content.get(MODEL, {})) == ({"said", "counts"} if first else set())
        if first:
            assert content[MODEL]["said"].numpy().shape == (24, 2)
            assert (content[MODEL]["counts"].numpy() >= 0).all()
    assert {order.has_target for (_, round), order in played.orders().items() if round == 1} == {False}


@pytest.mark.federation
def test_what_own_speakers_send_is_a_function_of_the_noisy_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has which private images: with the same noisy sums every byte that leaves is the same."""
    drawn: list[int] = []

    def same(values: np.ndarray, scale: float) -> np.ndarray:
        drawn.append(len(values))
        return np.arange(1, 1 + len(values)) * 10**7  # some images of each class

    monkeypatch.setattr("fedmutual.methods.own_speaker.noisy", same)
    sent = []
    for name, partition in (("a", "partition=iid"), ("b", "partition=pathological")):
        played = play(tmp_path / name, *OWN, partition, "privacy.metrics=none")
        assert played.error is None
        sent.append([{k: repr(dict(record)) for k, record in c.items()} for c in reports(played)])
        assert played.orders()[1000, 2].has_target
    assert len(drawn) == 2 * 3
    assert sent[0] == sent[1]


@pytest.mark.federation
def test_a_repeated_run_says_the_same_and_spends_nothing(tmp_path: Path) -> None:
    """Another run with the same state, as after a crash or a resume: the release comes from the ledger."""
    said = []
    for name in ("first", "again"):
        played = play(tmp_path / name, *OWN, f"state_dir={tmp_path / 'sites'}")
        assert played.error is None
        first = [c for c in reports(played) if c[REPORT]["round"] == 1]
        said.append({c[REPORT]["client"]: c[MODEL]["said"].numpy() for c in first})
        assert np.isfinite(played.line(2, "client-0")["validation_accuracy"])
    for client, values in said[0].items():
        np.testing.assert_array_equal(values, said[1][client])
        spent = BudgetLedger(tmp_path / "sites", client).spent()
        assert spent.releases == 1
        assert 1.98 < spent.epsilon <= 2


@pytest.mark.federation
def test_without_epsilon_own_speakers_work_without_noise(tmp_path: Path) -> None:
    played = play(tmp_path / "run", *OWN, "privacy.epsilon=null", "strategy.axes=20")
    assert played.error is None
    assert played.orders()[1000, 2].has_target
    assert played.line(2, "client-0")["speaker_accuracy"] > 0.6
    assert not (tmp_path / "run" / "clients" / FOLDER).exists()


@pytest.mark.federation
def test_a_site_whose_owner_asks_for_more_releases_nothing(tmp_path: Path) -> None:
    def node(number: int) -> dict[str, Any]:
        own: dict[str, Any] = {"privacy-delta": 1e-4} if number == 1 else {}
        return {"partition-id": number, "num-partitions": 3, "trust-run": True, **own}

    played = play(tmp_path / "run", *OWN, "exchange.min_clients=2", node_config=node)
    assert played.error is None
    ledger = tmp_path / "run" / "clients" / FOLDER
    assert sorted(path.name for path in ledger.iterdir()) == ["client-0", "client-2"]
    (refused, *_) = [reply.error for reply in played.grid.replies if reply.has_error()]
    assert "privacy.delta: 0.001 is above this site's privacy-delta=0.0001" in str(refused.reason)


# ---------------------------------------------------------------------------------------------------
# Together with secure aggregation: each site has its share of the noise, and the server gets the sum

MASKED = (*PRIVATE, "privacy.secagg=true", "privacy.metrics=none", "rounds=4")


def dies(client: int, *rounds: int) -> Any:
    """A client that is killed in these rounds."""

    def before(node: int, order: Any) -> None:
        if trains(order) and node == 1000 + client and read_order(order.content).round in rounds:
            raise RuntimeError("killed")

    return before


def kept(played: Played, client: str) -> list[tuple[dict[str, Any], np.ndarray]]:
    """What a site's ledger holds: the releases and their numbers."""
    from fedmutual.files.checkpoint import read_generation

    folder = played.path / "clients" / FOLDER / client
    found = [read_generation(path) for path in folder.glob("*.safetensors")]
    return [(meta, arrays["sums"]) for meta, arrays in found]


@pytest.mark.federation
def test_the_server_gets_the_noisy_sum_only(small: str, tmp_path: Path) -> None:
    from fedmutual.learning.speaker import GRID, sensitivity

    played = play(tmp_path / "run", *small.split(), *MASKED)
    assert played.error is None
    assert played.rejections() == []
    sent: dict[str, np.ndarray] = {}
    for content in reports(played):
        report = content[REPORT]
        assert MODEL not in content
        assert not report.get("predictions")
        assert dict(content[METRICS]) == {"num-examples": 1}
        if report.get("masked"):
            assert report["round"] == 1
            sent[report["client"]] = unpack(report["masked"], 8).view(np.int64)
    assert len(sent) == 3
    shares = {}
    for client, numbers in sent.items():
        ((meta, own),) = kept(played, client)
        assert meta["multiplier"] == pytest.approx(multiplier_for(2, 1e-3), rel=1e-6)
        assert not np.array_equal(numbers, own)
        shares[client] = own
    total = np.sum(list(shares.values()), axis=0)
    assert np.array_equal(np.sum(list(sent.values()), axis=0), total)
    # two of the three sites' noise is enough, so each one's is smaller by sqrt 2 than a site's alone
    share = multiplier_for(2, 1e-3) * sensitivity(7, 2) / np.sqrt(2)
    apart = (total[0:-1:2] + total[1:-1:2]) / np.sqrt(6)  # what is said of two classes adds up to 0
    assert 0.3 * share < np.sqrt(np.mean(apart.astype(float) ** 2)) < 2.5 * share
    assert share > 0.5 * GRID
    taught = [order.has_target for (_, round), order in played.orders().items() if 1 < round < 5]
    assert all(taught)


@pytest.mark.federation
def test_after_a_drop_out_the_same_cohort_sends_the_same_numbers(small: str, tmp_path: Path) -> None:
    quorum = "exchange.min_clients=2"
    played = play(tmp_path / "run", *small.split(), *MASKED, quorum, before=dies(1, 1))
    assert played.error is None
    orders = played.orders()
    assert orders[1000, 2].cohort == orders[1000, 1].cohort
    assert [orders[1000, round].has_target for round in (2, 3, 4)] == [False, True, True]
    assert all(len(kept(played, f"client-{k}")) == 1 for k in range(3))


@pytest.mark.federation
@pytest.mark.parametrize("budget", [None, 4])
def test_without_a_site_that_stays_away_it_is_another_release(
    small: str, tmp_path: Path, budget: int | None
) -> None:
    """It is charged, so it is made only where the budget pays for it."""
    more = ("exchange.min_clients=2", f"privacy.budget={budget or 'null'}")
    played = play(tmp_path / "run", *small.split(), *MASKED, *more, clients=4, before=dies(3, 1, 2, 3, 4))
    assert played.error is None
    orders = played.orders()
    members = [len(orders[1000, round].cohort.names) for round in (1, 2, 3) if orders[1000, round].cohort]
    assert members == [4, 4, 3 if budget else 4]
    releases = kept(played, "client-0")
    assert len(releases) == (2 if budget else 1)
    assert orders[1000, 4].has_target == bool(budget)
    if budget:
        (_, first), (_, second) = releases
        assert not np.array_equal(first, second)
        assert 2 < BudgetLedger(played.path / "clients", "client-0").spent().epsilon < 4


@pytest.mark.federation
def test_sums_without_noise_are_masked_too(small: str, tmp_path: Path) -> None:
    played = play(tmp_path / "run", *small.split(), *MASKED, "privacy.epsilon=null")
    assert played.error is None
    assert played.rejections() == []
    assert not any(MODEL in content for content in reports(played))
    assert played.orders()[1000, 2].has_target


@pytest.mark.federation
def test_listeners_without_a_backbone_may_be_any_networks(tmp_path: Path) -> None:
    more = ("strategy.features=hog", "model.per_client=[visionnet,'visionnet dropout=0.0']")
    played = play(tmp_path / "run", *PRIVATE, *more)
    assert played.error is None
    assert played.rejections() == []
    assert all(set(content.get(MODEL, {})) <= {"sums"} for content in reports(played))
    line = played.line(2, "client-0")
    assert np.isfinite(line["kl_before"])
    assert 0 <= line["speaker_accuracy"] <= 1
    architectures = {content[REPORT]["architecture"] for content in reports(played)}
    assert architectures == {"VisionNet"}


def listens(right: list[bool], speaker: list[bool], labels: list[int]) -> bool:
    """Whether a client with these validation images listens to a speaker; what each is right on is given."""
    from types import SimpleNamespace

    from fedmutual.methods.listening import helps

    truth = np.array(labels)
    own, spoken = (np.where(said, truth, 1 - truth) for said in (right, speaker))
    site = SimpleNamespace(
        classes=("a", "b"),
        private=SimpleNamespace(labels=truth, seen=9 * np.eye(len(truth), dtype=np.float32)),
        validation_indices=lambda round: np.arange(len(truth)),
    )
    learner = SimpleNamespace(
        site=site,
        client="ward",
        order=SimpleNamespace(round=2),
        settings=SimpleNamespace(rounds=9),
        on_private=lambda indices: np.log(np.eye(2)[own] + 1e-3),
    )
    count = len(truth)
    taken = {"centre": np.zeros(count, np.float32), "axes": np.eye(count, dtype=np.float32)}
    return helps(learner, taken, np.eye(2)[[*spoken, 0]], "backbone")  # type: ignore[arg-type]


def test_a_client_listens_unless_it_surely_knows_better(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    classes = [0, 1] * 6
    good, bad = [True] * 12, [False] * 12
    assert listens(good, good, classes)
    assert listens(bad, good, classes)
    assert listens([True] * 3, [False] * 3, classes[:3])  # three images prove nothing
    assert listens(good, bad, [0] * 12)  # nor does a client that knows one class
    assert not caplog.records
    assert not listens(good, bad, classes)
    assert "ward, round 2: does not listen to the speaker" in caplog.text


# ---------------------------------------------------------------------------------------------------
# The ledger

RECORDS = np.arange(64, dtype=np.uint8).reshape(4, 16)


def asked(epsilon: float = 0.5, **about: Any) -> Asked:
    from fedmutual.learning.gaussian import multiplier_for

    return Asked(multiplier_for(epsilon, 1e-3), 1e-3, "pixels (8, 8, 3)", {"map": "a", **about})


def draw() -> dict[str, np.ndarray]:
    return {"gram": np.random.default_rng().standard_normal(3)}


def test_what_was_released_is_released_again_and_spends_nothing(tmp_path: Path) -> None:
    first = BudgetLedger(tmp_path, "a").release(asked(), RECORDS, 0.5, draw)
    again = BudgetLedger(tmp_path, "a").release(asked(), RECORDS, 0.5, draw)  # another process, another run
    np.testing.assert_array_equal(first["gram"], again["gram"])
    spent = BudgetLedger(tmp_path, "a").spent()
    assert (spent.releases, spent.delta) == (1, 1e-3)
    assert spent.epsilon == pytest.approx(0.5, rel=0.01)


def test_a_budget_that_is_used_up_draws_nothing(tmp_path: Path) -> None:
    ledger = BudgetLedger(tmp_path, "a")
    ledger.release(asked(), RECORDS, 0.5, draw)

    def never() -> dict[str, np.ndarray]:
        raise AssertionError("drawn")

    with pytest.raises(BudgetError, match=r"spent to epsilon 0\.748 \(delta 0\.001\), of 0\.5") as refused:
        ledger.release(asked(map="b"), RECORDS[:1], 0.5, never)  # one image in common is enough
    assert refused.value.told is not None
    assert str(tmp_path) not in refused.value.told
    assert ledger.spent().releases == 1
    ledger.release(asked(map="b"), RECORDS, 0.75, draw)  # the owner has raised it
    assert ledger.spent().releases == 2


def test_of_one_list_of_sites_one_release_is_made_whatever_the_budget(tmp_path: Path) -> None:
    ledger = BudgetLedger(tmp_path, "a")
    first = ledger.release(asked(cohort="x"), RECORDS, 9.0, draw, once="cohort")
    again = ledger.release(asked(cohort="x"), RECORDS, 9.0, draw, once="cohort")
    np.testing.assert_array_equal(first["gram"], again["gram"])
    for other, records in ((asked(cohort="x", map="b"), RECORDS), (asked(cohort="x"), RECORDS[1:])):
        with pytest.raises(BudgetError, match="another release was made for the same cohort"):
            ledger.release(other, records, 9.0, draw, once="cohort")
    ledger.release(asked(cohort="y"), RECORDS, 9.0, draw, once="cohort")
    assert ledger.spent().releases == 2


def test_other_images_have_their_own_budget_if_they_can_be_told_apart(tmp_path: Path) -> None:
    ledger = BudgetLedger(tmp_path, "a")
    ledger.release(asked(), RECORDS[:2], 0.5, draw)
    ledger.release(asked(), RECORDS[2:], 0.5, draw)
    other_size = Asked(asked().multiplier, 1e-3, "pixels (9, 9, 3)", {})
    with pytest.raises(BudgetError):
        ledger.release(other_size, RECORDS + 100, 0.5, draw)


def test_a_release_that_could_not_be_written_is_not_sent(tmp_path: Path) -> None:
    ledger = BudgetLedger(tmp_path, "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmutual.client.budget.save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):  # noqa: PT011
            ledger.release(asked(), RECORDS, 0.5, draw)


def test_a_damaged_ledger_is_refused(tmp_path: Path) -> None:
    ledger = BudgetLedger(tmp_path, "a")
    ledger.release(asked(), RECORDS, 0.5, draw)
    (entry,) = ledger.path.glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-1])
    with pytest.raises(BudgetError, match="is damaged"):
        ledger.release(asked(map="b"), RECORDS, 9.0, draw)


# ---------------------------------------------------------------------------------------------------
# What is refused before anything starts

HEAD = ("model=pretrained", "model.tune=head", "strategy=speaker")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*HEAD, "privacy.epsilon=0"), "privacy.epsilon: 0.0 is not above 0"),
        ((*HEAD, "privacy.epsilon=100"), "privacy.epsilon: 100.0 is above 32"),
        ((*HEAD, "privacy.epsilon=1", "privacy.delta=0.1"), "privacy.delta: 0.1 is above 0.01"),
        (
            (*HEAD, "privacy.epsilon=1", "privacy.budget=0.5"),
            "privacy.epsilon: 1 is above privacy.budget=0.5",
        ),
        (("privacy.epsilon=1",), "privacy.epsilon: strategy=mutual has no noise: set strategy=speaker"),
        (("strategy=speaker",), "strategy=speaker adds up frozen features: set model=pretrained"),
        ((*HEAD, "model.tune=all"), "set model=pretrained model.tune=head"),
        ((*HEAD, "public.labelled=true"), "public.labelled: strategy=speaker"),
        (
            (*HEAD, "privacy.secagg=true", "num_clients=4", "privacy.colluding=4"),
            "privacy.colluding: 4 of num_clients=4 is everyone",
        ),
        (
            (*HEAD, "privacy.secagg=true", "privacy.speaker=own"),
            "privacy.speaker: own does not go with privacy.secagg",
        ),
        ((*HEAD, "privacy.secagg=true", "rounds=1"), "rounds: the sums of strategy=speaker take one"),
    ],
)
def test_what_cannot_be_proven_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        compose(overrides)
    assert message in str(refused.value)


def test_without_opendp_it_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    settings = compose([*HEAD, "privacy.epsilon=1"])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "opendp" else found(name))
    assert "pip install 'fedmutual[privacy]'" in (settings.check() or "")


def test_the_owners_budget_goes_before_the_runs() -> None:
    overrides = [*HEAD, "privacy.epsilon=1", "privacy.budget=9"]
    assert compose(overrides, {"privacy-budget": "3"}).privacy.budget == 3
    with pytest.raises(SettingsError, match=r"privacy.epsilon: 1 is above privacy.budget=0.5"):
        compose(overrides, {"privacy-budget": "0.5"})
