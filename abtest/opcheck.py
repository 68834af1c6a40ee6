"""The op-level oracle: is a candidate op as close to the truth as PyTorch is, in its output and in every gradient?

Truth is the reference function on the same inputs raised to fp64, and in fp64 where its code says fp32 in so many words.
Nothing is timed that is not green here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from abtest.opcall import call, gradients_of, input_names, leaves, named_outputs, random_gradients, tensors_in
from abtest.oracle import exact_arithmetic
from abtest.poison import POISONS, poisoned
from abtest.quantity import MAX_RATIO, MEAN_RATIO, Quantity, compare, same_bits
from abtest.verdict import Check, Level, Verdict
from kernels.contract import Exactness, Op, Workload

SEEDS = (0, 1, 2)
TRAINING_DTYPE = "bfloat16"
NUDGES = 8  # of an op's inputs, where what rounding them does is asked for

Values = dict[str, Tensor | None]


@dataclass(frozen=True)
class OpReport:
    """The verdict on one workload with one seed, and the numbers of every output and gradient behind it."""

    workload: Workload
    device: str
    seed: int
    verdict: Verdict
    quantities: tuple[Quantity, ...] = ()

    @property
    def passed(self) -> bool:
        return self.verdict.level.lossless


def workloads_for(op: Op, device: torch.device) -> list[Workload]:
    """All workloads but those beyond 2^31 elements on a GPU, in bf16, as training is there: in fp32 a library's order of
    summation alone, another one for other strides, moves a small product's mean error by half. Elsewhere the small ones, in
    fp32, since Triton's interpreter truncates bf16."""
    if device.type == "cuda":
        return [replace(workload, dtype=TRAINING_DTYPE) for workload in op.workloads if not workload.beyond_int32]
    return [replace(workload, dtype="float32") for workload in op.workloads if workload.small]


def small_workloads(op: Op) -> list[Workload]:
    """The small workloads in the dtype that they name and in bf16, which is another kernel to the compiler."""
    small = [workload for workload in op.workloads if workload.small]
    return small + [replace(w, dtype=TRAINING_DTYPE) for w in small if w.dtype != TRAINING_DTYPE]


def check_op(
    op: Op, workload: Workload, device: torch.device, seed: int = 0, exactness: Exactness = Exactness.ROUNDING
) -> OpReport:
    """Judges `op.candidate` against `op.reference` on one workload.

    FAILED: a ratio above its limit, NaN or Inf, a missing gradient, a wrong shape or dtype, a modified input, a result
    that is not fully written, a second call (with seed 0 a checkpointed one) or second backward with other bits, other bits
    under a BITWISE claim, or a RuntimeError. INVALID: the reference or the inputs can't be trusted. APPROX claims keep their
    level while all but the ratios hold. The caller's random state is left as it was.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        verdict, quantities = _Comparison(op, workload, device, seed, exactness).judge()
    return OpReport(workload, str(device), seed, verdict, quantities)


class _Comparison:
    """One candidate, one workload, one seed: what every step of the judgement shares."""

    def __init__(self, op: Op, workload: Workload, device: torch.device, seed: int, exactness: Exactness):
        self.op, self.seed, self.exactness = op, seed, exactness
        self.build = lambda: op.inputs(workload, device, seed)

    def judge(self) -> tuple[Verdict, tuple[Quantity, ...]]:
        inputs = self.build()
        self.names = input_names(self.op.reference, inputs)
        before = _snapshot(self.names, inputs)
        if _differing(before, _snapshot(self.names, self.build())):
            return _invalid("inputs(workload, device, seed) gives other values on a second call"), ()
        outputs = self.call(self.op.reference, inputs)
        incoming = random_gradients(outputs, self.seed)
        reference = self.values(outputs, inputs, incoming)
        truth = self.exactly(self.build(), incoming)
        del outputs
        bad = [name for side in (reference, truth) for name, value in side.items() if not _is_finite(value)]
        if bad:
            return _invalid(f"the reference itself is not finite in {bad[0]}"), ()
        gradients = [value for name, value in reference.items() if name.startswith("d ")]
        if gradients and all(value is None for value in gradients):
            return _invalid("the reference gives no gradient although an input requires one"), ()
        self.nudged = self.errors_of_rounded_inputs(incoming, truth) if self.op.backward_stable else {}
        try:
            return self.judge_candidate(before, incoming, reference, truth)
        except torch.OutOfMemoryError:
            raise  # says nothing of the candidate
        except RuntimeError as error:
            line = str(error).strip().splitlines() or [""]
            return _failed("runs", f"the candidate raised {type(error).__name__}: {line[0]}"), ()

    def exactly(self, inputs: Sequence[Any], incoming: dict[str, Tensor], nudge: _Nudge | None = None) -> Values:
        """The reference's outputs and gradients in fp64, of the inputs or of inputs beside them."""
        raised = tuple(_raise_to_fp64(item, nudge) for item in inputs)
        gradients = {name: _raise_to_fp64(gradient, nudge) for name, gradient in incoming.items()}
        with exact_arithmetic(torch.float64):
            return self.values(self.call(self.op.reference, raised), raised, gradients)

    def errors_of_rounded_inputs(self, incoming: dict[str, Tensor], truth: Values) -> dict[str, tuple[float, float]]:
        """By output or gradient: the largest and the mean error that inputs make which are off by up to half an ulp."""
        found: dict[str, list[tuple[float, float]]] = {}
        for seed in range(NUDGES):
            values = self.exactly(self.build(), incoming, _Nudge(seed))
            for name, value in values.items():
                if value is not None and value.numel():
                    error = (value - truth[name]).abs()
                    found.setdefault(name, []).append((error.max().item(), error.mean().item()))
        return {name: (max(m for m, _ in e), sum(mean for _, mean in e) / len(e)) for name, e in found.items()}

    def judge_candidate(
        self, before: Values, incoming: dict[str, Tensor], reference: Values, truth: Values
    ) -> tuple[Verdict, tuple[Quantity, ...]]:
        inputs, sent = self.build(), {name: gradient.clone() for name, gradient in incoming.items()}
        outputs = self.call(self.op.candidate, inputs)
        complaint = _shape_complaint(named_outputs(outputs), reference)
        if complaint:
            return _failed("structure", complaint), ()
        first = self.values(outputs, inputs, incoming, retain_graph=True)
        complaint = _missing_gradient(first, reference)
        if complaint:
            return _failed("gradients", complaint), ()
        not_finite = [name for name, value in first.items() if not _is_finite(value)]
        if not_finite:
            return _failed("finite", f"the candidate is not finite in {not_finite[0]}"), ()
        again = self.values(outputs, inputs, incoming)
        another = self.op.candidate if self.seed else self.checkpointed  # which takes a forward more: once is enough
        second = self.values(self.call(another, inputs), inputs, incoming)
        after = _snapshot(self.names, inputs) | {f"incoming {name}": gradient for name, gradient in incoming.items()}
        wanted = before | {f"incoming {name}": gradient for name, gradient in sent.items()}
        quantities = _compare_all(truth, reference, first, self.nudged)
        checks = [
            *_ratio_checks(quantities),
            _same("second backward", first, again),
            _same("second call", first, second),
            _same("inputs unmodified", wanted, after),
            self.written(first, sent),
        ]
        return self.conclude(quantities, checks), quantities

    def written(self, first: Values, sent: dict[str, Tensor]) -> Check:
        """Whatever uninitialised memory holds, the result has the same bits: nothing is read that was not written."""
        unwritten = []
        for value in POISONS:
            fresh = self.build()
            with poisoned(value):
                found = self.values(self.call(self.op.candidate, fresh), fresh, sent)
            unwritten += [f"{name} (memory filled with {value:g})" for name in _differing(first, found)]
        return Check("fully written", float(len(unwritten)), 0.0, not unwritten, ", ".join(unwritten))

    def call(self, function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        torch.manual_seed(self.seed)
        return call(function, inputs)

    def checkpointed(self, *inputs: Any) -> Any:
        """The candidate as a loop with gradient checkpointing calls it: once forward, and again in backward, where what it
        saved may be unpacked only once."""
        return checkpoint(self.op.candidate, *inputs, use_reentrant=False)

    def values(
        self, outputs: Sequence[Tensor], inputs: Sequence[Any], incoming: dict[str, Tensor], retain_graph: bool = False
    ) -> Values:
        """Outputs as "output 0" and gradients as "d name"; a gradient that autograd does not deliver is None."""
        gradients = gradients_of(outputs, dict(leaves(self.names, inputs)), incoming, retain_graph)
        found: Values = {name: output.detach().clone() for name, output in named_outputs(outputs).items()}
        return found | {f"d {name}": gradient for name, gradient in gradients.items()}

    def conclude(self, quantities: Sequence[Quantity], checks: list[Check]) -> Verdict:
        same_bits = all(quantity.same_bits for quantity in quantities)
        if self.exactness is Exactness.BITWISE:
            differing = [quantity.name for quantity in quantities if not quantity.same_bits]
            checks = [*checks, Check("bitwise", float(len(differing)), 0.0, same_bits, ", ".join(differing))]
        failed = [check for check in checks if not check.passed]
        if self.exactness is Exactness.APPROX and all(check.name in ("max ratio", "mean ratio") for check in failed):
            return Verdict(Level.APPROX, _sentence(checks[0], checks[1]), tuple(checks))
        if failed:
            return Verdict(Level.FAILED, _sentence(*failed), tuple(checks))
        return Verdict(Level.BITWISE if same_bits else Level.ROUNDING, _sentence(checks[0], checks[1]), tuple(checks))


def _snapshot(names: Sequence[str], inputs: Sequence[Any]) -> Values:
    """Copies of everything the op could write to: tensors, parameters, buffers, and the tensors of a dataclass."""
    held = (pair for name, item in zip(names, inputs, strict=True) for pair in tensors_in(name, item))
    return {name: tensor.detach().clone() for name, tensor in held}


class _Nudge:
    """Moves numbers by up to half a unit in the last place of their own dtype, evenly spread."""

    def __init__(self, seed: int) -> None:
        self.seed, self.calls = seed, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        generator = torch.Generator(x.device).manual_seed(self.seed + (self.calls << 16))
        shift = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64) - 0.5
        return x.double() * (1 + torch.finfo(x.dtype).eps * shift)


def _raise_to_fp64(item: Any, nudge: _Nudge | None = None) -> Any:
    if isinstance(item, nn.Module):
        if nudge is not None:
            raise TypeError("a module's parameters are not nudged; an op judged as backward stable takes tensors")
        return item.double()  # a fresh build of its own: nobody else sees the change
    if isinstance(item, Tensor) and item.is_floating_point():
        raised = item.detach().double() if nudge is None else nudge(item.detach())
        return raised.requires_grad_(item.requires_grad)
    if is_dataclass(item) and not isinstance(item, type):
        return replace(item, **{field.name: _raise_to_fp64(getattr(item, field.name), nudge) for field in fields(item)})
    return item


def _is_finite(value: Tensor | None) -> bool:
    return value is None or not value.is_floating_point() or bool(torch.isfinite(value).all())


def _shape_complaint(outputs: dict[str, Tensor], reference: Values) -> str | None:
    wanted = {name: value for name, value in reference.items() if name.startswith("output ")}
    if len(outputs) != len(wanted):
        return f"the candidate returns {len(outputs)} outputs, the reference {len(wanted)}"
    for name, value in wanted.items():
        got = outputs[name]
        if (got.shape, got.dtype) != (value.shape, value.dtype):
            return f"{name} is {list(got.shape)} {got.dtype}; the reference gives {list(value.shape)} {value.dtype}"
    return None


def _missing_gradient(candidate: Values, reference: Values) -> str | None:
    for name, value in reference.items():
        if value is not None and candidate[name] is None:
            return f"the candidate delivers no gradient {name!r}"
        if value is None and candidate[name] is not None and bool(candidate[name].any()):
            return f"the candidate delivers a gradient {name!r} where the reference has none"
    return None


def _compare_all(
    truth: Values, reference: Values, candidate: Values, nudged: dict[str, tuple[float, float]]
) -> tuple[Quantity, ...]:
    present = [name for name, value in reference.items() if value is not None]
    return tuple(
        compare(name, truth[name], reference[name], candidate[name], nudged.get(name, (0.0, 0.0))) for name in present
    )


def _ratio_checks(quantities: Sequence[Quantity]) -> list[Check]:
    if not quantities:
        return [
            Check("max ratio", None, MAX_RATIO, False, "nothing was compared"),
            Check("mean ratio", None, MEAN_RATIO, False),
        ]
    highest, widest = max(quantities, key=lambda q: q.max_ratio), max(quantities, key=lambda q: q.mean_ratio)
    return [
        Check("max ratio", highest.max_ratio, MAX_RATIO, highest.max_ratio <= MAX_RATIO, highest.name),
        Check("mean ratio", widest.mean_ratio, MEAN_RATIO, widest.mean_ratio <= MEAN_RATIO, widest.name),
    ]


def _differing(wanted: Values, got: Values) -> list[str]:
    def equal(one: Tensor | None, other: Tensor | None) -> bool:
        return one is other if one is None or other is None else same_bits(one, other)

    return [name for name in wanted if not equal(wanted[name], got.get(name))]


def _same(name: str, wanted: Values, got: Values) -> Check:
    differing = _differing(wanted, got)
    return Check(name, float(len(differing)), 0.0, not differing, ", ".join(differing))


def _sentence(*checks: Check) -> str:
    parts = []
    for check in checks:
        value = "nothing" if check.value is None else f"{check.value:.4g}"
        parts.append(f"{check.name} {value} (limit {check.limit:g})" + (f" in {check.detail}" if check.detail else ""))
    return "; ".join(parts)


def _invalid(reason: str) -> Verdict:
    return Verdict(Level.INVALID, reason, (Check("comparable", None, None, False, reason),))


def _failed(name: str, reason: str) -> Verdict:
    return Verdict(Level.FAILED, reason, (Check(name, None, None, False, reason),))
