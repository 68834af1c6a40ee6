"""What a kernel of the device, or an operator of the CPU, does: the table of names, and the group that a name is in.

Where a group is a kind of part of the roofline it has that kind's name. The first pattern that is found in a name decides,
so order matters: attention kernels of cuDNN and CUTLASS also carry the names of matrix products. Case does not matter.
"""

from __future__ import annotations

import re

OTHER = "other"
UPDATE = "optimizer"  # whatever the update runs, by whatever name
WORDS = {
    "matrix": "matrix products",
    "recurrence": "delta rule",
    "attention": "attention",
    "elementwise": "elementwise",
    "norm": "norms and reductions",
    "copy": "copies, casts, indexing",
    "loss": "softmax and loss",
    UPDATE: "optimizer",
    "host": "views, allocation, autograd",  # operators that compute nothing; a device has no kernel for them
    OTHER: "other",
}

# Kernels of a device, as its tracer names them.
KERNELS = (
    ("loss", r"^triton_.*(softmax|nll_loss)"),
    ("matrix", r"^triton_(tem|mm)_"),  # torch.compile's: templates, reductions, pointwise
    ("norm", r"^triton_(red|per)_"),
    ("elementwise", r"^triton_poi_"),
    ("copy", r"^mem(cpy|set)|(direct|bfloat16|float8\w*)_copy_kernel|catarray|fillfunctor|multi_tensor_apply.*copy"),
    ("copy", r"n[cd]?h?w\w*ton[cd]?h?w|transpose_readwrite"),
    (UPDATE, r"adam"),
    ("attention", r"flash|fmha|sdpa|attention|attn|mha_"),
    ("loss", r"softmax|nll_loss|cross_entropy|logsumexp"),
    ("elementwise", r"conv(?!ert)|fprop|dgrad|wgrad|im2col"),  # depthwise, four taps: traffic and no product
    ("recurrence", r"^(?!.*at::).*((^|_)chunk_|delta_rule|wy_repr|solve_tril|_inverse_kernel|kkt|recompute_w_u|recurrent)"),
    ("recurrence", r"^gdn_"),
    ("matrix", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|gemv|matmul|(^|::)dot_kernel"),
    ("norm", r"reduce|moments|layer_?norm|rms_?norm|l2_?norm|gammabeta|scan|cumsum"),
    ("copy", r"index|gather|scatter|embedding|sort|deviceselect|nonzero|partial_segment|arange"),
    ("elementwise", r"elementwise|vectorized|silu|sigmoid|swiglu|rope|rotary|dropout|distribution|pointwise"),
    ("elementwise", r"multi_tensor_apply|tri[lu]|where|_gate_"),
)

# Operators of PyTorch on a CPU; those of `aten` without that.
OPERATORS = (
    ("host", r"^autograd::|(?-i:^_*[A-Z]\w*Backward\d*$)|AccumulateGrad"),  # nodes, without the operators that they run
    ("loss", r"softmax|nll_loss|cross_entropy|logsumexp"),
    ("attention", r"scaled_dot_product|attention"),
    ("recurrence", r"delta_rule"),
    ("matrix", r"^(add)?(mm|bmm|mv|dot|vdot|matmul|linear|einsum|outer)_?(_out|_backward)?$|^baddbmm|solve_tri|^linalg_"),
    ("elementwise", r"conv"),
    ("host", r"^((_unsafe_)?view|_?reshape\w*|transpose|permute|movedim|expand|(un)?squeeze|m?[th]|numpy_t)(_as|_)?$"),
    ("host", r"^(slice|select|as_strided|split|split_with_sizes|chunk|narrow|unbind|detach|alias|(un)?flatten|unfold)_?$"),
    ("host", r"^(to|type_as|diagonal|empty\w*|new_empty\w*|result_type|resolve_\w+|is_\w+|lift_\w+|set_|resize\w*)$"),
    ("host", r"^(item|_local_scalar_dense|requires_grad_|_has_\w+|_nested\w*|broadcast_\w+)$"),
    ("copy", r"copy|clone|contiguous|^(cat|stack|[hv]stack|repeat|roll|flip|pad|constant_pad_nd|(arg)?sort|unique\w*)$"),
    ("copy", r"^(new_)?(zero|one|full|fill|arange|eye|scalar_tensor)|index|gather|scatter|embedding|nonzero|searchsorted"),
    ("copy", r"^(slice|select|unfold|diagonal)_backward|repeat_interleave|masked_select|diag|take|where|^tri[lu]_?$"),
    ("norm", r"^(sum|mean|var|std|cumsum|amax|amin|max|min|prod|any|all|argmax|diff|bincount|isfinite|isnan)_?$|norm"),
    ("elementwise", r"^_?(add|sub|rsub|mul|div|neg|exp|expm1|log|log1p|pow|sqrt|rsqrt|square|abs|reciprocal|addc\w+)_?$"),
    ("elementwise", r"^(silu|sigmoid|softplus|tanh|relu|gelu|sin|cos|threshold|clamp|maximum|minimum|lerp|masked_fill)"),
    ("elementwise", r"^(lt|gt|le|ge|eq|ne|logical_\w+|bitwise_\w+|__\w+__|floor\w*|ceil|round|remainder|fmod|sign|erf)_?$"),
    ("elementwise", r"_foreach_|dropout|bernoulli|random|normal_|uniform"),
)

# Optimizations, by the words in their folders' names.
FOLDERS = (
    ("loss", r"cross_entropy|logits|loss|softmax"),
    ("recurrence", r"ssm|delta"),
    ("attention", r"attention"),
    ("matrix", r"matmul|mma|linear|lora|gemm|dot|fp8"),
    ("elementwise", r"conv|silu|swiglu|rope|elementwise|gate(?!d)"),
    ("norm", r"norm"),
    (UPDATE, r"adam"),
)


def of_kernel(name: str) -> str:
    """The group of a device's kernel, copy or fill."""
    return _first(KERNELS, name)


def of_operator(name: str) -> str:
    """The group of an operator as PyTorch names it, "aten::mm" for example."""
    return _first(OPERATORS, name.removeprefix("aten::"))


def of_folder(name: str) -> str:
    """The group of an optimization's own kernels and operators."""
    return _first(FOLDERS, name)


def _first(table: tuple[tuple[str, str], ...], name: str) -> str:
    return next((group for group, pattern in table if re.search(pattern, name, re.IGNORECASE)), OTHER)
