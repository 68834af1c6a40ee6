"""The sentences of the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from abtest.markdown import code, number, per_second, percent, prose
from bench.ceilings import Ceilings
from bench.roofline import spark as device
from bench.roofline.predict import Forecast
from bench.roofline.setting import Setting
from bench.roofline.step import Step, step_of, trained_numbers

PARTS = (
    "A part's floor is the longer of bytes over the copy bandwidth and FLOPs over the matrix rate, and floors are added up: "
    "no two parts overlap. Where an optimization has an op for the part, bytes and FLOPs are what that op states. Reached: "
    "the floor over that op's time in its microbenchmark, forward and backward together."
)
PRODUCTS = (
    "The same arithmetic with each product as a kernel of its own, operands read from memory and the result written there; "
    "the head is above."
)
EFFICIENCIES = (
    "How near to its floor each kind of work came in this run's microbenchmarks, on workloads of at least as many rows. A "
    "part with a microbenchmark of its own takes that one's number, any other its kind's. A kind without any is taken at "
    "its floor, and the prediction is too fast by whatever is really lost there."
)
CHECK = (
    "Each arm is predicted without its own time: the device's part from the efficiencies above, the optimizations that are "
    "on at their candidate's and everything else at the reference's; the host's part from the launches that the arm makes "
    "and the median cost of a launch in the *other* arms. A micro-step takes the longer of the two. The device's part is "
    "too short where reference code makes more passes over memory than in the ops that were timed, as over logits in fp32."
)
ARMS = "The floor above, of what has to be computed and not of what an arm chooses to, over the measured micro-step."


def trained(setting: Setting, step: Step) -> str:
    how = f"LoRA r={setting.rank}" if setting.method == "lora" else "full fine-tuning"
    numbers = f"{trained_numbers(step.shape, setting) / 1e6:,.1f}M numbers train"
    packs = "one pack" if setting.packs == 1 else f"{setting.packs} packs"
    documents = "one document" if setting.documents == 1 else f"{setting.documents} documents of equal length"
    again = "layers' forward run twice" if setting.gradient_checkpointing else "no recomputation"
    return (
        f"{prose(setting.model)} · {how}, {numbers} · {setting.dtype} · {packs} of {setting.pack_length:,} tokens, "
        f"{documents} in each · {percent(setting.supervised)} of positions supervised · {again}"
    )


def rates(ceilings: Ceilings) -> str:
    copied, multiplied = ceilings.copy_bytes_per_s, ceilings.matmul_flops_per_s
    ridge = f"a part with more than {number(multiplied / copied, 3)} FLOP for a byte is bound by FLOPs"
    return f"Ceilings: copies {copied / 1e9:,.0f} GB/s (read + written), products {multiplied / 1e12:,.3g} TFLOP/s; {ridge}."


def summary(step: Step) -> str:
    launches = sum(part.all_launches for part in step.micro_step)
    dead = (
        " It counts the first layer's dx, as the MFU in the other reports does; nothing below that layer trains, so the "
        "parts do not."
    )
    return (
        "The matrix floor is of the linear layers' products alone, head included."
        f"{dead if step.setting.method == 'lora' else ''} Launches of a micro-step, at least: {launches:,}."
    )


def assumptions(step: Step) -> str:
    """What the floor counts on, and what would get below it."""
    setting, shape = step.setting, step.shape
    last = (*shape.mixer_output(shape.kinds[-1]), *shape.mlp_inputs, *shape.mlp_output)
    weights = sum(linear.fan_in * linear.fan_out for linear in last)
    unused = (6 if setting.trained else 4) * weights * (setting.positions - setting.supervised_rows)
    documents = "Documents are equally long, which for a given number of them makes the fewest attention scores; real ones "
    lines = [
        "What one part hands to the next goes through memory, once each way; caches are taken for empty.",
        documents + "have more." if setting.documents > 1 else "Each pack is one document.",
        "Logits exist for supervised positions only, and are never written to memory.",
        "Adapters' gradients are written in the compute dtype; adding them to their fp32 sums is left out. Gradients of "
        "whole weights are written in fp32.",
        "Arithmetic that is no product counts at the matrix rate as well, which it can't reach, so its floor is low.",
        "Not used, though exact: on unsupervised positions the last layer's work behind its attention or delta rule is for "
        f"nothing, {percent(unused / max(step.product_flops, 1))} of the products' FLOPs here.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def predicted(step: Step, microseconds: float, floor: float) -> str:
    return (
        f"**Every part by the optimization that was timed for it, and launches that cost nothing (a CUDA graph): "
        f"{number(microseconds / 1e3, 4)} ms, {per_second(step.per_second(microseconds))} tokens/s, "
        f"{percent(floor / microseconds)} of the floor's rate.** No arm of this run need be that."
    )


def errors(found: Sequence[Forecast]) -> str:
    """How far off, which arm tests it most, and what it does not test."""
    sizes = [abs(one.error) for one in found]
    usual = statistics.median(one.launches for one in found)
    hardest = max(found, key=lambda one: abs(math.log(one.launches / usual)))
    hosted = sum(one.host_ms > one.device_ms for one in found)
    below = sum(one.floor_ms <= one.measured_ms for one in found)
    return (
        f"**Error: median {percent(statistics.median(sizes))}, largest {percent(max(sizes))}** over {len(found)} arms. Arms "
        "that launch nearly the same kernels vouch for one another; the one whose launches differ most from the rest, "
        f"{code(hardest.arm)}, is off by {100 * hardest.error:+.0f} %. The host decides in {hosted} of {len(found)}: those "
        f"test the cost of a launch and not the efficiencies. {below} of {len(found)} took at least the floor of what they "
        "run."
    )


def spark_headline(setting: Setting) -> str:
    step = step_of(replace(setting, supervised=1.0, gradient_checkpointing=False))
    rate = step.per_second(step.floor_us(device.CEILINGS))
    return (
        f"**The published {device.PUBLISHED_TOKENS_PER_S:,} tokens/s are {percent(device.PUBLISHED_TOKENS_PER_S / rate)} of "
        f"the floor's {per_second(rate)}**, every position supervised and nothing recomputed."
    )


def spark(setting: Setting) -> str:
    step = step_of(replace(setting, supervised=1.0, gradient_checkpointing=False))
    ceilings = [replace(device.CEILINGS, matmul_flops_per_s=rate) for rate in device.MATMUL_RANGE]
    low, high = (per_second(step.per_second(step.floor_us(each))) for each in ceilings)
    launches = sum(part.all_launches for part in step.micro_step)
    least, most = (number(launches * cost / 1e3, 3) for cost in device.LAUNCH_US)
    return (
        "Nothing here was measured by this project. Over the range of matrix rates the floor with every position supervised "
        f"is {low} to {high} tokens/s. The prediction carries this page's efficiencies over to the other device as they "
        f"are, which nobody has checked. The fewest launches would take its host {least} to {most} ms, which can pass while "
        "the device works. What pack length, supervised part and checkpointing the published rate is of is not known: it is "
        "held against this page's setting."
    )
