"""FLOPs a position, against a count by hand."""

from __future__ import annotations

import dataclasses

import pytest
from in_process import CONFIG

from abtest.census import model_flops
from loop.training import build

# qwen3.5-tiny, weights of each matrix as (in, out); three delta layers and one of attention, vocabulary of 4096
MLP = [(128, 384), (128, 384), (384, 128)]
DELTA = [(128, 256), (128, 128), (128, 128)]  # in_proj_qkv: 2 x 64 keys + 128 values; in_proj_z; out_proj
DECAY = [(128, 4), (128, 4)]  # in_proj_a and in_proj_b, without adapters
ATTENTION = [(128, 256), (128, 64), (128, 64), (128, 128)]  # q with its gate, k, v, o
HEAD = [(128, 4096)]
ADAPTED = 4 * MLP + 3 * DELTA + ATTENTION
ALL = ADAPTED + 3 * DECAY + HEAD
WEIGHTS = sum(width * height for width, height in ALL)
RANK = CONFIG.lora.rank
ADAPTERS = sum(RANK * (width + height) for width, height in ADAPTED)


@pytest.mark.parametrize("enabled", [(), ("static_lora",)], ids=["PEFT", "static_lora"])
def test_lora_takes_four_a_frozen_weight_and_six_a_trained_one(enabled):
    run, _ = build(CONFIG, enabled)
    assert model_flops(run) == 4 * WEIGHTS + 6 * ADAPTERS


def test_full_takes_six_a_weight():
    run, _ = build(dataclasses.replace(CONFIG, method="full"))
    assert model_flops(run) == 6 * WEIGHTS
