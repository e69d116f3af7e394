"""Each example is a Flower app of its own: a real ``flwr run`` of it completes, and its clients learn."""

from __future__ import annotations

import difflib
import importlib
import itertools
import re
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict

from fedmutual import Order
from fedmutual.simulation.inprocess import InProcessGrid
from fedmutual.simulation.superlink import SuperLink
from fedmutual.wire.records import payload_bytes

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# example -> its package, and run configuration that is quick
APPS = {
    "quickstart-pytorch": ("quickstart_mutual", {"num-server-rounds": 2, "local-epochs": 1}),
    "any-model": ("anymodel", {"num-server-rounds": 2}),
    "text": ("textapp", {"num-server-rounds": 2}),
}
FEDAVG = "quickstart-pytorch/fedavg"
FILES = ("server_app.py", "client_app.py", "task.py")

Module = Callable[[str, str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Import a module of an example; its modules are forgotten afterwards."""
    torch.manual_seed(0)
    threads, before = torch.get_num_threads(), set(sys.modules)
    torch.set_num_threads(1)

    def load(example: str, name: str) -> ModuleType:
        if example == "any-model":
            pytest.importorskip("lightgbm")
        monkeypatch.syspath_prepend(str(EXAMPLES / example))
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(threads)
    ours = {"compare", "quickstart_fedavg", *(package for package, _ in APPS.values())}
    for name in [name for name in sys.modules if name.split(".")[0] in ours and name not in before]:
        del sys.modules[name]


def project(example: str) -> dict[str, Any]:
    """The example's pyproject.toml."""
    return tomllib.loads((EXAMPLES / example / "pyproject.toml").read_text())


class Watched(InProcessGrid):
    """A grid that keeps every order with its reply."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[tuple[Message, Message]] = []

    def _answer(self, order: Message) -> Message | None:
        reply = super()._answer(order)
        assert reply is not None
        self.seen.append((order, reply))
        return reply

    def replies(self, kind: str) -> list[Message]:
        """The replies to ``train`` or ``evaluate``."""
        return [reply for order, reply in self.seen if order.metadata.message_type == kind]


def play(module: Module, example: str, package: str, clients: int, **changed: Any) -> Watched:
    """The example's ServerApp drives its ClientApp in this process."""
    config = project(example)["tool"]["flwr"]["app"]["config"] | changed
    grid = Watched(module(example, f"{package}.client_app").app, clients, config)
    module(example, f"{package}.server_app").app(grid, Context(1, 1, {}, RecordDict(), dict(config)))
    return grid


# ---------------------------------------------------------------------------------------------------------
# Every example


@pytest.mark.parametrize("example", APPS)
def test_every_client_answers_every_order(
    example: str, module: Module, caplog: pytest.LogCaptureFixture
) -> None:
    package, quick = APPS[example]
    grid = play(module, example, package, 3, **quick)
    assert len(grid.replies("train")) == len(grid.replies("evaluate")) == 3 * 2
    assert not any(reply.has_error() for _, reply in grid.seen)
    assert not any(m.content.array_records for pair in grid.seen for m in pair)  # no weight travels
    assert not [record for record in caplog.records if "rejected" in record.getMessage()]
    assert [Order.of(order).has_target for order, _ in grid.seen[::6]] == [False, True]


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    """One for all examples, as Flower's own; Ray's workers look for modules in its folder first."""
    folder = tmp_path_factory.mktemp("superlink")
    link = SuperLink(copied("text", folder), folder / "superlink.log")
    try:
        link.start(pause)
        yield link
    finally:
        link.close(lambda: False)


def copied(example: str, folder: Path) -> Path:
    """A copy of the example."""
    ignored = shutil.ignore_patterns(".*", "__pycache__")
    return shutil.copytree(EXAMPLES / example, folder / example, ignore=ignored)


def pause() -> None:
    """Between two looks at another process."""
    time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("example", APPS)
def test_flwr_run_completes(example: str, superlink: SuperLink, tmp_path: Path) -> None:
    if example == "any-model":
        pytest.importorskip("lightgbm")
    superlink.app_dir = copied(example, tmp_path)
    quick = "\n".join(f"{key} = {value}" for key, value in APPS[example][1].items())
    one_process = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=1"
    run = superlink.submit(quick, one_process, pause)
    deadline = time.monotonic() + 240
    status, details = "", ""
    while not status.startswith("finished") and time.monotonic() < deadline:
        time.sleep(2)
        status, details = superlink.status(run, pause)
    superlink.save_log(run, tmp_path / "run.log", pause)
    log = (tmp_path / "run.log").read_text()
    assert (status, details) == ("finished:completed", ""), log
    assert "[ROUND 2/2]" in log
    assert "rejected" not in log
    assert len(re.findall(r"Aggregated MetricRecord: \{'", log)) >= 2, log  # an evaluation in each round


@pytest.mark.parametrize("example", [*APPS, FEDAVG])
def test_the_commands_of_a_readme_name_settings_that_exist(example: str) -> None:
    text = (EXAMPLES / example / "README.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^    (flwr run .*)$", text, re.MULTILINE)]
    assert commands
    settings = project(example)["tool"]["flwr"]["app"]["config"]
    for command in commands:
        assert (EXAMPLES / example / command[2] / "pyproject.toml").is_file()
        options = dict(itertools.pairwise(command))
        given = options.get("--run-config", "").split()
        assert {pair.partition("=")[0] for pair in given} <= settings.keys()


# ---------------------------------------------------------------------------------------------------------
# The quickstart


def quickstart_diff() -> list[str]:
    """From the FedAvg quickstart to this one, as `diff -u` prints it."""
    lines: list[str] = []
    for file in FILES:
        old = (EXAMPLES / FEDAVG / "quickstart_fedavg" / file).read_text().splitlines()
        new = (EXAMPLES / "quickstart-pytorch/quickstart_mutual" / file).read_text().splitlines()
        names = f"fedavg/{file}", f"mutual/{file}"
        lines += [line.rstrip("\n") for line in difflib.unified_diff(old, new, *names, lineterm="")]
    return lines


def test_the_quickstarts_diff_is_short_and_on_its_page() -> None:
    diff = quickstart_diff()
    changed = [line for line in diff if line[0] in "+-" and not line.startswith(("+++", "---"))]
    assert 10 < len(changed) <= 40
    page = (ROOT / "docs" / "quickstart.md").read_text()
    assert "```diff\n" + "\n".join(diff) + "\n```" in page
    for text in (page, (EXAMPLES / "quickstart-pytorch" / "README.md").read_text()):
        assert f"{len(changed)} lines" in text


def test_the_two_quickstarts_differ_in_nothing_else() -> None:
    folders = EXAMPLES / FEDAVG / "quickstart_fedavg", EXAMPLES / "quickstart-pytorch" / "quickstart_mutual"
    ours, others = ({path.name: path.read_text() for path in folder.glob("*.py")} for folder in folders)
    assert ours.keys() == others.keys()
    assert {name for name in ours if ours[name] != others[name]} == set(FILES)
    old, new = (project(example)["tool"]["flwr"]["app"] for example in (FEDAVG, "quickstart-pytorch"))
    assert {key for key in old if old[key] != new[key]} == {"components"}


def test_the_quickstart_learns_with_a_tenth_of_the_traffic(module: Module) -> None:
    mutual = play(module, "quickstart-pytorch", "quickstart_mutual", 2, **{"num-server-rounds": 4})
    fedavg = play(module, FEDAVG, "quickstart_fedavg", 2, **{"num-server-rounds": 4})
    for grid in (mutual, fedavg):  # four rounds, of three epochs each: one alone does not get there
        last = grid.replies("evaluate")[-2:]
        assert min(float(reply.content.metric_records["metrics"]["eval_acc"]) for reply in last) > 0.85
    sizes = [[payload_bytes(m.content) for pair in grid.seen for m in pair] for grid in (mutual, fedavg)]
    assert 10 * sum(sizes[0]) < sum(sizes[1])


def test_the_quickstarts_network_stays_at_the_client(module: Module) -> None:
    grid = play(module, "quickstart-pytorch", "quickstart_mutual", 2, **{"num-server-rounds": 1})
    first, second = (context.state.array_records["net"] for context in grid.contexts.values())
    assert not np.array_equal(first["fc2.weight"].numpy(), second["fc2.weight"].numpy())


# ---------------------------------------------------------------------------------------------------------
# Any model


def test_each_model_is_better_than_alone(module: Module) -> None:
    compare = module("any-model", "compare")
    alone, together = (compare.play(kl_weight, seed=0, rounds=2) for kl_weight in (0.0, 1.0))
    assert set(alone) == {"network", "random forest", "boosted trees"}
    assert all(together[name] > alone[name] + 0.02 for name in alone), (alone, together)


def test_trees_learn_a_class_that_only_their_peers_know(module: Module) -> None:
    learners = module("any-model", "anymodel.learners")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 64)).astype(np.float32)
    public = rng.normal(size=(40, 64)).astype(np.float32)
    x[40:, :32] += 9
    public[20:, 32:] += 9
    y = np.repeat([0, 3], 40)
    log_targets = np.full((20, 10), -9.0, np.float32)
    log_targets[:, 7] = 0.0
    known = Order(round=1, num_classes=10)
    taught = Order(
        round=2,
        num_classes=10,
        target_indices=np.arange(20, 40, dtype=np.int32),
        log_targets=log_targets,
        kl_weight=1.0,
    )
    for partition in (1, 2):
        trees = learners.make_learner(partition, seed=0)
        trees.fit(x, y, public, known)
        assert trees.predict(public).argmax(axis=1).tolist() == [0] * 40
        assert trees.predict(public).sum(axis=1) == pytest.approx(np.ones(40), abs=1e-5)
        trees.fit(x, y, public, taught)
        assert trees.predict(public).argmax(axis=1).tolist() == [0] * 20 + [7] * 20
        assert trees.predict(x).argmax(axis=1).tolist() == y.tolist()


def test_the_clients_rows_are_apart(module: Module) -> None:
    data = module("any-model", "anymodel.data")
    parts = [data.load_data(i, 3, 0.5, 0) for i in range(3)]
    assert sum(len(part.y) for part in parts) == 1797 - data.PUBLIC - data.TEST
    assert np.array_equal(parts[0].public, parts[2].public)
    rows = [row.tobytes() for x in (*(p.x for p in parts), parts[0].public, parts[0].test_x) for row in x]
    assert len(rows) == len(set(rows)) == 1797
    assert min(len(part.y) for part in parts) >= data.LEAST
    frequent = [np.bincount(part.y, minlength=10) / len(part.y) for part in parts]
    assert np.abs(frequent[0] - frequent[1]).sum() > 0.5  # label skew


def test_the_table_holds_paired_gains(
    module: Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = module("any-model", "compare")
    figures = {(0.0, 0): 0.5, (0.0, 1): 0.6, (1.0, 0): 0.7, (1.0, 1): 0.9}
    monkeypatch.setattr(
        compare, "play", lambda kl_weight, seed, rounds: {"network": figures[kl_weight, seed]}
    )
    monkeypatch.setattr(compare.logging, "disable", lambda level: None)
    compare.main(seeds=2, rounds=1)
    # gains 0.2 and 0.3: 0.25 +- 12.706 * 0.0707 / sqrt(2)
    assert "| network       | 0.550 | 0.800    | +0.250 | -0.385 to +0.885 |" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# Text


def test_tokens(module: Module) -> None:
    model = module("text", "textapp.model")
    assert model.words("The `FFT` of x, in 2 steps") == ["the", "fft", "of", "in", "steps"]
    assert model.trigrams("An FFT") == [" an", "an ", "n f", " ff", "fft", "ft "]
    classifier = model.Classifier(model.words, ["one two", "two three"])
    assert classifier.tokens(["two four one", "four"]) == [[2, 0], []]  # sorted: one, three, two
    scores = classifier([[2, 0], [], [1]])
    assert scores.shape == (3, 4)
    mean = (classifier.embedding.weight[2] + classifier.embedding.weight[0]) / 2
    assert torch.allclose(scores[0], classifier.output(mean), atol=1e-6)
    assert torch.equal(scores[1], classifier.output.bias)  # a text without a known token


def test_prose_has_no_code_and_no_formula(module: Module) -> None:
    texts = module("text", "textapp.texts")
    paragraphs = [
        "Compute the mean of all given values.",
        "Parameters\n----------\na : array\n    The values that are used here, all.",
        "Notes\n-----\nIt is the sum over the number of values. Short one.",
        "See the formula :math:`x` of the paper here.",
        "Examples\n--------\n>>> mean([1, 2]) is the one that we want here",
    ]
    assert list(texts._prose("\n\n".join(paragraphs))) == [
        "Compute the mean of all given values.",
        "It is the sum over the number of values.",
    ]


def test_no_function_is_in_two_parts(module: Module) -> None:
    texts = module("text", "textapp.texts")
    parts = [texts.load_texts(i, 3, 0.3, 0) for i in range(3)]
    _, public, test = parts[0]
    private = [sentence for own, _, _ in parts for sentence in own.sentences]
    functions = {
        (sentence, label): function
        for label, chapter in enumerate(texts.CHAPTERS)
        for function, sentence in texts.sentences_of(chapter)
    }
    labels = [label for own, _, _ in parts for label in own.labels]
    of_private = {(functions[s, y], y) for s, y in zip(private, labels, strict=True)}
    of_public = {(functions[s, y], y) for s, y in zip(public.sentences, public.labels, strict=True)}
    of_test = {(functions[s, y], y) for s, y in zip(test.sentences, test.labels, strict=True)}
    assert not of_private & of_public
    assert not of_private & of_test
    assert not of_public & of_test
    count = len(private) + len(public.sentences) + len(test.sentences)
    assert count == texts.PER_CHAPTER * len(texts.CHAPTERS)


def test_text_clients_are_better_than_alone(module: Module) -> None:
    compare = module("text", "compare")
    assert compare.play(1.0, seed=0, rounds=4) > compare.play(0.0, seed=0, rounds=4) + 0.03


def test_words_and_trigrams_take_turns(module: Module) -> None:
    grid = play(module, "text", "textapp", 3, **{"num-server-rounds": 1})
    kept = [context.state.array_records["model"] for context in grid.contexts.values()]
    assert all(isinstance(record, ArrayRecord) for record in kept)
    sizes = [record["embedding.weight"].numpy().shape[0] for record in kept]
    assert len(set(sizes)) == 3  # vocabularies of their own
    client_app = module("text", "textapp.client_app")
    tokenizers = [client_app.load(context)[0].tokenizer.__name__ for context in grid.contexts.values()]
    assert tokenizers == ["words", "trigrams", "words"]
