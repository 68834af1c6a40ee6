"""Which optimizations ship on a device, and `shipping.toml`, the file that says so.

The file is TOML. Top-level keys:

    schema       2
    device_slug  the device's folder name under reports/
    device       its name in words
    [[setting]]  one table for each thing that was trained on the device:
        model, method, dtype   as in the recipe ("" where the record does not say)
        pack_length            tokens of a pack (left out where the record does not say)
        supervise              as `data.supervise`; left out where it is the default, the assistant's tokens
        rank                   of LoRA's adapters (left out for full fine-tuning and where the record does not say)
        run_id                 the run whose records decided
        enable                 the optimizations to switch on, all of them together; may be empty
        [setting.not_enabled]  every other optimization of that run = why not, in words

`enable` is what was gated and timed *together*: the fastest lossless combination whose gain is real, or the fastest single
optimization. The answer of `bench.search` goes before all that was measured earlier in its run, since it was timed in turn
with sets of that, where ratios to stock of several commands drift apart. A gain is real when the whole 95 % interval of the
speed ratio lies above 1, and above the whole interval of the reference timed against itself anywhere in the same run: equal
arms of one machine can come out that far apart, and their median is near 1 by luck as often as not. What lies in
`negative_results/` never ships, whatever it measures. Nor does what was let through as a whole, but whose op was not by the
microbenchmark's op check: that one sees values that a model's own weights may not lead to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from abtest.verdict import Level
from bench.records import Record
from bench.report import text
from bench.report.devices import Device, newest_by_arm
from bench.report.settings import BASELINES, Trained, beside, reference_of
from loop.shipping import ASSISTANT

SCHEMA = 2
SEARCH = "search"  # the arm that a search which came to its end has answered with
PARTIAL_SEARCH = "partial_search"  # one that did not, was among some names or began with a set: a combination as any other


@dataclass(frozen=True)
class Shipping:
    """enable: what to switch on. basis: the record that was measured with exactly that on, None if nothing ships.

    reasons: per arm of the run, why it ships or does not. not_enabled: per optimization that stays off, why.
    """

    enable: tuple[str, ...]
    basis: Record | None
    reasons: dict[str, str]
    not_enabled: dict[str, str]


@dataclass(frozen=True)
class _Run:
    """One run, oldest record first. bad_reference: why none of its arms can be trusted, or None."""

    records: tuple[Record, ...]
    current: tuple[Record, ...]  # the newest of each arm
    floor: float
    bad_reference: str | None

    def stock_recipe(self, record: Record) -> dict:
        """The recipe of the stock beside `record`, which another command of the run may not share."""
        stock = reference_of(record, self.records)
        return stock.recipe if stock else record.recipe


def decide(run: Sequence[Record]) -> Shipping:
    """The decision for one run: its records on one device in one setting, oldest first. The newest of each arm counts."""
    current = tuple(newest_by_arm(run).values())
    whole = _Run(tuple(run), current, timing_floor(run), _bad_reference(run, current))
    basis = _basis(whole)
    enable = () if basis is None else basis.optimizations
    reasons = {record.arm: _reason(record, basis, whole) for record in current if record.role not in BASELINES}
    not_enabled = {}
    for record in current:
        if record.role in ("optimization", "negative"):
            not_enabled.update({name: reasons[record.arm] for name in _switched(record) if name not in enable})
    for record in current:
        if record.role == "combination":
            for name in record.optimizations:
                if name not in enable:
                    not_enabled.setdefault(name, f"measured only within {record.arm}, which does not ship")
    return Shipping(enable, basis, reasons, not_enabled)


def _switched(record: Record) -> tuple[str, ...]:
    return record.optimizations or (record.arm,)  # an arm that could not run may have switched nothing on


def _basis(run: _Run) -> Record | None:
    """The fastest of what may ship; a single optimization wins a tie."""
    if run.bad_reference:
        return None
    singles = [record for record in run.current if record.role == "optimization" and _obstacle(record, run) is None]
    combinations = [record for record in run.current if record.role == "combination" and _obstacle(record, run) is None]
    able = [record for record in (*singles, *combinations) if not _searched(record, run)]
    return max(able, key=lambda record: record.perf.ratio, default=None)


def _searched(record: Record, run: _Run) -> bool:
    """Whether a search that may ship was measured later in the run, and so chose among what `record` is made of."""
    order = [id(one) for one in run.records]
    answers = [one for one in run.current if one.arm == SEARCH and one.role == "combination" and _obstacle(one, run) is None]
    return any(order.index(id(record)) < order.index(id(answer)) for answer in answers)


def _bad_reference(run: Sequence[Record], current: Sequence[Record]) -> str | None:
    """What is wrong with stock beside any arm that counts."""
    for record in current:
        for stock in beside(record, run) if record.role not in BASELINES else ():
            if not stock.verdict.level.lossless:
                return f"the reference itself is {stock.verdict.level.value}: {stock.verdict.reason}"
    return None


def _obstacle(record: Record, run: _Run) -> str | None:
    """Why an arm may not ship whatever the others do, or None."""
    level = record.verdict.level
    if not level.lossless:
        return f"{level.value}: {record.verdict.reason}"
    op = _bad_op(record)
    if op is not None:
        return f"{level.value} as a whole, but its op is {op}: {(record.micro or {}).get('reason') or 'no reason is given'}"
    if record.recipe != run.stock_recipe(record):
        ratio = f" and {text.ratio(record.perf)}" if record.perf else ""
        return f"{level.value}{ratio}, but beside stock of another recipe; its page says which"
    if record.role == "combination":
        for other in run.current:
            bad = _bad_op(other) if other.verdict.level.lossless else other.verdict.level.value
            if bad and other.role == "optimization" and set(_switched(other)) & set(record.optimizations):
                return f"{level.value}, but {other.arm} alone is {bad}"
    if record.perf is None:
        return f"not timed here: {record.untimed or 'the record gives no reason'}"
    if not record.perf.ratio_low > run.floor:  # a ratio that is not a number ends here too
        worse = "slower" if record.perf.ratio_high < 1.0 else "no measurable gain"
        beside = f"; the reference against itself reaches {run.floor:.3f}" if run.floor > 1.0 else ""
        return f"lossless but {worse}: ratio {text.ratio(record.perf)}{beside}"
    return None


def _bad_op(record: Record) -> str | None:
    """The level of an optimization's op in its microbenchmark, if that is none to ship with."""
    level = (record.micro or {}).get("level")
    return level if level in (Level.APPROX.value, Level.FAILED.value, Level.INVALID.value) else None


def timing_floor(run: Sequence[Record]) -> float:
    """What a ratio's lower end must exceed: 1, or how far from 1 equal arms' interval reaches in any command."""
    floor = 1.0
    for record in run:
        if record.role == "repeat" and record.perf is not None:
            floor = max(floor, record.perf.ratio_high, 1.0 / record.perf.ratio_low)
    return floor


def _reason(record: Record, basis: Record | None, run: _Run) -> str:
    level = record.verdict.level
    if record.role == "peer":
        return "a peer, for comparison only"
    obstacle = run.bad_reference or _obstacle(record, run)
    if record.role == "negative":
        words = f"{level.value} and {text.ratio(record.perf)}" if record.perf else level.value
        return obstacle or f"{words}, but a negative result; move its folder to kernels/ and measure again to ship it"
    if basis is None or record is basis:
        return obstacle or f"the fastest that is lossless, {text.ratio(record.perf)}"
    if record.role == "optimization" and set(record.optimizations) <= set(basis.optimizations):
        return f"part of {basis.arm}, measured together"
    if obstacle:
        return obstacle
    words = f"{level.value} and {text.ratio(record.perf)}"
    if _searched(record, run):
        return f"{words}, but the search timed sets of what passed in turn and found a faster one"
    return f"{words}, but {basis.arm} is faster and they were not measured together"


def to_toml(device: Device, decisions: Iterable[Shipping]) -> str:
    """The text of `shipping.toml`: one decision for each of the device's settings, in their order."""
    lines = [f"# {text.MARK}", f"schema = {SCHEMA}", *_pairs({"device_slug": device.slug, "device": device.name})]
    for setting, shipping in zip(device.settings, decisions, strict=True):
        lines += ["", *_setting(setting.trained, setting.run_id, shipping)]
    return "\n".join(lines) + "\n"


def _setting(trained: Trained, run_id: str, shipping: Shipping) -> list[str]:
    length = [] if trained.pack_length is None else [f"pack_length = {trained.pack_length}"]
    rank = [] if trained.rank is None else [f"rank = {trained.rank}"]
    targets = {} if trained.supervise == ASSISTANT else {"supervise": trained.supervise}
    return [
        "[[setting]]",
        *_pairs({"model": trained.model, "method": trained.method}), *rank, *length,
        *_pairs({"dtype": trained.dtype} | targets | {"run_id": run_id}),
        f"enable = [{', '.join(quoted(name) for name in shipping.enable)}]",
        "",
        "[setting.not_enabled]",
        *(f"{quoted(name)} = {quoted(reason)}" for name, reason in sorted(shipping.not_enabled.items())),
    ]  # fmt: skip


def _pairs(values: Mapping[str, str]) -> list[str]:
    return [f"{key} = {quoted(value)}" for key, value in values.items()]


def quoted(value: str) -> str:
    """A TOML basic string: JSON's escapes are all TOML's, except that TOML also wants DEL escaped."""
    value = value.encode("utf-8", "replace").decode("utf-8")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
