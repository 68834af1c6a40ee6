"""Rendering: from the records to the files under reports/, and the comparison of the two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from abtest.report import site
from abtest.report.site import write
from bench.records import Record
from bench.report import (
    cross_compile,
    headline,
    index,
    micro_page,
    overview,
    pages,
    plots,
    profile_page,
    readme,
    search_page,
    shipping,
    waterfall,
)
from bench.report.devices import Device, Setting, load
from bench.report.text import page_name, prose
from bench.roofline import device_page as roofline_page
from loop.errors import UserError

PATTERNS = ("*.md", "*/*.md", "*/*.png", "*/*/*.md", "*/*/*.png", "*/*/*.svg", "*/shipping.toml", *site.PATTERNS)
EARLIER = "no: not in the newest run"


def render(data_dir: Path, out_dir: Path) -> list[Path]:
    """Writes the whole report of the records in `data_dir`/<device_slug>/*.jsonl, and in `data_dir`/gate, /cross_compile,
    /micro, /profile and /search, to `out_dir`.

    The files are a function of the records alone. A file that already says the same is left as it is, and a file that an
    earlier rendering made and no record explains any more is removed. README.md beside the repository's own `out_dir` gets
    its table. Returns the report's files, relative to `out_dir`, sorted. Raises UserError for a record that is not valid,
    naming file and line; nothing is written then.
    """
    return write(files(data_dir, out_dir), out_dir, PATTERNS)


def differences(data_dir: Path, out_dir: Path) -> list[str]:
    """The report's files in `out_dir` that are missing, differ from what the records say, or have no record, with which."""
    return site.differences(files(data_dir, out_dir), out_dir, PATTERNS)


def files(data_dir: Path, out_dir: Path) -> dict[Path, bytes]:
    """Every file of the report in `out_dir` and its bytes, in memory."""
    devices = [(device, [shipping.decide(setting.run) for setting in device.settings]) for device in load(data_dir)]
    content, compiled, micro = site.files(data_dir), cross_compile.files(data_dir), micro_page.files(data_dir)
    profiles, searched = profile_page.files(data_dir), search_page.files(data_dir, waterfall.answers(devices))
    start = index.index_page(
        devices, gated=bool(content), compiled=bool(compiled), micro=bool(micro), profiled=bool(profiles),
        searched=bool(searched),
    )  # fmt: skip
    content |= compiled | micro | profiles | searched
    content[Path("README.md")] = start.encode("utf-8", "replace")
    found = headline.pairs(devices)
    content[Path("headline.json")] = headline.to_json(found).encode()
    content |= readme.files(out_dir, headline.markdown(found))
    for device, decisions in devices:
        if device.slug == data_dir.name:
            raise UserError(f"{data_dir / device.slug}: a device can't have the name of the records' folder")
        folder = Path(device.slug)
        content[folder / "shipping.toml"] = shipping.to_toml(device, decisions).encode()
        if len(device.settings) > 1:
            content[folder / "README.md"] = index.device_page(device, decisions).encode("utf-8", "replace")
        for setting, decision in zip(device.settings, decisions, strict=True):
            made = _setting_files(device, setting, decision)
            content.update({folder / device.path(setting) / name: data for name, data in made})
    return content


def _setting_files(device: Device, setting: Setting, decision: shipping.Shipping) -> Iterator[tuple[str, bytes]]:
    timed = any(record.perf and record.role != "reference" for record in setting.current)
    roofline = roofline_page(setting.current)
    start = overview.setting_page(device, setting, decision, timed, floor=roofline is not None)
    yield "README.md", start.encode("utf-8", "replace")
    if timed:
        yield "overview.png", plots.ratio_plot(setting.current, decision.basis, device.name)
    if roofline is not None:
        yield "roofline.md", roofline.encode("utf-8", "replace")
    for record in (*setting.current, *setting.earlier):
        name, older = page_name(record.arm), setting.older.get(record.arm, 0)
        reason = decision.reasons.get(record.arm)
        ships = EARLIER if record in setting.earlier else _answer(record, decision, reason)
        plotted = bool(record.losses)
        page = pages.arm_page(record, setting.stock_of(record), device.name, setting.run_id, older, ships, plotted)
        yield f"{name}.md", page.encode("utf-8", "replace")
        if plotted:
            yield f"{name}.png", plots.loss_plot(record, device.name)


def _answer(record: Record, decision: shipping.Shipping, reason: str | None) -> str | None:
    if reason is None:
        return None
    return f"{'**yes**' if overview.ships(record, decision) else 'no'}: {prose(reason)}"
