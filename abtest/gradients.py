"""Per-parameter distance of an arm's gradients from the oracle's, and what two arms' distances say of each other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from abtest.limits import ROW_FLOOR

SMALL = 64  # tensors with fewer elements are pooled across layers


@dataclass
class Distances:
    """Sums per probe batch, keyed by parameter: |g - g*|^2, |g*|^2, <g, g*>; and per row |g - g*|^2 over all batches."""

    error: dict[str, list[float]] = field(default_factory=dict)
    norm: dict[str, list[float]] = field(default_factory=dict)
    dot: dict[str, list[float]] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    elements: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, gradients: Mapping[str, torch.Tensor | None], truth: Mapping[str, torch.Tensor]) -> None:
        """Adds one batch. A missing, extra, misshapen, non-finite or aliased gradient is a problem, never skipped."""
        self.problems += _mismatch(gradients, truth)
        count = len(next(iter(self.error.values()), ()))
        for name, exact in truth.items():
            gradient = gradients.get(name)
            if gradient is None or gradient.shape != exact.shape:
                continue
            exact = exact.to(gradient.device).double()
            difference = gradient.double() - exact
            if not bool(torch.isfinite(difference).all()):
                self.problems.append(f"{name}: gradient is not finite in probe batch {count}")
            self.elements += exact.numel()
            squares = difference.square()
            rows = squares.flatten(1).sum(1) if squares.ndim >= 2 else squares.sum().reshape(1)
            self.rows[name] = self.rows.get(name, 0) + rows.cpu()
            values = torch.stack([squares.sum(), exact.square().sum(), (gradient.double() * exact).sum()]).tolist()
            for store, value in zip((self.error, self.norm, self.dot), values, strict=True):
                store.setdefault(name, []).append(value)


def _mismatch(gradients: Mapping[str, torch.Tensor | None], truth: Mapping[str, torch.Tensor]) -> list[str]:
    problems = [f"{name}: in the candidate only" for name in gradients if name not in truth]
    spans: list[tuple[int, int, str]] = []
    for name, exact in truth.items():
        gradient = gradients.get(name)
        if gradient is None:
            problems.append(f"{name}: no gradient")
        elif gradient.shape != exact.shape:
            problems.append(f"{name}: gradient of shape {list(gradient.shape)}, expected {list(exact.shape)}")
        elif gradient.numel():
            spans.append((gradient.data_ptr(), gradient.data_ptr() + gradient.nbytes, name))
    spans.sort()
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            problems.append(f"{other}: shares memory with the gradient of {one}")
    return problems


@dataclass(frozen=True)
class Comparison:
    """A candidate's gradient errors beside the reference's, over the probe batches of one state.

    rho: error ratio of the worst parameter; geomean over parameters; row: error ratio of the worst row;
    alpha: largest significant difference of the projection on the oracle; reference_error: the reference's relative
    error, root mean square over batches, median over parameters.
    share: of the parameters, how many have an oracle gradient that is not zero; the others can show nothing.
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


def pooled(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Parameters by what they are compared as: small ones together with those of the same name in other layers."""
    groups: dict[str, list[str]] = {}
    for name, size in sizes.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name) if size < SMALL else name, []).append(name)
    return groups


def compare(reference: Distances, candidate: Distances, sizes: Mapping[str, int]) -> Comparison:
    """Both arms against the same oracle batches. `sizes` gives each parameter's number of elements."""
    groups = pooled({name: sizes[name] for name in reference.error})
    ratios, errors = {}, []
    for key, names in groups.items():
        if not any(sum(reference.norm[n]) for n in names):
            if any(sum(candidate.error[n]) for n in names) and not any(sum(reference.error[n]) for n in names):
                ratios[key] = math.inf  # a gradient where the truth and the reference have none
            continue  # exactly zero, such as A's while B is zero
        e_reference, e_candidate = _error(reference, names), _error(candidate, names)
        errors.append(e_reference / math.sqrt(len(reference.error[names[0]])))
        ratios[key] = _ratio(e_candidate, e_reference)
    alphas = {key: _alpha(reference, candidate, names) for key, names in groups.items() if key in ratios}
    rows = {name: _worst_row(reference.rows[name], candidate.rows[name]) for name in reference.rows}
    rho_name, alpha_name, row_name = _worst(ratios), _worst(alphas), _worst(rows)
    return Comparison(
        rho=ratios.get(rho_name, 1.0),
        rho_name=rho_name,
        geomean=math.exp(sum(math.log(max(r, 1e-30)) for r in ratios.values()) / max(len(ratios), 1)),
        row=rows.get(row_name, 1.0),
        row_name=row_name,
        alpha=alphas.get(alpha_name, 0.0),
        alpha_name=alpha_name,
        reference_error=sorted(errors)[len(errors) // 2] if errors else 0.0,
        share=len(ratios) / max(len(groups), 1),
    )


def _worst(values: Mapping[str, float]) -> str:
    return max(values, key=lambda key: math.inf if math.isnan(values[key]) else values[key], default="")


def _error(side: Distances, names: list[str]) -> float:
    """e_p: relative error, pooled over probe batches; any error where the oracle's gradient is zero is infinite."""
    batches = len(side.error[names[0]])
    total = 0.0
    for batch in range(batches):
        norm, error = (sum(part[name][batch] for name in names) for part in (side.norm, side.error))
        if error != 0:
            total += error / norm if norm > 0 else math.inf
    return math.sqrt(total)


def _ratio(candidate: float, reference: float) -> float:
    if candidate == reference:
        return 1.0
    return candidate / reference if reference > 0 else math.inf


def _alpha(reference: Distances, candidate: Distances, names: list[str]) -> float:
    """|mean difference of <g, g*> / |g*|^2| between the arms where it is significant (paired t > 5), else 0."""
    differences = []
    for batch in range(len(reference.error[names[0]])):
        norm = sum(reference.norm[name][batch] for name in names)
        if norm > 0:
            differences.append(sum(candidate.dot[n][batch] - reference.dot[n][batch] for n in names) / norm)
    if len(differences) < 3:
        return 0.0
    values = torch.tensor(differences, dtype=torch.float64)
    mean, spread = float(values.mean()), float(values.std()) / math.sqrt(len(differences))
    if math.isnan(mean):
        return math.nan
    return abs(mean) if abs(mean) > 5 * spread else 0.0


def _worst_row(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """The largest row error ratio; a row's error counts as at least `ROW_FLOOR` of the mean row's (RMS): rows that the
    reference happens to hit, or that have next to no gradient, would divide by nothing."""
    floor = reference.mean() * ROW_FLOOR**2
    ratio = ((candidate + floor) / (reference + floor)).nan_to_num(nan=1.0 if not candidate.isnan().any() else math.inf)
    return math.sqrt(float(ratio.max()))
