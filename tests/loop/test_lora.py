"""Adapters: PEFT reads what the loop wrote, the loop reads what PEFT wrote, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from loop_truth import plain_model, stir_adapters
from safetensors.torch import load_file, save_file

from loop.batch import PackedBatch
from loop.data import load_tokenizer
from loop.errors import UserError
from loop.lora import ADAPTER_CONFIG, ADAPTER_FILE, adapters, save_adapters
from loop.model import forward_body
from loop.run import Run
from loop.training import build, train

MODELS = ["qwen3.5-tiny", "qwen2-tiny"]
LENGTH = 50
BACKENDS = [(), ("static_lora",)]


def one_document(run: Run) -> PackedBatch:
    ids = torch.randint(run.model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(LENGTH)[None]
    return PackedBatch(ids, torch.full_like(ids, -100), positions, torch.tensor([0, LENGTH], dtype=torch.int32), LENGTH, 0)


def loop_logits(run: Run) -> torch.Tensor:
    run.model.eval()
    with torch.no_grad():
        return run.model.get_output_embeddings()(forward_body(run.model, one_document(run)))


def peft_logits(model, run: Run) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=one_document(run).input_ids).logits


def saved(run: Run, folder: Path) -> Path:
    save_adapters(run.model, run.config.lora, folder, run.config.model, run.optimizer.masters)
    return folder


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("enable", BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_peft_loads_what_the_loop_saved(make, tmp_path, model, enable):
    run, _ = build(make(model=model, lora={"rank": 4, "alpha": 6.0}), enable)
    assert run.enabled == list(enable)
    stir_adapters(run)
    loaded = peft.PeftModel.from_pretrained(plain_model(run), saved(run, tmp_path))
    close(peft_logits(loaded, run), loop_logits(run))
    without = peft_logits(plain_model(run), run)
    assert float((loop_logits(run) - without).abs().max()) > 0.05, "adapters that change nothing would prove nothing"
    assert len(load_file(tmp_path / ADAPTER_FILE)) == 2 * sum(1 for _ in adapters(run.model))


@pytest.mark.parametrize("enable", BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_the_loop_starts_from_what_peft_saved(make, tmp_path, model, enable):
    fresh, _ = build(make(model=model))
    settings = peft.LoraConfig(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(plain_model(fresh), settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path)
    lora = {"targets": ("q_proj", "v_proj", "down_proj"), "start_from": tmp_path}
    run, _ = build(make(model=model, lora=lora), enable)
    assert run.enabled == list(enable)
    close(loop_logits(run), peft_logits(theirs, run))
    again = load_file(saved(run, tmp_path / "again") / ADAPTER_FILE)
    original = load_file(tmp_path / ADAPTER_FILE)
    assert again.keys() == original.keys() and all(torch.equal(again[key], original[key]) for key in original)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_the_saved_values_themselves(make, tmp_path, dtype):
    """In bf16 too: the fp32 copies that were saved come back, not what bf16 makes of them."""
    train(make(dtype=dtype, output=tmp_path / "first"))
    first = load_file(tmp_path / "first" / ADAPTER_FILE)
    assert any(bool((value != value.bfloat16().float()).any()) for value in first.values())
    run, _ = build(make(dtype=dtype, lora={"start_from": tmp_path / "first"}))
    second = load_file(saved(run, tmp_path / "second") / ADAPTER_FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    computed = {name: parameter.detach() for name, parameter in run.optimizer.parameters.items()}
    assert all(torch.equal(run.optimizer.masters[name].to(value), value) for name, value in computed.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_adapters_depend_on_the_seed_alone(make, dtype):
    def initial(enable=(), **changes) -> dict[str, torch.Tensor]:
        run, _ = build(make(model="qwen3.5-tiny", dtype=dtype, **changes), enable)
        return {name: parameter.detach().clone() for name, parameter in run.optimizer.parameters.items()}

    first = initial()
    torch.rand(3)
    for other in (initial(), initial(("static_lora", "supervised_logits")), initial(gradient_checkpointing=True)):
        assert list(other) == list(first) and all(torch.equal(other[name], first[name]) for name in first)
    reseeded = initial(seed=1)
    assert all(torch.equal(reseeded[name], value) == (".lora_B." in name) for name, value in first.items())
    for name, value in first.items():
        bound = value.shape[1] ** -0.5
        assert not value.any() if ".lora_B." in name else 0.9 * bound < float(value.abs().max()) <= 1.01 * bound, name


def test_a_checkpoint_gets_the_initial_adapters_of_its_seed(make, tmp_path):
    """Nothing is drawn for its weights, so torch's own generator is in any state when the adapters are drawn."""
    named, _ = build(make(method="full"))
    named.model.save_pretrained(tmp_path)
    load_tokenizer(None, named.config.data).save_pretrained(tmp_path)
    first = {name: p.detach().clone() for name, p in build(make())[0].optimizer.parameters.items()}
    torch.manual_seed(99)
    second = build(make(model=str(tmp_path)))[0].optimizer.parameters
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_only_adapters_train(make):
    run, dataset = build(make(model="qwen3.5-tiny"))
    frozen = {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    assert set(run.optimizer.parameters) and all(".lora_" in name for name in run.optimizer.parameters)
    batch = dataset.micro_batches(0, 1, 1)[0]
    run.micro_step(run, batch, batch.supervised_tokens)
    run.optimizer.step(0)
    assert all(torch.equal(value, run.model.get_parameter(name)) for name, value in frozen.items())


def test_all_ten_projections_carry_adapters(make):
    run, _ = build(make(model="qwen3.5-tiny"))
    assert {adapter.name.rpartition(".")[2] for adapter in adapters(run.model)} == set(run.config.lora.targets)


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [
        (("query",), ["query"]),
        ((), []),
        (("q_proj", "k_prj"), ["k_prj"]),
        (("lm_head",), ["lm_head"]),
        (("in_proj_z",), ["in_proj_z"]),  # of the default targets, but not in this model
    ],
)
def test_targets_that_match_nothing_are_named(make, targets, wrong):
    with pytest.raises(UserError) as error:
        build(make(lora={"targets": targets}))
    assert str(error.value).startswith(f"lora.targets {wrong} match no projection of this model; it has ['down_proj', ")


@pytest.fixture
def adapter_folder(make, tmp_path) -> Path:
    run, _ = build(make())
    return saved(run, tmp_path / "adapters")


def rewrite_settings(folder: Path, **changes: object) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_FILE)


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
EXTRA = "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight"
DAMAGES = {
    "wrong alpha": (lambda f: rewrite_settings(f, lora_alpha=16.0), "scales by 4.0, this run by 2.0"),
    "wrong rank": (lambda f: rewrite_settings(f, r=16), "scales by 0.5, this run by 2.0"),
    "rank zero": (lambda f: rewrite_settings(f, r=0), "r is 0"),
    "alpha a string": (lambda f: rewrite_settings(f, lora_alpha="8"), "lora_alpha 8; numbers are expected"),
    "rslora": (lambda f: rewrite_settings(f, use_rslora=True), "use_rslora is True; only plain LoRA"),
    "alpha pattern": (lambda f: rewrite_settings(f, alpha_pattern={"q_proj": 3}), "alpha_pattern"),
    "settings a list": (lambda f: (f / ADAPTER_CONFIG).write_text("[1]"), "holds no JSON object"),
    "settings no JSON": (lambda f: (f / ADAPTER_CONFIG).write_text("{"), "can't be read"),
    "settings no text": (lambda f: (f / ADAPTER_CONFIG).write_bytes(b"\xff\xfe"), "can't be read"),
    "tensors damaged": (lambda f: (f / ADAPTER_FILE).write_bytes(b"\x08" * 40), "can't be read"),
    "tensors cut off": (lambda f: (f / ADAPTER_FILE).write_bytes((f / ADAPTER_FILE).read_bytes()[:-9]), "can't be read"),
    "no tensors": (lambda f: (f / ADAPTER_FILE).unlink(), f"{ADAPTER_FILE} is not there"),
    "no settings": (lambda f: (f / ADAPTER_CONFIG).unlink(), f"{ADAPTER_CONFIG} is not there"),
    "tensor missing": (lambda f: rewrite_tensors(f, lambda t: t.pop(KEY)), f"{KEY} is missing"),
    "tensor too many": (lambda f: rewrite_tensors(f, lambda t: t.update({EXTRA: t[KEY].clone()})), f"1 tensors .* {EXTRA}"),
    "tensor misshapen": (
        lambda f: rewrite_tensors(f, lambda t: t.update({KEY: t[KEY][:-1].clone()})),
        r"has shape \[383, 4\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_named(make, adapter_folder, damage):
    spoil, message = DAMAGES[damage]
    spoil(adapter_folder)
    with pytest.raises(UserError, match=message) as error:
        build(make(lora={"start_from": adapter_folder}))
    assert "lora.start_from: " in str(error.value) and str(adapter_folder) in str(error.value)


def test_another_rank_names_the_tensor_and_both_shapes(make, adapter_folder):
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight has shape \[4, 128\]; expected \[8, 128\]"):
        build(make(lora={"start_from": adapter_folder, "rank": 8, "alpha": 16.0}))
