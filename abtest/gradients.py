"""Per-parameter distance of an arm's gradients from the oracle's, and what two arms' distances say of each other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from abtest.limits import ALPHA_BETTER, ALPHA_T, ALPHA_T_FEW, NOTHING, ROW_FLOOR
from abtest.projection import Kept, Projected

SMALL = 64  # tensors with fewer elements are pooled across layers
FAINT = 1e-8  # of the mean |g*|^2: a batch with less is compared with so much, or it would outweigh every other


@dataclass
class Distances:
    """Sums per probe batch, keyed by parameter: |g - g*|^2, |g*|^2, <g, g*>; and of every row the first two of them over all
    batches, fp64 [2, rows]."""

    error: dict[str, list[float]] = field(default_factory=dict)
    norm: dict[str, list[float]] = field(default_factory=dict)
    dot: dict[str, list[float]] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    elements: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, gradients: Mapping[str, torch.Tensor | None], truth: Mapping[str, Kept]) -> None:
        """Adds one batch. A missing, extra, misshapen, non-finite or aliased gradient is a problem, never skipped. Where of
        the truth a projection is left, sums are of projections."""
        self.problems += _mismatch(gradients, truth)
        batch = len(next(iter(self.error.values()), ()))
        compared = {name: g for name in truth if (g := gradients.get(name)) is not None and g.shape == truth[name].shape}
        # All tensors' sums before the first is looked at: waiting for each takes longer than adding them up.
        for name, (values, rows) in _all_sums(compared, truth).items():
            if not math.isfinite(values[0]):
                self.problems.append(f"{name}: gradient is not finite in probe batch {batch}")
            self.elements += truth[name].numel()
            self.rows[name] = self.rows.get(name, 0) + rows
            for store, value in zip((self.error, self.norm, self.dot), values, strict=True):
                store.setdefault(name, []).append(value)


def _all_sums(
    gradients: Mapping[str, torch.Tensor], truth: Mapping[str, Kept]
) -> dict[str, tuple[list[float], torch.Tensor]]:
    """By name the three sums and the row sums of `_sums`, these on the CPU; the device is waited for twice."""
    if not gradients:
        return {}
    device = next(iter(gradients.values())).device
    sums, rows = zip(*(_sums(g.to(device), truth[name].to(device)) for name, g in gradients.items()), strict=True)
    own_rows = torch.cat(rows, dim=1).cpu().split([part.shape[1] for part in rows], dim=1)
    return dict(zip(gradients, zip(torch.stack(sums).tolist(), own_rows, strict=True), strict=True))


def _sums(gradient: torch.Tensor, exact: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """|g - g*|^2, |g*|^2 and <g, g*>, and the first two of these for every row; fp64 [3] and [2, rows]."""
    if isinstance(exact, Projected):
        gradient, exact = exact.alike(gradient), exact.values
    gradient, exact = gradient.double(), exact.double()
    rows = torch.stack([_by_row((gradient - exact).square_()), _by_row(exact.square())])
    return torch.cat([rows.sum(1), (gradient * exact).sum().reshape(1)]), rows


def _by_row(squares: torch.Tensor) -> torch.Tensor:
    return squares.flatten(1).sum(1) if squares.ndim >= 2 else squares.sum().reshape(1)


def _mismatch(gradients: Mapping[str, torch.Tensor | None], truth: Mapping[str, Kept]) -> list[str]:
    problems = [f"{name}: in the candidate only" for name in gradients if name not in truth]
    whole: list[tuple[str, torch.Tensor]] = []
    for name, exact in truth.items():
        gradient = gradients.get(name)
        if gradient is None:
            problems.append(f"{name}: no gradient")
        elif gradient.shape != exact.shape:
            problems.append(f"{name}: gradient of shape {list(gradient.shape)}, expected {list(exact.shape)}")
        elif gradient.numel():
            whole.append((name, gradient))
    return problems + _aliased(whole)


def _aliased(named: list[tuple[str, torch.Tensor]]) -> list[str]:
    """Gradients that share memory with one before them; views that merely take turns in it, such as columns, do not."""
    problems, open_spans = [], []
    for name, gradient in sorted(named, key=lambda pair: pair[1].data_ptr()):
        start = gradient.data_ptr()
        open_spans = [(end, other, tensor) for end, other, tensor in open_spans if start < end]
        for _, other, tensor in open_spans:
            if _overlap(tensor, gradient):
                problems.append(f"{name}: shares memory with the gradient of {other}")
                break
        open_spans.append((start + _extent(gradient) * gradient.element_size(), name, gradient))
    return problems


def _extent(tensor: torch.Tensor) -> int:
    """How many elements lie between a tensor's first and its last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, whose spans of memory overlap and of which `one` begins first, have a byte in common."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    ahead, uneven = divmod(other.data_ptr() - one.data_ptr(), one.element_size())
    if uneven or one.dtype != other.dtype:
        return True  # no two gradients that take turns look like that
    taken = torch.zeros(max(_extent(one), ahead + _extent(other)), dtype=torch.bool)
    taken.as_strided(one.shape, one.stride()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), ahead).any())


@dataclass(frozen=True)
class Comparison:
    """A candidate's gradient errors beside the reference's, over the probe batches of one state.

    rho: error ratio of the worst parameter; few: of the worst one that has less than `SMALL` elements in all layers
    together; geomean over parameters; row: error ratio of the worst row; alpha: largest significant difference of the
    projection on the oracle, of those that lead away from it; reference_error: the reference's relative error, root mean
    square over batches, median over parameters.
    share: of the parameters, how many have an oracle gradient that is not zero; the others can show nothing.
    words: by "rho", "few" and "row", what was worst and by how much either arm is off there: a ratio alone does not tell an
    error of the candidate's from a reference that happens to have next to none.
    """

    rho: float
    rho_name: str
    geomean: float
    row: float
    row_name: str
    alpha: float
    alpha_name: str
    reference_error: float
    share: float
    few: float = 1.0
    few_name: str = ""
    words: Mapping[str, str] = field(default_factory=dict)


def pooled(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Parameters by what they are compared as: small ones together with those of the same name in other layers."""
    groups: dict[str, list[str]] = {}
    for name, size in sizes.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name) if size < SMALL else name, []).append(name)
    return groups


def compare(reference: Distances, candidate: Distances, sizes: Mapping[str, int]) -> Comparison:
    """Both arms against the same oracle batches. `sizes` gives each parameter's number of elements."""
    groups = pooled({name: sizes[name] for name in reference.error})
    ratios, errors, off = {}, [], {}
    for key, names in groups.items():
        own, other, norms = (_per_batch(part, names) for part in (reference.error, candidate.error, reference.norm))
        if not any(norms + own + other):
            continue  # exactly zero, such as A's while B is zero
        if any(norms):
            errors.append(math.sqrt(_relative(own, norms) / len(norms)))
            off[key] = (math.sqrt(_relative(other, norms) / len(norms)), errors[-1])
        ratios[key] = _ratio(own, other, norms)
    alphas = {key: _alpha(reference, candidate, groups[key]) for key in ratios}
    ratios_of_rows = {name: _row_ratios(own, candidate.rows[name]) for name, own in reference.rows.items()}
    rows = {name: math.sqrt(float(values.max())) for name, values in ratios_of_rows.items()}
    few = {key: ratio for key, ratio in ratios.items() if sum(sizes[name] for name in groups[key]) < SMALL}
    many = {key: ratio for key, ratio in ratios.items() if key not in few}
    rho_name, few_name, alpha_name, row_name = (_worst(values) for values in (many, few, alphas, rows))
    return Comparison(
        rho=many.get(rho_name, 1.0),
        rho_name=rho_name,
        geomean=math.exp(sum(math.log(max(r, 1e-30)) for r in ratios.values()) / max(len(ratios), 1)),
        row=rows.get(row_name, 1.0),
        row_name=row_name,
        alpha=alphas.get(alpha_name, 0.0),
        alpha_name=alpha_name,
        reference_error=sorted(errors)[len(errors) // 2] if errors else 0.0,
        share=len(errors) / max(len(groups), 1),
        few=few.get(few_name, 1.0),
        few_name=few_name,
        words={"rho": _off(rho_name, off), "few": _off(few_name, off)}
        | _of_row(row_name, ratios_of_rows, reference, candidate),
    )


def _worst(values: Mapping[str, float]) -> str:
    return max(values, key=lambda key: math.inf if math.isnan(values[key]) else values[key], default="")


def _per_batch(part: Mapping[str, list[float]], names: list[str]) -> list[float]:
    return [math.fsum(values) if all(map(math.isfinite, values)) else math.nan
            for values in zip(*(part[name] for name in names), strict=True)]  # fmt: skip


def _relative(error: list[float], norm: list[float]) -> float:
    """e_p^2: squared relative errors, summed over probe batches. A batch in which the oracle's gradient is nothing, or next
    to it, is set beside the mean of the others."""
    typical = math.fsum(norm) / max(sum(n > 0 for n in norm), 1) or 1.0
    return sum(e / max(n, typical * (FAINT if n > 0 else 1.0)) for e, n in zip(error, norm, strict=True) if e != 0)


def _ratio(reference: list[float], candidate: list[float], norm: list[float]) -> float:
    """rho_p. Infinite for any error in a batch where truth and reference have no gradient at all."""
    if reference == candidate:
        return 1.0
    if any(n == 0 and own == 0 and other != 0 for own, other, n in zip(reference, candidate, norm, strict=True)):
        return math.inf
    nothing = NOTHING**2 * sum(n > 0 for n in norm)
    own, other = _relative(reference, norm) + nothing, _relative(candidate, norm) + nothing
    return math.sqrt(other / own) if own > 0 else math.inf


def _alpha(reference: Distances, candidate: Distances, names: list[str]) -> float:
    """|mean difference of <g, g*> / |g*|^2| between the arms where it is significant, paired over batches, else 0. And 0
    where it is small and the candidate's own projection is the nearer one to 1: a step that rounds less is no error."""
    norms, own, other = (_per_batch(part, names) for part in (reference.norm, reference.dot, candidate.dot))
    pairs = [(a / n, b / n) for a, b, n in zip(own, other, norms, strict=True) if n > 0]
    if len(pairs) < 3:
        return 0.0
    values = torch.tensor(pairs, dtype=torch.float64)
    differences = values[:, 1] - values[:, 0]
    mean, spread = float(differences.mean()), float(differences.std()) / math.sqrt(len(pairs))
    if math.isnan(mean):
        return math.nan
    one, two = ((values.mean(0) - 1).abs()).tolist()
    better = two <= one and abs(mean) <= ALPHA_BETTER
    significant = abs(mean) > ALPHA_T_FEW.get(len(pairs), ALPHA_T) * spread
    return abs(mean) if significant and not better else 0.0


def _row_ratios(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Squared error ratio of every row. Its error counts as at least `ROW_FLOOR` of the mean row's (RMS), and of what its
    gradient makes it, since errors go with gradients (correlation 0.8 to 1.0 over the rows of a tensor, in bf16): rows that
    the reference happens to hit, or that have next to no gradient, would divide by nothing. And as `NOTHING` of the mean
    row's gradient. Both [2, rows], of `Distances`."""
    (own, norm), other = reference, candidate[0]
    usual = own.mean() * (norm / norm.mean()).nan_to_num(nan=0.0).clamp(min=1.0)
    floor = usual * ROW_FLOOR**2 + NOTHING**2 * norm.mean()
    return ((other + floor) / (own + floor)).nan_to_num(nan=1.0 if not other.isnan().any() else math.inf)


def _off(name: str, errors: Mapping[str, tuple[float, float]]) -> str:
    """errors: by name the candidate's relative error and the reference's, root mean square over batches."""
    if name not in errors:
        return name
    candidate, reference = (f"{100 * error:.2g} %" for error in errors[name])
    return f"{name}: off by {candidate} of the gradient, the reference by {reference}"


def _of_row(name: str, ratios: Mapping[str, torch.Tensor], reference: Distances, candidate: Distances) -> dict[str, str]:
    """The row with the largest ratio: both arms' errors and its gradient, over the reference's mean row (RMS)."""
    if name not in ratios:
        return {}
    row = int(ratios[name].argmax())
    (own, norm), other = reference.rows[name], candidate.rows[name][0]
    error, beside, gradient = _over(other[row], own), _over(own[row], own), _over(norm[row], norm)
    return {"row": f"{name}, row {row}: error {error}, the reference's {beside}, gradient {gradient} times the mean row's"}


def _over(square: torch.Tensor, rows: torch.Tensor) -> str:
    return f"{math.sqrt(float(square / rows.mean())):.2g}" if rows.mean() > 0 else "?"
