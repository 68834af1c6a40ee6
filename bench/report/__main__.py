"""`python -m bench.report`: renders every report from the records, or with --check says which files differ from them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.report import differences, render
from loop.cli import guarded, parse
from loop.errors import UserError


@dataclass(frozen=True)
class Options:
    """Render reports/ from reports/data/<device>/*.jsonl."""

    reports: Path = Path("reports")  # the folder of reports; its folder `data` holds the records
    check: bool = False  # write nothing; exit with 1 and name the files that differ from what the records say


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 where --check found a difference. Raises UserError for what the user must put right."""
    options = parse(Options(), "python -m bench.report", "Renders reports/ from reports/data/<device>/*.jsonl.", argv)
    data_dir = options.reports / "data"
    try:
        if options.check:
            return _check(data_dir, options.reports)
        written = render(data_dir, options.reports)
    except OSError as error:
        raise UserError(f"{error.filename or options.reports}: {error.strerror or error}") from error
    print(f"{options.reports}: {len(written)} files rendered; start at {options.reports / 'README.md'}")
    return 0


def _check(data_dir: Path, reports: Path) -> int:
    found = differences(data_dir, reports)
    if found:
        print(f"{reports}: not what the records say, run `python -m bench.report`: {', '.join(found)}", file=sys.stderr)
        return 1
    print(f"{reports}: every file is what the records say")
    return 0


if __name__ == "__main__":
    guarded(main)
