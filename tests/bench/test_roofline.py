"""Bytes, FLOPs and floors of a step: against the loop's own count, against the ops, and against one another."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest
import torch

from abtest.census import model_flops
from bench.ceilings import Ceilings
from bench.roofline.linear import products
from bench.roofline.parts import BY_DOCUMENTS, KINDS, Part, Work
from bench.roofline.setting import Setting, check
from bench.roofline.shape import TINY_VOCABULARY, shape_of
from bench.roofline.step import floor_us, step_of, trained_numbers
from kernels.contract import Workload
from kernels.registry import module_of
from loop.config import Config, DataConfig, LoraConfig
from loop.errors import UserError
from loop.shapes import SHAPES, is_tiny
from loop.training import build

TINY = [name for name in SHAPES if is_tiny(name)]
RATES = Ceilings(4.24e12, 803e12, 0, 0, "bfloat16")
SMALL = Setting("qwen3.5-tiny", rank=4, pack_length=192, dtype="float32")


def built(model: str, method: str):
    """The loop's own run of a tiny model, on the CPU."""
    data = DataConfig(pack_length=192)
    run, _ = build(Config(model=model, method=method, device="cpu", dtype="float32", lora=LoraConfig(rank=4), data=data))
    return run


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", TINY)
def test_products_take_the_flops_that_the_loop_counts(model, method):
    setting = dataclasses.replace(SMALL, model=model, method=method)
    run = built(model, method)
    assert run.model.get_input_embeddings().num_embeddings == TINY_VOCABULARY
    assert step_of(setting).product_flops == model_flops(run) * setting.positions


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", TINY)
def test_as_many_numbers_train_as_in_the_loop_but_for_vectors(model, method):
    parameters = [p for p in built(model, method).model.parameters() if p.requires_grad]
    setting = dataclasses.replace(SMALL, model=model, method=method)
    matrices = sum(p.numel() for p in parameters if p.ndim > 1)
    assert trained_numbers(shape_of(model), setting) == matrices


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("in_proj_z",), Setting.targets])
def test_adapters_on_some_projections_are_counted_there(targets):
    setting = dataclasses.replace(SMALL, targets=targets)
    data, lora = DataConfig(pack_length=192), LoraConfig(rank=4, targets=targets)
    run, _ = build(Config(device="cpu", dtype="float32", lora=lora, data=data))
    assert step_of(setting).product_flops == model_flops(run) * setting.positions


@pytest.mark.parametrize("method", ["lora", "full"])
def test_products_one_by_one_are_the_same_arithmetic(method):
    step = step_of(dataclasses.replace(SMALL, method=method))
    alone = sum(product.count * product.work.flops for product in products(step.shape, step.setting))
    head = sum(part.flops for part in step.micro_step if part.name.startswith("head"))
    assert alone + head == step.product_flops


def test_the_matrix_floor_is_the_one_that_was_worked_out_by_hand():
    """4 FLOP for each of 1.373 + 0.509 billion frozen weights and 6 for each of 125 million adapters': 96,700 tokens/s."""
    step = step_of(Setting())
    assert step.per_second(step.matrix_floor_us(RATES)) == pytest.approx(96_700, rel=0.03)
    assert step.product_flops == pytest.approx(5376 * (4 * (1.373e9 + 0.509e9) + 6 * 125.0e6), rel=0.001)


def test_sums_are_of_all_parts():
    step = step_of(Setting(gradient_checkpointing=True))
    total = sum(part.floor_us(RATES) for part in step.micro_step)
    assert step.floor_us(RATES) == pytest.approx(total) == pytest.approx(sum(step.by_kind(RATES).values()))
    assert set(step.by_kind(RATES)) == set(KINDS)
    assert floor_us(step.update, RATES) > 0 and not {part.phase for part in step.micro_step} & {"update"}


def test_a_part_is_bound_by_what_takes_longer_and_counts_as_often_as_it_runs():
    rates = Ceilings(copy_bytes_per_s=1e6, matmul_flops_per_s=1e9, copied_bytes=0, matmul_size=0, matmul_dtype="")
    moving = Part("", "elementwise", "forward", 3, Work(5, 4000), 2, "")
    computing = dataclasses.replace(moving, work=Work(5, 6000))
    assert (moving.bound(rates), moving.floor_us(rates)) == ("bytes", pytest.approx(15))
    assert (computing.bound(rates), computing.floor_us(rates)) == ("FLOPs", pytest.approx(18))
    assert (moving.bytes, moving.flops, moving.all_launches) == (15, 12_000, 6)


# Forward and backward of a part together are what its op states.

T = {"T": 1536}
OPS = {
    "SiLU(gate) * up": ("silu_mul", T | {"I": 6144}),
    "gated RMSNorm": ("gated_rms_norm", {"T": 1536 * 16, "D": 128}),
    "residual addition, RMSNorm": ("rms_norm", T | {"D": 2048, "zero_centred": 1, "add": 1}),
    "q and k norm, rope": ("rope_qk_norm", T | {"H": 8, "KV": 2, "D": 256, "R": 64}),
    "head and cross-entropy": ("supervised_logits", {"B": 2, "L": 768, "D": 2048, "V": 248_320, "S": 384}),
    "decay and beta": ("decay_gates", T | {"H": 16}),
    "convolution, SiLU, l2 norm": ("conv_silu_norm", T | {"HK": 16, "K": 128, "V": 2048}),
    "delta rule, chunks of 64": ("ssm_fast_path", T | {"HK": 16, "HV": 16, "K": 128, "V": 128}),
    "attention within documents": ("packed_attention", {"B": 2, "L": 768, "H": 8, "KV": 2, "D": 256}),
}
LORA = {
    "gate_proj, up_proj": ("lora_matmul", T | {"D_in": 2048, "R": 128, "O1": 6144, "O2": 6144}),
    "q_proj, k_proj, v_proj": ("lora_matmul", T | {"D_in": 2048, "R": 128, "O1": 4096, "O2": 512, "O3": 512}),
    "out_proj": ("lora_matmul", T | {"D_in": 2048, "R": 128, "O1": 2048}),
    "in_proj_a": ("sm121a_matmul", T | {"D_in": 2048, "D_out": 16}),
}
FULL = {
    "down_proj": ("full_ft_linear", T | {"D_in": 6144, "D_out": 2048, "held": 0}),
    "in_proj_a": ("full_ft_linear", T | {"D_in": 2048, "D_out": 16, "held": 0}),
}
CASES = [("lora", *case) for case in (OPS | LORA).items()] + [("full", *case) for case in (OPS | FULL).items()]


@pytest.mark.parametrize(("method", "name", "case"), CASES, ids=[f"{case[1]}, {case[0]}" for case in CASES])
def test_forward_and_backward_of_a_part_are_its_op(method, name, case):
    optimization, shape = case
    setting = Setting(method=method, pack_length=768, packs=2, documents=3, supervised=0.25)
    parts = [part for part in step_of(setting).micro_step if part.name == name]
    assert [part.phase for part in parts] == ["forward", "backward"] and parts[0].ops[0] == optimization
    workload = Workload("roofline", shape | {"trained": int(method == "full")}, "bfloat16")
    op = importlib.import_module(module_of(optimization)).OPTIMIZATION.op
    if optimization in BY_DOCUMENTS:
        make = getattr(importlib.import_module(f"{module_of(optimization)}.op"), BY_DOCUMENTS[optimization])
        op = make((workload, (256,) * 6))
    assert sum(part.work.bytes for part in parts) == op.bytes_moved(workload)
    assert sum(part.work.flops for part in parts) == op.flops(workload)


def test_every_part_moves_something_each_way():
    for method in ("lora", "full"):
        for supervised in (0.0, 1.0):
            for part in step_of(Setting(method=method, supervised=supervised)).micro_step:
                assert part.work.bytes > 0 and part.work.flops >= 0 and part.count > 0 and part.launches > 0, part


# What a step has, and what it has not


def names(setting: Setting) -> set[str]:
    return {part.name for part in step_of(setting).micro_step}


@pytest.mark.parametrize("model", [name for name in SHAPES if not name.startswith("qwen3.5")])
def test_a_dense_model_has_no_delta_rule(model):
    step = step_of(dataclasses.replace(SMALL, model=model))
    kinds = {part.kind for part in step.micro_step}
    assert kinds == {"matrix", "attention", "elementwise"}
    assert not [part.name for part in step.micro_step if "delta" in part.name or "in_proj" in part.name]
    assert step.shape.delta is None and "attention output gate" not in names(step.setting)


def test_three_layers_in_four_of_the_hybrid_are_delta_layers():
    counts = {part.name: part.count for part in step_of(Setting()).micro_step}
    assert counts["delta rule, chunks of 64"] == 18 and counts["attention within documents"] == 6
    assert counts["in_proj_qkv, in_proj_z"] + counts["in_proj_qkv, in_proj_z, first layer"] == 18
    assert counts["residual addition, RMSNorm"] + counts["RMSNorm, first"] == 48


def test_nothing_below_the_first_adapters_has_a_gradient():
    def backward(method: str) -> dict[str, int]:
        parts = step_of(Setting(method=method)).micro_step
        return {part.name: part.work.flops for part in parts if part.phase == "backward"}

    lora, full = backward("lora"), backward("full")
    assert "embedding" not in lora and "RMSNorm, first" not in lora and "in_proj_a, first layer" not in lora
    assert {"embedding", "RMSNorm, first", "in_proj_qkv"} <= set(full)
    adapters = 2 * 5376 * 128 * (2 * (6144 + 2048) + 2 * 2048)  # dy B and dB of each, dA of each
    assert lora["in_proj_qkv, in_proj_z, first layer"] == adapters


def test_checkpointing_runs_the_layers_forward_again_and_the_head_not():
    once, twice = step_of(Setting()), step_of(Setting(gradient_checkpointing=True))
    again = [part for part in twice.micro_step if part.phase == "recompute"]
    assert not {"embedding", "head and cross-entropy", "residual addition, last RMSNorm"} & {part.name for part in again}
    assert "delta rule, chunks of 64" in {part.name for part in again}
    assert twice.floor_us(RATES) == pytest.approx(once.floor_us(RATES) + floor_us(again, RATES))
    assert once.product_flops == twice.product_flops


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_longer_pack_takes_longer(method):
    steps = [step_of(Setting(method=method, pack_length=length)) for length in (1, 64, 2048, 5376, 16_384)]
    floors = [step.floor_us(RATES) for step in steps]
    assert floors == sorted(floors) and len(set(floors)) == len(floors)
    assert len({floor_us(step.update, RATES) for step in steps}) == 1


def test_more_supervised_positions_take_longer_and_none_is_no_division_by_zero():
    floors = [step_of(Setting(supervised=part)).floor_us(RATES) for part in (0.0, 0.25, 0.5, 1.0)]
    assert floors == sorted(floors) and len(set(floors)) == 4
    step = step_of(Setting(supervised=0.0))
    assert step.setting.supervised_rows == 0 and step.per_second(step.floor_us(RATES)) > 0


def test_documents_are_equal_fill_the_pack_and_have_fewer_scores_the_more_there_are():
    setting = Setting(pack_length=10, packs=2, documents=3)
    assert setting.lengths == (4, 3, 3, 4, 3, 3)
    flops = []
    for documents in (1, 2, 32):
        step = step_of(Setting(documents=documents))
        flops.append(sum(part.flops for part in step.micro_step if part.kind == "attention"))
    assert flops == sorted(flops, reverse=True) and flops[0] == 6 * 7 * 5376 * 5377 * 8 * 256


def test_a_folder_has_the_shape_of_its_configuration(tmp_path):
    """Qwen3-1.7B's published sizes; its own attention has more columns a head than hidden size over heads."""
    config = {
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    step = step_of(Setting(model=str(tmp_path), method="full"))
    assert "delta rule, chunks of 64" not in {part.name for part in step.micro_step}
    layer = 2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144
    assert step.product_flops == 6 * 5376 * (28 * layer + 151_936 * 2048)
    assert step.shape.attention.normed and not step.shape.attention.gated


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pack_length": 0}, "pack_length is 0"), ({"rank": 0}, "rank is 0"), ({"packs": 0}, "packs is 0"),
        ({"documents": 0}, "documents is 0"), ({"documents": 5377}, "documents is 5377"),
        ({"supervised": 1.5}, "supervised is 1.5"), ({"supervised": -0.1}, "supervised is -0.1"),
        ({"dtype": "float16"}, "float16"), ({"method": "dora"}, "dora"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_named(change, words):
    with pytest.raises(UserError, match=words):
        check(dataclasses.replace(Setting(), **change))


def test_models_that_are_not_known_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        step_of(Setting(model="qwen9"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2 model are not known here; known are qwen3"):
        step_of(Setting(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        step_of(Setting(model=str(tmp_path)))


def test_bytes_are_of_the_compute_dtype():
    """Nothing but sums of gradients, masters, decay rates and norms' factors is fp32 in a bf16 run."""
    moved = [sum(part.bytes for part in step_of(Setting(dtype=dtype)).micro_step) for dtype in ("bfloat16", "float32")]
    assert 1.99 < moved[1] / moved[0] < 2
    assert torch.bfloat16.itemsize == Setting().item


def test_the_update_reads_gradients_twice_and_masters_and_moments_both_ways():
    """Bytes a trained number: 4 for the norm; 16 read (gradient, master, two moments), 12 written, and 2 for bf16."""
    numbers = trained_numbers(shape_of("qwen3.5-tiny"), SMALL)
    for dtype, each in (("float32", 32), ("bfloat16", 34)):
        (update,) = step_of(dataclasses.replace(SMALL, dtype=dtype)).update
        assert (update.bytes, update.phase) == (each * numbers, "update")


def test_forwards_are_counted_by_hand():
    """One pack of the 2B model in bf16: what is read and written, and the products."""
    forward = {part.name: part.work for part in step_of(Setting()).micro_step if part.phase == "forward"}
    rows = 5376
    assert forward["SiLU(gate) * up"].bytes == 3 * 2 * rows * 6144
    assert forward["RMSNorm, first"].bytes == 2 * (2 * rows * 2048 + 2048) + 4 * rows
    assert forward["residual addition, RMSNorm"].bytes == 2 * (4 * rows * 2048 + 2048) + 4 * rows
    assert forward["attention within documents"].bytes == 2 * rows * 256 * (2 * 8 + 2 * 2)
    assert forward["attention within documents"].flops == 4 * 8 * 256 * rows * (rows + 1) // 2
    assert forward["delta rule, chunks of 64"].bytes == rows * (2 * (3 * 2048 + 16) + 4 * 16 + 2 * 2048)
    assert forward["head and cross-entropy"].flops == 2 * rows * 2048 * 248_320
    adapters = 128 * (2048 + 6144)
    assert forward["down_proj"].flops == 2 * rows * (2048 * 6144 + adapters)
    assert forward["down_proj"].bytes == 2 * (rows * (2048 + 6144) + 2048 * 6144 + adapters)


def test_launches_are_those_of_products_whose_sums_are_made_inside():
    """Forward: one product for all A, two for each projection. Backward: dy B, dB and dx for each, dA and its dx for all."""
    launches = {(part.name, part.phase): part.launches for part in step_of(Setting()).micro_step}
    joined = "q_proj, k_proj, v_proj"
    assert (launches[joined, "forward"], launches[joined, "backward"]) == (7, 11)
    assert (launches["down_proj", "forward"], launches["down_proj", "backward"]) == (3, 5)
    assert launches["in_proj_qkv, in_proj_z, first layer", "backward"] == 5  # no dx
    full = {(part.name, part.phase): part.launches for part in step_of(Setting(method="full")).micro_step}
    assert (full["down_proj", "forward"], full["down_proj", "backward"]) == (1, 2)
    assert full["gated RMSNorm", "backward"] == 1 + launches["gated RMSNorm", "backward"]
