"""From the gate's records to the files under reports/gate, and what every rendering of a report shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from abtest import figures
from abtest.markdown import MARK
from abtest.report import records, sensitivity, sensitivity_records
from abtest.report.loss import LossCurve, loss_plot
from abtest.report.matrix import heat_map
from abtest.report.op_level import op_level_tests
from abtest.report.page import file_name, gate_page
from abtest.report.records import Gated
from loop.files import replacing

FOLDER = Path("gate")
PATTERNS = ("gate/*.md", "gate/*/*.md", "gate/*/*.png")


def render(data_dir: Path, out_dir: Path) -> list[Path]:
    """Writes the gate's part of the report, out of `data_dir`/gate, to `out_dir`/gate; nothing where there is no record.

    Returns its files, relative to `out_dir`, sorted. Raises UserError for a record that is not valid, naming file and line;
    nothing is written then.
    """
    return write(files(data_dir), out_dir, PATTERNS)


def files(data_dir: Path) -> dict[Path, bytes]:
    """Every file of the gate's part, relative to the folder of reports, and its bytes, in memory."""
    measured, gated = sensitivity_records.load(data_dir), records.load(data_dir)
    content: dict[Path, bytes] = {}
    if measured or gated:
        text = sensitivity.readme(measured, gated, op_level_tests)
        content[FOLDER / "README.md"] = text.encode("utf-8", "replace")
    for one in measured:
        if any(line.kind == "mutant" and line.caught_by and not line.equivalent for line in one.lines):
            content[FOLDER / one.slug / "sensitivity.png"] = heat_map(one)
    for one in gated:
        target = FOLDER / one.slug / file_name(one.record)
        content[target.with_name(f"{target.name}.md")] = gate_page(one).encode("utf-8", "replace")
        if one.record.losses:
            content[target.with_name(f"{target.name}.png")] = _loss_plot(one)
    return content


def _loss_plot(gated: Gated) -> bytes:
    record = gated.record
    curve = LossCurve(record.name, record.losses, record.reference_losses, record.noise_sigma, first=0)
    return loss_plot(curve, record.verdict.level.value, gated.device, record.run_id)


def write(content: Mapping[Path, bytes], out_dir: Path, patterns: Iterable[str]) -> list[Path]:
    """Brings `out_dir` to `content`. A file that already says the same is left as it is, and one that an earlier rendering
    made, matches `patterns` and is not in `content` any more is removed."""
    for path, data in content.items():
        target = out_dir / path
        if not (target.is_file() and same(path, target.read_bytes(), data)):
            with replacing(target) as temporary:
                temporary.write_bytes(data)
    for path in sorted(generated(out_dir, patterns) - set(content)):
        (out_dir / path).unlink()
    return sorted(content)


def differences(content: Mapping[Path, bytes], out_dir: Path, patterns: Iterable[str]) -> list[str]:
    """The files in `out_dir` that are missing, differ from `content`, or have no record, with which."""
    found = []
    for path, data in sorted(content.items()):
        if not (out_dir / path).is_file():
            found.append(f"{path} (missing)")
        elif not same(path, (out_dir / path).read_bytes(), data):
            found.append(f"{path} (differs)")
    return found + [f"{path} (no record)" for path in sorted(generated(out_dir, patterns) - set(content))]


def same(path: Path, one: bytes, two: bytes) -> bool:
    """Whether two versions of a report file say the same: text to the byte, plots by their numbers and pixels."""
    return figures.same_image(one, two) if path.suffix == ".png" else one == two


def generated(out_dir: Path, patterns: Iterable[str]) -> set[Path]:
    """The files in `out_dir` that match and that a rendering made, by their mark; relative to `out_dir`."""
    if not out_dir.is_dir():
        return set()
    found = {path for pattern in patterns for path in out_dir.glob(pattern)}
    return {path.relative_to(out_dir) for path in found if path.is_file() and _marked(path)}


def _marked(path: Path) -> bool:
    data = path.read_bytes()
    return figures.is_ours(data) if path.suffix == ".png" else MARK.encode() in data[:400]
