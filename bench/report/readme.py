"""The part of README.md that is rendered: the table between two comments. All else there is written by hand."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- headline: rendered by `python -m bench.report`; edits between these two comments are lost -->"
END = "<!-- /headline -->"


def files(out_dir: Path, table: str) -> dict[Path, bytes]:
    """README.md with `table` in its place, relative to `out_dir`. Empty for any folder but the repository's own reports, and
    where README.md is not there or has not both comments: it is somebody else's then."""
    path = ROOT / "README.md"
    if out_dir.resolve() != ROOT / "reports" or not path.is_file():
        return {}
    text = with_table(path.read_text(encoding="utf-8"), table)
    return {} if text is None else {Path("..") / path.name: text.encode("utf-8", "replace")}


def with_table(text: str, table: str) -> str | None:
    """`text` with `table` between the two comments, None where they are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}" if begin and end else None
