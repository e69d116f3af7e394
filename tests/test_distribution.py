"""Sites without public images get the server's: once, checked, counted, and learn from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message
from local_grid import FIRST_NODE, LocalGrid, Played, play, trains
from small_data import image_set, write_images

import fedmutual.wire.public_images
from fedmutual.data.images import DataError
from fedmutual.data.public import digest
from fedmutual.data.received import Part, has_received, load_received, parts_received, receive

NAMES = ("a", "b", "c")
COMMON = ("data=folder", "data.image_size=20", "exchange.poll_interval=0.01", "strategy.burn_in=0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a site with private images only, and the server's with the public ones."""
    root = tmp_path_factory.mktemp("photographs")
    for number, name in enumerate(("server", *NAMES)):
        for position, label in enumerate(("cat", "dog")):
            part = "public" if name == "server" else "train"
            write_images(
                root / name / part / label, 9 if name == "server" else 12, seed=10 * number + position
            )
    return root


def run(path: Path, folders: Path, *overrides: str, **hooks: Any) -> Played:
    def node_config(i: int) -> dict[str, Any]:
        name = NAMES[i % len(NAMES)]
        return {
            "client-name": name,
            "data-dir": str(folders / name),
            "cache-dir": str(path / f"cache-{name}"),
        }

    settings = (*COMMON, f"data.root={folders / 'server'}", "public.distribute=true", *overrides)
    return play(path / "run", *settings, node_config=node_config, **hooks)


def sent(played: Played) -> dict[int, list[Message]]:
    """Parts that went out, by node."""
    parts: dict[int, list[Message]] = {}
    for message in played.grid.orders:
        if message.metadata.message_type == "query.public" and "pixels" in message.content:
            parts.setdefault(message.metadata.dst_node_id, []).append(message)
    return parts


def test_sites_without_public_images_learn_from_the_servers(tmp_path: Path, folders: Path) -> None:
    played = run(tmp_path, folders)
    assert played.error is None
    assert played.summary["status"] == "completed"
    assert {line["client"] for line in played.history} == set(NAMES)
    assert [len(parts) for parts in sent(played).values()] == [1, 1, 1]
    bytes_sent = played.summary["traffic"]["public_data_bytes"]
    pixels = 18 * 20 * 20 * 3
    assert 3 * pixels < bytes_sent < 3 * (pixels + 2000)
    # they are no part of what a round costs
    assert all(line["downlink_bytes"] < 2000 for line in played.history)
    assert all("pixels" not in message.content for message in played.grid.orders if trains(message))


def test_a_second_run_sends_nothing(tmp_path: Path, folders: Path) -> None:
    run(tmp_path, folders, "rounds=1")
    again = run(tmp_path, folders, "rounds=1", f"output_dir={tmp_path}/again")
    assert again.error is None
    assert sent(again) == {}


def test_only_the_site_that_lacks_it_gets_it(tmp_path: Path, folders: Path) -> None:
    for name in NAMES[:2]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train").symlink_to(folders / name / "train")
        (tmp_path / name / "public").symlink_to(folders / "server" / "public")
    (tmp_path / "c").symlink_to(folders / "c")
    (tmp_path / "server").symlink_to(folders / "server")
    played = run(tmp_path, tmp_path, "rounds=1")
    assert played.error is None
    assert list(sent(played)) == [FIRST_NODE + 2]
    assert played.summary["clients"]["c"]["num_examples"] > 0


def test_a_late_joiner_gets_it_before_its_first_order(tmp_path: Path, folders: Path) -> None:
    grids: list[LocalGrid] = []
    config = {"client-name": "c", "data-dir": str(folders / "c"), "cache-dir": str(tmp_path / "cache-c")}

    def tamper(node: int, reply: Message) -> Message:
        if trains(reply) and node == FIRST_NODE + 1 and reply.content["report"]["round"] == 1:
            grids[0].add_node(7, config)
        return reply

    played = run(tmp_path, folders, clients=2, prepare=grids.append, tamper=tamper)
    assert played.error is None
    assert played.rejections() == []
    assert [line["round"] for line in played.history if line["client"] == "c"] == [2, 3, 4]
    kinds = [m.metadata.message_type for m in played.grid.orders if m.metadata.dst_node_id == 7]
    assert kinds[:4] == ["query.identify", "query.public", "query.public", "train.round"]


def test_what_was_damaged_on_the_way_is_refused_and_sent_again(
    tmp_path: Path, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged: list[int] = []

    def before(node: int, order: Message) -> None:
        if "pixels" in order.content and not damaged:
            damaged.append(node)
            pixels = order.content["pixels"]["images"].numpy().copy()
            pixels[0, 0, 0, 0] ^= 1
            order.content["pixels"] = ArrayRecord({"images": Array(pixels)})

    with caplog.at_level(logging.WARNING):
        played = run(tmp_path, folders, before=before)
    assert played.summary["status"] == "completed"
    assert "did not take the public set" in caplog.text
    assert len(sent(played)[damaged[0]]) == 2
    assert played.rejections() == []


def test_small_parts_and_a_break_in_between(
    tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedmutual.wire.public_images, "PART_BYTES", 5 * 20 * 20 * 3)  # 18 images: 5, 5, 5, 3
    broken: list[int] = []

    def before(node: int, order: Message) -> None:
        if "pixels" in order.content and order.content["public"]["part"] == 2 and not broken:
            broken.append(node)
            raise RuntimeError("the line was cut")

    played = run(tmp_path, folders, before=before)
    assert played.summary["status"] == "completed"
    assert played.rejections() == []
    numbers = {node: [m.content["public"]["part"] for m in parts] for node, parts in sent(played).items()}
    assert numbers.pop(broken[0]) == [0, 1, 2, 3, 2]  # only what was missing is sent again
    assert set(map(tuple, numbers.values())) == {(0, 1, 2, 3)}


def test_without_it_the_remedy_is_named(tmp_path: Path, folders: Path) -> None:
    played = run(tmp_path, folders, "public.distribute=false")
    assert "public.distribute=true" in played.summary["reason"]


# ---------------------------------------------------------------------------------------------------
# The site's copy


def a_part(number: int, count: int, images: Any, whole: Any, labelled: bool = True) -> Part:
    name = digest(("x", "y"), whole, labelled, None)
    return Part(name, number, count, ("x", "y"), whole.labels if labelled else None, images)


@pytest.mark.parametrize("labelled", [True, False])
def test_parts_in_any_order_make_the_set(tmp_path: Path, labelled: bool) -> None:
    whole = image_set([0, 1, 0, 1, 1])
    first = a_part(0, 2, whole.images[:3], whole, labelled)
    second = a_part(1, 2, whole.images[3:], whole, labelled)
    assert not receive(tmp_path, second)
    assert parts_received(tmp_path, first.digest) == [1]
    assert not has_received(tmp_path, first.digest)
    assert receive(tmp_path, first)
    assert receive(tmp_path, first)  # a repeated part does no harm
    public = load_received(tmp_path, first.digest)
    np.testing.assert_array_equal(public.images.images, whole.images)
    np.testing.assert_array_equal(public.images.labels, whole.labels if labelled else [-1] * 5)
    assert digest(("x", "y"), public.images, labelled, None) == first.digest
    assert parts_received(tmp_path, first.digest) == []


def test_other_labels_are_another_set(tmp_path: Path) -> None:
    whole = image_set([0, 1, 0])
    part = a_part(0, 1, whole.images, whole)
    changed = Part(part.digest, 0, 1, part.classes, np.array([0, 0, 0]), part.images)
    with pytest.raises(DataError, match="has the digest"):
        receive(tmp_path, changed)
    assert not has_received(tmp_path, part.digest)
    assert parts_received(tmp_path, part.digest) == []
    assert receive(tmp_path, part)


@pytest.mark.parametrize("name", ["../../etc", "", "0123"])
def test_a_digest_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is not a digest"):
        has_received(tmp_path, name)


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"public\.distribute=true"):
        load_received(tmp_path, "0" * 32)
