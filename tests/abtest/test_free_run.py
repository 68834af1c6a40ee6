"""The free run: what it records, and how arms are pulled back to the reference on the way."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIG, tiny

from abtest import fingerprint as fp
from abtest import free_run as module
from abtest.catalogue.patching import around_micro_step, swap_optimizer
from abtest.free_run import KEYS, device_bytes, free_run, save_state, state_bytes, step_batches
from abtest.perturb import Start
from abtest.states import resync_steps
from loop.optim import learning_rate
from loop.run import Run
from loop.training import build, train

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
RESYNC = resync_steps(STEPS)


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def state_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.optimizer.state().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def started(model: str = "qwen3-tiny"):
    return tiny(model)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[dict, dict[int, Path]]:
    """The reference's run, and its optimizer's state before the steps at which others are resynced."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resync")
    files = {step: folder / f"{step}.safetensors" for step in RESYNC}
    run, dataset = started()

    def keep(step: int) -> None:
        if step in files:
            save_state(run, files[step])

    return free_run(run, dataset, STEPS, silent, before_step=keep), files


def test_thirty_steps_are_resynced_at_ten_and_twenty() -> None:
    assert resync_steps(30) == (10, 20) and RESYNC == (2, 4)


def test_what_is_recorded(reference) -> None:
    answer, _ = reference
    run, dataset = started()
    for key in KEYS:
        assert len(answer[key]) == STEPS
    for key in ("gradients", "state", "rng", "batch"):
        assert all(isinstance(mark, str) for mark in answer[key])
    assert len(set(answer["gradients"])) == len(set(answer["state"])) == len(set(answer["batch"])) == STEPS
    assert len(set(answer["rng"])) == 1  # nothing is drawn
    assert answer["lr"] == [learning_rate(CONFIG.optim, step, CONFIG.steps) for step in range(STEPS)]
    batches = [step_batches(run, dataset, step) for step in range(STEPS)]
    assert answer["supervised"] == [sum(batch.supervised_tokens for batch in own) for own in batches]
    assert (answer["replays"], answer["still"]) == ([0] * STEPS, [])
    assert all(math.isfinite(loss) for loss in answer["loss"]) and answer["loss"][-1] < answer["loss"][0]


def test_the_losses_are_those_of_training(reference) -> None:
    trained = train(CONFIG)
    run, dataset = build(CONFIG)
    assert tuple(free_run(run, dataset, CONFIG.steps, silent)["loss"]) == trained.losses


def test_another_run_has_the_same_bits_resynced_or_not(reference) -> None:
    answer, files = reference
    for resync in (None, files):
        assert free_run(*started(), STEPS, silent, resync=resync) == answer


def test_progress_is_told_and_steps_are_announced() -> None:
    told, announced = [], []
    free_run(*started(), 2, lambda done, total: told.append((done, total)), before_step=announced.append)
    assert told == [(1, 2), (2, 2)] and announced == [0, 1]


def drifts(run: Run) -> None:
    """A defect that grows: the optimizer's rate is off by ten per cent."""

    def change(kind: type) -> type:
        class Drifting(kind):
            def step(self, step: int):
                for master in self.masters.values():
                    if master.grad is not None:
                        master.data.add_(master.grad.sign(), alpha=-1e-4)
                return super().step(step)

        return Drifting

    swap_optimizer(run, change)


def test_a_run_that_diverges_is_pulled_back(reference) -> None:
    answer, files = reference
    run, dataset = started()
    drifts(run)
    same = {}

    def look(step: int) -> None:
        same[step] = step in files and equal(state_of(run), load_file(files[step]))

    pulled = free_run(run, dataset, STEPS, silent, resync=files, before_step=look)
    assert same == {step: step in RESYNC for step in range(STEPS)}
    for step in range(STEPS):  # at the steps resynced the weights are the reference's, and so is the loss
        assert (pulled["loss"][step] == answer["loss"][step]) is (step == 0 or step in RESYNC)

    run, dataset = started()
    drifts(run)
    free = free_run(run, dataset, STEPS, silent)
    assert pulled["loss"][:2] == free["loss"][:2]
    assert all(free["loss"][step] != answer["loss"][step] for step in range(1, STEPS))


def test_a_bf16_run_computes_with_what_it_was_handed(tmp_path: Path) -> None:
    run, _ = tiny("qwen3-tiny", "full", dtype="bfloat16")
    other, _ = tiny("qwen3-tiny", "full", dtype="bfloat16")
    with torch.no_grad():
        for master in other.optimizer.masters.values():
            master.add_(2**-7)
    save_state(other, tmp_path / "state.safetensors")
    module.take_state(run, tmp_path / "state.safetensors")
    for name, master in run.optimizer.masters.items():
        assert torch.equal(master, other.optimizer.masters[name])
        assert torch.equal(run.optimizer.parameters[name], master.bfloat16())
    assert (tmp_path / "state.safetensors").stat().st_size < state_bytes(run)  # there are no moments yet


def test_replicas_are_kicked_at_the_start_and_after_every_resync(reference, monkeypatch) -> None:
    answer, files = reference
    run, dataset = started()
    kicks, original = [], module.kick

    def watched(run: Run, seed: int, trained_only: bool = False, patience: float = 0) -> None:
        before = state_of(run)
        original(run, seed, trained_only, patience)
        handed = kicks and equal(before, load_file(files[RESYNC[len(kicks) - 1]]))
        kicks.append((seed, trained_only, bool(handed), not equal(before, state_of(run))))

    monkeypatch.setattr(module, "kick", watched)
    frozen = run.model.get_input_embeddings().weight.detach().clone()
    replica = free_run(run, dataset, STEPS, silent, resync=files, kick_seed=3)
    assert kicks == [(3, False, False, True), *((3 + 1000 * step, True, True, True) for step in RESYNC)]
    assert not torch.equal(run.model.get_input_embeddings().weight, frozen)
    assert replica["gradients"] == replica["state"] == replica["rng"] == replica["batch"] == []
    monkeypatch.undo()
    assert free_run(*started(), STEPS, silent, resync=files, kick_seed=3)["loss"] == replica["loss"]
    # So few steps may all come out with the reference's bits: how a CPU sums decides.
    others = [free_run(*started(), STEPS, silent, resync=files, kick_seed=seed)["loss"] for seed in range(4, 8)]
    losses = {tuple(own) for own in (answer["loss"], replica["loss"], *others)}
    assert len(losses) > 2
    assert all(abs(a / b - 1) < 1e-5 for own in losses for a, b in zip(own, answer["loss"], strict=True))


def test_a_replica_that_is_restored_is_the_one_that_would_be_built(reference) -> None:
    """Of a run that trained, with other frozen weights by then, moments, and a gradient left over."""
    _, files = reference
    built = {seed: free_run(*started(), STEPS, silent, resync=files, kick_seed=seed)["loss"] for seed in (3, 4)}
    run, dataset = started()
    marks = (fp.fingerprint(dict(run.model.named_parameters())), fp.fingerprint(run.optimizer.state()))
    start = Start.of(run)
    for seed in (4, 3, 4):
        assert free_run(run, dataset, STEPS, silent, resync=files, kick_seed=seed)["loss"] == built[seed]
        master = next(iter(run.optimizer.masters.values()))
        master.grad = torch.ones_like(master)
        start.restore(run)
        assert fp.fingerprint(dict(run.model.named_parameters())) == marks[0]
        state = run.optimizer.state()
        assert fp.fingerprint({name: value for name, value in state.items() if name.startswith("master.")}) == marks[1]
        assert not any(value.any() for name, value in state.items() if not name.startswith("master."))
        assert all(gradient is None for gradient in run.optimizer.gradients().values())


def leaves_out(run: Run, names: list[str]) -> None:
    """The optimizer never hands these on to AdamW."""

    def change(kind: type) -> type:
        class Forgetful(kind):
            def step(self, step: int):
                kept = {name: self.masters[name].detach().clone() for name in names}
                out = super().step(step)
                with torch.no_grad():
                    for name, value in kept.items():
                        self.masters[name].copy_(value)
                self.publish()
                return out

        return Forgetful

    swap_optimizer(run, change)


@pytest.mark.parametrize("resynced", [False, True])
def test_what_never_moves_is_named(reference, resynced: bool) -> None:
    """Also where a resync moves it: that was not the run's own doing."""
    run, dataset = started()
    names = sorted(run.optimizer.masters)[3:5]
    leaves_out(run, names)
    assert free_run(run, dataset, STEPS, silent, resync=reference[1] if resynced else None)["still"] == names


def test_what_moves_at_one_step_alone_is_not_still(reference) -> None:
    run, dataset = started()
    name = sorted(run.optimizer.masters)[0]
    leaves_out(run, [name])

    def nudge(step: int) -> None:
        if step == 1:
            run.optimizer.masters[name].data.add_(1e-3)

    assert free_run(run, dataset, STEPS, silent, resync=reference[1], before_step=nudge)["still"] == []


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph where there is no CUDA."""

    played = 0

    def replay(self) -> None:
        self.played += 1


def test_replays_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    run, dataset = started()
    graph, original = FakeGraph(), FakeGraph.replay

    def replays(micro_step, *arguments):
        graph.replay()
        return micro_step(*arguments)

    around_micro_step(run, replays)
    answer = free_run(run, dataset, 3, silent)
    assert (answer["replays"], graph.played) == ([CONFIG.grad_accum] * 3, 3 * CONFIG.grad_accum)
    assert FakeGraph.replay is original


def test_replays_are_no_longer_counted_after_an_error(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    original = FakeGraph.replay

    def fails(step: int) -> None:
        raise RuntimeError("out of graphs")

    with pytest.raises(RuntimeError, match="out of graphs"):
        free_run(*started(), 1, silent, before_step=fails)
    assert FakeGraph.replay is original


def test_the_memory_of_a_device_is_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1 << 30))
    assert device_bytes(torch.device("cuda")) == 1 << 30 and device_bytes(torch.device("cpu")) == 0
