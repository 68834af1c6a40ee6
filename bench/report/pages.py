"""One arm's page: its verdict, its loss beside the reference's, every check beside its limit, and its speed."""

from __future__ import annotations

from abtest.verdict import Check
from bench.records import Record
from bench.report.micro import micro_section
from bench.report.text import (
    MARK,
    NOTHING,
    code,
    facts,
    launches_saved,
    memory,
    names,
    number,
    page_name,
    per_second,
    percent,
    prose,
    ratio,
    scalar,
    setting_words,
    shell,
    table,
    timed_all_the_same,
    update,
)

PEER_TIME = (
    "**The gate did not pass, and this is no time to ship by**: it is a peer's, which has to be beaten whatever it does."
)
SIGMA = "σ is the standard deviation of the loss at that step over perturbed references: the noise floor."


def arm_page(
    record: Record, stock: Record | None, device: str, newest_run: str, older: int, ships: str | None, plotted: bool
) -> str:
    """Markdown of one arm. `stock`: the reference beside it, None where it is unknown. `ships`: why it ships or does not,
    None for the reference; `older`: superseded records."""
    sections = [
        f"<!-- {MARK} -->\n# {code(record.arm)} on {prose(device)}",
        _verdict(record, ships),
        _history(record, newest_run, older),
        facts_of(record),
        _peer(record),
        "## Loss" if plotted else "",
        f"![Loss of {page_name(record.arm)} and of the reference by step]({page_name(record.arm)}.png)" if plotted else "",
        SIGMA if plotted and any(record.noise_sigma) else "",
        "## Checks\n\n" + checks(record),
        "## Speed\n\n" + speed(record, stock),
        micro_section(record.micro) if record.micro else "",
        "## Notes\n\n" + "\n".join(f"- {prose(note)}" for note in record.notes) if record.notes else "",
        "## Where it comes from\n\n" + _provenance(record),
        "[All arms of this run](README.md)",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _verdict(record: Record, ships: str | None) -> str:
    level = record.verdict.level
    words = "lossless" if level.lossless else "not run here" if level.value == "NOT_RUN" else "not lossless"
    lines = [f"> **{level.value}** ({words}): {prose(record.verdict.reason)}"]
    if ships is not None:
        lines.append(f"> Ships here: {ships}")
    return "\n>\n".join(lines)


def _history(record: Record, newest_run: str, older: int) -> str:
    parts = []
    if record.run_id != newest_run:
        parts.append(f"This arm is not in the newest run, {code(newest_run)}: its numbers are from {code(record.run_id)}.")
    if older:
        parts.append(f"{older} older {'record' if older == 1 else 'records'} of this arm not shown.")
    return " ".join(parts)


def facts_of(record: Record) -> str:
    rows = [
        ("what it does", prose(record.summary) or NOTHING),
        ("switched on", names(record.optimizations) or NOTHING),
        ("exactness claimed", prose(record.exactness.upper()) or NOTHING),
        ("why exact", prose(record.why_exact) or NOTHING),
        ("trained", setting_words(record) or NOTHING),
        ("implementations that ran", scalar("paths", record.environment.get("paths"))),
    ]
    return table(("", ""), rows)


def _peer(record: Record) -> str:
    """What ran, of somebody else's code: versions, path, device kernels."""
    peer = record.environment.get("peer")
    if record.role != "peer" or not isinstance(peer, dict):
        return ""
    kernels = peer.get("kernels")
    parts = ["## What ran", facts({key: value for key, value in peer.items() if key != "kernels" and value})]
    if isinstance(kernels, dict) and kernels:
        rows = [(code(str(name)), str(count)) for name, count in kernels.items()]
        parts.append(f"Device kernels of a micro-step in the gate:\n\n{table(('kernel', 'launches'), rows, numeric=(1,))}")
    return "\n\n".join(part for part in parts if part)


def checks(record: Record) -> str:
    """Every check of the gate: its number beside its limit, whether it passed, and what was worst."""
    if not record.verdict.checks:
        return f"No check was made: {prose(record.verdict.reason)}"
    rows = [
        (prose(check.name), number(check.value), number(check.limit), passed(check), prose(check.detail) or NOTHING)
        for check in record.verdict.checks
    ]
    return table(("check", "value", "limit", "", "worst"), rows, numeric=(1, 2))


def passed(check: Check) -> str:
    return "pass" if check.passed else "**FAIL**"


def _raced(record: Record) -> list[tuple[str, str]]:
    if record.race is None:
        return []
    words = f"it takes {ratio(record.race)} as long, {record.race.blocks} blocks in turn"
    if record.race.peer_ms is not None and record.race.own_ms is not None:
        words += f", {number(record.race.peer_ms, 4)} and {number(record.race.own_ms, 4)} ms a micro-step"
    return [(f"beside {code(record.race.arm)}", words)]


def speed(record: Record, stock: Record | None = None) -> str:
    perf = record.perf
    if perf is None:
        return why_untimed(record)
    note = PEER_TIME if timed_all_the_same(record) else ""
    compared = "it is the reference" if record.role == "reference" else ratio(perf)
    rows = [
        ("speed ratio to the reference, 95 % interval", f"{compared}, {perf.blocks} blocks"),
        *_raced(record),
        ("real tokens/s", f"**{per_second(perf.real_tokens_per_s)}**"),
        ("positions/s", per_second(perf.positions_per_s)),
        ("supervised tokens/s", per_second(perf.supervised_tokens_per_s)),
        ("micro-step", f"{number(perf.micro_step_ms, 4)} ms"),
        *([] if perf.update_ms is None else [("update of the weights", update(perf, record.role != "reference"))]),
        ("peak memory", memory(perf.peak_memory_bytes)),
        ("MFU, of the measured matrix rate", percent(perf.mfu)),
        ("kernel launches a micro-step", _launches(record, stock)),
    ]
    return table(("", ""), rows) + (f"\n\n{note}" if note else "")


def _launches(record: Record, stock: Record | None) -> str:
    saved = launches_saved(record, stock)
    if saved is None or stock is None:
        return NOTHING if record.perf.launches is None else f"{record.perf.launches:,}"
    words = f"{saved:,} fewer than" if saved > 0 else f"{-saved:,} more than" if saved else "as many as"
    return f"{record.perf.launches:,}, {words} the reference's {stock.perf.launches:,}"


def why_untimed(record: Record) -> str:
    if not record.verdict.level.lossless and record.untimed is None:
        return "No time: what did not pass its gate is not timed."
    return f"Not timed: {prose(record.untimed or 'the record gives no reason.')}"


def _provenance(record: Record) -> str:
    return f"Run {code(record.run_id)}, finished {prose(record.finished_at)}.\n\n```sh\n{shell(record.command)}\n```"
