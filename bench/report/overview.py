"""A device's README, and the index over devices: what to ship, readable in a minute."""

from __future__ import annotations

from collections.abc import Sequence

from abtest.verdict import Check, Level
from bench.records import Perf, Record
from bench.report.devices import Device
from bench.report.pages import why_untimed
from bench.report.shipping import BASELINES, Shipping
from bench.report.text import (
    MARK,
    NOTHING,
    code,
    facts,
    link,
    memory,
    names,
    number,
    per_second,
    percent,
    prose,
    ratio,
    setting,
    shell,
    table,
)

ORDER = list(Level)
LEGEND = """\
- **BITWISE**: losses, gradients, weights, optimizer and random state have the reference's bits.
- **ROUNDING**: the same function in another order of operations; inside the noise floor of the reference itself.
- **APPROX**, **FAILED**, **INVALID**, **NOT_RUN**: not lossless, or not shown to be. Such an arm is never timed.
- The speed ratio is the reference's time over the arm's, timed in turn; in brackets its 95 % interval.
- An optimization ships if it is lossless and the whole interval is above 1 and above the reference's ratio to itself."""


def device_page(device: Device, shipping: Shipping, plotted: bool) -> str:
    """Markdown of `reports/<device_slug>/README.md`."""
    newest = device.current[-1]
    stock = device.reference or newest  # an arm may have had a recipe of its own
    sections = [
        f"<!-- {MARK} -->\n# {prose(device.name)}",
        _headline(device, shipping),
        f"{setting(stock)} · run {code(device.run_id)}, finished {prose(newest.finished_at)}",
        "**Measured from a working tree with uncommitted changes.**" if newest.environment.get("git_dirty") else "",
        "![Speed of every timed arm over the reference's](overview.png)" if plotted else "Nothing was timed on this device.",
        "## What to switch on",
        _decisions(device, shipping),
        LEGEND,
        "## Reference and peers",
        _others(device),
        "## Throughput and memory",
        _throughput(device),
        "## The run\n\n" + _counts(device),
        f"```sh\n{shell(newest.command)}\n```",
        facts({key: value for key, value in stock.recipe.items() if value is not None}),
        "## Data\n\n" + facts(stock.data) if stock.data else "",
        "## Environment\n\n" + facts({key: value for key, value in newest.environment.items() if key != "paths"}),
        _earlier(device),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def index_page(devices: Sequence[tuple[Device, Shipping]], gated: bool, compiled: bool = False) -> str:
    """Markdown of `reports/README.md`. gated, compiled: whether there is a page on the gate, on what kernels compile to."""
    header = ("device", "switch on", "speed", "real tok/s", "peak memory", "verdict", "measured with", "finished")
    rows = []
    for device, shipping in devices:
        basis, newest = shipping.basis, device.current[-1]
        before = device.reference.perf if device.reference else None
        after = basis.perf if basis else None
        rows.append((
            f"[{prose(device.name)}]({device.slug}/README.md)",
            f"**{names(shipping.enable)}**" if basis else "nothing: see the report",
            f"**{ratio(after)}**" if after else NOTHING,
            _speeds(before, after),
            _change(before and memory(before.peak_memory_bytes), after and memory(after.peak_memory_bytes)),
            basis.verdict.level.value if basis else NOTHING,
            setting(newest),
            prose(newest.finished_at),
        ))  # fmt: skip
    body = table(header, rows, numeric=(2, 3, 4)) if rows else "No records yet: `make bench` makes them."
    how = (
        "`python -m loop.train --data my.jsonl` switches on what `shipping.toml` allows for the device that it runs on. "
        "Arrows go from the reference to what ships; verdicts belong to a device and do not carry over to another."
    )
    gate = "\n[The gate itself](gate/README.md): what it catches, what it lets through, and every arm gated in full.\n"
    code_of = "\n[What the kernels compile to](cross_compile/README.md), for GPUs that need not be here: no word on speed.\n"
    others = (gate if gated else "") + (code_of if compiled else "")
    return f"<!-- {MARK} -->\n# What ships where\n\n{body}\n\n{how}\n\n{LEGEND}\n{others}"


def _speeds(before: Perf | None, after: Perf | None) -> str:
    """Real tokens a second of the reference and of what ships. The reference's is that of the same turns, so that the
    arrow and the ratio say the same; its own row may be of quieter or busier minutes."""
    if after is None:
        return _change(before and per_second(before.real_tokens_per_s), None)
    return _change(per_second(after.real_tokens_per_s / after.ratio), per_second(after.real_tokens_per_s))


def _change(before: str | None, after: str | None) -> str:
    return " → ".join(value for value in (before, after) if value) or NOTHING


def _headline(device: Device, shipping: Shipping) -> str:
    basis = shipping.basis
    if basis is None:
        return "> **Nothing ships here yet.** The table says why; train with the reference, which is the default."
    before, after = device.reference.perf if device.reference else None, basis.perf
    change = _speeds(before, after)
    used = _change(before and memory(before.peak_memory_bytes), memory(after.peak_memory_bytes))
    return (
        f"> **Switch on {names(shipping.enable)}: {ratio(after)} the reference's speed, lossless"
        f" ({basis.verdict.level.value}).** {change} real tok/s, peak memory {used}.\n>\n"
        "> `python -m loop.train --data my.jsonl` does so on this device, from [shipping.toml](shipping.toml)."
    )


def _decisions(device: Device, shipping: Shipping) -> str:
    header = (
        "optimization", "exactness claimed", "verdict", "decided by", "speed ratio", "real tok/s", "peak memory", "ships?",
    )  # fmt: skip
    chosen = [record for record in device.current if record.role in ("optimization", "negative", "combination")]
    chosen.sort(key=lambda record: _rank(record, shipping))
    rows = [_decision(record, shipping) for record in chosen]
    return table(header, rows, numeric=(4, 5, 6)) if rows else "This run had no optimization."


def _rank(record: Record, shipping: Shipping) -> tuple:
    """What ships first, then the timed by speed, then the rest by verdict."""
    speed = record.perf.ratio if record.perf else 0.0
    level = 0 if record.perf else 1 + ORDER.index(record.verdict.level)
    return record is not shipping.basis, not ships(record, shipping), level, -speed


def ships(record: Record, shipping: Shipping) -> bool:
    """Whether an arm is what ships, or an optimization that is part of it."""
    part = record.role == "optimization" and bool(record.optimizations)
    return record is shipping.basis or (part and set(record.optimizations) <= set(shipping.enable))


def _decision(record: Record, shipping: Shipping) -> tuple[str, ...]:
    perf, bold = record.perf, "**" if ships(record, shipping) else ""
    members = f" ({names(record.optimizations)})" if record.role == "combination" else ""
    untimed = "not timed" if record.verdict.level.lossless else NOTHING
    return (
        f"{bold}{link(record.arm)}{bold}{members}",
        prose(record.exactness.upper()),
        f"{bold}{record.verdict.level.value}{bold}",
        decided_by(record),
        f"{bold}{ratio(perf)}{bold}" if perf else untimed,
        per_second(perf.real_tokens_per_s) if perf else NOTHING,
        memory(perf.peak_memory_bytes) if perf else NOTHING,
        ("**yes**: " if bold else "no: ") + prose(shipping.reasons[record.arm]),
    )


def decided_by(record: Record) -> str:
    """The check that decided, its number beside its limit: the worst that failed, else the one closest to its limit."""
    checks = record.verdict.checks
    failed = [check for check in checks if not check.passed]
    measured = [check for check in checks if check.value is not None and check.limit is not None]
    worst = max(failed or measured, key=_strain, default=None)
    if worst is None:
        return prose(record.verdict.reason)
    limit = "" if worst.limit is None else f", limit {number(worst.limit)}"
    return f"{prose(worst.name)}: {number(worst.value)}{limit}"


def _strain(check: Check) -> float:
    """How much of its limit a check used up; what is not a number comes first among failures and last among passes."""
    if check.value is None or check.limit is None or check.value != check.value:
        return -1.0 if check.passed else float("inf")
    if check.passed and abs(check.value) > abs(check.limit):
        return 0.0  # a number that had to reach its limit, so nearness says nothing
    return abs(check.value) / abs(check.limit) if check.limit else float(check.value != 0)


def _others(device: Device) -> str:
    header = ("arm", "role", "verdict", "speed ratio", "real tok/s", "peak memory", "what it is")
    rows = [
        (
            link(record.arm),
            record.role,
            record.verdict.level.value,
            ratio(record.perf) if record.perf and record.role != "reference" else NOTHING,
            per_second(record.perf.real_tokens_per_s) if record.perf else NOTHING,
            memory(record.perf.peak_memory_bytes) if record.perf else NOTHING,
            prose(record.summary if record.verdict.level.lossless else f"{record.summary}: {record.verdict.reason}"),
        )
        for record in device.current
        if record.role in ("reference", "repeat", "peer")
    ]
    return table(header, rows, numeric=(3, 4, 5)) if rows else "This run recorded no reference and no peer."


def _throughput(device: Device) -> str:
    header = (
        "arm", "**real tokens/s**", "positions/s", "supervised tokens/s", "micro-step", "peak memory", "MFU", "launches",
    )  # fmt: skip
    rows = [
        (
            link(record.arm),
            f"**{per_second(perf.real_tokens_per_s)}**",
            per_second(perf.positions_per_s),
            per_second(perf.supervised_tokens_per_s),
            f"{number(perf.micro_step_ms, 4)} ms",
            memory(perf.peak_memory_bytes),
            percent(perf.mfu),
            NOTHING if perf.launches is None else f"{perf.launches:,}",
        )
        for record in device.current
        if (perf := record.perf) is not None
    ]
    untimed = [
        f"- {link(record.arm)}: {why_untimed(record)}"
        for record in device.current
        if record.perf is None and record.verdict.level.lossless
    ]
    parts = [table(header, rows, numeric=range(1, 8)) if rows else "", "\n".join(untimed)]
    note = "Real tokens leave out padding; MFU is of the measured matrix rate; launches are device kernels a micro-step."
    return "\n\n".join(part for part in (*parts, note if rows else "") if part)


def _counts(device: Device) -> str:
    gated = [record for record in device.current if record.role not in BASELINES]
    levels = [f"{count} {level.value}" for level in ORDER if (count := sum(r.verdict.level is level for r in gated))]
    timed = sum(record.perf is not None for record in gated)
    return f"{len(gated)} arms beside the reference: {', '.join(levels) or 'none'}; {timed} timed."


def _earlier(device: Device) -> str:
    parts = []
    if device.earlier:
        header = ("arm", "run", "finished", "verdict", "speed ratio in that run", "real tok/s")
        rows = [
            (
                link(record.arm),
                code(record.run_id),
                prose(record.finished_at),
                record.verdict.level.value,
                ratio(record.perf) if record.perf else NOTHING,
                per_second(record.perf.real_tokens_per_s) if record.perf else NOTHING,
            )
            for record in device.earlier
        ]
        words = "Not in the newest run, so not comparable with the tables above and not shipped:"
        parts.append(f"{words}\n\n{table(header, rows, numeric=(4, 5))}")
    if device.older:
        counts = ", ".join(f"{code(arm)} {count}" for arm, count in device.older.items())
        parts.append(f"Older records, superseded and not shown: {counts}.")
    return "\n\n".join(["## Earlier runs", *parts]) if parts else ""
