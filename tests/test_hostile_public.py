"""Public images that a stranger sends: nothing is written outside a site's cache, and no run ends of them."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from local_grid import enter_run
from small_data import image_set

from fedmutual.data.images import DataError
from fedmutual.data.public import digest
from fedmutual.data.received import MOST_PARTS, Part, has_received, parts_received, receive
from fedmutual.settings import SettingsError
from fedmutual.wire.codec import MessageError
from fedmutual.wire.exchange import Reply
from fedmutual.wire.public_images import Distributor, answer, part_record, read_answer

WHOLE = image_set([0, 1, 0, 1, 1])  # 8x8 pixels
DIGEST = digest(("x", "y"), WHOLE, True, None)
AGREED = {"client-name": "ward", "accept-public": True}


def a_part(number: Any = 0, count: Any = 2, **changes: Any) -> Part:
    values = {"labels": WHOLE.labels, "images": WHOLE.images[:3], "classes": ("x", "y"), "digest": DIGEST}
    return Part(**{"number": number, "count": count, **values, **changes})


def sent(part: Part | None = None, changes: Mapping[str, Any] | None = None) -> RecordDict:
    """The message of a part, with entries of its record replaced; None removes one."""
    content = part_record(part or a_part())
    for key, value in (changes or {}).items():
        if value is None:
            del content["public"][key]
        else:
            content["public"][key] = value
    return content


def at_site(cache: Path, content: RecordDict, node_config: dict[str, Any] = AGREED) -> RecordDict:
    settings: Any = SimpleNamespace(cache_dir=str(cache), data=SimpleNamespace(image_size=8))
    return answer(content, settings, node_config)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------
# At the site


def test_a_site_that_has_agreed_keeps_the_set(tmp_path: Path) -> None:
    first = at_site(tmp_path, sent())["public"]
    assert (first["whole"], first["parts"]) == (False, [0])
    second = at_site(tmp_path, sent(a_part(1, images=WHOLE.images[3:])))["public"]
    assert (second["whole"], second["parts"]) == (True, [])
    assert has_received(tmp_path, DIGEST)


@pytest.mark.parametrize(
    "node", [{}, {"accept-public": False}, {"accept-public": "no"}, {"accept-public": 1}]
)
def test_without_the_owners_agreement_nothing_is_taken(tmp_path: Path, node: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="accept-public=true") as refused:
        at_site(tmp_path, sent(), node)
    assert refused.value.told == str(refused.value)
    assert files(tmp_path) == []


@pytest.mark.parametrize("node", [{"accept-public": "true"}, {"trust-run": True}])
def test_the_owner_agrees_in_words_or_with_a_run_of_his_own(tmp_path: Path, node: dict[str, Any]) -> None:
    assert at_site(tmp_path, sent(), node)["public"]["parts"] == [0]


@pytest.mark.parametrize(
    "changes",
    [
        {"part": "../../x"},
        {"part": "0"},
        {"part": 0.0},
        {"part": True},
        {"part": [0]},
        {"part": b"0"},
        {"part": None},
        {"part": -1},
        {"part": 2},
        {"part": 2**63},
        {"parts": 0},
        {"parts": -1},
        {"parts": 10**9},
        {"parts": 2**64 - 1},
        {"parts": MOST_PARTS + 1},
        {"parts": "2"},
        {"parts": True},
        {"parts": None},
        {"digest": "../../etc/x"},
        {"digest": "0" * 31},
        {"digest": "0" * 32 + "\n"},
        {"digest": "x" * 2_000_000},
        {"digest": 7},
        {"digest": b"0" * 32},
        {"digest": None},
        {"classes": None},
        {"classes": "xy"},
        {"classes": ["x"]},
        {"classes": [1, 2]},
        {"classes": ["x"] * 10_001},
        {"classes": ["x", "y" * 257]},
        {"labels": "0"},
        {"labels": b"1234567"},
        {"labels": b""},
        {"labels": WHOLE.labels[:2].tobytes()},
        {"labels": np.full(5, 2, "<i8").tobytes()},
        {"labels": np.full(5, -2, "<i8").tobytes()},
        {"labels": [0, 1, 0, 1, 1]},
    ],
)
def test_what_no_server_sends_is_refused_and_nothing_is_written(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    cache = tmp_path / "a" / "cache"
    private = cache / "images" / "private.npy"
    private.parent.mkdir(parents=True)
    private.write_bytes(b"decoded")
    tracemalloc.start()
    try:
        with pytest.raises((MessageError, DataError)) as refused:
            at_site(cache, sent(changes=changes))
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 300
    assert files(tmp_path) == ["a/cache/images/private.npy"]
    assert private.read_bytes() == b"decoded"


def array_of(shape: Any, data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array("uint8", shape, stype, data)


def npy(header: str, length: int = 0) -> bytes:
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(length)


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 8, 8, 3), }"
FIT = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 8, 8, 3), }"


@pytest.mark.parametrize(
    "pixels",
    [
        {},
        {"other": Array(WHOLE.images)},
        {"images": Array(WHOLE.images), "more": Array(WHOLE.images)},
        {"images": Array(WHOLE.images.astype(np.float64))},
        {"images": Array(WHOLE.images.astype(np.int8))},
        {"images": Array(WHOLE.images[..., :1])},
        {"images": Array(WHOLE.images[:, :4])},
        {"images": Array(WHOLE.images[0])},
        {"images": Array(WHOLE.images[:0])},
        {"images": Array(np.zeros((1, 9, 9, 3), np.uint8))},
        {"images": array_of((1, 8, 8, 3), b"")},
        {"images": array_of((1, 8, 8, 3), b"garbage")},
        {"images": array_of((1, 8, 8, 3), npy(FIT))},
        {"images": array_of((1, 8, 8, 3), npy(FIT, 191))},
        {"images": array_of((1, 8, 8, 3), npy(FIT, 193))},
        {"images": array_of((1, 8, 8, 3), npy(HUGE, 192))},
        {"images": array_of((1_000_000, 8, 8, 3), npy(HUGE, 192))},
        {"images": array_of((2**40, 8, 8, 3), npy(FIT, 192))},
        {"images": array_of((-1, 8, 8, 3), npy(FIT, 192))},
        {"images": array_of((1, 8, 8, 3), npy(FIT.replace("|u1", "|O"), 192))},
        {"images": array_of((1, 8, 8, 3), npy(FIT, 192), "pickle")},
    ],
)
def test_pixels_are_unpacked_only_as_the_pictures_of_the_run(
    tmp_path: Path, pixels: dict[str, Array]
) -> None:
    content = RecordDict({"public": sent()["public"], "pixels": ArrayRecord(pixels)})
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="pixels"):
            at_site(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    assert files(tmp_path) == []


@pytest.mark.parametrize("record", [ConfigRecord({"images": 1}), None])
def test_pixels_or_the_question_of_another_kind(tmp_path: Path, record: ConfigRecord | None) -> None:
    content = sent()
    if record is None:
        del content["public"]
    else:
        content["pixels"] = record
    with pytest.raises(MessageError):
        at_site(tmp_path, content)


@pytest.mark.parametrize("most", [5 * 192, "960", 2**31])
def test_a_set_that_is_as_large_as_allowed_is_taken(tmp_path: Path, most: Any) -> None:
    node = AGREED | {"max-public-bytes": most}
    parts = [a_part(i, 5, images=WHOLE.images[i : i + 1]) for i in range(5)]
    whole = [at_site(tmp_path, sent(part), node)["public"]["whole"] for part in parts]
    assert whole == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("most", "sizes"), [(4 * 192, (2, 2, 1)), (3 * 192, (1, 1, 2)), (192, (2,)), (1, (1,))]
)
def test_what_is_larger_is_refused_when_it_shows(tmp_path: Path, most: int, sizes: tuple[int, ...]) -> None:
    node = AGREED | {"max-public-bytes": most}
    parts = [a_part(i, len(sizes), images=WHOLE.images[:size]) for i, size in enumerate(sizes)]
    for part in parts[:-1]:
        at_site(tmp_path, sent(part), node)
    with pytest.raises((DataError, MessageError), match="max-public-bytes"):
        at_site(tmp_path, sent(parts[-1]), node)
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*.npy"))
    assert stored <= most + 5 * 128  # their headers


def test_other_sets_count_too(tmp_path: Path) -> None:
    node = AGREED | {"max-public-bytes": 4 * 192}
    for number, seed in enumerate((1, 2, 3)):
        whole = image_set([0], seed=seed)
        part = Part(digest(("x", "y"), whole, False, None), 0, 1, ("x", "y"), None, whole.images)
        assert at_site(tmp_path, sent(part), node)["public"]["whole"], number
    with pytest.raises(DataError, match=r"more than 768 bytes.*max-public-bytes"):
        at_site(tmp_path, sent(a_part(0, 2, images=WHOLE.images[:2])), node)


def test_a_limit_that_is_no_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="max-public-bytes: not a number"):
        at_site(tmp_path, sent(), AGREED | {"max-public-bytes": "much"})


def test_labels_for_other_pictures_than_come(tmp_path: Path) -> None:
    labels = np.array([0, 1, 0, 1])
    receive(tmp_path, a_part(0, labels=labels))
    with pytest.raises(DataError, match="4 labels for 5 images"):
        receive(tmp_path, a_part(1, labels=labels, images=WHOLE.images[3:]))
    assert parts_received(tmp_path, DIGEST) == []
    assert not has_received(tmp_path, DIGEST)


def test_parts_of_different_sizes(tmp_path: Path) -> None:
    receive(tmp_path, a_part(0))
    with pytest.raises(DataError, match="different sizes"):
        receive(tmp_path, a_part(1, images=np.zeros((2, 9, 9, 3), np.uint8)))
    assert not has_received(tmp_path, DIGEST)


def test_parts_of_an_earlier_division_are_no_obstacle(tmp_path: Path) -> None:
    for number in range(4):
        receive(tmp_path, a_part(number, 5, images=WHOLE.images[number : number + 1]))
    question = RecordDict({"public": ConfigRecord({"digest": DIGEST, "parts": 2})})
    settings: Any = SimpleNamespace(cache_dir=str(tmp_path), data=None)
    assert answer(question, settings, {"partition-id": 0, "num-partitions": 1})["public"]["whole"]
    assert parts_received(tmp_path, DIGEST, 2) == [0, 1]
    with pytest.raises(DataError, match="5 labels for 4 images"):  # the old second part is in the way
        receive(tmp_path, a_part(0))
    assert not receive(tmp_path, a_part(0))
    assert receive(tmp_path, a_part(1, images=WHOLE.images[3:]))


# ---------------------------------------------------------------------------------------------------
# At the server


def said(**values: Any) -> RecordDict:
    return RecordDict({"public": ConfigRecord(values)})


HOSTILE = [
    RecordDict({}),
    RecordDict({"public": ArrayRecord({})}),
    RecordDict({"other": ConfigRecord({"whole": True})}),
    said(),
    said(whole=True),
    said(whole=1, parts=[]),
    said(whole="yes", parts=[]),
    said(whole=[True], parts=[]),
    said(parts=[0]),
    said(whole=False, parts="01"),
    said(whole=False, parts=10**9),
    said(whole=False, parts=[4]),
    said(whole=False, parts=[-1]),
    said(whole=False, parts=[2**63]),
    said(whole=False, parts=[0, 0]),
    said(whole=False, parts=["0"]),
    said(whole=False, parts=[0.5]),
    said(whole=False, parts=[float("nan")]),
    said(whole=False, parts=[b"0"]),
    said(whole=False, parts=[True]),
    said(whole=False, parts=list(range(100_000))),
]


@pytest.mark.parametrize("content", HOSTILE)
def test_an_answer_that_is_none(content: RecordDict) -> None:
    with pytest.raises(MessageError) as refused:
        read_answer(content, 4)
    assert len(str(refused.value)) < 200


def test_an_answer() -> None:
    assert read_answer(said(whole=False, parts=[3, 0]), 4) == (False, {0, 3})
    assert read_answer(said(whole=True, parts=[]), 4) == (True, set())


class Line:
    """An exchange whose nodes answer what they are told to; the honest one, node 1, takes what it gets."""

    def __init__(self, contents: list[Any]) -> None:
        self.contents = contents
        self.patience = SimpleNamespace(seconds=1.0)
        self.parts: list[int] = []

    def send_and_collect(self, messages: list[Any], everyone: bool) -> list[Reply]:
        return [self._reply(m.metadata.dst_node_id, m.content) for m in messages]

    def _reply(self, node: int, content: RecordDict) -> Reply:
        if node != 1:
            return Reply(node, self.contents[node - 2], "", 10, 10, 0.0)
        whole = "pixels" in content
        if whole:
            self.parts.append(int(cast(int, content["public"]["part"])))
        return Reply(node, said(whole=whole, parts=[]), "", 10, 10, 0.0)


def test_whatever_a_node_answers_the_others_are_served(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(RecordDict):
        def get(self, *_: Any) -> Any:
            raise RuntimeError("\x1b[31mdecoding failed")

    contents = [*HOSTILE, None, Broken({})]
    line: Any = Line(contents)
    public = SimpleNamespace(images=WHOLE, digest=DIGEST, warm_start=None)
    public = type("Public", (), {"__len__": lambda self: 5, **vars(public)})()
    shared: Any = SimpleNamespace(public=public, classes=("x", "y"))
    settings: Any = SimpleNamespace(public=SimpleNamespace(labelled=True))
    bytes_sent: list[int] = []
    distributor = Distributor(line, settings, shared, bytes_sent.append)
    nodes = range(1, len(contents) + 2)
    enter_run()
    with caplog.at_level(logging.WARNING):
        distributor.serve(nodes)
    assert line.parts == [0]
    assert bytes_sent == [10]
    for node in nodes[1:]:
        assert sum(f"node {node} did not say" in text for text in caplog.messages) == 1, node
    assert "\x1b" not in caplog.text
    line.contents = [said(whole=True, parts=[])] * len(contents)
    distributor.serve(nodes)  # they are asked again, and the honest one is not
    assert line.parts == [0]
    distributor.serve(nodes)
