"""The parts between the projections: attention, delta rule, norms, gates. An op states forward and backward together, and
how much of that is the forward's is worked out here."""

from __future__ import annotations

from bench.roofline.parts import Part, Work, both_ways, op_work
from bench.roofline.setting import Setting
from bench.roofline.shape import Shape


def attention(shape: Shape, setting: Setting) -> list[Part]:
    """Rotation, attention within documents and the output's gate, of every attention layer."""
    a, count, T = shape.attention, shape.layers("attention"), setting.positions
    if not count:
        return []
    sizes = {"B": setting.packs, "L": setting.pack_length, "H": a.heads, "KV": a.key_heads, "D": a.width}
    window = {"W": a.window} if a.window else {}
    work = op_work("packed_attention", sizes | window, setting.dtype, setting.lengths)
    forward = Work(setting.item * T * a.width * 2 * (a.heads + a.key_heads), work.flops * 2 // 7)
    scores = both_ways(
        "attention within documents", "attention", count, work, forward, (1, 2),
        "q, k, v, y and gradients once; scores never leave the chip, backward makes them again", ("packed_attention",),
    )  # fmt: skip
    return _rotation(shape, setting) + scores + (_output_gate(shape, setting) if a.gated else [])


def _rotation(shape: Shape, setting: Setting) -> list[Part]:
    a, T, item = shape.attention, setting.positions, setting.item
    heads, count = a.heads + a.key_heads, shape.layers("attention")
    if not a.normed:
        once = Work(item * (2 * T * heads * a.width + 2 * T * a.rotary), 3 * T * heads * a.rotary)
        twice = Work(2 * once.bytes, 2 * once.flops)
        return both_ways("rope", "elementwise", count, twice, once, (1, 1), "q, k read and written each way")
    sizes = {"T": T, "H": a.heads, "KV": a.key_heads, "D": a.width, "R": a.rotary, "trained": setting.trained}
    work = op_work("rope_qk_norm", sizes, setting.dtype)
    forward = Work(
        item * (2 * T * heads * a.width + 2 * T * a.rotary + 2 * a.width) + 4 * T * heads,
        T * heads * (4 * a.width + 3 * a.rotary),
    )
    return both_ways(
        "q and k norm, rope", "elementwise", count, work, forward, (1, 1 + setting.trained),
        "q, k once each way; backward reads inputs again", ("rope_qk_norm",),
    )  # fmt: skip


def _output_gate(shape: Shape, setting: Setting) -> list[Part]:
    """y * sigmoid(gate): the traffic of SiLU(gate) * up, whose op counts one product more."""
    a, T = shape.attention, setting.positions
    elements = T * a.heads * a.width
    return both_ways(
        "attention output gate", "elementwise", shape.layers("attention"), Work(8 * setting.item * elements, 14 * elements),
        Work(3 * setting.item * elements, 5 * elements), (1, 1), "y, gate, result and gradients once",
    )  # fmt: skip


def delta(shape: Shape, setting: Setting) -> list[Part]:
    """Convolution with its norms, decay and beta, delta rule and gated norm, of every delta layer."""
    if shape.delta is None:
        return []
    return _convolution(shape, setting) + _decay(shape, setting) + _delta_rule(shape, setting) + _gated_norm(shape, setting)


def _convolution(shape: Shape, setting: Setting) -> list[Part]:
    d, T, C = shape.delta, setting.positions, shape.delta.channels
    sizes = {"T": T, "HK": d.key_heads, "K": d.key_width, "V": d.values, "trained": setting.trained}
    work = op_work("conv_silu_norm", sizes, setting.dtype, setting.lengths)
    boundaries = 4 * (len(setting.lengths) + 1)
    forward = Work(
        setting.item * (2 * T * C + 4 * C) + 4 * T * 2 * d.key_heads + boundaries,
        T * (12 * C + 3 * 2 * d.key_heads * d.key_width),
    )
    return both_ways(
        "convolution, SiLU, l2 norm", "elementwise", shape.layers("delta"), work, forward, (1, 1 + setting.trained),
        "x once each way, q, k, v and their gradients once", ("conv_silu_norm",),
    )  # fmt: skip


def _decay(shape: Shape, setting: Setting) -> list[Part]:
    """g = -exp(A) softplus(a + dt) in fp32 and beta = sigmoid(b): two numbers a value head read, two written."""
    T, H = setting.positions, shape.delta.value_heads
    work = op_work("decay_gates", {"T": T, "H": H, "trained": setting.trained}, setting.dtype)
    forward = Work(T * H * (3 * setting.item + 4), 10 * T * H)
    return both_ways(
        "decay and beta", "elementwise", shape.layers("delta"), work, forward, (1, 1 + setting.trained),
        "a, b, g, beta and gradients once; g is fp32", ("decay_gates",),
    )  # fmt: skip


def _delta_rule(shape: Shape, setting: Setting) -> list[Part]:
    d, T = shape.delta, setting.positions
    sizes = {"T": T, "HK": d.key_heads, "HV": d.value_heads, "K": d.key_width, "V": d.value_width}
    work = op_work("ssm_fast_path", sizes, setting.dtype, setting.lengths)
    # Backward moves the inputs, dy and the inputs' gradients: with y for dy twice the forward's and dy less.
    forward = Work((work.bytes + setting.item * T * d.values) // 3, work.flops // 3)
    return both_ways(
        "delta rule, chunks of 64", "recurrence", shape.layers("delta"), work, forward, (2, 3),
        "inputs, y and gradients once; states and chunk inverses stay on the chip",
        ("ssm_fast_path", "kept_delta_states", "chunk_delta_backward"),
    )  # fmt: skip


def _gated_norm(shape: Shape, setting: Setting) -> list[Part]:
    d, rows = shape.delta, setting.positions * shape.delta.value_heads
    work = op_work("gated_rms_norm", {"T": rows, "D": d.value_width, "trained": setting.trained}, setting.dtype)
    elements = rows * d.value_width
    forward = Work(setting.item * (3 * elements + d.value_width) + 4 * rows, 10 * elements)
    return both_ways(
        "gated RMSNorm", "elementwise", shape.layers("delta"), work, forward, (1, 1 + setting.trained),
        "y, gate, result and gradients once", ("gated_rms_norm",),
    )  # fmt: skip


def norms(shape: Shape, setting: Setting) -> list[Part]:
    """Two a layer and the last; each but the first comes with the residual addition in front of it."""
    first = _norm("RMSNorm, first", 1, 0, shape, setting)
    if setting.method == "lora":
        first = first[:1]  # nothing below it trains
    added = _norm("residual addition, RMSNorm", 2 * len(shape.kinds) - 1, 1, shape, setting)
    return first + added + _norm("residual addition, last RMSNorm", 1, 1, shape, setting, in_layer=False)


def _norm(name: str, count: int, add: int, shape: Shape, setting: Setting, in_layer: bool = True) -> list[Part]:
    T, D = setting.positions, shape.hidden
    sizes = {"T": T, "D": D, "zero_centred": int(shape.zero_centred), "add": add, "trained": setting.trained}
    work = op_work("rms_norm", sizes, setting.dtype)
    forward = Work(setting.item * ((4 if add else 2) * T * D + D) + 4 * T, T * D * (4 + add))
    words = "x, residual, sum, result and gradients once" if add else "x, result and gradients once"
    launches = (1, 1 + setting.trained)
    return both_ways(name, "elementwise", count, work, forward, launches, words, ("rms_norm",), in_layer)


def gated_mlp(shape: Shape, setting: Setting) -> list[Part]:
    elements = setting.positions * shape.intermediate
    work = op_work("silu_mul", {"T": setting.positions, "I": shape.intermediate}, setting.dtype)
    return both_ways(
        "SiLU(gate) * up", "elementwise", len(shape.kinds), work, Work(3 * setting.item * elements, 5 * elements), (1, 1),
        "gate, up, result and gradients once", ("silu_mul",),
    )  # fmt: skip
