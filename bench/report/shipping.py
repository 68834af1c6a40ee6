"""Which optimizations ship on a device, and `shipping.toml`, the file that says so.

The file is TOML. Top-level keys:

    schema       1
    device_slug  the device's folder name under reports/
    device       its name in words
    model, method, dtype   what was trained when it was measured ("" where the record does not say)
    run_id       the run whose records decided
    enable       the optimizations to switch on, all of them together; may be empty
    [not_enabled]          every other optimization of that run = why not, in words

`enable` is what was gated and timed *together*: the fastest lossless combination whose gain is real, or the fastest single
optimization. A gain is real when the whole 95 % interval of the speed ratio lies above 1, and above what the reference
timed against itself reaches in the same run. What lies in `negative_results/` never ships, whatever it measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.records import Record
from bench.report import text

SCHEMA = 1
BASELINES = ("reference", "repeat")


@dataclass(frozen=True)
class Shipping:
    """enable: what to switch on. basis: the record that was measured with exactly that on, None if nothing ships.

    reasons: per arm of the run, why it ships or does not. not_enabled: per optimization that stays off, why.
    """

    enable: tuple[str, ...]
    basis: Record | None
    reasons: dict[str, str]
    not_enabled: dict[str, str]


def decide(current: Sequence[Record]) -> Shipping:
    """The decision for one run. `current` holds one record an arm, all of the same run and device."""
    basis = _basis(current)
    enable = () if basis is None else basis.optimizations
    reasons = {record.arm: _reason(record, basis, current) for record in current if record.role not in BASELINES}
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


def _basis(current: Sequence[Record]) -> Record | None:
    """The fastest of what may ship; a single optimization wins a tie."""
    if _bad_reference(current):
        return None
    singles = [record for record in current if record.role == "optimization" and _obstacle(record, current) is None]
    combinations = [record for record in current if record.role == "combination" and _obstacle(record, current) is None]
    return max((*singles, *combinations), key=lambda record: record.perf.ratio, default=None)


def _bad_reference(current: Sequence[Record]) -> str | None:
    for record in current:
        if record.role in BASELINES and not record.verdict.level.lossless:
            return f"the reference itself is {record.verdict.level.value}: {record.verdict.reason}"
    return None


def _obstacle(record: Record, current: Sequence[Record]) -> str | None:
    """Why an arm may not ship whatever the others do, or None."""
    level = record.verdict.level
    if not level.lossless:
        return f"{level.value}: {record.verdict.reason}"
    if record.recipe != _recipe_of_stock(record, current):
        ratio = f" and {text.ratio(record.perf)}" if record.perf else ""
        return f"{level.value}{ratio}, but beside stock of another recipe; its page says which"
    if record.role == "combination":
        for other in current:
            bad = other.role == "optimization" and not other.verdict.level.lossless
            if bad and set(_switched(other)) & set(record.optimizations):
                return f"{level.value}, but {other.arm} alone is {other.verdict.level.value}"
    if record.perf is None:
        return f"not timed here: {record.untimed or 'the record gives no reason'}"
    floor = timing_floor(current)
    if not record.perf.ratio_low > floor:  # a ratio that is not a number ends here too
        worse = "slower" if record.perf.ratio_high < 1.0 else "no measurable gain"
        beside = f"; the reference against itself reaches {floor:.3f}" if floor > 1.0 else ""
        return f"lossless but {worse}: ratio {text.ratio(record.perf)}{beside}"
    return None


def _recipe_of_stock(record: Record, current: Sequence[Record]) -> dict:
    return next((other.recipe for other in current if other.role == "reference"), record.recipe)


def timing_floor(current: Sequence[Record]) -> float:
    """What a ratio's lower end must exceed: 1, or how far from 1 equal arms came out in this run, whichever is more."""
    floor = 1.0
    for record in current:
        if record.role == "repeat" and record.perf is not None:
            floor = max(floor, record.perf.ratio, 1.0 / record.perf.ratio)
    return floor


def _reason(record: Record, basis: Record | None, current: Sequence[Record]) -> str:
    level = record.verdict.level
    if record.role == "peer":
        return "a peer, for comparison only"
    obstacle = _bad_reference(current) or _obstacle(record, current)
    if record.role == "negative":
        words = f"{level.value} and {text.ratio(record.perf)}" if record.perf else level.value
        return obstacle or f"{words}, but a negative result; move its folder to kernels/ and measure again to ship it"
    if basis is None or record is basis:
        return obstacle or f"the fastest that is lossless, {text.ratio(record.perf)}"
    if record.role == "optimization" and set(record.optimizations) <= set(basis.optimizations):
        return f"part of {basis.arm}, measured together"
    if obstacle:
        return obstacle
    return f"{level.value} and {text.ratio(record.perf)}, but {basis.arm} is faster and they were not measured together"


def to_toml(slug: str, device: str, run_id: str, reference: Record, shipping: Shipping) -> str:
    """The text of `shipping.toml`; `reference` is any record of the run, for the model and the method."""
    header: Mapping[str, object] = {
        "device_slug": slug,
        "device": device,
        "model": reference.recipe.get("model") or "",
        "method": reference.recipe.get("method") or "",
        "dtype": text.dtype(reference) or "",
        "run_id": run_id,
    }
    lines = [f"# {text.MARK}", f"schema = {SCHEMA}"]
    lines += [f"{key} = {quoted(str(value))}" for key, value in header.items()]
    lines += [f"enable = [{', '.join(quoted(name) for name in shipping.enable)}]", "", "[not_enabled]"]
    lines += [f"{quoted(name)} = {quoted(reason)}" for name, reason in sorted(shipping.not_enabled.items())]
    return "\n".join(lines) + "\n"


def quoted(value: str) -> str:
    """A TOML basic string: JSON's escapes are all TOML's, except that TOML also wants DEL escaped."""
    value = value.encode("utf-8", "replace").decode("utf-8")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
