"""Distances from an oracle, and what two arms' distances say of each other."""

from __future__ import annotations

import math
import re

import pytest
import torch

from abtest import gate
from abtest.gate import gradient_checks
from abtest.gradients import Comparison, Distances, _alpha, compare

BATCHES = 10
SHAPES = {"layers.0.up.weight": (128, 32), "layers.1.up.weight": (128, 32), "norm.weight": (96,)}
SMALL = {f"layers.{layer}.A_log": (4,) for layer in range(12)}
NOISE = 0.02  # what bf16 leaves behind


def draws(shapes: dict, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(BATCHES)
    ]


def noisy(truth: list[dict], seed: int, noise: float = NOISE) -> list[dict]:
    """Every value off by `noise` of its size on average."""
    kicks = draws({name: value.shape for name, value in truth[0].items()}, seed)
    return [
        {name: value * (1 + noise * kick[name]) for name, value in batch.items()}
        for batch, kick in zip(truth, kicks, strict=True)
    ]


def distances(gradients: list[dict], truth: list[dict]) -> Distances:
    out = Distances()
    for batch, exact in zip(gradients, truth, strict=True):
        out.add(batch, exact)
    return out


def judged(candidate: list[dict], truth: list[dict], reference: list[dict] | None = None) -> Comparison:
    reference = noisy(truth, 1) if reference is None else reference
    sizes = {name: value.numel() for name, value in truth[0].items()}
    return compare(distances(reference, truth), distances(candidate, truth), sizes)


def failing(comparison: Comparison) -> set[str]:
    return {check.name for check in gradient_checks("x", comparison) if not check.passed}


@pytest.fixture(scope="module")
def truth() -> list[dict[str, torch.Tensor]]:
    return draws(SHAPES, 0)


def test_another_rounding_passes(truth):
    found = judged(noisy(truth, 2), truth)
    assert not failing(found) and found.alpha == 0.0
    assert found.reference_error == pytest.approx(NOISE, rel=0.1)  # of one batch, however many there are


def test_the_same_gradients_have_ratio_one(truth):
    found = judged(noisy(truth, 1), truth)
    assert (found.rho, found.geomean, found.row, found.alpha) == (1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_scale_error_of_one_percent_in_one_projection_shows_as_alpha_alone(truth, factor):
    candidate = noisy(truth, 2)
    for batch in candidate:
        batch["layers.1.up.weight"] *= factor
    found = judged(candidate, truth)
    assert found.alpha == pytest.approx(0.01, rel=0.1) and found.alpha_name == "layers.1.up.weight"
    assert failing(found) == {"gradient scale error"}


@pytest.mark.parametrize(("reference", "candidate"), [(NOISE, 4 * NOISE), (NOISE / 4, NOISE)])
def test_the_words_of_a_parameter_say_how_far_off_either_arm_is(truth, reference, candidate):
    """The ratio is 4 in both."""
    name = "layers.1.up.weight"
    own, other = noisy(truth, 1), noisy(truth, 2)
    for mine, theirs, fine, coarse in zip(own, other, noisy(truth, 1, reference), noisy(truth, 2, candidate), strict=True):
        mine[name], theirs[name] = fine[name], coarse[name]
    found = judged(other, truth, own)
    (check,) = [check for check in gradient_checks("x", found) if check.name == "gradient error ratio, worst parameter"]
    assert found.rho == pytest.approx(4, rel=0.1) and not check.passed
    percent = re.fullmatch(rf"{re.escape(name)}: off by (\S+) % of the gradient, the reference by (\S+) %", check.detail)
    assert [float(part) for part in percent.groups()] == pytest.approx([100 * candidate, 100 * reference], rel=0.1)


def test_one_wrong_row_of_128_shows_as_a_row_alone(truth):
    candidate = noisy(truth, 2)
    for batch in candidate:
        batch["layers.0.up.weight"][17] *= 1.25
    found = judged(candidate, truth)
    assert failing(found) == {"gradient error ratio, worst row"} and found.row_name == "layers.0.up.weight"
    assert re.fullmatch(
        r"layers\.0\.up\.weight, row 17: error 1\d, the reference's (0\.9|1)\S*, gradient (0\.9|1)\S* times the mean row's",
        found.words["row"],
    )


def test_the_words_of_a_row_tell_a_small_error_of_the_reference_from_a_large_one_of_the_candidate(truth):
    """The reference happens to hit row 5 at every batch; the candidate is off there by as much as anywhere."""
    name, reference = "layers.1.up.weight", noisy(truth, 1)
    for batch, exact in zip(reference, truth, strict=True):
        batch[name][5] = exact[name][5]
    found = judged(noisy(truth, 2), truth, reference)
    assert found.row_name == name and not failing(found)
    assert re.search(r"row 5: error (0\.[89]|1)\S*, the reference's 0, gradient", found.words["row"])


@pytest.mark.parametrize(("factor", "caught"), [(1.0, False), (1.25, True), (0.0, True)])
def test_a_row_of_large_gradients_that_the_reference_happens_to_hit(truth, factor, caught):
    """Errors go with gradients: ten times the gradient has ten times the error, and is no garbage for that."""
    name = "layers.1.up.weight"
    tenfold = torch.ones(128, 1, dtype=torch.float64)
    tenfold[9] = 10
    truth = [batch | {name: batch[name] * tenfold} for batch in truth]
    reference, candidate = noisy(truth, 1), noisy(truth, 2)
    for own, other, exact in zip(reference, candidate, truth, strict=True):
        own[name][9] = exact[name][9] * 1.001
        other[name][9] *= factor
    found = judged(candidate, truth, reference)
    assert ("gradient error ratio, worst row" in failing(found)) == caught
    assert not caught or found.words["row"].startswith(f"{name}, row 9: ")


@pytest.mark.parametrize("garbage", [0.0, 1e4])
def test_a_row_of_garbage_in_one_batch_of_ten_shows(truth, garbage):
    candidate = noisy(truth, 2)
    candidate[3]["layers.0.up.weight"][100] = garbage
    assert "gradient error ratio, worst row" in failing(judged(candidate, truth))


def test_small_tensors_are_pooled_across_layers():
    truth = draws(SMALL | SHAPES, 0)
    candidate = noisy(truth, 2)
    alone = {name: judged([{name: b[name]} for b in candidate], [{name: b[name]} for b in truth]).few for name in SMALL}
    assert max(alone.values()) > 1.3  # luck, when four numbers stand alone
    assert judged(candidate, truth).few < max(alone.values())
    for batch in candidate:
        batch["layers.7.A_log"] *= 1.5
    found = judged(candidate, truth)
    assert found.few > gate.RHO_FEW and found.few_name == "layers.*.A_log"


def test_tensors_at_the_limit_of_small_stand_alone():
    shapes = {"layers.0.w": (64,), "layers.1.w": (64,), "layers.0.v": (63,), "layers.1.v": (63,)}
    truth = draws(shapes, 0)
    candidate = noisy(truth, 2)
    for batch in candidate:
        batch["layers.1.w"] *= 2
    assert judged(candidate, truth).rho_name == "layers.1.w"
    for batch in candidate:
        batch["layers.1.v"] *= 9
    assert judged(candidate, truth).rho_name == "layers.*.v"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_a_problem_and_no_comparison_passes(truth, value):
    candidate = noisy(truth, 2)
    candidate[4]["norm.weight"][5] = value
    assert distances(candidate, truth).problems == ["norm.weight: gradient is not finite in probe batch 4"]
    assert not judged(candidate, truth).rho <= gate.RHO
    assert not judged(candidate, truth).row <= gate.ROW


def test_a_nan_in_the_first_parameter_is_not_outranked_by_a_later_one(truth):
    candidate = noisy(truth, 2)
    candidate[0]["layers.0.up.weight"][0, 0] = math.nan
    candidate[0]["norm.weight"] *= 1000
    assert math.isnan(judged(candidate, truth).rho)


def zeroed(batches: list[dict], name: str, which=range(BATCHES)) -> list[dict]:
    return [
        {key: torch.zeros_like(value) if key == name and index in which else value for key, value in batch.items()}
        for index, batch in enumerate(batches)
    ]


def test_gradients_that_are_zero_on_both_sides_count_for_nothing(truth):
    name = "layers.0.up.weight"
    zeros = zeroed(truth, name)
    found = judged(zeroed(noisy(truth, 2), name), zeros, zeroed(noisy(truth, 1), name))
    assert not failing(found) and found.row_name != name


@pytest.mark.parametrize("which", [range(BATCHES), [3]], ids=["every batch", "one batch"])
def test_a_gradient_where_there_should_be_none_fails(truth, which):
    name = "layers.0.up.weight"
    zeros, reference, candidate = (zeroed(side, name, which) for side in (truth, noisy(truth, 1), noisy(truth, 2)))
    candidate[3][name] = candidate[3][name].clone()
    candidate[3][name][0, 0] = 1e-6
    found = judged(candidate, zeros, reference)
    assert found.rho == math.inf and found.rho_name == name


def test_a_reference_without_error_allows_next_to_none(truth):
    assert judged(noisy(truth, 2), truth, reference=truth).rho > 1000
    assert not failing(judged(noisy(truth, 2, noise=1e-6), truth, reference=truth))
    assert not failing(judged(truth, truth, reference=truth))


def test_structure_is_never_skipped():
    truth = {"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.ones(4), "d": torch.ones(2)}
    shared = torch.ones(4)
    found = Distances()
    found.add({"a": torch.ones(3, 2), "b": shared, "c": shared, "d": None, "extra": torch.ones(1)}, truth)
    assert found.problems == [
        "extra: in the candidate only", "a: gradient of shape [3, 2], expected [2, 3]",
        "d: no gradient", "c: shares memory with the gradient of b",
    ]  # fmt: skip
    assert found.elements == 8  # b and c
    missing = Distances()
    missing.add({}, truth)
    assert len(missing.problems) == 4 and missing.elements == 0


def test_views_of_one_buffer_that_take_turns_are_not_aliased():
    truth = {"q": torch.ones(6, 4), "k": torch.ones(6, 4), "v": torch.ones(6, 4)}
    joint = torch.arange(72.0).reshape(6, 12)
    views = {name: joint[:, 4 * at : 4 * at + 4] for at, name in enumerate(truth)}

    def problems(gradients: dict) -> list[str]:
        found = Distances()
        found.add(gradients, truth)
        return found.problems

    assert problems(views) == []
    assert problems(views | {"k": joint[:, 3:7]}) == [
        "k: shares memory with the gradient of q"
    ]  # whose first column is q's last
    assert problems(views | {"v": joint.reshape(-1)[20:44].reshape(6, 4)}) == ["v: shares memory with the gradient of q"]


@pytest.mark.parametrize(("noise", "flagged"), [(1e-6, False), (2e-5, True)])
def test_luck_with_one_ill_conditioned_token_is_no_defect_below_what_counts_as_none(truth, noise, flagged):
    """In one probe one token's rounding is blown up, in the candidate thirty times as much as in the reference."""
    reference, candidate = noisy(truth, 1, noise), noisy(truth, 2, noise)
    for side, times in ((reference, 1), (candidate, 30)):
        side[4]["layers.0.up.weight"][7] *= 1 + times * noise
        side[4]["layers.0.up.weight"] *= 1 + times * noise / 3
    assert bool(failing(judged(candidate, truth, reference))) is flagged


def test_a_probe_without_a_gradient_neither_passes_everything_nor_fails_everyone(truth):
    """Rounding leaves something where the oracle has exactly nothing; that must not drown what the other probes show."""
    name = "layers.0.up.weight"
    zeros = zeroed(truth, name, [3])
    assert not failing(judged(noisy(zeros, 2), zeros, noisy(zeros, 1)))

    def rounding(side: list[dict], seed: int, size: float = 1e-4) -> list[dict]:
        kicks = draws(SHAPES, seed)
        return [{k: value + size * kicks[3][k] * (at == 3) for k, value in b.items()} for at, b in enumerate(side)]

    reference, candidate = rounding(noisy(zeros, 1), 8), rounding(noisy(zeros, 2), 9)
    assert not failing(judged(candidate, zeros, reference))
    for batch in candidate:
        batch[name] *= 1.05
    assert "gradient error ratio, worst parameter" in failing(judged(candidate, zeros, reference))
    loud = rounding(noisy(zeros, 2), 9, size=1.0)
    assert judged(loud, zeros, reference).rho > gate.RHO and judged(loud, zeros, reference).rho_name == name


def test_a_gradient_everywhere_near_nothing_in_one_probe_does_not_outweigh_the_others(truth):
    name = "layers.1.up.weight"
    faint = [{key: value * (1e-9 if key == name and i == 5 else 1) for key, value in b.items()} for i, b in enumerate(truth)]
    reference = [
        {k: v + 1e-6 * draws(SHAPES, 4)[0][k] for k, v in b.items()} for b in noisy(faint, 1)
    ]  # a thousand times that
    candidate = [{k: v + 1e-6 * draws(SHAPES, 5)[0][k] for k, v in b.items()} for b in noisy(faint, 2)]
    assert not failing(judged(candidate, faint, reference))
    for batch in candidate:
        batch[name] *= 1.05
    assert judged(candidate, faint, reference).rho > gate.RHO


@pytest.mark.parametrize(("factor", "caught"), [(1.004, False), (1.003, False), (1.0, True), (1.012, True)])
def test_a_projection_nearer_to_the_truth_than_the_reference_s_is_no_scale_error(truth, factor, caught):
    name = "layers.1.up.weight"
    reference, candidate = noisy(truth, 1), noisy(truth, 2)
    for own, other in zip(reference, candidate, strict=True):
        own[name], other[name] = 1.008 * own[name], factor * other[name]
    assert (judged(candidate, truth, reference).alpha > gate.ALPHA) == caught


@pytest.mark.parametrize("probes", [3, 4, 5, 7, 9, 10, 12])
def test_chance_looks_like_a_scale_error_as_rarely_over_few_probes_as_over_ten(probes):
    """Each of 4,000 parameters projects on the oracle as the reference does, but for noise above the limit."""
    count, generator = 4000, torch.Generator().manual_seed(probes)
    reference, candidate = Distances(), Distances()
    for index in range(count):
        name, ones = f"p{index}", [1.0] * probes
        noise = (1 + 0.05 * torch.randn(probes, generator=generator, dtype=torch.float64)).tolist()
        for arm, dot in ((reference, ones), (candidate, noise)):
            arm.norm[name], arm.error[name], arm.dot[name] = ones, ones, dot
    flagged = sum(_alpha(reference, candidate, [f"p{index}"]) > 0 for index in range(count))
    assert flagged <= 10  # 3 are expected over up to ten probes; with one limit for all it would be 150 over three
    candidate.dot["p0"] = [0.99 - 0.0001 * index for index in range(probes)]
    assert _alpha(reference, candidate, ["p0"]) == pytest.approx(0.01, rel=0.1)


def test_sums_are_what_they_say(truth):
    found = distances(noisy(truth, 2), truth)
    name, candidate = "layers.0.up.weight", noisy(truth, 2)
    errors = [(c[name] - t[name]).square() for c, t in zip(candidate, truth, strict=True)]
    assert found.error[name] == pytest.approx([float(e.sum()) for e in errors])
    assert found.norm[name] == pytest.approx([float(t[name].square().sum()) for t in truth])
    norms = sum(t[name].square().sum(1) for t in truth)
    torch.testing.assert_close(found.rows[name], torch.stack([sum(e.sum(1) for e in errors), norms]))
    assert found.rows["norm.weight"].shape == (2, 1)
    assert found.elements == BATCHES * (2 * 128 * 32 + 96)
