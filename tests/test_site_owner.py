"""At a site its owner decides: a run's configuration is no code, no path and no question there."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from local_grid import enter_run, over_the_wire
from omegaconf import OmegaConf

from fedmutual.client.answer import client_settings, handle
from fedmutual.client.refusal import error_reason, without_own
from fedmutual.client.sent import FOLDER
from fedmutual.client.state import StateError
from fedmutual.data.images import DataError
from fedmutual.models.allowed import require_model
from fedmutual.settings import Settings, SettingsError
from fedmutual.settings.at_site import check_overrides, check_targets, site_settings, trusts_run
from fedmutual.settings.compose import CONF_DIR, compose
from fedmutual.settings.identity import IdentityError
from fedmutual.simulation.inprocess import node_context
from fedmutual.wire.codec import MessageError
from fedmutual.wire.orders import Order, order_record

NAMED = {"client-name": "ward"}
CUSTOM = "model=custom"
GROUPS = ("model", "strategy", "consensus", "data", "partition")


def at_site(*overrides: str, **node_config: Any) -> Settings:
    """The settings of a run at a site that is not trusted with more."""
    node = {key.replace("_", "-"): value for key, value in node_config.items()}
    return site_settings({"overrides": shlex.join(overrides)}, NAMED | node)


# ---------------------------------------------------------------------------------------------------
# Who is trusted


@pytest.mark.parametrize(
    ("node_config", "trusted"),
    [
        ({}, False),
        ({"partition-id": 0, "num-partitions": 3}, False),  # a trial's sites have them too
        ({"trust-run": True}, True),
        ({"trust-run": "true"}, True),
        ({"trust-run": "True"}, True),
        ({"trust-run": False}, False),
        ({"trust-run": "no"}, False),
        ({"trust-run": 1}, False),
    ],
)
def test_only_the_sites_own_configuration_trusts_a_run(node_config: dict[str, Any], trusted: bool) -> None:
    assert trusts_run(node_config) is trusted


@pytest.mark.parametrize(
    ("program", "ray", "trusted"),
    [
        ("/venv/lib/ray/_private/workers/default_worker.py", True, True),
        ("/venv/lib/ray/_private/workers/default_worker.py", False, False),
        ("/venv/bin/flwr-clientapp", True, False),
        ("/tmp/default_worker.py", True, False),
    ],
)
def test_a_worker_of_the_simulation_engine_is_trusted(
    monkeypatch: pytest.MonkeyPatch, program: str, ray: bool, trusted: bool
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    if ray:
        monkeypatch.setitem(sys.modules, "ray", sys)
    assert trusts_run({}) is trusted
    assert not trusts_run({"trust-run": False})


def test_a_run_in_one_process_is_trusted_unless_its_node_says_otherwise() -> None:
    assert trusts_run(node_context(1, {}, {"partition-id": 0}).node_config)
    assert not trusts_run(node_context(1, {}, {"trust-run": False}).node_config)


def test_the_run_cannot_say_that_it_is_trusted() -> None:
    for key in ("trust-run", "trust_run"):
        with pytest.raises(SettingsError):
            at_site(f"+{key}=true")
    assert site_settings({"trust-run": True, "overrides": "rounds=2"}, NAMED).rounds == 2
    with pytest.raises(SettingsError, match="state-dir"):
        site_settings({"trust-run": True, "overrides": "state_dir=/srv"}, NAMED)


# ---------------------------------------------------------------------------------------------------
# No code


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load",
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torchvision.io.read_file",
        "torchvision_models.resnet18",
        "torchvision.models",
        "torchvision.models._api.get_model",
        "torchvision.models.resnet.__loader__",
        "torchvision.models.resnet18()",
        "fedmutual.__main__.main",
        "fedmutual.settings.compose.compose",
        "fedmutual.modelsx.a",
        "hubconf.net",
        "a b.c",
    ],
)
def test_a_model_from_elsewhere_is_refused_by_its_name(target: str) -> None:
    with pytest.raises(SettingsError, match=r"model._target_: .* is not allowed at this site"):
        at_site(CUSTOM, f"model._target_='{target}'")
    with pytest.raises(SettingsError, match=r"model"):
        at_site(f"model={{_target_: '{target}'}}")


def test_nothing_that_a_run_names_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef net(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for group in GROUPS:
        with pytest.raises(SettingsError, match="is not allowed at this site"):
            at_site(f"{group}._target_=hubconf.net")
    with pytest.raises(SettingsError, match="is not allowed at this site"):
        client_settings(
            {"overrides": "model.per_client=[hubconf.net]"}, {"partition-id": 0, "num-partitions": 1}
        )
    assert not (tmp_path / "ran").exists()
    with pytest.raises(
        SettingsError, match="non-class of type 'function'"
    ):  # the attack works where it is trusted
        site_settings({"overrides": "strategy._target_=hubconf.net"}, NAMED | {"trust-run": True})
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "target",
    [
        "torchvision.models.get_model",  # would load a detector's backbone from elsewhere
        "torchvision.models.get_weight",
        "torchvision.models.list_models",
        "torchvision.models.ResNet18_Weights",
        "torchvision.models.resnet.conv3x3",
        "torchvision.models.googlenet.warnings.warn",
        "torchvision.models.detection.fasterrcnn_resnet50_fpn",  # its backbone's weights come from elsewhere
        "torchvision.models.resnet.nn.Linear",
        "torchvision.models.nothing",
        "fedmutual.models.build.build_model",
        "fedmutual.models.visionnet.nn.Linear",
    ],
)
def test_what_is_beside_the_models_is_never_called(target: str) -> None:
    assert at_site(CUSTOM, f"model._target_={target}").model.target == target  # nothing is imported for it
    with pytest.raises(SettingsError, match=r"model\._target_: (.* is no model|there is no)"):
        require_model(target, NAMED)
    require_model(target, NAMED | {"trust-run": True})
    require_model(target, NAMED | {"allowed-models": f"a.b, {target}"})


@pytest.mark.parametrize(
    "target",
    [
        "fedmutual.models.visionnet.VisionNet",
        "torchvision.models.resnet18",
        "torchvision.models.vgg.vgg11_bn",
        "torchvision.models.VisionTransformer",
        "torchvision.models.squeezenet1_0",
    ],
)
def test_this_packages_models_and_torchvisions_are_built(target: str) -> None:
    assert at_site(CUSTOM, f"model._target_={target}").model.target == target
    require_model(target, NAMED)


def test_every_model_and_class_of_conf_is_allowed() -> None:
    found: dict[str, list[str]] = {}
    for path in CONF_DIR.glob("*/*.yaml"):
        target = OmegaConf.to_container(OmegaConf.load(path)).get("_target_")  # type: ignore[union-attr]
        if isinstance(target, str) and path.stem != "custom":
            found.setdefault(path.parent.name, []).append(target)
    assert {group: len(targets) > 2 for group, targets in found.items()} == dict.fromkeys(GROUPS, True)
    plain = {group: {"_target_": targets[0]} for group, targets in found.items()}
    for group, targets in found.items():
        for target in targets:
            check_targets({**plain, group: {"_target_": target}}, {})
            with pytest.raises(SettingsError, match=f"{group}._target_"):
                check_targets({**plain, group: {"_target_": f"x.{target}"}}, {})
    for target in found["model"]:
        require_model(target, NAMED)


def test_the_owner_lists_models_and_classes() -> None:
    own = "mypkg.nets.MyNet"
    assert at_site(CUSTOM, f"model._target_={own}", allowed_models=f"x.Y,{own}").model.target == own
    with pytest.raises(SettingsError, match="allowed-models="):
        at_site(CUSTOM, f"model._target_={own}", allowed_models="mypkg.nets")
    listed = f"{__name__}.listed"
    with pytest.raises(SettingsError, match=r"strategy._target_: .*allowed-classes"):
        at_site(f"strategy._target_={listed}")
    with pytest.raises(SettingsError, match=r"strategy._target_: no class"):  # now it is looked for
        at_site(f"strategy._target_={listed}", allowed_classes=listed)


def test_the_owner_chooses_any_model_and_the_runs_is_left_behind() -> None:
    settings = at_site(CUSTOM, "model._target_=torch.hub.load", "+model.repo=x", model="mypkg.MyNet")
    assert (settings.model.target, settings.model.arguments) == ("mypkg.MyNet", {})
    require_model("mypkg.MyNet", NAMED | {"model": "mypkg.MyNet"})
    with pytest.raises(SettingsError, match="is no model"):
        require_model("mypkg.MyNet", NAMED | {"model": "mypkg.Other"})


@pytest.mark.parametrize("argument", ["weights", "weights_backbone", "pretrained"])
def test_weights_from_elsewhere_are_refused(argument: str) -> None:
    with pytest.raises(SettingsError, match=rf"model\.{argument}: this site loads no weights"):
        at_site("model=resnet18", f"+model.{argument}=DEFAULT")
    assert at_site("model=resnet18", f"+model.{argument}=null").model.arguments == {argument: None}
    target = "torchvision.models.resnet18"
    assert at_site("model=resnet18", f"+model.{argument}=DEFAULT", allowed_models=target)


# ---------------------------------------------------------------------------------------------------
# No question: environment, resolvers, search paths, files


@pytest.mark.parametrize(
    "override",
    [
        "tracking.project=${oc.env:SECRET}",
        "tracking.project='${oc.env:SECRET}'",
        "tracking.project=$\\{oc.env:SECRET\\}",  # Hydra would take the backslashes away
        'tracking.project="a${oc.env:SECRET}b"',
        "rounds=${seed}",
        "+model.x=${oc.decode:1}",
        "model=${oc.env:SECRET}",
        "${oc.env:SECRET}=1",
    ],
)
def test_an_override_reads_nothing_of_the_site(monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.setenv("SECRET", "visionnet")
    with pytest.raises(SettingsError, match="a site reads no environment") as refused:
        at_site(override)
    assert "visionnet" not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "hydra.searchpath=[file:///tmp]",
        "+hydra.run.dir=/tmp",
        "hydra/job_logging=none",
        "+hydra/launcher=basic",
        "~hydra",
        "model@train=resnet18",
        "+/hydra/output=x",
        "defaults=[x]",
        "+searchpath=/tmp",
        "nosuch=1",
        "model.per-client=1",
        "rounds=1,2",
        "rounds=range(1,9)",
        "rounds",
        "=",
    ],
)
def test_hydras_own_and_unknown_keys_are_refused(override: str) -> None:
    with pytest.raises(SettingsError):
        check_overrides([override])
    with pytest.raises(SettingsError):
        at_site(override)


@pytest.mark.parametrize("group", ["experiment", "strategy", "model", "data", "public", "optimizer"])
@pytest.mark.parametrize("choice", ["../model/resnet18", "/etc/passwd", "..", "a/b", "~/x", "[../x]"])
def test_files_are_chosen_by_their_plain_names(group: str, choice: str) -> None:
    with pytest.raises(SettingsError, match="no plain name"):
        at_site(f"{group}='{choice}'" if "[" not in choice else f"{group}={choice}")
    if "[" not in choice:
        with pytest.raises(SettingsError, match="no plain name"):  # a key of the app's own configuration
            site_settings({group: f"'{choice}'"}, NAMED)


def test_megabytes_of_overrides_are_not_parsed() -> None:
    with pytest.raises(SettingsError, match="characters are not read"):
        at_site("data.classes=[" + "a," * 20_000 + "a]")


@pytest.mark.parametrize(
    "overrides",
    [
        ("rounds=5", "train.batch_size=8", "model=resnet18", "strategy=fedmd", "public.size=null"),
        ("+model.width_mult=0.5", "model=mobilenet_v3_small"),
        ("model={dropout: 0.1}", "participation.absent=[a:1-3,client-4:1-7]", "tracking.project=/Shared/x"),
        ("experiment=paper_protocol", "data.image_size=20", "++seed=3"),
        ("model=custom", "model._target_=torchvision.models.vgg11"),
        ("partition=dirichlet", "partition.alpha=0.3", "num_clients=3", "evaluation.unseen_limit=10"),
    ],
)
def test_what_is_allowed_is_composed_as_ever(overrides: tuple[str, ...]) -> None:
    found, expected = at_site(*overrides), compose(overrides)
    assert found == expected


# ---------------------------------------------------------------------------------------------------
# No path


@pytest.mark.parametrize(("key", "own"), [("state_dir", "state-dir"), ("cache_dir", "cache-dir")])
def test_a_folder_is_the_node_configurations(key: str, own: str) -> None:
    assert getattr(at_site("rounds=2"), key) is None  # the site's own default
    with pytest.raises(SettingsError, match=f"{key}: .*{own}=") as refused:
        at_site(f"{key}=/srv/servers")
    assert "/srv" not in str(refused.value)
    assert getattr(at_site(f"{key}=/srv/servers", **{own: "/var/site"}), key) == "/var/site"
    with pytest.raises(SettingsError, match="relative"):
        at_site(**{own: "site"})


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("data=folder", "data.root=/etc"), "data.root"),
        (("data=folder",), "data.root"),
        (("data=folder", "data={root: /etc}"), "data.root"),
        (("data=facemask", "data.root=/etc"), "data.root"),
        (("data=huggingface", "data.dataset=/home"), "data.dataset"),
        (("data=huggingface", "data.dataset=someone/faces"), "data.dataset"),
    ],
)
def test_images_are_read_where_the_node_configuration_says(
    tmp_path: Path, overrides: tuple[str, ...], key: str
) -> None:
    with pytest.raises(SettingsError, match=rf"{key}: .*data-dir="):
        at_site(*overrides)
    data = at_site(*overrides, data_dir=str(tmp_path)).data
    assert getattr(data, key.removeprefix("data.")) == str(tmp_path)


def test_the_servers_own_paths_are_nothing_to_a_site() -> None:
    settings = at_site("output_dir=/srv/runs/1", "resume=/srv/runs/1", "tracking.mlflow_uri=file:/srv")
    assert (settings.output_dir, settings.resume) == (None, None)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "~/x", "file:///etc", "C:\\x", "../../x", "a/../../x", "\\\\host\\x"]
)
def test_no_other_setting_is_a_path(path: str) -> None:
    with pytest.raises(SettingsError, match=r"model\.checkpoint: a run names no path at a site"):
        at_site(f"+model.checkpoint='{path}'")
    with pytest.raises(SettingsError, match=r"data\.classes: a run names no path"):
        at_site("data=folder", f"data.classes=[a,'{path}']", data_dir="/")


def test_in_simulation_the_runs_own_settings_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "torch.hub.load")
    run = ("data=folder", f"data.root={tmp_path}", "state_dir=/run", "model._target_=${oc.env:SECRET}")
    settings = at_site(*run, trust_run=True)
    assert (settings.data.root, settings.state_dir) == (str(tmp_path), "/run")
    assert settings.model.target == "torch.hub.load"


# ---------------------------------------------------------------------------------------------------
# What an error reply says

HOME = os.path.expanduser("~")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("/data/ward 3/x.jpg is broken"), "this site's images cannot be used as they are"),
        (StateError("/var/state/run/ward: damaged"), "the order failed at this site"),
        (OSError(28, "No space left on device", "/var/state"), "No space left on device"),
        (FileNotFoundError(2, "No such file", "/data/patients"), "No such file or directory"),
        (RuntimeError("cannot open /data/patients"), "the order failed at this site"),
        (MemoryError("/data"), "out of memory"),
        (KeyError("patients"), "the order failed at this site"),
    ],
)
def test_of_most_errors_only_the_kind_is_told(error: Exception, said: str) -> None:
    assert error_reason(error, NAMED) == f"{type(error).__name__}: {said}; its own log says more"
    assert error_reason(error, {"trust-run": True}) == f"{type(error).__name__}: {error}"


def test_what_an_error_says_for_others_is_told() -> None:
    error = DataError("/data/ward 3 has no public images: copy them", "no public images: copy them")
    assert error_reason(error, NAMED) == "DataError: no public images: copy them"
    assert error_reason(error, {"trust-run": True}).endswith("/data/ward 3 has no public images: copy them")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("root: /mnt/ward 3/photos is not a folder", "root: <data-dir> is not a folder"),
        ("root: '/mnt/ward 3/photos/train': no", "root: '<data-dir>': no"),
        ("/home/x/y.yaml is missing, ~/z too", "<path> is missing, <path> too"),
        ("C:\\Users\\x: no, file:///etc: no", "<path>: no, <path>: no"),
        (f"{HOME}/a", "<path>"),
        ("device: 'gpu-of-ward' is none of auto, cpu", "device: '<device>' is none of auto, cpu"),
        ("conf/model/x.yaml, and/or 1/2: n. a.", "conf/model/x.yaml, and/or 1/2: n. a."),
    ],
)
def test_paths_and_values_of_the_node_are_replaced(text: str, told: str) -> None:
    node = {"client-name": "n", "data-dir": "/mnt/ward 3/photos", "device": "gpu-of-ward", "partition-id": 1}
    assert without_own(text, node) == told
    for kind in (SettingsError, MessageError, IdentityError):
        assert error_reason(kind(text), node) == f"{kind.__name__}: {told}"


def reply_to(run: str, node_config: dict[str, Any]) -> str:
    """What the server reads when a client refuses its order."""
    enter_run()
    order = Order(
        run="run-1",
        round=1,
        closing=False,
        public_digest="",
        classes=("a", "b"),
        num_classes=2,
        indices=np.zeros(0, np.int32),
    )
    message = over_the_wire(Message(order_record(order), 5, "train.round"))
    context = Context(
        run_id=1, node_id=5, node_config=node_config, state=RecordDict(), run_config={"overrides": run}
    )
    reply = handle(message, context)
    assert reply.has_error()
    return str(reply.error.reason)


def test_the_site_logs_what_its_reply_does_not_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = tmp_path / "patients of ward 3"
    (secret / "train" / "cat").mkdir(parents=True)
    (secret / "train" / "dog").mkdir()
    node = {"client-name": "ward", "data-dir": str(secret), "state-dir": str(tmp_path / "state")}
    with caplog.at_level(logging.ERROR):
        reason = reply_to("data=folder", node)
    assert reason == "ward: DataError: this site's images cannot be used as they are; its own log says more"
    assert "patients of ward 3" in caplog.text
    told = reply_to("data=folder", {**node, "trust-run": True})
    assert "patients of ward 3" in told
    missing = reply_to("data=folder", {**node, "data-dir": str(secret / "no")})
    assert missing.startswith("ward: SettingsError: data.root: <data-dir> is not a folder")


def test_a_hostile_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    node = {"client-name": "ward", "state-dir": str(tmp_path)}
    reason = reply_to("model=custom model._target_=torch.hub.load", node)
    assert reason.startswith(
        "ward: SettingsError: model._target_: torch.hub.load is not allowed at this site"
    )
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]  # the record of the reply


def test_what_an_import_says_of_the_sites_files_stays_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import client_app
    import fedmutual.client

    monkeypatch.delattr(fedmutual.client, "answer")
    monkeypatch.setitem(sys.modules, "fedmutual.client.answer", None)
    with pytest.raises(ImportError, match="at this site; its own log says more") as told:
        client_app._client()
    cause = str(told.value.__cause__)
    assert cause in caplog.text
    assert cause not in str(told.value)
