"""The page of one setting on one device: what to ship, readable in a minute, and what that rests on."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from abtest.verdict import Check, Level
from bench.records import Perf, Record
from bench.report.devices import Device, Setting
from bench.report.micro import micro_cell
from bench.report.pages import why_untimed
from bench.report.settings import BASELINES
from bench.report.shipping import Shipping
from bench.report.text import (
    MARK,
    NOTHING,
    code,
    dtype,
    facts,
    launches_saved,
    link,
    memory,
    names,
    number,
    per_second,
    percent,
    prose,
    ratio,
    setting_words,
    shell,
    table,
    timed_all_the_same,
    update,
)
from loop.config import DataConfig, LoraConfig

ORDER = list(Level)
LEGEND = """\
- **BITWISE**: losses, gradients, weights, optimizer and random state have the reference's bits.
- **ROUNDING**: the same function in another order of operations; inside the noise floor of the reference itself.
- **APPROX**, **FAILED**, **INVALID**, **NOT_RUN**: not lossless, or not shown to be. Such an arm is never timed.
- The speed ratio is the reference's time over the arm's, timed in turn; in brackets its 95 % interval.
- An optimization ships if it is lossless and the whole interval is above 1 and above all that the interval of the
  reference beside itself reaches."""
BUT_PEERS = " A peer is all the same: it never ships, and has to be beaten whatever it does."
UPDATES = (
    " A step has one update of the weights, which no other column holds: what it adds to a micro-step before it, timed "
    "in turn with stock's."
)
UPDATES_ALONE = " By itself it began on a device at rest, and on a GPU is what the host takes to launch it."
COLUMNS = """\
- Decided by: the gate's check that came closest to its limit, or failed by most; each arm's page has them all.
- Micro: the op on its own, forward and backward, over PyTorch's, and the largest part of the hardware limit that it reaches.
- Launches saved: device kernels a micro-step, of as many as the reference launches.
- Peak memory: on a GPU the most that tensors take in a micro-step, or what stays with the process between two, pools of CUDA
  graphs included, if that is more; on a CPU the resident memory of the process."""


def setting_page(device: Device, setting: Setting, shipping: Shipping, plotted: bool, floor: bool = False) -> str:
    """Markdown of a setting's README.md, which is the device's where it has no other setting. floor: whether it has a
    roofline page."""
    stock = setting.reference or setting.newest  # an arm may have had a recipe of its own
    several = len(device.settings) > 1
    dirty = any(record.environment.get("git_dirty") for record in setting.run)
    sections = [
        f"<!-- {MARK} -->\n# {prose(device.name)}" + (f": {setting_words(stock)}" if several else ""),
        headline(setting, shipping, "../shipping.toml" if several else "shipping.toml"),
        f"{setting_words(stock)} · run {code(setting.run_id)}, finished {prose(setting.newest.finished_at)}",
        "**Measured from a working tree with uncommitted changes.**" if dirty else "",
        "![Speed of every timed arm over the reference's](overview.png)" if plotted else "Nothing was timed in this run.",
        "## What to switch on",
        _decisions(setting, shipping),
        f"{COLUMNS}\n{legend(setting.current)}",
        "## Reference and peers",
        _others(setting),
        "## Throughput and memory",
        _throughput(setting),
        "[The floor of a step](roofline.md): what the hardware allows, part by part, and what that predicts."
        if floor
        else "",
        "## The run\n\n" + _counts(setting),
        "```sh\n" + "\n".join(shell(command) for command in setting.commands) + "\n```",
        facts({key: value for key, value in stock.recipe.items() if value is not None}),
        "## Data\n\n" + facts(stock.data) if stock.data else "",
        "## Environment\n\n"
        + facts({key: value for key, value in setting.newest.environment.items() if key not in ("paths", "peer")}),
        _earlier(setting),
        "[What else was trained on this device](../README.md)" if several else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def legend(shown: Iterable[Record]) -> str:
    """What the levels mean, and of peers what their times mean where one of `shown` has a time that it did not pass for."""
    never = "is never timed."
    return LEGEND.replace(never, never + BUT_PEERS) if any(map(timed_all_the_same, shown)) else LEGEND


def train_command(setting: Setting) -> str:
    """The command that trains in this setting."""
    trained, recipe = setting.trained, (setting.reference or setting.newest).recipe
    words = ["--model", trained.model] if trained.model else []
    words += ["--method", "full"] if trained.method == "full" else []
    usual = {"cpu": "float32", "cuda": "bfloat16"}.get(str(recipe.get("device")))  # what --dtype auto is there
    words += ["--dtype", trained.dtype] if trained.dtype not in ("", usual) else []
    length = trained.pack_length
    words += ["--data.pack-length", str(length)] if length not in (None, DataConfig().pack_length) else []
    words += ["--data.supervise", trained.supervise] if trained.supervise != DataConfig().supervise else []
    words += _lora(recipe.get("lora")) if trained.rank is not None else []
    return shlex.join(["python", "-m", "loop.train", *words, "--data", "my.jsonl"])


def _lora(lora: Mapping[str, Any]) -> list[str]:
    """Rank and scale of the adapters, where they are not the usual ones."""
    usual = vars(LoraConfig())
    given = [(name, lora.get(name)) for name in ("rank", "alpha")]
    return [word for name, value in given if value not in (None, usual[name]) for word in (f"--lora.{name}", f"{value:g}")]


def _speeds(before: Perf | None, after: Perf | None) -> str:
    """Real tokens a second of the reference and of what ships. The reference's is that of the same turns, so that the
    arrow and the ratio say the same; its own row may be of quieter or busier minutes."""
    if after is None:
        return _change(before and per_second(before.real_tokens_per_s), None)
    return _change(per_second(after.real_tokens_per_s / after.ratio), per_second(after.real_tokens_per_s))


def _change(before: str | None, after: str | None) -> str:
    return " → ".join(value for value in (before, after) if value) or NOTHING


def headline(setting: Setting, shipping: Shipping, toml: str) -> str:
    """What to switch on and what it buys, as a quotation; `toml`: where `shipping.toml` is from here."""
    basis = shipping.basis
    if basis is None:
        return "> **Nothing ships here yet.** The decision table says why; train with the reference, which is the default."
    change, used = change_of(setting, basis)
    return (
        f"> **Switch on {names(shipping.enable)}: {ratio(basis.perf)} the reference's speed, lossless"
        f" ({basis.verdict.level.value}).** {change} real tok/s, peak memory {used}.\n>\n"
        f"> {code(train_command(setting))} does so on this device, from [shipping.toml]({toml})."
    )


def change_of(setting: Setting, basis: Record | None) -> tuple[str, str]:
    """Real tokens a second and peak memory, from the reference to what ships; of the reference alone if nothing does."""
    before, after = setting.reference.perf if setting.reference else None, basis.perf if basis else None
    used = _change(before and memory(before.peak_memory_bytes), after and memory(after.peak_memory_bytes))
    return _speeds(before, after), used


def _decisions(setting: Setting, shipping: Shipping) -> str:
    header = (
        "optimization", "claim", "verdict", "decided by", "micro", "speed ratio", "real tok/s", "peak memory",
        "launches saved", "ships?",
    )  # fmt: skip
    chosen = [record for record in setting.current if record.role in ("optimization", "negative", "combination")]
    chosen.sort(key=lambda record: _rank(record, shipping))
    rows = [_decision(record, setting, shipping) for record in chosen]
    return table(header, rows, numeric=range(4, 9)) if rows else "This run had no optimization."


def _rank(record: Record, shipping: Shipping) -> tuple:
    """What ships first, then the timed by speed, then the rest by verdict."""
    speed = record.perf.ratio if record.perf else 0.0
    level = 0 if record.perf else 1 + ORDER.index(record.verdict.level)
    return record is not shipping.basis, not ships(record, shipping), level, -speed


def ships(record: Record, shipping: Shipping) -> bool:
    """Whether an arm is what ships, or an optimization that is part of it."""
    part = record.role == "optimization" and bool(record.optimizations)
    return record is shipping.basis or (part and set(record.optimizations) <= set(shipping.enable))


def _decision(record: Record, setting: Setting, shipping: Shipping) -> tuple[str, ...]:
    perf, bold = record.perf, "**" if ships(record, shipping) else ""
    members = f" ({names(record.optimizations)})" if record.role == "combination" else ""
    untimed = "not timed" if record.verdict.level.lossless else NOTHING
    return (
        f"{bold}{link(record.arm)}{bold}{members}",
        prose(record.exactness.upper()),
        f"{bold}{record.verdict.level.value}{bold}",
        decided_by(record),
        micro_cell(record.micro, dtype(record)),
        f"{bold}{ratio(perf)}{bold}" if perf else untimed,
        per_second(perf.real_tokens_per_s) if perf else NOTHING,
        memory(perf.peak_memory_bytes) if perf else NOTHING,
        _saved(record, setting),
        ("**yes**: " if bold else "no: ") + prose(shipping.reasons[record.arm]),
    )


def _saved(record: Record, setting: Setting) -> str:
    stock = setting.stock_of(record)
    saved = launches_saved(record, stock)
    return NOTHING if saved is None else f"{saved:,} of {stock.perf.launches:,}".replace("-", "−")


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


def _others(setting: Setting) -> str:
    header = ("arm", "role", "verdict", "speed ratio", "real tok/s", "peak memory", "what it is")
    rows = [
        (
            link(record.arm),
            record.role,
            record.verdict.level.value,
            ratio(record.perf) if record.perf and record.role != "reference" else NOTHING,
            per_second(record.perf.real_tokens_per_s) if record.perf else NOTHING,
            memory(record.perf.peak_memory_bytes) if record.perf else NOTHING,
            _words(record, setting),
        )
        for record in (*setting.baselines, *(record for record in setting.current if record.role == "peer"))
    ]
    return table(header, rows, numeric=(3, 4, 5)) if rows else "This run recorded no reference and no peer."


def _words(record: Record, setting: Setting) -> str:
    found = f"{record.verdict.level.value}: " if timed_all_the_same(record) else ""
    words = record.summary if record.verdict.level.lossless else f"{record.summary}: {found}{record.verdict.reason}"
    which = f"command {setting.commands.index(record.command) + 1}: " if len(setting.commands) > 1 else ""
    return which + prose(words)


def _throughput(setting: Setting) -> str:
    timed = [record for record in setting.current if record.perf is not None]
    updates = any(record.perf.update_ms is not None for record in timed)
    header = (
        "arm", "**real tokens/s**", "positions/s", "supervised tokens/s", "micro-step", *(["update"] if updates else []),
        "peak memory", "MFU", "launches",
    )  # fmt: skip
    untimed = [
        f"- {link(record.arm)}: {why_untimed(record)}"
        for record in setting.current
        if record.perf is None and record.verdict.level.lossless
    ]
    rows = [_speed(record, updates) for record in timed]
    parts = [table(header, rows, numeric=range(1, len(header))) if rows else "", "\n".join(untimed)]
    note = "Real tokens leave out padding; MFU is of the measured matrix rate; launches are device kernels a micro-step."
    if updates:
        note += UPDATES
        alone = any(record.perf.update_ms is not None and not record.perf.update_in_step for record in timed)
        note += UPDATES_ALONE if alone else ""
    return "\n\n".join(part for part in (*parts, note if rows else "") if part)


def _speed(record: Record, updates: bool) -> tuple[str, ...]:
    perf = record.perf
    return (
        link(record.arm) + (f" ({record.role}, {record.verdict.level.value})" if timed_all_the_same(record) else ""),
        f"**{per_second(perf.real_tokens_per_s)}**",
        per_second(perf.positions_per_s),
        per_second(perf.supervised_tokens_per_s),
        f"{number(perf.micro_step_ms, 4)} ms",
        *([update(perf, record.role != "reference")] if updates else []),
        memory(perf.peak_memory_bytes),
        percent(perf.mfu),
        NOTHING if perf.launches is None else f"{perf.launches:,}",
    )


def _counts(setting: Setting) -> str:
    gated = [record for record in setting.current if record.role not in BASELINES]
    levels = [f"{count} {level.value}" for level in ORDER if (count := sum(r.verdict.level is level for r in gated))]
    timed = sum(record.perf is not None for record in gated)
    how = f" {len(setting.commands)} commands, numbered from the top:" if len(setting.commands) > 1 else ""
    return f"{len(gated)} arms beside the reference: {', '.join(levels) or 'none'}; {timed} timed.{how}"


def _earlier(setting: Setting) -> str:
    parts = []
    if setting.earlier:
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
            for record in setting.earlier
        ]
        words = "Not in the newest run, so not comparable with the tables above and not shipped:"
        parts.append(f"{words}\n\n{table(header, rows, numeric=(4, 5))}")
    if setting.older:
        counts = ", ".join(f"{code(arm)} {count}" for arm, count in setting.older.items())
        parts.append(f"Older records, superseded and not shown: {counts}.")
    return "\n\n".join(["## Earlier runs", *parts]) if parts else ""
