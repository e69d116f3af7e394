"""What is handed on: the app bundle, the source archive and the wheel; the wheel needs no checkout.

That the wheel's own program does a whole run is in test_end_to_end.py.
"""

from __future__ import annotations

import io
import re
import shutil
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from installation import ROOT, build, command, copy_checkout, environment

import fedmutual
from fedmutual.appfolder import app_folder, runnable_app

BUNDLE_LIMIT = 1_700_000  # bytes; Flower's own limit is 10 MiB
APP_FILES = ("server_app.py", "client_app.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


def needed() -> set[str]:
    """The files of an app bundle: the two apps, the package, conf, and what says what it is."""
    parts = [*ROOT.glob("fedmutual/**/*.py"), *ROOT.glob("conf/**/*.yaml")]
    return {path.relative_to(ROOT).as_posix() for path in parts} | {
        name for name in APP_FILES if name != "pyproject.toml"
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "fedmutual"
    copy_checkout(folder)
    return folder


def bundle(folder: Path, home: Path) -> bytes:
    """What ``flwr build`` makes of an app's folder."""
    program = shutil.which("flwr", path=sysconfig.get_path("scripts"))
    assert program is not None
    home.mkdir(parents=True, exist_ok=True)
    quiet = {"FLWR_HOME": str(home / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    shown = command([program, "build", "--app", str(folder)], home, **quiet)
    assert "missing the following" not in shown  # Flower's advice on pyproject.toml
    return next(home.glob("fedmutual.fedmutual.*.fab")).read_bytes()


def names(archive: bytes) -> set[str]:
    return {name for name in zipfile.ZipFile(io.BytesIO(archive)).namelist() if not name.startswith(".info/")}


def test_the_bundle_holds_the_needed_files_only(checkout: Path, tmp_path: Path) -> None:
    fab = bundle(checkout, tmp_path)
    assert names(fab) - {"pyproject.toml"} == needed()
    assert 0 < len(fab) < BUNDLE_LIMIT
    with zipfile.ZipFile(io.BytesIO(fab)) as file:
        assert "fab-format-version = 1" in file.read("pyproject.toml").decode()


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive and the wheel."""
    return build(checkout, tmp_path_factory.mktemp("dist"))


def test_the_source_archive_is_whole_and_clean(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    also = {
        "Makefile",
        "mkdocs.yml",
        "fedmutual/py.typed",
        "tests/conftest.py",
        "docs/METHOD.md",
        "notebooks/comparison.ipynb",
    }
    assert needed() | set(APP_FILES) | also <= held
    assert {name.partition("/")[0] for name in held if name} == SOURCE_PARTS


SOURCE_PARTS = {
    "fedmutual", "conf", "tests", "benchmarks", "docs", "docker", "examples", "notebooks", "requirements",
    "server_app.py", "client_app.py", "pyproject.toml", "mkdocs.yml", "Makefile", "README.md", "LICENSE",
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", ".gitignore", "PKG-INFO",
}  # fmt: skip


def test_the_wheel_holds_the_package_and_its_app_only(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        described = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        said = archive.read(described).decode()
    app = {name for name in needed() | {"pyproject.toml"} if not name.startswith("fedmutual/")}
    package = {name for name in needed() if name.startswith("fedmutual/")} | {"fedmutual/py.typed"}
    templates = (ROOT / "fedmutual" / "provision" / "templates").rglob("*.*")
    package |= {path.relative_to(ROOT).as_posix() for path in templates}
    package |= {f"fedmutual/provision/templates/{machine}/env" for machine in ("server", "supernode")}
    assert held == package | {f"fedmutual/_app/{name}" for name in app}
    assert "Description-Content-Type: text/markdown" in said
    assert distributions[1].stat().st_size < BUNDLE_LIMIT


@pytest.fixture(scope="module")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel."""
    return environment(distributions[1], tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed_from_source(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that built the source archive itself."""
    return environment(distributions[0], tmp_path_factory.mktemp("source"))


def files(programs: Path) -> dict[str, bytes]:
    """What an installation put beside its programs: the package, its app, and the command's entry point."""
    (package,) = programs.parent.glob("lib/python*/site-packages/fedmutual")
    (described,) = package.parent.glob("fedmutual-*.dist-info/entry_points.txt")
    held = {p.relative_to(package).as_posix(): p for p in package.rglob("*") if p.suffix != ".pyc"}
    return {name: path.read_bytes() for name, path in (held | {"": described}).items() if path.is_file()}


def test_the_source_archive_installs_the_same(installed: Path, installed_from_source: Path) -> None:
    """So that what is found of the wheel below holds for both."""
    wheel, source = files(installed), files(installed_from_source)
    assert len(wheel) > 150
    assert wheel == source
    shown = command([str(installed_from_source / "fedmutual"), "--version"], installed_from_source)
    assert shown == f"fedmutual {fedmutual.__version__}\n"


def test_what_is_installed_finds_its_own_conf(installed: Path, tmp_path: Path) -> None:
    code = (
        "import fedmutual.settings.compose as s, sys; print(s.CONF_DIR); "
        "print(s.compose(['rounds=3']).rounds); "
        "print([p for p in sys.path if (__import__('pathlib').Path(p) / 'server_app.py').exists()])"
    )
    conf, rounds, apps = command([str(installed / "python"), "-I", "-c", code], tmp_path).splitlines()
    assert Path(conf).is_relative_to(installed.parent)
    assert (rounds, apps) == ("3", "[]")


def test_the_wheel_gives_the_bundle_of_the_checkout(installed: Path, checkout: Path, tmp_path: Path) -> None:
    package = next(installed.parent.glob("lib/python*/site-packages/fedmutual"))
    with runnable_app(app_folder(package), package) as folder:
        from_wheel = bundle(folder, tmp_path / "wheel")
    assert not folder.exists()
    assert from_wheel == bundle(checkout, tmp_path / "checkout")


def test_a_checkout_is_run_as_it_is() -> None:
    with runnable_app(app_folder()) as folder:
        assert folder == ROOT


def test_the_wheel_compares_with_its_own_client_app(installed: Path, tmp_path: Path) -> None:
    code = "from fedmutual.simulation.inprocess import load_client_app as load; load(); "
    code += "import client_app; print(client_app.__file__)"
    found = Path(command([str(installed / "python"), "-c", code], tmp_path).splitlines()[-1])
    assert found.parts[-3:] == ("fedmutual", "_app", "client_app.py")
    assert found.is_relative_to(installed.parent)


def test_the_version_is_the_same_everywhere() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert fedmutual.__version__ == declared
    places = [path for path in (ROOT / "docker").rglob("*") if path.is_file() and path.suffix != ".txt"]
    tags = {
        tag
        for path in places
        for tag in re.findall(r"\bfedmutual:(\d[\w.]*)", path.read_text(errors="ignore"))
    }
    assert tags == {declared}
