"""Shell completion: asked as bash asks, and in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedmutual.commands.completion import SHELLS, complete_override

ROOT = Path(__file__).resolve().parents[1]


def fedmutual(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fedmutual", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_its_code(shell: str) -> None:
    code = fedmutual("completion", shell)
    assert "fedmutual" in code
    assert "argcomplete" in code.lower()


def test_settings_and_choices() -> None:
    assert complete_override("partition=") == [
        f"partition={path.stem}" for path in sorted((ROOT / "conf" / "partition").glob("*.yaml"))
    ]
    assert "partition.alpha=" in complete_override("partition")
    assert complete_override("train.b") == ["train.batch_size="]
    assert complete_override("rou") == ["rounds="]
    assert {"strategy=", "strategy.kl_weight="} <= set(complete_override("strat"))
    assert complete_override("rounds=") == []
    assert complete_override("nosuch=") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fedmutual com", {"compare", "completion"}),
        ("fedmutual clean --d", {"--dry-run"}),
        ("fedmutual completion z", {"zsh"}),
        ("fedmutual run optimizer=", {"adam", "adamw", "sgd"}),
        ("fedmutual config rounds=2 train.loc", {"train.local_epochs="}),
    ],
)
def test_in_bash(line: str, offered: set[str], tmp_path: Path) -> None:
    program = tmp_path / "fedmutual"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fedmutual "$@"\n')
    program.chmod(0o755)
    # what readline does on TAB; it breaks words at "=" too
    script = f"""
        eval "$(fedmutual completion bash)"
        COMP_LINE='{line}' COMP_POINT={len(line)} COMP_TYPE=9 COMP_WORDS=({line}) COMP_CWORD=1
        _python_argcomplete fedmutual
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert {word.strip() for word in result.stdout.splitlines()} == offered, result.stderr
