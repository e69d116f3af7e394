"""The public face: names, a run from Python, its models, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedmutual
from fedmutual.settings import SettingsError

TINY = (
    "rounds=1 num_clients=2 device=cpu data.pool_size=80 data.unseen_size=20 data.image_size=20 "
    "public.size=12 public.fill=0 train.local_epochs=1 strategy.public_epochs=1 strategy.min_steps=1 "
    "tracking.loggers=[]"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedmutual.Run:
    return fedmutual.run(f"{TINY} output_dir={tmp_path_factory.mktemp('api') / 'run'}")


def test_every_public_name_is_there_and_documented() -> None:
    for name in fedmutual.__all__:
        found = getattr(fedmutual, name)
        assert inspect.getdoc(found), name
        assert name in dir(fedmutual)
    homes = [name for names in fedmutual._HOMES.values() for name in names]
    assert sorted(homes) == sorted(fedmutual.__all__)
    with pytest.raises(AttributeError, match="no attribute 'FedNothing'"):
        fedmutual.FedNothing  # noqa: B018


def test_the_names_a_type_checker_sees_are_those_that_are_imported() -> None:
    source = Path(fedmutual.__file__).read_text()
    for home, names in fedmutual._HOMES.items():
        assert f"from {home} import" in source
        module = importlib.import_module(home)
        assert all(hasattr(module, name) for name in names)
    assert (Path(fedmutual.__file__).parent / "py.typed").exists()


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, fedmutual; print([m for m in ('torch', 'flwr', 'numpy', 'hydra') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_server_needs_no_torch() -> None:
    code = "import sys, fedmutual as f; f.MutualLearning(6, 3); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_a_run_leaves_history_summary_and_models(run: fedmutual.Run) -> None:
    assert run.summary["status"] == "completed"
    assert sorted(run.history["client"].unique()) == ["client-0", "client-1"]
    assert run.history["closing"].sum() == 2
    assert list(run.models) == ["client-0", "client-1"]


def test_predict_takes_arrays_and_pictures_alike(run: fedmutual.Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    arrays = run.predict(pixels)
    assert arrays.shape == (3, 2)
    np.testing.assert_allclose(arrays.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(run.predict(tmp_path), arrays, atol=1e-6)
    np.testing.assert_allclose(
        run.predict([tmp_path / "2.png", tmp_path / "0.png"]), arrays[[2, 0]], atol=1e-6
    )


def test_predict_names_what_it_cannot_read(run: fedmutual.Run, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        run.predict(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"uint8 \[n, H, W, 3\]"):
        run.predict(np.zeros((2, 8, 8, 3)))


def test_load_model_gives_the_same_model(run: fedmutual.Run) -> None:
    stored = run.models["client-1"]
    again = fedmutual.load_model(str(stored.folder))
    for name, values in stored.model.state_dict().items():
        assert again.model.state_dict()[name].equal(values)


def test_a_wrong_setting_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"strategy\.kl_wait"):
        fedmutual.run(["strategy.kl_wait=2", f"output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="engine: 'ray' is none of in-process, flower"):
        fedmutual.run(engine="ray")


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(fedmutual.RunError, match=r"run: .*good reports"):
        fedmutual.run(f"{TINY} device=cuda:7 output_dir={tmp_path / 'run'}")


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(fedmutual.RunError, match=r"no summary\.json"):
        _ = fedmutual.Run(tmp_path).summary


def test_data_sets_are_given_as_objects(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    shades = np.repeat((40 + 160 * labels)[:, None], 20 * 20 * 3, axis=1).reshape(60, 20, 20, 3)
    pixels = np.clip(shades + rng.integers(-30, 30, shades.shape), 0, 255).astype(np.uint8)
    items = list(zip(pixels, labels.tolist(), strict=True))
    data = {"train": items[:40], "public": [(x, None) for x, _ in items[40:48]], "test": items[48:]}
    settings = (
        "rounds=2 num_clients=2 device=cpu data.image_size=20 tracking.loggers=[] strategy.min_steps=1 "
        "public.fill=0"
    )
    path = tmp_path / "run"
    done = fedmutual.run(f"{settings} output_dir={path}", data={**data, "classes": ["dark", "bright"]})
    assert done.summary["unseen"]["num_examples"] == 12
    assert done.predict(np.full((1, 20, 20, 3), 200, np.uint8)).shape == (1, 2)
    alone = ("data=custom data._target_=fedmutual.data.given.data_sets", f"output_dir={tmp_path / 'alone'}")
    with pytest.raises(Exception, match="with them again"):
        fedmutual.run(" ".join([settings, *alone]))
    with pytest.raises(ValueError, match="objects stay in this process"):
        fedmutual.run(data=data, engine="flower")
