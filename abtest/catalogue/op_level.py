"""Which op-level test catches a defect by itself, so that one that the whole gate lets through is still caught somewhere.

Of the families whose defects each sit in one module, in the loss head or in accumulation, all that do. The others change the
optimizer, which has an oracle of its own (`abtest.update`), or need a run to show at all.
"""

from __future__ import annotations

TEST = "tests/abtest/test_survivors_op_level.py::test_the_defect_shows_in_its_op"
NAMES = (
    # cross_entropy
    "true_class_rounded", "scaled_by_first_row", "small_gradients_dropped", "chunk_without_gradient", "vocabulary_cut",
    "logits_rounded", "ignored_read_as_class", "rows_overwritten", "head_dw_doubled", "head_dw_in_fewer_bits",
    # delta_rule
    "dg_off", "db_lost", "dk_off", "dv_unwritten", "dq_of_another", "dy_misread", "beta_scaled", "q_norm_eps",
    "a_log_rounded", "a_log_off", "a_log_reinitialised", "dt_bias_reinitialised", "conv_dweight_scaled",
    "conv_dx_at_tile_ends", "gated_norm_dw",
    # lora
    "lora_scale_off", "lora_scaled_again_backwards", "lora_dx_incomplete", "lora_wrong_stride", "lora_bypassed",
    "lora_da_loses_positions", "lora_db_from_rounded", "lora_rank_cut", "dx_added_twice", "nothing_trains_below",
    "garbage_row", "down_projection_off",
    # norm_rope
    "norm_one_omitted", "norm_dw_in_bf16", "norm_dw_loses_rows", "norm_dy_clobbered", "norm_rstd_of_neighbour",
    "norm_eps_too_large", "norm_weight_first", "qk_norm_scaled", "rope_positions_in_bf16", "rope_angles_rounded",
    "rope_inv_freq_wrong",
    "dq_garbage_at_ragged_length", "dq_wrong_for_large_q",
    # normalisation
    "mean_of_means", "unshifted_count", "ignored_counted", "divided_twice", "layer_divided_twice", "document_means",
    "labels_shifted_twice", "next_document_predicted", "first_labels_lost", "ignored_trained",
    # packing
    "state_leak", "conv_leak", "boundaries_dropped", "boundaries_late", "resets_on_grid", "state_leaks_faded",
    "backward_state_leak", "attention_leak", "positions_restart_late",
    # precision_optimizer
    "accumulated_in_fewer_bits", "fp8_input", "tf32_input", "added_twice",
)  # fmt: skip

STALE = "tests/abtest/test_survivors_op_level.py::test_a_copy_of_a_weight_shows_once_the_weight_moves[4.0]"

OP_LEVEL_TESTS = {name: f"{TEST}[{name}]" for name in NAMES} | {"lora_db_from_stale_a": STALE}
