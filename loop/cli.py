"""What every command shares: flags from dataclasses, recipes, and one clear line for a mistake."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loop.errors import UserError

T = TypeVar("T")


def parse(default: T, prog: str, description: str, argv: list[str] | None = None) -> T:
    """A configuration like `default` from `--recipe FILE` and flags, flags winning. Raises UserError for a wrong flag."""
    import tyro

    from loop.recipe import load_recipe

    arguments = list(sys.argv[1:] if argv is None else argv)
    default = _recipe(arguments, default, load_recipe)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            about = description + " --recipe FILE reads a TOML file of the same keys first; flags win."
            return tyro.cli(type(default), default=default, args=arguments, prog=prog, description=about)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_one_line(errors.getvalue())} (see {prog} --help)") from None


def _recipe(arguments: list[str], default: T, load: Callable[[Path, T], T]) -> T:
    """Takes `--recipe FILE` out of `arguments` and applies it."""
    for index, argument in enumerate(arguments):
        if argument == "--recipe":
            if index + 1 == len(arguments):
                raise UserError("--recipe needs a file")
            path = Path(arguments[index + 1])
            del arguments[index : index + 2]
            return load(path, default)
        if argument.startswith("--recipe="):
            del arguments[index]
            return load(Path(argument.partition("=")[2]), default)
    return default


def _one_line(box: str) -> str:
    """The words of tyro's framed message: no frame, no colours, no help hint."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    inside = [line for line in text.splitlines() if not line.startswith("╭")]  # the frame's top holds only a heading
    lines = [line.strip("│╭╮╰╯─ \t") for line in inside]
    words = [line for line in lines if line and not line.startswith(("For full helptext", "Parsing error", "usage:"))]
    said = " ".join(words).partition("Argument helptext:")[0]
    return re.sub(r"\s+", " ", said).strip(" ;") or "wrong flags"


def guarded(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: 2 with one line for a user's mistake, 130 for Ctrl-C, else what it returns."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141
    sys.exit(code)
