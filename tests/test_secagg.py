"""Secure aggregation: the server gets the sum, and a site never answers what would give a part of it away."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from local_grid import Played, play, trains

from fedmutual.client.masking import FILE, Masking, Owner, open_masking
from fedmutual.client.state import StateError
from fedmutual.learning.consensus import MeanConsensus, log_softmax
from fedmutual.learning.ring import MODULUS, MOST_CLIENTS, Summed, steps
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.strategies.cfd import CFD
from fedmutual.strategies.dsfl import DSFL
from fedmutual.strategies.feddf import FedDF
from fedmutual.strategies.fedmd import FedMD
from fedmutual.strategies.mutual import MutualLearning
from fedmutual.wire.codec import MessageError
from fedmutual.wire.masks import WIDE_BYTES, Cohort, added, masked, new_key, pack, public_key, unpack
from fedmutual.wire.orders import Order, order_record, read_order
from fedmutual.wire.records import REPORT, read_config
from fedmutual.wire.reports import Expected, Report, read_report, report_record
from fedmutual.wire.signatures import Proof, fingerprint, prove, proven_by

FLOOR = 1e-4
NAMES = ("ana", "ben", "cem", "dov", "eva")
ADDS = {"log-odds": Summed(True, FLOOR), "probabilities": Summed(False, FLOOR)}


def predictions(count: int, samples: int = 50, classes: int = 3, seed: int = 0) -> list[np.ndarray]:
    """What so many clients predict, sure of some samples and not of others."""
    rng = np.random.default_rng(seed)
    scores = 4 * rng.normal(size=(count, samples, classes)).astype(np.float32)
    return [log_softmax(np.maximum(log_softmax(each), np.log(FLOOR))) for each in scores]


@cache
def key(name: str) -> bytes:
    return new_key()


def cohort(*names: str) -> Cohort:
    return Cohort(tuple(sorted(names)), tuple(public_key(key(name)) for name in sorted(names)))


def all_masked(parts: list[np.ndarray], round: int = 1) -> list[np.ndarray]:
    names = NAMES[: len(parts)]
    return [
        masked(part, key(name), name, cohort(*names), "run", round)
        for name, part in zip(names, parts, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------
# The sum


@given(st.integers(3, 5), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_masks_cancel_exactly(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, MODULUS, size).astype(np.uint32) for _ in range(count)]
    assert np.array_equal(added(all_masked(parts)), np.sum(parts, axis=0, dtype=np.uint64) % MODULUS)


def test_numbers_travel_in_three_bytes() -> None:
    values = np.array([0, 1, 255, 256, 70_000, MODULUS - 1], np.uint32)
    assert len(pack(values)) == 18
    assert np.array_equal(unpack(pack(values)), values)
    assert pack(np.array([0x030201], np.uint32)) == b"\x01\x02\x03"


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("classes", [2, 5])
def test_the_sum_of_masked_parts_is_the_plain_sum(adds: str, classes: int) -> None:
    summed, said = ADDS[adds], predictions(5, samples=600, classes=classes)
    total = added(all_masked([summed.encode(each, 5) for each in said]))
    low, width = (np.log(FLOOR), -2 * np.log(FLOOR)) if adds == "log-odds" else (0.0, 1.0)
    found = 5 * low + width * total.reshape(600, classes - 1) / steps(5)
    values = [
        (each[:, 1:] - each[:, :1]) if adds == "log-odds" else np.exp(each[:, 1:].astype(np.float64))
        for each in said
    ]
    assert np.abs(found - np.sum(values, axis=0, dtype=np.float64)).max() <= 1e-4


def test_as_many_clients_as_fit_do_not_wrap_and_more_are_refused() -> None:
    sure = np.log(np.array([[FLOOR, 1 - FLOOR]], np.float32))
    for adds in ADDS.values():
        total = added([adds.encode(sure, MOST_CLIENTS)] * MOST_CLIENTS)
        assert np.exp(adds.decode(total, MOST_CLIENTS, 2))[0, 1] == pytest.approx(1 - FLOOR, abs=1e-4)
    with pytest.raises(ValueError, match=f"at most {MOST_CLIENTS} clients, not {MOST_CLIENTS + 1}"):
        steps(MOST_CLIENTS + 1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("divergence", ["own_peer", "peer_own"])
def test_a_client_finds_the_target_that_the_server_would_have_sent(
    divergence: str, temperature: float
) -> None:
    said = dict(zip(NAMES, predictions(5), strict=True))
    plain = MeanConsensus(said, divergence, temperature).target("cem")
    summed = Summed(divergence == "own_peer", FLOOR, temperature, without_own=True)
    mean = summed.decode(added([summed.encode(each, 5) for each in said.values()]), 5, 3)
    target = MeanConsensus({"(sum)": mean}, divergence, temperature).target("cem")
    assert plain is not None
    assert target is not None
    peers = summed.take_out(target.log_probabilities, said["cem"], 1 / 5, temperature)
    expected = np.exp(log_softmax(plain.log_probabilities))
    assert np.abs(np.exp(peers) - expected).max() <= 2e-4  # of which the floor is 1e-4
    assert np.abs(np.exp(log_softmax(target.log_probabilities)) - expected).max() > 0.1  # its own was in it


@pytest.mark.parametrize(
    ("make", "adds"),
    [
        (FedMD, "log-odds"),
        (FedDF, "log-odds"),
        (DSFL, "probabilities"),
        (CFD, "probabilities"),
        (lambda n, c: MutualLearning(n, c, divergence="own_peer"), "log-odds"),
        (lambda n, c: MutualLearning(n, c, divergence="peer_own"), "probabilities"),
    ],
)
def test_a_strategy_forms_the_same_consensus_from_the_sum(make: Callable[..., Any], adds: str) -> None:
    said, summed = predictions(5), ADDS[adds]
    reports = {name: Report(name, 1, "", "", each) for name, each in zip(NAMES, said, strict=True)}
    mean = summed.decode(added([summed.encode(each, 5) for each in said]), 5, 3)
    formed = []
    for given_reports in (reports, {"(sum)": Report("(sum)", 1, "", "", mean)}):
        strategy = make(50, 3)
        strategy.take(1, given_reports)
        formed.append(np.exp(strategy.consensus_of_all()))
    assert np.abs(formed[0] - formed[1]).max() <= 1e-4


# ---------------------------------------------------------------------------------------------------
# What a masked part tells


def test_a_masked_part_is_uniform_and_tells_nothing_of_the_predictions() -> None:
    summed, said = ADDS["probabilities"], predictions(3, samples=20_000, classes=2)
    parts = [summed.encode(each, 3) for each in said]
    for part, sent in zip(parts, all_masked(parts), strict=True):
        assert abs(np.corrcoef(part, sent)[0, 1]) < 0.04  # 5 standard errors
        assert np.abs(np.corrcoef([part, *all_masked(parts)])[0, 1:]).max() < 0.04
        counts = np.histogram(sent, 64, (0, MODULUS))[0]
        assert ((counts - 20_000 / 64) ** 2 / (20_000 / 64)).sum() < 150  # chi-square, 63 degrees: p = 1e-8
    two = added(all_masked(parts)[:2])
    assert abs(np.corrcoef(two, parts[0] + parts[1])[0, 1]) < 0.04  # nor does a sum of some of them


@pytest.mark.parametrize("change", ["round", "run", "members"])
def test_every_round_run_and_list_has_masks_of_its_own(change: str) -> None:
    nothing, everyone = np.zeros(300, np.uint32), cohort(*NAMES)
    first = masked(nothing, key("ana"), "ana", everyone, "run", 1)
    other = masked(
        nothing,
        key("ana"),
        "ana",
        cohort(*NAMES[:4]) if change == "members" else everyone,
        "another" if change == "run" else "run",
        2 if change == "round" else 1,
    )
    assert np.mean(first == other) < 0.05
    difference = (first.astype(np.int64) - other) % MODULUS
    assert len(np.unique(difference)) > 290  # no stream of theirs is the same


@pytest.mark.parametrize(
    ("names", "keys", "reason"),
    [
        (("ana", "ana"), (b"a" * 32, b"b" * 32), "twice"),
        (("ben", "ana"), (b"a" * 32, b"b" * 32), "not sorted"),
        (("ana", "ben"), (b"a" * 32,), "one key of 32 bytes"),
        (("ana", "ben"), (b"a" * 32, b"b" * 31), "one key of 32 bytes"),
        (("ana", "ben"), (b"a" * 32, b"a" * 32), "two names have one key"),
    ],
)
def test_a_malformed_list_is_refused(names: tuple[str, ...], keys: tuple[bytes, ...], reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        Cohort(names, keys)


def test_a_key_without_a_secret_is_refused_by_its_name() -> None:
    zero = Cohort(("ana", "ben"), (public_key(key("ana")), bytes(32)))
    with pytest.raises(MessageError, match="the key of ben"):
        masked(np.zeros(1, np.uint32), key("ana"), "ana", zero, "run", 1)


# ---------------------------------------------------------------------------------------------------
# What a site answers


class Site:
    """The side of ``ana``."""

    def __init__(self, folder: Path, least: int = 3) -> None:
        self.masking = Masking(folder, "ana", ADDS["probabilities"], Owner(least))
        own = self.masking.public_key()
        self.keys = {name: public_key(key(name)) for name in NAMES} | {"ana": own}

    def order(self, round: int, *names: str, **keys: bytes) -> Order:
        members = sorted(names)
        every = tuple((self.keys | keys)[name] for name in members)
        return Order(run="run", round=round, num_classes=3, cohort=Cohort(tuple(members), every))

    def answer(self, order: Order, seed: int = 0) -> bytes:
        self.masking.admit(order)
        (said,) = predictions(1, seed=seed)
        report = self.masking.hide(Report("ana", order.round, "", "", said), order)
        assert not len(report.predictions)
        assert report.masked is not None
        return report.masked


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_round_is_answered_once_and_repeated_with_the_same_bytes(site: Site) -> None:
    order = site.order(1, "ana", "ben", "cem", "dov")
    first = site.answer(order)
    assert len(first) == 50 * 2 * 3
    assert site.answer(order) == first


def test_no_second_list_is_answered_in_a_round(site: Site) -> None:
    site.answer(site.order(1, "ana", "ben", "cem", "dov"))
    with pytest.raises(MessageError, match="round 1 has another list"):
        site.answer(site.order(1, "ana", "ben", "cem"))
    site.answer(site.order(2, "ana", "ben", "cem"))


def test_no_earlier_round_is_answered_again(site: Site) -> None:
    site.answer(site.order(1, *NAMES))
    site.answer(site.order(2, *NAMES))
    with pytest.raises(MessageError, match="answered round 2"):
        site.answer(site.order(1, *NAMES))


def test_a_list_that_was_promised_binds_before_anything_is_sent(site: Site) -> None:
    """The server may have it from another client that answers at once."""
    site.masking.admit(site.order(1, *NAMES))
    with pytest.raises(MessageError, match="another list"):
        site.masking.admit(site.order(1, *NAMES[:4]))


def test_other_predictions_under_the_same_masks_are_never_sent(site: Site) -> None:
    site.answer(site.order(1, *NAMES))
    with pytest.raises(StateError, match="with other predictions") as error:
        site.answer(site.order(1, *NAMES), seed=1)
    assert "with other predictions" in str(error.value.told)


def test_nobody_joins_or_comes_back_and_no_key_changes(site: Site) -> None:
    site.answer(site.order(1, "ana", "ben", "cem", "dov"))
    with pytest.raises(MessageError, match="eva: not in the list"):
        site.answer(site.order(2, *NAMES))
    with pytest.raises(MessageError, match=r"ben: .* another key"):
        site.answer(site.order(2, "ana", "ben", "cem", ben=public_key(new_key())))
    site.answer(site.order(3, "ana", "ben", "cem"))
    with pytest.raises(MessageError, match="dov: not in the list"):
        site.answer(site.order(4, "ana", "ben", "cem", "dov"))


def test_too_few_are_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(MessageError, match="2 clients take part"):
        site.answer(site.order(1, "ana", "ben"))
    careful = Site(tmp_path / "other", least=5)
    with pytest.raises(MessageError, match=r"4 clients take part, .* 5 \(secagg-min-clients\)"):
        careful.answer(careful.order(1, *NAMES[:4]))
    careful.answer(careful.order(1, *NAMES))


def test_a_list_with_a_wrong_key_of_its_own_is_refused(site: Site) -> None:
    with pytest.raises(MessageError, match="another key than its own"):
        site.answer(site.order(1, *NAMES, ana=public_key(new_key())))


def test_without_a_sum_nothing_is_sent(site: Site) -> None:
    (said,) = predictions(1)
    report = Report("ana", 1, "", "", said, unseen_predictions=said)
    assert site.answer(site.order(1, "ben", "cem", "dov")) == b""
    assert site.masking.hide(report, Order(round=1, num_classes=3)).masked == b""
    closing = site.masking.hide(report, replace(site.order(9, *NAMES), closing=True))
    assert closing.unseen_predictions is None
    assert not len(closing.predictions)


def test_a_damaged_record_ends_the_answers(site: Site, tmp_path: Path) -> None:
    site.answer(site.order(1, *NAMES))
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(StateError, match="start a new run"):
        site.answer(site.order(2, *NAMES))


def test_what_the_owner_says(tmp_path: Path) -> None:
    plain, secure = compose(), compose(["privacy.secagg=true"])
    assert open_masking(tmp_path, "ana", plain, {}) is None
    assert open_masking(tmp_path, "ana", secure, {"secagg-min-clients": 4}) is not None
    with pytest.raises(SettingsError, match="takes part only with it"):
        open_masking(tmp_path, "ana", plain, {"require-secagg": "true"})
    for wrong in ("2", "many", "-5"):
        with pytest.raises(SettingsError, match=r"secagg-min-clients: .* from 3 on"):
            open_masking(tmp_path, "ana", secure, {"secagg-min-clients": wrong})


def test_a_share_of_the_noise_is_enough_only_behind_keys_that_the_owner_knows(tmp_path: Path) -> None:
    pytest.importorskip("opendp", reason="needs the extra fedmutual[privacy]")
    noisy = compose(["strategy=speaker", "model=pretrained", "privacy.epsilon=1", "privacy.secagg=true"])
    with pytest.raises(SettingsError, match=r"with a share of the noise only: list the peers' keys"):
        open_masking(tmp_path, "ana", noisy, {})
    peers = ",".join(f"{name}:SHA256:{'a' * 43}" for name in ("ben", "cem"))
    assert open_masking(tmp_path, "ana", noisy, {"secagg-peers": peers}) is not None
    assert open_masking(tmp_path, "ana", noisy, {"trust-run": "true"}) is not None


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["strategy=fedavg"], "strategy=fedavg"),
        (["strategy=mutual_async"], "strategy=mutual_async"),
        (["strategy=local"], "strategy=local"),
        *[
            ([f"consensus={name}"], "consensus")
            for name in ("validation", "confidence", "median", "trimmed_mean", "reputation")
        ],
        (["strategy.divergence=published_code"], "strategy.divergence"),
        (["participation.fraction=0.5"], "participation"),
        (["exchange.enough_clients=3"], "exchange.enough_clients"),
        (["num_clients=2"], "num_clients=2"),
    ],
)
def test_what_needs_more_than_a_sum_is_refused_by_name(overrides: list[str], key: str) -> None:
    compose(overrides)
    with pytest.raises(SettingsError, match=key):
        compose([*overrides, "privacy.secagg=true"])


@pytest.mark.parametrize("name", ["mutual", "fedmd", "dsfl", "cfd", "feddf"])
def test_what_needs_no_more_is_accepted(name: str) -> None:
    assert compose([f"strategy={name}", "privacy.secagg=true"]).privacy.secagg


# ---------------------------------------------------------------------------------------------------
# Keys that their sites have signed


@pytest.fixture(scope="module")
def site_keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A long-lived private key for each name: ECDSA as Flower's, and one of another kind."""
    folder = tmp_path_factory.mktemp("keys")
    for name in NAMES:
        made = Ed25519PrivateKey.generate() if name == "eva" else ec.generate_private_key(ec.SECP384R1())
        shape = PrivateFormat.PKCS8 if name == "dov" else PrivateFormat.OpenSSH
        (folder / name).write_bytes(made.private_bytes(Encoding.PEM, shape, NoEncryption()))
    return {name: folder / name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_signature_holds_for_its_run_name_and_key_only(name: str, site_keys: dict[str, Path]) -> None:
    proof = prove(site_keys[name], "run", name, b"k" * 32)
    own = fingerprint(proof.signer)
    assert proven_by(proof, "run", name, b"k" * 32) == own
    assert own.startswith("SHA256:")
    for wrong in (("another", name, b"k" * 32), ("run", "other", b"k" * 32), ("run", name, b"x" * 32)):
        assert proven_by(proof, *wrong) == ""
    assert proven_by(replace(proof, signature=proof.signature[:-1]), "run", name, b"k" * 32) == ""
    for nonsense in (Proof(), Proof(b"ssh-ed25519 x", b"y"), Proof(b"z" * 5000, b"y" * 5000)):
        assert proven_by(nonsense, "run", name, b"k" * 32) == ""


def test_masks_cancel_only_among_those_who_were_told_the_same() -> None:
    names = ("ana", "ben", "cem")

    def total(*terms: bytes) -> int:
        nothing = np.zeros(1, np.uint64)
        parts = [
            masked(nothing, key(name), name, cohort(*names), "run", 1, WIDE_BYTES, told)
            for name, told in zip(names, terms, strict=True)
        ]
        return int(added(parts, WIDE_BYTES)[0])

    assert total(b"epsilon 0.5", b"epsilon 0.5", b"epsilon 0.5") == 0
    assert total(b"epsilon 0.5", b"epsilon 32", b"epsilon 32") != 0


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    with pytest.raises(ValueError, match="no private key"):
        prove(tmp_path / "key", "run", "ana", b"k" * 32)
    owner = Owner.of({"secagg-key": str(tmp_path / "missing")})
    masking = Masking(tmp_path, "ana", ADDS["probabilities"], owner)
    with pytest.raises(SettingsError, match="secagg-key"):
        masking.proof("run")


@pytest.mark.parametrize("wrong", ["ben", "ben:SHA256:short", "ben:SHA256:" + "a" * 43 + ",cem"])
def test_a_peer_without_a_fingerprint_is_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match="secagg-peers"):
        Owner.of({"secagg-peers": wrong})


class Pinned(Site):
    """``ana``, whose owner lists the peers' keys."""

    def __init__(self, folder: Path, site_keys: dict[str, Path], *peers: str) -> None:
        super().__init__(folder)
        self.signed = {n: prove(site_keys[n], "run", n, self.keys[n]) for n in NAMES}
        listed = ",".join(f"{name}:{fingerprint(self.signed[name].signer)}" for name in peers)
        self.masking = Masking(folder, "ana", ADDS["probabilities"], Owner.of({"secagg-peers": listed}))

    def order(self, round: int, *names: str, **keys: bytes) -> Order:
        order = super().order(round, *names, **keys)
        assert order.cohort is not None
        proofs = tuple(self.signed[name] for name in order.cohort.names)
        return replace(order, cohort=replace(order.cohort, proofs=proofs))


def test_a_server_that_gives_false_keys_or_adds_sites_is_refused(
    tmp_path: Path, site_keys: dict[str, Path]
) -> None:
    site = Pinned(tmp_path, site_keys, "ben", "cem", "dov")
    with pytest.raises(MessageError, match="the key of ben is not signed"):
        site.answer(site.order(1, "ana", "ben", "cem", ben=public_key(new_key())))
    with pytest.raises(MessageError, match="eva is not among this site's secagg-peers"):
        site.answer(site.order(1, "ana", "ben", "eva"))
    with pytest.raises(MessageError, match="the key of ben is not signed"):
        site.answer(Site.order(site, 1, "ana", "ben", "cem"))  # without any signature
    false = replace(site.signed["ben"], signer=site.signed["cem"].signer)
    site.signed["ben"], right = false, site.signed["ben"]
    with pytest.raises(MessageError, match="the key of ben is not signed"):
        site.answer(site.order(1, "ana", "ben", "cem"))
    site.signed["ben"] = right
    assert site.answer(site.order(1, "ana", "ben", "cem"))


# ---------------------------------------------------------------------------------------------------
# Messages


def test_a_list_and_a_share_arrive_as_they_were_sent() -> None:
    target = predictions(1, samples=4)[0]
    order = Order(
        run="run", round=2, num_classes=3, log_targets=target, target_indices=np.arange(4, dtype=np.int32),
        cohort=cohort(*NAMES), own_share=0.2,
    )  # fmt: skip
    found = read_order(order_record(order))
    assert (found.cohort, found.own_share) == (order.cohort, 0.2)
    assert np.array_equal(found.log_targets, target)  # type: ignore[arg-type]  # in float32


@pytest.mark.parametrize("data", [b"x" * 17, b"x" * 19, "text", 5, None])
def test_a_masked_part_of_a_wrong_size_or_type_is_rejected(data: Any) -> None:
    expected = Expected(1, 3, 3, "float16", FLOOR, masked_bytes=18)
    record = report_record(Report("ana", 1, "", "", np.zeros((0, 3)), {"num-examples": 1}, masked=b"x" * 18),
                           "float16", FLOOR)  # fmt: skip
    assert read_report(record, expected).masked == b"x" * 18
    if data is None:
        del record[REPORT]["masked"]  # type: ignore[union-attr]
    else:
        record[REPORT]["masked"] = data  # type: ignore[index]
    with pytest.raises(MessageError, match="masked"):
        read_report(record, expected)


@pytest.mark.parametrize("adds", ADDS)
def test_whatever_a_hostile_client_adds_the_mean_is_a_distribution(adds: str) -> None:
    rng, summed = np.random.default_rng(0), ADDS[adds]
    for _ in range(20):
        mean = summed.decode(rng.integers(0, MODULUS, 100).astype(np.uint32), 3, 3)
        peers = summed.take_out(mean, predictions(1)[0], 1 / 3, 1.0)
        for values in (mean, peers):
            assert np.isfinite(values).all()
            assert np.exp(values).sum(axis=1) == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------------------------------------------
# Federations

SECURE = ("privacy.secagg=true", "rounds=3", "public.size=60")


@dataclass
class Captured:
    """A run, and what each client predicted before it was masked."""

    played: Played
    predictions: dict[tuple[str, int], np.ndarray]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Captured]:
    predicted: dict[tuple[str, int], np.ndarray] = {}
    hide = Masking.hide

    def seen(self: Masking, report: Report, order: Order) -> Report:
        predicted[report.client, report.round] = report.predictions
        return hide(self, report, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masking, "hide", seen)
        yield Captured(play(tmp_path_factory.mktemp("secure"), *SECURE, page=True), predicted)


@pytest.fixture
def secure(captured: Captured) -> Played:
    return captured.played


def masked_parts(played: Played) -> dict[tuple[str, int], bytes]:
    """(client, round) -> what was sent."""
    sent = [m for m in played.grid.replies if trains(m) and not m.has_error()]
    configs = [read_config(m.content, REPORT) for m in sent]
    return {(c["client"], c["round"]): c["masked"] for c in configs if "masked" in c}


def test_a_run_ends_where_the_plain_one_does(secure: Played, tmp_path: Path) -> None:
    plain = play(tmp_path / "plain", *SECURE, "privacy.secagg=false")
    assert secure.error is None
    assert plain.error is None
    for line in secure.history:
        same = plain.line(line["round"], line["client"])
        assert "prediction_shares" not in line
        for figure in ("train_loss", "validation_loss", "unseen_accuracy"):
            assert line.get(figure) == pytest.approx(same.get(figure), abs=0.02), (line, figure)
    names = {line["client"] for line in secure.history}
    assert len(names) == 3
    assert secure.summary["status"] == "completed"
    assert (secure.path / "report.html").exists()


def test_no_report_correlates_with_its_predictions_and_the_sum_is_the_plain_one(captured: Captured) -> None:
    parts = {who: unpack(part) for who, part in masked_parts(captured.played).items()}
    assert len(parts) == 9 + 3
    summed = Summed(True, FLOOR)
    for who, part in parts.items():
        if who[1] == 4:  # of the unseen images
            continue
        odds = captured.predictions[who] @ np.array([-1, 1])
        assert abs(np.corrcoef(odds, part)[0, 1]) < 0.65  # 5 standard errors of 60 images
    for round in (1, 2, 3):
        together = [who for who in parts if who[1] == round]
        mean = summed.decode(added([parts[who] for who in together]), 3, 2)
        plain = np.mean([captured.predictions[who] @ np.array([-1, 1]) for who in together], axis=0)
        assert np.abs(mean @ np.array([-1, 1]) - plain).max() < 5e-3  # float16, as in a plain run


def test_the_server_measures_the_ensemble_and_no_client_of_it(secure: Played, tmp_path: Path) -> None:
    """The sum of the closing predictions is that of a run whose server sees each client's."""
    plain = play(tmp_path / "plain", *SECURE, "privacy.secagg=false")
    found, other = (played.summary["unseen"] for played in (secure, plain))
    assert found["ensemble_accuracy"] == pytest.approx(other["ensemble_accuracy"], abs=0.026)  # an image
    parts = [part for (_, round), part in masked_parts(secure).items() if round == 4]
    assert [len(part) for part in parts] == [40 * 3] * 3


def test_without_a_client_there_is_no_ensemble(tmp_path: Path) -> None:
    def dies(node: int, order: Message) -> None:
        if trains(order) and read_order(order.content).closing and node == 1001:
            raise RuntimeError("killed")

    played = play(tmp_path / "run", *SECURE, "rounds=1", "exchange.min_clients=2", before=dies)
    assert played.error is None
    assert played.summary["unseen"]["ensemble_accuracy"] is None


def test_nothing_else_leaves_in_the_clear(secure: Played) -> None:
    for message in secure.grid.replies:
        if trains(message):
            config = read_config(message.content, REPORT)
            assert "unseen-predictions" not in config
            assert not config.get("predictions")


def test_the_ledger_counts_three_bytes_a_number(secure: Played, tmp_path: Path) -> None:
    plain = play(tmp_path / "plain", *SECURE, "privacy.secagg=false", "rounds=1")
    more = secure.line(1, "client-0")["uplink_bytes"] - plain.line(1, "client-0")["uplink_bytes"]
    assert 0 < more <= 60 + 20  # a byte an image more than float16


def test_a_client_that_dies_in_a_round_is_left_out_of_the_next(tmp_path: Path) -> None:
    def dies(node: int, order: Message) -> None:
        if trains(order) and read_order(order.content).round == 2 and node == 1003:
            raise RuntimeError("killed")

    played = play(tmp_path / "run", *SECURE, "rounds=4", clients=4, before=dies)
    assert played.error is None
    assert [(r, "killed" in why) for r, _, why in played.rejections()] == [(2, True)]
    orders = played.orders()
    members = {round: order.cohort.names for (_, round), order in orders.items() if order.cohort}
    assert [len(members[round]) for round in (1, 2, 3, 4)] == [4, 4, 3, 3]
    taught = {round: order.has_target for (node, round), order in orders.items() if node == 1000}
    assert taught == {1: False, 2: True, 3: False, 4: True, 5: True}  # round 2 has no sum
    # the one that is back learns from the others, and sends no predictions
    back = orders[1003, 4]
    assert (back.has_target, back.own_share) == (True, 0.0)
    assert orders[1000, 4].own_share == pytest.approx(1 / 3)
    parts = masked_parts(played)
    assert parts["client-3", 3] == parts["client-3", 4] == b""
    assert len(parts["client-0", 4]) == 60 * 3


def test_a_run_whose_sites_know_each_other(tmp_path: Path, site_keys: dict[str, Path]) -> None:
    names = ("client-0", "client-1", "client-2")
    files = dict(zip(names, site_keys.values(), strict=False))
    known = {name: fingerprint(prove(file, "", name, b"").signer) for name, file in files.items()}
    peers = ",".join(f"{name}:{key}" for name, key in known.items())

    def node_config(number: int) -> dict[str, Any]:
        own = {"secagg-key": str(files[names[number]]), "secagg-peers": peers}
        return {"partition-id": number, "num-partitions": 3, **own}

    honest = play(tmp_path / "run", *SECURE, node_config=node_config)
    assert honest.error is None
    assert honest.rejections() == []

    def puts_its_own_key_in_place(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "query.key" and node == 1000:
            reply.content[REPORT]["key"] = public_key(new_key())  # type: ignore[index]
        return reply

    cheated = play(tmp_path / "cheat", *SECURE, node_config=node_config, tamper=puts_its_own_key_in_place)
    assert "the key of client-0 is not signed" in str(cheated.error)
    assert masked_parts(cheated) == {}


def test_of_three_none_can_be_left_out(tmp_path: Path) -> None:
    """The next round waits for all three again, and has its sum."""

    def dies(node: int, order: Message) -> None:
        if trains(order) and read_order(order.content).round == 1 and node == 1000:
            raise RuntimeError("killed")

    played = play(tmp_path / "run", *SECURE, before=dies)
    assert played.error is None
    orders = played.orders()
    assert [orders[1001, round].has_target for round in (2, 3, 4)] == [False, True, True]


def test_a_resumed_run_keeps_its_keys_and_promises(tmp_path: Path) -> None:
    def stops(node: int, order: Message) -> Message | None:
        if trains(order) and read_config(order.content, REPORT)["round"] == 3:
            raise RuntimeError("the server is killed")
        return order

    first = play(tmp_path / "run", *SECURE, "rounds=4", tamper=stops)
    assert first.error is not None
    before = {path: json.loads(path.read_text()) for path in first.states().glob(f"*/{FILE}")}
    again = play(tmp_path / "run", *SECURE, "rounds=4", resume=True)
    assert again.error is None
    assert again.rejections() == []
    for path, promise in before.items():
        assert json.loads(path.read_text())["private"] == promise["private"]
    assert again.summary["status"] == "completed"
