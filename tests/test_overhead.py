"""The federated system and a plain PyTorch loop learn the very same weights (benchmarks/overhead.py)."""

from __future__ import annotations

from pathlib import Path

import plain_loop
import pytest
import torch
from local_grid import TINY, play
from safetensors.torch import load_file

from fedmutual.settings.compose import compose

CASE = ("rounds=2", "strategy.wire_dtype=float32", "strategy.mutual_epochs=2")


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy.phase=mixed",),
        ("strategy.phase=separate",),
        ("strategy.divergence=peer_own", "strategy.temperature=2.0", "strategy.wire_dtype=float16"),
        ("experiment=paper", "train.local_epochs=2", "train.warm_start_epochs=1", "data.image_size=20"),
    ],
    ids=["mixed", "separate", "peer_own", "paper"],
)
def test_plain_loop_ends_with_the_same_bits(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    played = play(tmp_path, *CASE, *overrides, clients=2)
    assert played.error is None
    settings = compose([*TINY, *CASE, *overrides, "num_clients=2"])
    clients = plain_loop.start_clients(settings, 2)
    start = {client.name: {k: v.clone() for k, v in client.model.state_dict().items()} for client in clients}
    result = plain_loop.learn(settings, clients)
    assert sorted(result.weights) == ["client-0", "client-1"]
    for name, weights in result.weights.items():
        exported = load_file(played.states() / name / "model.safetensors")
        assert sorted(exported) == sorted(weights)
        for key, tensor in weights.items():
            assert not torch.equal(tensor, start[name][key])
            assert torch.equal(exported[key], tensor), (name, key)
        assert result.accuracies[name] == pytest.approx(played.summary["clients"][name]["unseen_accuracy"])
