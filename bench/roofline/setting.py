"""What a roofline is of: a model, how it is trained, and the micro-step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bench.records import Record
from loop.config import DEFAULT_TARGETS
from loop.errors import UserError
from loop.shapes import SHAPES

ITEM_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Setting:
    """One micro-step: `packs` packs of `pack_length` tokens, `documents` of equal length in each."""

    model: str = "qwen3.5-2b"  # a named shape, or a folder of a transformers checkpoint
    method: Literal["lora", "full"] = "lora"  # train adapters, or every weight
    rank: int = 128  # width of the adapters
    targets: tuple[str, ...] = DEFAULT_TARGETS  # projections with an adapter, by the last part of their name
    pack_length: int = 5376  # tokens of a pack
    packs: int = 1  # packs of a micro-step
    documents: int = 1  # of a pack, taken to be equally long
    supervised: float = 1.0  # the part of all positions that has a loss
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of compute; what trains has an fp32 master copy
    gradient_checkpointing: bool = False  # run every layer's forward twice

    @property
    def positions(self) -> int:
        return self.pack_length * self.packs

    @property
    def supervised_rows(self) -> int:
        return round(self.supervised * self.positions)

    @property
    def item(self) -> int:
        """Bytes of one number of compute."""
        return ITEM_BYTES[self.dtype]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the documents of a micro-step. Of all ways to cut a pack into so many, this one has the fewest scores."""
        short, longer = divmod(self.pack_length, self.documents)
        return ((short + 1,) * longer + (short,) * (self.documents - longer)) * self.packs

    @property
    def trained(self) -> int:
        """1 where the model's own weights train, else 0, as the ops' workloads have it."""
        return int(self.method == "full")


def check(setting: Setting) -> Setting:
    """`setting` itself. Raises UserError for a number that can't be."""
    for name in ("rank", "pack_length", "packs", "documents"):
        if getattr(setting, name) < 1:
            raise UserError(f"{name} is {getattr(setting, name)}; it must be at least 1")
    if setting.documents > setting.pack_length:
        raise UserError(f"documents is {setting.documents}; a pack of {setting.pack_length} tokens holds no more than those")
    if not 0 <= setting.supervised <= 1:
        raise UserError(f"supervised is {setting.supervised}; it must be from 0 to 1")
    if setting.method not in ("lora", "full") or setting.dtype not in ITEM_BYTES:
        raise UserError(
            f"method {setting.method!r} in {setting.dtype!r} is not known: lora or full, {' or '.join(ITEM_BYTES)}"
        )
    return setting


def setting_of(record: Record) -> Setting | None:
    """What `record` trained, without checkpointing, since a floor recomputes nothing. None where it does not say, where the
    model was no named shape (a record holds no configuration), and where documents were padded, not packed."""
    recipe, data = record.recipe, _part(record.recipe, "data")
    counts = [record.data.get(name) for name in ("documents", "packs", "supervised_fraction")]
    if recipe.get("model") not in SHAPES or recipe.get("dtype") not in ITEM_BYTES or "pack_length" not in data:
        return None
    if None in counts or not counts[1] or data.get("rows") == "padded":
        return None
    lora = _part(recipe, "lora")
    return check(
        Setting(
            model=recipe["model"],
            method=recipe.get("method", "lora"),
            rank=lora.get("rank", Setting.rank),
            targets=tuple(lora.get("targets", DEFAULT_TARGETS)),
            pack_length=data["pack_length"],
            packs=data.get("packs_per_micro_step", 1),
            documents=min(data["pack_length"], max(1, round(counts[0] / counts[1]))),
            supervised=counts[2],
            dtype=recipe["dtype"],
        )
    )


def _part(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = mapping.get(key)
    return part if isinstance(part, Mapping) else {}
