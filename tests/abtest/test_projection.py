"""Projected gradients: what of a comparison they keep, exactly or nearly; nothing about a gradient goes unnoticed."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import CONFIG

from abtest import projection
from abtest.gate import gradient_checks
from abtest.gradients import Comparison, Distances, compare
from abtest.projection import WIDTH, Projected, keep, kept, project
from abtest.worker import Worker
from loop.recipe import to_plain

SHAPES = {"up": (96, 700), "down": (160, 500), "norm": (96,)}
BATCHES, NOISE = 10, 0.02


@pytest.fixture(autouse=True)
def every_matrix_is_large(monkeypatch) -> None:
    monkeypatch.setattr(projection, "LARGE", 1)


def drawn(seed: int, rank: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Of `rank`, as gradients of few tokens are; of full rank for None."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...]) -> torch.Tensor:
        if rank is None or len(shape) < 2:
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        sides = (
            torch.randn(size, generator=generator, dtype=torch.float64) for size in ((shape[0], rank), (rank, shape[1]))
        )
        return torch.matmul(*sides)

    return [{name: one(shape) for name, shape in SHAPES.items()} for _ in range(BATCHES)]


def noisy(truth: list[dict], seed: int, rank: int | None = None) -> list[dict]:
    """Off by `NOISE` of each tensor's size, in a direction of this rank."""
    kicks = drawn(seed, rank)
    return [
        {name: g + NOISE * float(g.norm()) * kick[name] / float(kick[name].norm()) for name, g in batch.items()}
        for batch, kick in zip(truth, kicks, strict=True)
    ]


def in_files(truth: list[dict]) -> list[dict]:
    return [kept(keep(batch, f"probe {index}")) for index, batch in enumerate(truth)]


def judged(candidate: list[dict], reference: list[dict], truth: list[dict]) -> Comparison:
    sides = []
    for arm in (reference, candidate):
        sides.append(Distances())
        for batch, exact in zip(arm, truth, strict=True):
            sides[-1].add(batch, exact)
    assert not sides[1].problems and sides[1].elements == BATCHES * sum(map(math.prod, SHAPES.values()))
    return compare(*sides, {name: math.prod(shape) for name, shape in SHAPES.items()})


def failing(comparison: Comparison) -> set[str]:
    return {check.name for check in gradient_checks("x", comparison) if not check.passed}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**56 - 1), st.integers(1, 900), st.integers(1, 5))
def test_projections_are_linear_and_a_single_element_counts_with_its_full_size(seed, columns, rows):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed % 1000), dtype=torch.float64)
    projected = project(matrix, seed)
    assert projected.shape == (rows, WIDTH) and projected.dtype == torch.float64
    torch.testing.assert_close(project(3 * matrix, seed), 3 * projected)
    alone = torch.zeros(rows, columns)
    alone[rows // 2, columns // 3] = -7.0
    torch.testing.assert_close(project(alone, seed).square().sum(1), alone.double().square().sum(1))


def test_squared_lengths_are_right_on_average_and_as_near_as_said():
    """Of equal elements, for which signs are at their worst."""
    row = torch.ones(1, 400, dtype=torch.float64)
    factors = torch.tensor([float(project(row, seed).square().sum()) / 400 for seed in range(2000)])
    spread = math.sqrt(2 / WIDTH)
    assert float(factors.mean()) == pytest.approx(1, abs=4 * spread / math.sqrt(2000))
    assert 0.8 * spread < float(factors.std()) < 1.1 * spread


def test_pieces_change_nothing(monkeypatch):
    matrix = torch.randn(50, 30, dtype=torch.float64)
    whole = project(matrix, 5)
    monkeypatch.setattr(projection, "AT_ONCE", 70)
    torch.testing.assert_close(project(matrix, 5), whole)


def test_signs_differ_from_tensor_to_tensor_and_probe_to_probe():
    same = {"a": torch.ones(4, 90), "b": torch.ones(4, 90)}
    files = [kept(keep(same, probe)) for probe in ("one", "other", "one")]
    seeds = [file[name].seed for file in files for name in "ab"]
    assert seeds[:2] == seeds[4:] and len(set(seeds)) == 4


def test_what_is_small_or_no_matrix_stays_whole(monkeypatch):
    monkeypatch.setattr(projection, "LARGE", 40)
    whole = {"large": torch.ones(4, 10), "small": torch.ones(4, 9), "vector": torch.ones(99), "conv": torch.ones(20, 1, 4)}
    found = kept(keep(whole, "probe"))
    assert {name for name, value in found.items() if isinstance(value, Projected)} == {"large"}
    assert all(torch.equal(found[name], whole[name]) for name in ("small", "vector", "conv"))
    assert (found["large"].shape, found["large"].numel()) == (torch.Size((4, 10)), 40)


def test_a_file_holds_what_is_kept_in_the_gradients_dtype(tmp_path: Path):
    gradients = {"model.layers.0.up": torch.randn(6, 300), "norm": torch.randn(6)}
    save_file(keep(gradients, "probe"), tmp_path / "x.safetensors")
    found = kept(load_file(tmp_path / "x.safetensors"))
    assert found.keys() == gradients.keys() and torch.equal(found["norm"], gradients["norm"])
    values = found["model.layers.0.up"].values
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), found["model.layers.0.up"].alike(gradients["model.layers.0.up"]))


@pytest.mark.parametrize("rank", [None, 8, 1])
@pytest.mark.parametrize("seed", range(3))
def test_honest_rounding_passes_also_where_all_of_it_lies_in_one_direction(rank, seed):
    truth = drawn(seed, rank)
    reference, candidate = noisy(truth, 10 + seed, rank), noisy(truth, 20 + seed, rank)
    whole, found = (judged(candidate, reference, side) for side in (truth, in_files(truth)))
    assert not failing(found)
    assert found.rho == pytest.approx(whole.rho, rel=0.15) and found.geomean == pytest.approx(whole.geomean, rel=0.1)
    assert found.reference_error == pytest.approx(whole.reference_error, rel=0.1)


def scaled(batch: dict) -> None:
    batch["down"] *= 1.01


def wrong_row(batch: dict) -> None:
    batch["up"][17] *= 1.3


def wrong_element(batch: dict) -> None:
    batch["up"][17, 23] += 0.3 * float(batch["up"][17].norm())


def noisier(batch: dict) -> None:
    batch["down"] += 3 * NOISE * torch.randn(SHAPES["down"], generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("spoil", "name"),
    [(scaled, "gradient scale error"), (wrong_row, "gradient error ratio, worst row"),
     (wrong_element, "gradient error ratio, worst row"), (noisier, "gradient error ratio, worst parameter")],
)  # fmt: skip
def test_defects_show_as_they_do_in_whole_gradients(spoil, name):
    truth = drawn(0)
    candidate = noisy(truth, 2)
    for batch in candidate:
        spoil(batch)
    whole, found = (failing(judged(candidate, noisy(truth, 1), side)) for side in (truth, in_files(truth)))
    assert name in whole and name in found


def test_the_same_gradients_have_ratio_one():
    truth = drawn(0)
    found = judged(noisy(truth, 1), noisy(truth, 1), in_files(truth))
    assert (found.rho, found.geomean, found.row, found.alpha) == (1.0, 1.0, 1.0, 0.0)


def problems(gradients: dict) -> list[str]:
    (exact,) = in_files([{"up": torch.ones(6, 40), "down": torch.ones(6, 40)}])
    found = Distances()
    found.add(gradients, exact)
    return found.problems


def test_structure_is_never_skipped():
    good, nan = torch.ones(6, 40), torch.ones(6, 40)
    nan[3, 5] = math.nan
    assert problems({"up": good, "down": good.clone()}) == []
    assert problems({"up": good, "down": torch.ones(6, 39)}) == ["down: gradient of shape [6, 39], expected [6, 40]"]
    assert problems({"up": good, "down": good}) == ["down: shares memory with the gradient of up"]
    assert problems({"up": good, "down": nan}) == ["down: gradient is not finite in probe batch 0"]
    assert problems({"up": good}) == ["down: no gradient"]


def test_an_arm_is_compared_with_what_the_oracle_kept(tmp_path: Path):
    """The oracle's file and an arm's distances, by the worker's own commands."""
    config, count = to_plain(CONFIG) | {"method": "full", "grad_accum": 1}, 3
    at = {"state": "step 0", "weights": str(tmp_path / "w.safetensors"), "count": count, "seed": 0}
    oracle, arm = Worker(io.StringIO()), Worker(io.StringIO())
    oracle.build(config, [], exact=True)
    arm.build(config, [])
    arm.save_weights(at["weights"])
    for index in range(count):
        answer = oracle.oracle(**at, index=index, folder=str(tmp_path / "oracle"), budget=1 << 30)
        whole = sum(p.numel() * p.element_size() for p in oracle.run.model.parameters())
        assert Path(answer["path"]).stat().st_size < whole  # 64 numbers for rows of 128 and more
        arm.gradients(**at, index=index, truth=answer["path"])
    found = arm.distances("step 0", str(tmp_path / "rows.safetensors"))
    assert not found["problems"] and found["elements"] == count * sum(p.numel() for p in arm.run.optimizer.masters.values())
    relative = [math.sqrt(sum(found["error"][name]) / sum(norm)) for name, norm in found["norm"].items() if sum(norm)]
    assert 1e-8 < sorted(relative)[len(relative) // 2] < 1e-5  # fp32 beside fp64
