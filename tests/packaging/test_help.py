"""What `--help` says of a flag is said of that flag alone."""

from __future__ import annotations

import re

import pytest

from loop.cli import parse
from loop.config import Config


def test_every_flag_has_a_help_of_its_own(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config(), "python -m loop.train", "Trains.", ["--help"])
    assert stop.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = [line.strip("│ ") for line in text.splitlines()]
    flags: list[list[str]] = []
    for line in lines:
        if re.match(r"--[a-z]", line):
            flags.append([line])
        elif flags:
            flags[-1].append(line)
    assert len(flags) > 25
    helps = {}
    for first, *rest in flags:
        names, _, start = first.partition("  ")
        helps[names] = re.sub(r"\s*\(default:.*", "", " ".join([start.strip(), *rest])).strip()
    assert "JSONL" in next(value for name, value in helps.items() if "--data.path" in name)
    assert [name for name, value in helps.items() if len(value) < 8] == []
    assert len(set(helps.values())) == len(helps)
