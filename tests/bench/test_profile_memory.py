"""Memory by owner: storages counted once, with the first owner that has them, and a tiny run's owners by their sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.profile import memory
from loop.config import Config, DataConfig
from loop.run import Run
from loop.training import build, train_step

CPU = torch.device("cpu")


def test_a_storage_that_several_share_is_counted_once():
    whole = torch.zeros(100)
    shared = [whole, whole[3:7], whole.view(10, 10).T, whole.detach(), None, torch.empty(0)]
    assert list(memory.storages(shared, CPU).values()) == [400]
    assert list(memory.storages([whole[:1], torch.zeros(2)], CPU).values()) == [400, 8]  # a slice holds all of it
    assert memory.storages([], CPU) == {} and memory.storages([torch.zeros(3, device="meta")], CPU) == {}


def test_a_storage_belongs_to_the_first_owner_that_has_it():
    owners = {"trained": {1: 10, 2: 20}, "masters": {2: 20, 3: 30}, "gradients": {3: 30, 1: 10}}
    assert memory.disjoint(owners) == {"trained": {1: 10, 2: 20}, "masters": {3: 30}, "gradients": {}}


def config(**changes) -> Config:
    data = DataConfig(pack_length=128, max_examples=60, supervise="all")
    return dataclasses.replace(Config(device="cpu", data=data, steps=2), **changes)


def sizes(run: Run, dataset) -> dict:
    train_step(run, dataset, 0)
    batch = dataset.micro_batches(0, 1, 1)[0]
    found = memory.by_owner(run, batch)
    run.optimizer.zero_grad()
    return found


@pytest.fixture(scope="module")
def lora() -> tuple[Run, dict]:
    run, dataset = build(config())
    return run, sizes(run, dataset)


def test_owners_of_adapters_in_fp32(lora):
    run, found = lora
    trained = sum(4 * p.numel() for p in run.model.parameters() if p.requires_grad)
    assert found["trained"] == found["gradients"] == trained > 0
    assert found["masters"] == 0  # fp32 parameters are their own masters
    steps = 4 * len(run.optimizer.masters)
    assert found["moments"] == 2 * trained + steps
    frozen = sum(4 * p.numel() for p in run.model.parameters() if not p.requires_grad)  # a tied head is there once
    buffers = memory.storages(run.model.buffers(), CPU)
    assert found["frozen"] == frozen + sum(buffers.values())
    assert found["activations"] > 10 * 128 * 128 * 4 and found["rest"] is None and found["counted_by"] == "saved tensors"
    assert found["loss"] >= 128 * run.model.config.vocab_size * 4  # log-probabilities of every position, for backward


def test_what_was_borrowed_is_given_back(lora):
    from loop.model import cross_entropy_head

    run, _ = lora
    assert run.loss_head is cross_entropy_head
    assert not torch.nn.modules.module._global_forward_hooks


def test_recomputing_layers_keep_less(lora):
    run, dataset = build(config(gradient_checkpointing=True))
    found = sizes(run, dataset)
    assert 0 < found["activations"] < lora[1]["activations"] / 4
    assert found["loss"] == lora[1]["loss"]


def test_compute_in_bf16_has_masters_and_their_gradients():
    run, dataset = build(config(dtype="bfloat16", method="full"))
    found = sizes(run, dataset)
    numbers = sum(p.numel() for p in run.model.parameters())
    assert (found["trained"], found["masters"], found["gradients"]) == (2 * numbers, 4 * numbers, 4 * numbers)
    assert found["frozen"] == sum(memory.storages(run.model.buffers(), CPU).values())


def test_peaks_of_a_cpu_are_the_process():
    peaks = memory.peaks(CPU)
    assert peaks["peak"] > 1e8 and peaks["reserved"] is None


def test_every_owner_has_words(lora):
    assert set(lora[1]) | {"peak", "reserved"} == {*memory.WORDS, "counted_by"}
