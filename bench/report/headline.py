"""What ships beside the fastest peer of the same run: reports/headline.json, and README.md's table of the same pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from bench.records import Race, Record
from bench.report.devices import Device, Setting
from bench.report.settings import Trained
from bench.report.shipping import Shipping
from bench.report.text import NOTHING, code, per_second, percent, prose, ratio, sound, table
from bench.roofline.page import ceilings_of
from bench.roofline.setting import setting_of
from bench.roofline.step import step_of

REASON = 160  # letters of a peer's verdict; all of it is on the peer's own page
NO_PAIR = (
    "The newest run of no setting holds a timed peer beside what ships; "
    '`make bench EXTRAS="dev gpu peers" ARGS="--peers"` on a GPU box makes one that does.'
)
HEADER = (
    "device", "model", "method", "pack length", "supervised", "shipped tok/s", "best peer", "its tok/s", "ratio",
    "of the matrix floor", "gate",
)  # fmt: skip
LEGEND = (
    "What ships beside the fastest of its peers, in real tokens a second. Where the two were timed in turn, that is the "
    "ratio. Else each was timed in turn with stock: what comes of their ratios to stock and what comes of their tokens a "
    "second then differ by how the machine drifted in between, and the smaller of the two counts. How far apart equal "
    "arms come out is on the device's own page. Of the matrix floor: the least time of a micro-step's matrix products at "
    "the measured rate, over the micro-step of what ships."
)


@dataclass(frozen=True)
class Pair:
    """What ships in one setting on one device, and the fastest timed peer of that run. page: the setting's, relative to the
    folder of reports."""

    device: str
    page: str
    trained: Trained
    shipped: Record
    peer: Record

    @property
    def race(self) -> Race | None:
        """The peer beside what ships, timed in turn."""
        race, same = self.peer.race, self.peer.run_id == self.shipped.run_id
        if race is None or not same or (race.arm, race.optimizations) != (self.shipped.arm, self.shipped.optimizations):
            return None
        numbers = (race.ratio, race.ratio_low, race.ratio_high)
        return race if all(math.isfinite(number) and number > 0 for number in numbers) else None

    @property
    def ratio(self) -> float:
        """The speed of what ships over the peer's. Without a race that of their ratios to stock or of their tokens a second,
        whichever is smaller: a busy host slows stock most, which launches most, so neither is free of it."""
        if self.race is not None:
            return self.race.ratio
        one, other = self.shipped.perf, self.peer.perf
        return min(one.ratio / other.ratio, one.real_tokens_per_s / other.real_tokens_per_s)

    @property
    def ratio_low(self) -> float:
        """Without a race the low end over the high one. The two errors are of one machine and need not be independent, so
        half-widths of logarithms are added, not taken in quadrature: a difference spreads by no more than the sum of the two
        spreads, whatever their correlation."""
        if self.race is not None:
            return self.race.ratio_low
        return min(self.ratio, self.shipped.perf.ratio_low / self.peer.perf.ratio_high)

    @property
    def ratio_high(self) -> float:
        """The high end over the low one, as `ratio_low` is the other way round."""
        if self.race is not None:
            return self.race.ratio_high
        return max(self.ratio, self.shipped.perf.ratio_high / self.peer.perf.ratio_low)

    @property
    def supervised_fraction(self) -> float | None:
        """Of real tokens, by the statistics of the data; None where the record does not say."""
        value = self.shipped.data.get("supervised_fraction")
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    def entry(self) -> dict[str, Any]:
        """The pair's entry of headline.json."""
        return {
            "device": self.device,
            "model": self.trained.model,
            "method": self.trained.method,
            "pack_length": self.trained.pack_length,
            "supervised_fraction": self.supervised_fraction,
            "shipped_real_tokens_per_s": self.shipped.perf.real_tokens_per_s,
            "best_peer": self.peer.arm,
            "best_peer_real_tokens_per_s": self.peer.perf.real_tokens_per_s,
            "ratio": self.ratio,
            "ratio_low": self.ratio_low,
            "ratio_high": self.ratio_high,
            "matrix_floor_fraction": matrix_floor_fraction(self.shipped),
            "gate": self.shipped.verdict.level.value,
        }


def pairs(devices: Iterable[tuple[Device, Sequence[Shipping]]]) -> list[Pair]:
    """A pair for each setting whose newest run has both something that ships and a timed peer, whatever that one's verdict;
    in the reports' order. Of peers the one counts that comes nearest to what ships."""
    found = []
    for device, decisions in devices:
        for setting, decision in zip(device.settings, decisions, strict=True):
            if decision.basis is None or not sound(decision.basis.perf):
                continue
            page = "/".join(part for part in (device.slug, device.path(setting), "README.md") if part)
            own = [Pair(device.name, page, setting.trained, decision.basis, peer) for peer in _peers(setting)]
            found += sorted(own, key=lambda pair: pair.ratio)[:1]
    return found


def _peers(setting: Setting) -> Iterator[Record]:
    """Timed, and beside the stock that is everybody's: a ratio to stock of another recipe is of another thing."""
    for record in setting.current:
        stock = setting.stock_of(record)
        if record.role == "peer" and sound(record.perf) and (stock is None or stock.recipe == record.recipe):
            yield record


def matrix_floor_fraction(record: Record) -> float | None:
    """The matrix floor of the roofline page over the micro-step of a timed `record`; None where the record does not say
    enough, or its model is no named shape.

    The floor is the FLOPs of the linear layers' products, forward and backward, with adapters' own and with the head on
    supervised rows alone, nothing recomputed, at the matrix rate that the record's command measured.
    """
    setting, ceilings = setting_of(record), ceilings_of(record)
    if setting is None or ceilings is None:
        return None
    return step_of(setting).matrix_floor_us(ceilings) / (1e3 * record.perf.micro_step_ms)


def to_json(found: Iterable[Pair]) -> str:
    """The text of headline.json: a list of entries, strict JSON."""
    return json.dumps([pair.entry() for pair in found], indent=2, allow_nan=False) + "\n"


def markdown(found: Sequence[Pair]) -> str:
    """The pairs as a table for README.md, which lies beside the folder of reports, or a sentence that there are none."""
    if not found:
        return NO_PAIR
    shown = table(HEADER, [_row(pair, pair.entry()) for pair in found], numeric=(3, 4, 5, 7, 8, 9))
    leaky = [_verdict(pair) for pair in found if not pair.peer.verdict.level.lossless]
    return "\n\n".join(part for part in (shown, "\n".join(leaky), LEGEND) if part)


def _row(pair: Pair, entry: dict[str, Any]) -> tuple[str, ...]:
    level = pair.peer.verdict.level
    return (
        f"[{prose(entry['device'])}](reports/{pair.page})",
        prose(entry["model"]) or NOTHING,
        prose(entry["method"]) or NOTHING,
        NOTHING if entry["pack_length"] is None else f"{entry['pack_length']:,}",
        percent(entry["supervised_fraction"]),
        f"**{per_second(entry['shipped_real_tokens_per_s'])}**",
        code(entry["best_peer"]) + ("" if level.lossless else f" ({level.value})"),
        per_second(entry["best_peer_real_tokens_per_s"]),
        f"**{ratio(pair)}**",
        percent(entry["matrix_floor_fraction"]),
        entry["gate"],
    )


def _verdict(pair: Pair) -> str:
    verdict = pair.peer.verdict
    setting = (pair.device, pair.trained.model, pair.trained.method)
    length = [] if pair.trained.pack_length is None else [f"packs of {pair.trained.pack_length:,}"]
    parts = [*(prose(part) for part in setting if part), *length, f"{percent(pair.supervised_fraction)} supervised"]
    where = ", ".join(parts)
    reason = shorten(verdict.reason, REASON, placeholder=" …")
    return f"- {code(pair.peer.arm)} on {where}, is not lossless. {verdict.level.value}: {prose(reason)}"
