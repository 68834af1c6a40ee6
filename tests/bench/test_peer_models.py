"""Peers' models: fed as their collators feed them, from the run's weights, through their own code as far as it is here."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from abtest import patience
from abtest.update import check_update
from abtest.worker import Worker
from bench.peers import compiled, find, transformers_peft, unsloth
from bench.peers.ready import Unavailable, bound_kernels, flattened, modelling_of, one_text, raw_labels
from bench.peers.worker import PeerWorker
from loop.batch import IGNORE, PackedBatch
from loop.config import Config, DataConfig, LoraConfig
from loop.recipe import to_plain
from loop.training import accumulate

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CONFIG = Config(
    model="qwen3-shallow-tiny", steps=4, device="cpu", dtype="float32", repeatable_attention=True,
    lora=LoraConfig(rank=4, alpha=8.0), data=DataConfig(pack_length=192),
)  # fmt: skip
HYBRID = dataclasses.replace(CONFIG, model="qwen3.5-shallow-tiny")
LEAK = "editing documents outside the loss leaves the micro-step unchanged"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other are many times slower on a box shared with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What a step is fed


def batch(rows: int = 2) -> PackedBatch:
    ids = torch.arange(rows * 8).reshape(rows, 8)
    labels = torch.where(torch.tensor([0, 1, 0, 1, 0, 1, 1, 0]).bool(), ids + 1, IGNORE)
    positions = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2]).expand(rows, -1).contiguous()
    ends = torch.cat([torch.tensor([3, 5, 8]) + 8 * row for row in range(rows)])
    return PackedBatch(ids, labels, positions, F.pad(ends, (1, 0)).int(), 8 * rows, int((labels != IGNORE).sum()))


def test_labels_that_a_model_shifts_come_out_as_the_loop_has_them():
    whole = batch()
    for labels in (flattened(whole)["labels"], one_text(whole)["labels"]):
        shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]  # as transformers' loss does
        assert torch.equal(shifted.reshape(whole.labels.shape), whole.labels)
    assert torch.equal(raw_labels(whole.labels)[:, 0], torch.tensor([IGNORE, IGNORE]))


def test_a_pack_is_fed_as_transformers_own_collator_feeds_it():
    from transformers import DataCollatorWithFlattening

    whole = batch()
    raw = one_text(whole)
    bounds = list(zip(whole.cu_seqlens[:-1].tolist(), whole.cu_seqlens[1:].tolist(), strict=True))
    documents = [{key: raw[key].flatten()[a:b] for key in ("input_ids", "labels")} for a, b in bounds]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    wanted, ours = collate(documents), flattened(whole)
    assert set(wanted) - set(ours) == {"max_length_q", "max_length_k"}
    for key, value in ours.items():
        assert torch.equal(value, wanted[key]) and value.dtype == wanted[key].dtype, key


# transformers + PEFT beside stock


def workers(config: Config, peer: str = "transformers_peft") -> tuple[Worker, PeerWorker, dict, dict]:
    stock, theirs = Worker(io.StringIO()), PeerWorker(io.StringIO(), find(peer))
    own = dataclasses.replace(config, gradient_checkpointing=theirs.peer.checkpointing)
    return stock, theirs, stock.build(to_plain(config), []), theirs.build(to_plain(own), [])


def distance(stock: Worker, peer: Worker, one: PackedBatch) -> float:
    """The largest relative distance of any parameter's gradient."""
    found = []
    for run in (stock.run, peer.run):
        run.optimizer.zero_grad()
        accumulate(run, [one], one.supervised_tokens)
        found.append({name: gradient.clone() for name, gradient in run.optimizer.gradients().items()})
        run.optimizer.zero_grad()
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / ours[name].norm().clamp(min=1e-12)) for name in ours)


def alone(packed: PackedBatch) -> PackedBatch:
    """The same tokens as one document."""
    L = packed.positions
    bounds = torch.tensor([0, L], dtype=torch.int32)
    return dataclasses.replace(packed, position_ids=torch.arange(L)[None], cu_seqlens=bounds)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("config", [CONFIG, HYBRID], ids=lambda config: config.model)
def test_it_starts_where_stock_starts_and_has_its_gradients_on_a_single_document(config, method, one_thread):
    stock, peer, ours, theirs = workers(dataclasses.replace(config, method=method))
    for key in ("weights", "frozen", "elements", "data", "flops", "seed", "state_bytes"):
        assert ours[key] == theirs[key], key
    assert theirs["refused"] == {} and theirs["peer"]["recomputed"] == "every layer"
    assert not any("PackedDeltaNet" in path for path in theirs["paths"])
    packed = stock.dataset.micro_batches(0, 1, 1)[0]
    assert len(packed.lengths) > 1
    assert distance(stock, peer, alone(packed)) < 1e-3  # of the worst parameter: four decay rates of a layer
    leaks = distance(stock, peer, packed) > 1e-2
    assert leaks == (config.model == "qwen3.5-shallow-tiny")  # transformers' own delta rule pays no heed to boundaries


def test_in_bf16_it_has_peft_s_fp32_adapters_under_autocast_and_the_same_weights(one_thread):
    stock, peer, ours, theirs = workers(dataclasses.replace(HYBRID, dtype="bfloat16"))
    assert (ours["weights"], ours["frozen"]) == (theirs["weights"], theirs["frozen"])
    assert theirs["peer"]["autocast"] == "bfloat16" and theirs["peer"]["trained"] == ["float32"]
    assert distance(stock, peer, alone(stock.dataset.micro_batches(0, 1, 1)[0])) < 0.1


def test_adapters_that_a_run_starts_from_are_the_peer_s_too(tmp_path, one_thread):
    from loop import lora

    first = Worker(io.StringIO())
    first.build(to_plain(CONFIG), [])
    for parameter in first.run.optimizer.parameters.values():
        parameter.data.add_(0.01)
    lora.save_adapters(first.run.model, CONFIG.lora, tmp_path, "m")
    started = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, start_from=tmp_path))
    _, _, ours, theirs = workers(started)
    assert ours["weights"] == theirs["weights"] != first.build(to_plain(CONFIG), [])["weights"]


@pytest.fixture
def one_state(tmp_path, one_thread):
    """A peer's worker and what its commands are given: a state's weights, as stock wrote them."""
    stock, peer, _, _ = workers(HYBRID)
    path = str(tmp_path / "state.safetensors")
    stock.save_weights(path)
    return peer, {"weights": path, "state": "step 0", "count": 3, "seed": 0}


def test_its_structure_is_judged_by_whole_steps(one_state, monkeypatch):
    peer, given = one_state
    found = {f["name"]: f for f in peer.structure(**given, indexes=[0, 1, 2], repeats=2)["findings"]}
    assert [name for name, finding in found.items() if not finding["passed"]] == [LEAK]
    assert {"inputs unmodified", "2 repeats have the same bits", "other boundaries give other gradients"} <= set(found)

    def breaks(*arguments):
        raise RuntimeError("out of\npaper")

    monkeypatch.setattr("bench.peers.worker.repeated", breaks)
    again = {f["name"]: f for f in peer.structure(**given, indexes=[0, 1, 2], repeats=2)["findings"]}
    assert again["repeats have the same bits"]["detail"] == "it raises RuntimeError: out of" and LEAK in again


@pytest.mark.parametrize("short", [False, True])
def test_checking_the_update_leaves_the_run_as_it_was(short, one_state, monkeypatch):
    """Also where it lacked memory at first."""
    peer, given = one_state
    peer.free_run(2)
    before, calls = {name: value.clone() for name, value in peer.run.optimizer.state().items()}, []

    def checked(run, seed):
        calls.append(run)
        assert peer.run.optimizer is None, "it takes memory beside the one that is checked"
        answer = check_update(run, seed)
        if short and len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer

    monkeypatch.setattr("bench.peers.worker.check_update", checked)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    report_of = peer.update(**given, alone=False)
    assert len(calls) == 1 + short
    assert report_of["error"] <= report_of["limit"] and not report_of["problems"]
    after = peer.run.optimizer.state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    work = peer.work(**given, index=0)
    assert "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet" in work["modules"]


def test_when_it_is_timed_gradients_are_its_own(one_thread):
    _, peer, _, _ = workers(dataclasses.replace(CONFIG, method="full", dtype="bfloat16"))
    totals = peer.prepare_timing(1, 1)
    assert totals["positions"] == 192 and peer.time_block()["seconds"] > 0
    batch = peer.batches[0]
    peer.run.micro_step(peer.run, batch, batch.supervised_tokens)
    gradients = {p.grad.dtype for p in peer.run.optimizer.parameters.values() if p.grad is not None}
    assert gradients == {torch.bfloat16}
    peer.time_block()
    assert all(p.grad is None for p in peer.run.optimizer.parameters.values())


def test_what_it_has_nothing_for_is_refused_in_words(monkeypatch, one_thread):
    def nothing(peer, config):
        raise Unavailable("the model has no gated-delta layers")

    monkeypatch.setattr(transformers_peft, "build", nothing)
    made = PeerWorker(io.StringIO(), find("transformers_peft"))
    assert made.build(to_plain(CONFIG), []) == {"refused": {"transformers_peft": "the model has no gated-delta layers"}}


# The other peers, as far as they go without their packages


def test_compiled_layers_keep_the_delta_rule_out(monkeypatch, one_thread):
    modelling = modelling_of(HYBRID)
    monkeypatch.setattr(modelling, compiled.RULE, getattr(modelling, compiled.RULE))  # put back afterwards
    peer = find("transformers_peft_compile")
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # monkeypatch would delete it
        ready = compiled.build(peer, dataclasses.replace(HYBRID, gradient_checkpointing=False))
    assert ready.took["outside the graphs"] == [compiled.RULE] and ready.took["compiled"] == "2 decoder layers"
    assert all(layer._compiled_call_impl is not None for layer in ready.model.get_decoder().layers)
    assert ready.model.config._attn_implementation == "sdpa" and not ready.eager
    assert compiled.RULE not in bound_kernels(modelling)  # it is the wrapper that stays eager now


FLA = '''
import torch
def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, cu_seqlens=None, **options):
    """Stands in for FLA's: transformers' own, document by document; without boundaries it breaks."""
    from transformers.models.qwen3_5 import modeling_qwen3_5
    import inspect
    rule = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    bounds = cu_seqlens.tolist()
    parts = [rule(*(x[:, a:b] for x in (q, k, v, g, beta)), use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)[0]
             for a, b in zip(bounds, bounds[1:])]
    return torch.cat(parts, dim=1), None
'''
ASK = """
import io, json, sys
from bench.peers import find
from bench.peers.worker import PeerWorker
for config in sys.argv[2:]:
    worker = PeerWorker(io.StringIO(), find(sys.argv[1]))
    answer = worker.build(json.loads(config), [])
    if not answer["refused"]:
        packed = worker.dataset.micro_batches(0, 1, 1)[0]
        answer["logits"] = worker.run.model(**worker.ready.inputs(packed)).logits.double().sum().item()
    print(json.dumps(answer))
"""


def asked(name: str, path: Path, *configs: Config) -> list[dict]:
    """What a peer's worker answers to each in a process where `path` comes first."""
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    words = [sys.executable, "-c", ASK, name, *(json.dumps(to_plain(config)) for config in configs)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(configs) :]]


def test_fla_is_what_transformers_binds_and_is_told_of_boundaries(tmp_path, one_thread):
    ops = tmp_path / "fla" / "ops"
    ops.mkdir(parents=True)
    for folder in (ops.parent, ops):
        (folder / "__init__.py").touch()
    (ops / "gated_delta_rule.py").write_text(FLA, encoding="utf-8")
    dense, bound = asked("transformers_peft_fla", tmp_path, CONFIG, HYBRID)
    assert bound["peer"]["bound"]["torch_chunk_gated_delta_rule"] == "fla.ops.gated_delta_rule.chunk_gated_delta_rule"
    assert bound["peer"]["bound"]["causal_conv1d_fn"].startswith("transformers.")
    (plain,) = asked("transformers_peft", tmp_path, HYBRID)  # FLA is there, and hidden from it
    assert plain["peer"]["bound"]["torch_chunk_gated_delta_rule"].startswith("transformers.")
    assert plain["weights"] == bound["weights"] and plain["logits"] != bound["logits"]
    assert dense["refused"] == {
        "transformers_peft_fla": "the model has no gated-delta layers, so installing FLA changes nothing"
    }


class FastLanguageModel:
    """Stands in for Unsloth's: its arguments, PEFT's adapters."""

    @staticmethod
    def from_pretrained(
        model_name, max_seq_length, dtype, load_in_4bit, full_finetuning, use_gradient_checkpointing, offload_embedding,
        random_state,
    ):  # fmt: skip
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert max_seq_length == 192 and not load_in_4bit and use_gradient_checkpointing is False
        return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(
        model, r, target_modules, lora_alpha, lora_dropout, bias, use_gradient_checkpointing, random_state
    ):  # fmt: skip
        import peft

        return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))

    @staticmethod
    def for_training(model):
        model.train()


@pytest.mark.parametrize(("method", "trained"), [("lora", "float32"), ("full", "bfloat16")])
def test_unsloth_gets_the_run_s_weights_and_adapters_from_a_folder(method, trained, monkeypatch, one_thread):
    stand_in = types.ModuleType("unsloth")
    stand_in.FastLanguageModel = FastLanguageModel
    monkeypatch.setitem(sys.modules, "unsloth", stand_in)
    monkeypatch.setattr(unsloth, "_settle", lambda: None)
    monkeypatch.setattr(unsloth, "_observed", lambda inner: {"decoder layers": {"compiled whole": 4}})
    config = dataclasses.replace(HYBRID, method=method, dtype="bfloat16")
    _, peer, ours, theirs = workers(config, "unsloth_wrapped")
    for key in ("weights", "frozen", "elements"):
        assert ours[key] == theirs[key], key
    assert theirs["peer"]["trained"] == [trained] and theirs["peer"]["decoder layers"] == {"compiled whole": 4}
    assert peer.ready.autocast == (torch.bfloat16 if method == "lora" else None)
    assert peer.ready.inputs is one_text


def test_unsloth_s_packed_rows_have_the_documents_lengths():
    rows = unsloth.packed(batch())
    assert rows["packed_seq_lengths"].tolist() == [3, 2, 3, 3, 2, 3] and rows["packed_seq_lengths"].dtype == torch.int32
    assert set(rows) == {"input_ids", "labels", "position_ids", "packed_seq_lengths"} and rows["input_ids"].shape == (1, 16)
