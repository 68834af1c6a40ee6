"""Adapters: PEFT's modules as the reference, our own initial values, and PEFT's file format.

PEFT computes the reference because PEFT is what a user would run. Optimizations swap its `lora.Linear` for their own
module; whatever has `base_layer`, `lora_A` and `lora_B` is an adapter here, and is saved in PEFT's layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from loop.config import DEFAULT_TARGETS, LoraConfig
from loop.errors import UserError
from loop.files import write_safetensors, write_text

PEFT_PREFIX = "base_model.model."
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT's settings that would make the same tensors another function, and their values of plain LoRA.
PLAIN_LORA = {"use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "alpha_pattern": {}, "rank_pattern": {}}


@dataclass(frozen=True)
class Adapter:
    """One adapted projection. a [rank, in], b [out, rank]; the output gains `scaling * b @ a @ dropout(x)`."""

    name: str
    module: nn.Module
    base: nn.Linear
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    dropout: float


def attach(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Puts PEFT adapters on the targeted projections, freezes everything else, and sets A and B.

    A is Kaiming-uniform with a = sqrt(5) and B zero (PEFT's choice), drawn on the CPU so that every device starts alike.
    Raises UserError for targets that match nothing; of DEFAULT_TARGETS only one has to.
    """
    linears = sorted(
        {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    )
    targets = [name for name in config.targets if name in linears]
    wrong = [name for name in config.targets if name not in (*linears, *DEFAULT_TARGETS)] if targets else config.targets
    if wrong or not targets:
        raise UserError(f"lora.targets {list(wrong)} match no projection of this model; it has {linears}")
    if config.rank < 1:
        raise UserError(f"lora.rank is {config.rank}; it must be at least 1")
    _inject(model, config, targets)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model):
            bound = math.sqrt(6 / ((1 + 5) * adapter.a.shape[1]))
            adapter.a.copy_(torch.empty(adapter.a.shape).uniform_(-bound, bound, generator=generator))
            adapter.b.zero_()


def _inject(model: nn.Module, config: LoraConfig, targets: list[str]) -> None:
    try:
        import peft
    except ImportError as error:
        raise UserError("method lora needs the package peft (pip install peft), or use --method full") from error
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none"
    )
    peft.inject_adapter_in_model(settings, model)
    for adapter in adapters(model):
        # PEFT keeps adapters of a bf16 model in fp32; the optimizer has the fp32 copy, so compute is in one dtype.
        adapter.a.data = adapter.a.data.to(adapter.base.weight)
        adapter.b.data = adapter.b.data.to(adapter.base.weight)


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """Every adapted projection in the model's order, whether PEFT's module or an optimization's."""
    for name, module in model.named_modules():
        if all(hasattr(module, part) for part in ("base_layer", "lora_A", "lora_B")):
            if isinstance(module.lora_A, nn.ModuleDict):  # PEFT's
                a, b = module.lora_A["default"], module.lora_B["default"]
                p = getattr(module.lora_dropout["default"], "p", 0.0)
                yield Adapter(name, module, module.base_layer, a.weight, b.weight, module.scaling["default"], p)
            else:
                yield Adapter(
                    name,
                    module,
                    module.base_layer,
                    module.lora_A.weight,
                    module.lora_B.weight,
                    module.scaling,
                    module.dropout,
                )


def save_adapters(model: nn.Module, config: LoraConfig, folder: Path, base_model: str, tensors: dict | None = None) -> None:
    """Writes `adapter_model.safetensors` (fp32) and `adapter_config.json`; peft.PeftModel.from_pretrained reads them.

    tensors: values by canonical parameter name (the fp32 master copies), default the model's own.
    """
    state, targets = {}, set()
    for adapter in adapters(model):
        targets.add(adapter.name.rpartition(".")[2])
        for part, parameter in (("lora_A", adapter.a), ("lora_B", adapter.b)):
            value = parameter if tensors is None else tensors[f"{adapter.name}.{part}.weight"]
            state[f"{PEFT_PREFIX}{adapter.name}.{part}.weight"] = value.detach().float().cpu().contiguous()
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": sorted(targets), "bias": "none",
        "inference_mode": True, "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip
    write_safetensors(folder / ADAPTER_FILE, state)
    write_text(folder / ADAPTER_CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load_adapters(model: nn.Module, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Loads adapters that PEFT or `save_adapters` wrote into `tensors`, by canonical parameter name.

    tensors: the fp32 master copies, so that a bf16 run starts from the saved values and not from rounded ones. Raises
    UserError for what is missing, does not fit, or is no plain LoRA.
    """
    file, settings_file = folder / ADAPTER_FILE, folder / ADAPTER_CONFIG
    for path in (file, settings_file):
        if not path.is_file():
            raise UserError(f"lora.start_from: {path} is not there; a folder saved by PEFT holds {ADAPTER_FILE}")
    try:
        settings, left = json.loads(settings_file.read_text(encoding="utf-8")), load_file(file)
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"lora.start_from: {folder} can't be read: {error}") from error
    expected = _scaling(settings, settings_file)
    for adapter in adapters(model):
        if not math.isclose(adapter.scaling, expected):
            raise UserError(f"lora.start_from: {settings_file} scales by {expected}, this run by {adapter.scaling}")
        for part, parameter in (("lora_A", adapter.a), ("lora_B", adapter.b)):
            key = f"{PEFT_PREFIX}{adapter.name}.{part}.weight"
            value = left.pop(key, None)
            if value is None or value.shape != parameter.shape:
                got = "is missing" if value is None else f"has shape {list(value.shape)}"
                raise UserError(f"lora.start_from: {file}: {key} {got}; expected {list(parameter.shape)}")
            with torch.no_grad():
                tensors[f"{adapter.name}.{part}.weight"].copy_(value)
    if left:
        raise UserError(f"lora.start_from: {file} has {len(left)} tensors this run has no place for, first {min(left)}")


def _scaling(settings: Any, path: Path) -> float:
    """alpha / rank of an `adapter_config.json`. Raises UserError where that would not be the whole truth."""
    if not isinstance(settings, dict):
        raise UserError(f"lora.start_from: {path} holds no JSON object; PEFT's adapter_config.json is expected")
    for key, plain in PLAIN_LORA.items():
        if (settings.get(key) or plain) != plain:
            raise UserError(f"lora.start_from: {path}: {key} is {settings[key]}; only plain LoRA can be loaded")
    alpha, rank = settings.get("lora_alpha"), settings.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"lora.start_from: {path}: r is {rank} and lora_alpha {alpha}; numbers are expected, r at least 1")
    return alpha / rank
