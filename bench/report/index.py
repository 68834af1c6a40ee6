"""The first page of the reports, a row for each device and setting, and the page of a device with several settings."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.devices import Device, Setting
from bench.report.overview import change_of, headline, legend
from bench.report.shipping import Shipping
from bench.report.text import MARK, NOTHING, code, names, prose, ratio, setting_words, table

HOW = (
    "`python -m loop.train --data my.jsonl`, with the `--model` and `--method` of a row, switches on what `shipping.toml` "
    "allows for the device that it runs on: the setting with that very model, method and dtype, and of several pack lengths "
    "and ranks the nearest. Arrows go from the reference to what ships; verdicts belong to a device and a setting and do "
    "not carry over to another."
)


def index_page(
    devices: Sequence[tuple[Device, Sequence[Shipping]]], gated: bool, compiled: bool = False, micro: bool = False,
    profiled: bool = False, searched: bool = False,
) -> str:  # fmt: skip
    """Markdown of `reports/README.md`, from each device with the decision for each of its settings. gated, compiled, micro,
    profiled, searched: whether there is a page on the gate, on what kernels compile to, on microbenchmarks, on profiles, on
    searches."""
    header = ("device", "trained", "switch on", "speed", "real tok/s", "peak memory", "verdict", "finished")
    rows = []
    for device, decisions in devices:
        named = f"[{prose(device.name)}]({device.slug}/README.md)"
        for setting, shipping in zip(device.settings, decisions, strict=True):
            rows.append((named, *_row(device, setting, shipping)))
            named = ""  # a device's name stands once, at its first setting
    body = table(header, rows, numeric=(3, 4, 5)) if rows else "No records yet: `make bench` makes them."
    gate = "\n[The gate itself](gate/README.md): what it catches, what it lets through, and every arm gated in full.\n"
    code_of = "\n[What the kernels compile to](cross_compile/README.md), for GPUs that need not be here: no word on speed.\n"
    alone = (
        "\n[Microbenchmarks](micro/README.md): each optimization's op alone, and how near it is to what the device can do.\n"
    )
    where = "\n[Profiles](profile/README.md): where the time and the memory of a step go.\n"
    sets = "\n[Searches](search/README.md): from stock to the fastest set, what each member is worth and how it was found.\n"
    pages = ((gate, gated), (code_of, compiled), (alone, micro), (where, profiled), (sets, searched))
    others = "".join(words for words, there in pages if there)
    words = legend(record for device, _ in devices for setting in device.settings for record in setting.current)
    return f"<!-- {MARK} -->\n# What ships where\n\n{body}\n\n{HOW}\n\n{words}\n{others}"


def _row(device: Device, setting: Setting, shipping: Shipping) -> tuple[str, ...]:
    basis = shipping.basis
    speeds, used = change_of(setting, basis)
    folder = "/".join(part for part in (device.slug, device.path(setting)) if part)
    return (
        f"[{setting_words(setting.reference or setting.newest) or NOTHING}]({folder}/README.md)",
        f"**{names(shipping.enable)}**" if basis else "nothing: see the report",
        f"**{ratio(basis.perf)}**" if basis else NOTHING,
        speeds,
        used,
        basis.verdict.level.value if basis else NOTHING,
        prose(setting.newest.finished_at),
    )


def device_page(device: Device, decisions: Sequence[Shipping]) -> str:
    """Markdown of `reports/<device_slug>/README.md` where several things were trained: the headline of each."""
    sections = [f"<!-- {MARK} -->\n# {prose(device.name)}"]
    for setting, shipping in zip(device.settings, decisions, strict=True):
        stock = setting.reference or setting.newest
        page, finished = f"{device.path(setting)}/README.md", prose(setting.newest.finished_at)
        sections += [
            f"## [{setting_words(stock) or NOTHING}]({page})",
            headline(setting, shipping, "shipping.toml"),
            f"Run {code(setting.run_id)}, finished {finished}; [every arm and its numbers]({page}).",
        ]
    sections += ["The speed ratio is the reference's time over the time of what ships, in brackets its 95 % interval."]
    return "\n\n".join((*sections, "[All devices](../README.md)")) + "\n"
