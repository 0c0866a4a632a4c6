"""The command line, frozen: what it prints for --help is what help.txt says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FROZEN = Path(__file__).with_name("help.txt")
COMMANDS = (
    "",
    "plan",
    "capture",
    "transfer",
    "lora",
    "merge",
    "join",
    "rank",
    "inspect",
    "verify",
    "report",
    "eval",
    "generate",
    "import",
    "demo",
)
RENEW = "RENEW_HELP=1 python -m pytest tests/cli/test_help.py"


def test_help_is_as_frozen(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "80")
    pages = []
    for command in COMMANDS:
        result = invoke(*command.split(), "--help")
        assert (result.code, result.err) == (0, "")
        pages.append(f"$ lolcats {command + ' ' if command else ''}--help\n{result.out.strip()}\n")
    found = "\n".join(pages)
    if os.environ.get("RENEW_HELP"):
        FROZEN.write_text(found)
    assert FROZEN.exists(), f"There is no {FROZEN.name} yet: run `{RENEW}`."
    assert found == FROZEN.read_text(), (
        f"The command line changed. If that is meant, run `{RENEW}`, look at the difference, and tell the changelog."
    )


def test_every_command_is_frozen(invoke) -> None:
    from lolcats_cli.main import app

    assert {info.name for info in app.registered_commands} == set(COMMANDS) - {""}
