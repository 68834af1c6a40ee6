"""Which group a kernel, an operator and an optimization's folder are in, by their names."""

from __future__ import annotations

import re

import pytest

from bench.cross_compile.folders import folders
from bench.profile import groups, owners

KERNEL_NAMES = {
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT": "matrix",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": "matrix",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x3_tn_align8>(Params)": "matrix",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>(...)": "matrix",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<256, cutlass::bfloat16_t>>()":
        "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)":
        "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x128x256": "attention",
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": "recurrence",
    "chunk_bwd_kernel_dqkwg": "recurrence",
    "merge_16x16_to_64x64_inverse_kernel": "recurrence",
    "recompute_w_u_fwd_kernel": "recurrence",
    "prepare_wy_repr_bwd_kernel": "recurrence",
    "chunk_local_cumsum_scalar_kernel": "recurrence",
    "l2norm_fwd_kernel": "norm",
    "causal_conv1d_bwd_kernel": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >":
        "elementwise",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(1)>":
        "copy",
    "void at::native::unrolled_elementwise_kernel<at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>": "copy",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 3>": "copy",
    "void at::native::chunk_cat_cuda_kernel<float, c10::BFloat16>(float**)": "other",
    "Memcpy DtoD (Device -> Device)": "copy",
    "Memset (Device)": "copy",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >": "copy",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float>>>": "norm",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float, float>": "loss",
    "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>": "loss",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<3>, FusedAdamMath>":
        "optimizer",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, Copy<float, float>>": "copy",
    "void at::native::(anonymous namespace)::conv_depthwise2d_backward_kernel<3, 1, c10::BFloat16>": "elementwise",
    "sm80_xmma_wgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "elementwise",
    "triton_red_fused__to_copy_mean_mul_pow_rsqrt_3": "norm",
    "triton_red_fused__log_softmax__to_copy_1": "loss",
    "triton_poi_fused_mul_silu_7": "elementwise",
    "triton_tem_fused_mm_2": "matrix",
    "somebody_elses_kernel": "other",
}  # fmt: skip
OPERATOR_NAMES = {
    "aten::mm": "matrix", "aten::addmm": "matrix", "aten::linalg_solve_triangular": "matrix", "aten::mul_": "elementwise",
    "aten::silu_backward": "elementwise", "aten::_to_copy": "copy", "aten::index_select": "copy", "aten::view": "host",
    "aten::empty_strided": "host", "aten::sum": "norm", "aten::native_layer_norm": "norm", "aten::_log_softmax": "loss",
    "aten::nll_loss_backward": "loss", "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "aten::mkldnn_convolution": "elementwise", "MulBackward0": "host", "torch::autograd::AccumulateGrad": "host",
    "autograd::engine::evaluate_function: MmBackward0": "host", "aten::select_backward": "copy", "aten::select": "host",
    "aten::to": "host", "aten::tril": "copy", "aten::bitwise_and": "elementwise", "aten::_nobody_knows": "other",
}  # fmt: skip


@pytest.mark.parametrize(("name", "group"), KERNEL_NAMES.items())
def test_kernels_by_what_they_do(name, group):
    assert groups.of_kernel(name) == group


@pytest.mark.parametrize(("name", "group"), OPERATOR_NAMES.items())
def test_operators_by_what_they_do(name, group):
    assert groups.of_operator(name) == group


def test_every_group_of_the_tables_has_words():
    tables = (*groups.KERNELS, *groups.OPERATORS, *groups.FOLDERS)
    assert {group for group, _ in tables} <= set(groups.WORDS)
    assert all(re.compile(pattern) for _, pattern in tables)


def test_every_folder_with_kernels_or_operators_has_a_group():
    having = [name for name, (_, path) in folders().items() if owners.kernels_in(path) or owners.operators_in(path)]
    assert len(having) > 8
    assert [name for name in having if groups.of_folder(name) == groups.OTHER] == []


def test_groups_of_folders_agree_with_the_roofline():
    from bench.roofline.setting import Setting
    from bench.roofline.step import HEAD_OPS, step_of

    parts = (*step_of(Setting()).micro_step, *step_of(Setting(method="full")).micro_step)
    kinds = {(op, part.kind) for part in parts for op in part.ops if op not in HEAD_OPS}
    assert len(kinds) > 8
    for op, kind in kinds:
        group = groups.of_folder(op)
        assert group == kind or (kind, group) == ("elementwise", "norm"), op
