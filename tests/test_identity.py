"""A client's name comes from its node configuration and is the same after every restart."""

from __future__ import annotations

from typing import Any

import pytest

from fedmutual.settings.identity import IdentityError, client_name, partition_of


@pytest.mark.parametrize(
    ("node_config", "name"),
    [
        ({"client-name": "hospital-a"}, "hospital-a"),
        ({"client-name": "hospital-a", "partition-id": 3}, "hospital-a"),
        ({"partition-id": 3, "num-partitions": 5}, "client-3"),
        ({"partition-id": 0}, "client-0"),
        ({"client-name": "", "partition-id": 1}, "client-1"),
        ({"client-name": 7}, "7"),
        ({"client-name": "a" * 64}, "a" * 64),
        ({"client-name": "Site_1.north-2"}, "Site_1.north-2"),
    ],
)
def test_a_name(node_config: dict[str, Any], name: str) -> None:
    assert client_name(node_config) == name


@pytest.mark.parametrize("node_config", [{}, {"client-name": ""}, {"num-partitions": 3}])
def test_a_node_without_a_name_is_told_how_to_get_one(node_config: dict[str, Any]) -> None:
    with pytest.raises(IdentityError, match="no name: start it with --node-config 'client-name="):
        client_name(node_config)


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".hidden", "-a", "two words", "a\nb", "a\n", "ä", "a" * 65, "a\\b", "a\0b"]
)
def test_a_name_that_cannot_be_a_folder_is_refused(name: str) -> None:
    with pytest.raises(IdentityError, match="use up to 64 letters, digits, dots, hyphens and underscores"):
        client_name({"client-name": name})


@pytest.mark.parametrize(
    ("node_config", "partition"),
    [
        ({"partition-id": 2, "num-partitions": 5}, (2, 5)),
        ({"partition-id": "2", "num-partitions": "5"}, (2, 5)),
        ({"client-name": "a", "partition-id": 0, "num-partitions": 2}, (0, 2)),
        ({"partition-id": 2, "num-partitions": 5, "data-dir": "data"}, (2, 5)),  # its copy of the pool
        ({"partition-id": 2}, None),
        ({"client-name": "a"}, None),
        ({}, None),
    ],
)
def test_a_share_of_the_pool(node_config: dict[str, Any], partition: tuple[int, int] | None) -> None:
    assert partition_of(node_config) == partition


def test_a_share_without_a_number_is_refused() -> None:
    with pytest.raises(IdentityError, match="num-partitions but no partition-id"):
        partition_of({"num-partitions": 5})
