"""The page as Markdown: a pure function of a setting, a device's ceilings and its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from abtest.markdown import MARK, NOTHING, code, folded, number, per_second, percent, prose, table
from bench.ceilings import Ceilings
from bench.records import Record
from bench.roofline import spark, words
from bench.roofline.efficiency import Efficiencies, measured
from bench.roofline.linear import products
from bench.roofline.parts import KINDS
from bench.roofline.predict import device_us, forecasts
from bench.roofline.setting import Setting, setting_of
from bench.roofline.step import Step, floor_us, step_of

HEADER = (
    "part", "phase", "kind", "times", "MB each", "GFLOP each", "launches, at least", "floor each, µs", "bound by",
    "floor in all, ms", "reached", "what counts as moved",
)  # fmt: skip


def device_page(records: Sequence[Record]) -> str | None:
    """The page of a device's newest run, given its records; None where they hold no ceilings or no named model."""
    reference = next((record for record in records if record.role == "reference"), None)
    setting, ceilings = (None, None) if reference is None else (setting_of(reference), ceilings_of(reference))
    if setting is None or ceilings is None:
        return None
    return page(setting, ceilings, str(reference.environment.get("device") or "this device"), records)


def ceilings_of(record: Record) -> Ceilings | None:
    """What the run of `record` measured of its device, None where it did not."""
    names = ("copy_bytes_per_s", "matmul_flops_per_s")
    rates = [record.environment.get(name) for name in names]
    if not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        return None
    return Ceilings(*rates, copied_bytes=0, matmul_size=0, matmul_dtype=str(record.environment.get("matmul_dtype")))


def page(setting: Setting, ceilings: Ceilings, device: str, records: Sequence[Record] = ()) -> str:
    """Markdown. records: of one run on this device in this setting, for efficiencies and for the check of the prediction.

    Raises UserError for a model or a number that can't be.
    """
    step, efficiencies = step_of(setting), measured(records, setting)
    sections = [
        f"<!-- {MARK} -->\n# The floor of a step on {prose(device)}",
        words.trained(setting, step),
        words.rates(ceilings),
        _summary(step, ceilings),
        "## Every part\n\n" + words.PARTS + "\n\n" + parts_table(step, ceilings, efficiencies),
        "## What the floor takes for granted\n\n" + words.assumptions(step),
        "## Every product on its own\n\n" + _products(step, ceilings),
        _arms(step, ceilings, records),
        "## From the floor to a time\n\n" + _efficiencies(step, ceilings, efficiencies),
        "## The prediction checked on this device\n\n" + _check(setting, records, ceilings, efficiencies),
        _spark(setting, efficiencies),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(step: Step, ceilings: Ceilings) -> str:
    everything = step_of(replace(step.setting, supervised=1.0))
    again = step_of(replace(step.setting, gradient_checkpointing=True))
    update = floor_us(step.update, ceilings)
    rows = [
        _floor("matrix floor, every position supervised", everything, everything.matrix_floor_us(ceilings)),
        _floor("matrix floor", step, step.matrix_floor_us(ceilings)),
        *[(f"floor of the {kind} parts", NOTHING, _ms(value), NOTHING) for kind, value in step.by_kind(ceilings).items()],
        _floor("**floor of the micro-step**", step, step.floor_us(ceilings)),
        _floor("with its layers' forward run twice (checkpointing)", again, again.floor_us(ceilings)),
        _floor("with an optimizer step behind every micro-step", step, step.floor_us(ceilings) + update),
    ]
    return table(("", "TFLOP", "ms", "tokens/s"), rows, numeric=(1, 2, 3)) + f"\n\n{words.summary(step)}"


def _floor(name: str, step: Step, microseconds: float) -> tuple[str, ...]:
    flops = step.product_flops if "matrix floor" in name else None
    shown = NOTHING if flops is None else number(flops / 1e12, 4)
    return name, shown, _ms(microseconds), per_second(step.per_second(microseconds))


def parts_table(step: Step, ceilings: Ceilings, efficiencies: Efficiencies) -> str:
    """A row for every part and direction, and their sums."""
    rows = []
    for part in (*step.micro_step, *step.update):
        reached = next((efficiencies.by_op[name].of(ours=True) for name in part.ops if name in efficiencies.by_op), None)
        rows.append(
            (
                prose(part.name), part.phase, part.kind, str(part.count), number(part.work.bytes / 1e6, 4),
                number(part.work.flops / 1e9, 4), str(part.launches), number(part.floor_us(ceilings) / part.count, 4),
                part.bound(ceilings), _ms(part.floor_us(ceilings)), _reached(reached), prose(part.assumes),
            )
        )  # fmt: skip
    for name, parts in (("**micro-step**", step.micro_step), ("**update**", step.update)):
        moved, flops = sum(part.bytes for part in parts), sum(part.flops for part in parts)
        total = (f"{_whole(moved / 1e6)} in all", f"{_whole(flops / 1e9)} in all")
        launches = f"{sum(part.all_launches for part in parts):,} in all"
        rows.append((name, "", "", "", *total, launches, "", "", f"**{_ms(floor_us(parts, ceilings))}**", "", ""))
    return table(HEADER, rows, numeric=(3, 4, 5, 6, 7, 9, 10))


def _reached(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


def _products(step: Step, ceilings: Ceilings) -> str:
    rows, total = [], 0.0
    for product in products(step.shape, step.setting):
        floor = ceilings.floor_us(product.work.bytes, product.work.flops)
        total += product.count * floor
        rows.append(
            (
                prose(product.name), product.phase, f"{product.rows} × {product.inner} × {product.columns}",
                str(product.count), number(product.work.flops / 1e9, 4), number(product.work.bytes / 1e6, 4),
                number(floor, 4), product.work.bound(ceilings),
            )
        )  # fmt: skip
    header = ("product", "phase", "rows × inner × columns", "times", "GFLOP", "MB", "floor each, µs", "bound by")
    return f"{words.PRODUCTS} Their floors add up to {_ms(total)} ms.\n\n" + folded("products", header, rows, (3, 4, 5, 6))


def _arms(step: Step, ceilings: Ceilings, records: Sequence[Record]) -> str:
    """Every timed arm of this setting beside the floor; a peer, which is timed whatever its verdict, with that."""
    timed = [record for record in records if record.perf is not None and setting_of(record) == step.setting]
    if not timed:
        return ""
    floor = step.floor_us(ceilings) / 1e3
    rows = [
        (
            code(record.arm) + (f" (peer, {record.verdict.level.value})" if record.role == "peer" else ""),
            number(record.perf.micro_step_ms, 4), per_second(record.perf.positions_per_s),
            percent(floor / record.perf.micro_step_ms),
        )
        for record in sorted(timed, key=lambda record: record.perf.micro_step_ms)
    ]  # fmt: skip
    header = ("arm", "micro-step, ms", "positions/s", "of the floor's rate")
    return f"## What the arms reach\n\n{words.ARMS}\n\n{table(header, rows, numeric=(1, 2, 3))}"


def _efficiencies(step: Step, ceilings: Ceilings, efficiencies: Efficiencies) -> str:
    rows = []
    for kind in KINDS:
        if kind not in step.by_kind(ceilings):
            continue
        known = efficiencies.kind(kind)
        names = [
            name for name in efficiencies.by_op if any(name in part.ops for part in step.micro_step if part.kind == kind)
        ]
        from_ops = ", ".join(map(code, names)) or "no time in this run: taken at its floor"
        values = (NOTHING, NOTHING) if known is None else (percent(known.of(ours=True)), percent(known.of(ours=False)))
        rows.append((kind, *values, from_ops))
    header = ("kind", "floor over time, candidate", "floor over time, reference", "microbenchmarks of")
    shown = table(header, rows, numeric=(1, 2))
    if not efficiencies.by_op:
        return f"{words.EFFICIENCIES}\n\n{shown}\n\nWithout one time no prediction is made."
    predicted = device_us(step.micro_step, ceilings, efficiencies)
    return f"{words.EFFICIENCIES}\n\n{shown}\n\n{words.predicted(step, predicted, step.floor_us(ceilings))}"


def _check(setting: Setting, records: Sequence[Record], ceilings: Ceilings, efficiencies: Efficiencies) -> str:
    found = forecasts(setting, records, ceilings, efficiencies) if efficiencies.by_op else []
    if not found:
        return "No arm of this run has both a time and a count of launches, and an efficiency to predict it by: not checked."
    rows = [
        (
            code(one.arm), f"{one.launches:,}", number(one.device_ms, 4),
            NOTHING if one.host_us is None else number(one.host_us, 3), number(one.host_ms, 4),
            number(one.predicted_ms, 4), number(one.measured_ms, 4), f"**{100 * one.error:+.0f} %**",
        )
        for one in found
    ]  # fmt: skip
    header = ("arm", "launches", "device, ms", "a launch, µs", "host, ms", "predicted, ms", "measured, ms", "error")
    return f"{words.CHECK}\n\n{table(header, rows, numeric=range(1, 8))}\n\n{words.errors(found)}"


def _spark(setting: Setting, efficiencies: Efficiencies) -> str:
    """What the same floors are on DGX Spark, where its published rate is of this model and method."""
    if (setting.model, setting.method) != (spark.MODEL, spark.METHOD):
        return ""
    header = (
        "supervised", "checkpointing", "matrix floor, tokens/s", "floor, ms", "floor, tokens/s", "predicted, tokens/s",
        "published, of the floor",
    )  # fmt: skip
    parts = dict.fromkeys((1.0, setting.supervised))
    settings = [replace(setting, supervised=part, gradient_checkpointing=again) for part in parts for again in (False, True)]
    sections = [
        f"## {spark.NAME}, by the same floors",
        words.spark_headline(setting),
        table(("", "", "where from"), spark.PROVENANCE),
        table(header, [_spark_row(one, efficiencies) for one in settings], numeric=range(2, 7)),
        words.spark(setting),
    ]
    return "\n\n".join(sections)


def _spark_row(setting: Setting, efficiencies: Efficiencies) -> tuple[str, ...]:
    step = step_of(setting)
    floor, matrix = step.floor_us(spark.CEILINGS), step.matrix_floor_us(spark.CEILINGS)
    predicted = NOTHING
    if efficiencies.by_op:
        predicted = per_second(step.per_second(device_us(step.micro_step, spark.CEILINGS, efficiencies)))
    return (
        percent(setting.supervised), "yes" if setting.gradient_checkpointing else "no", per_second(step.per_second(matrix)),
        _ms(floor), per_second(step.per_second(floor)), predicted,
        percent(spark.PUBLISHED_TOKENS_PER_S / step.per_second(floor)),
    )  # fmt: skip


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else number(value, 3)


def _ms(microseconds: float) -> str:
    return number(microseconds / 1e3, 4)
