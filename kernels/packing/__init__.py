"""Packed rows instead of padded ones."""

from kernels.contract import Exactness, Op, Optimization

from . import kernel, op, patch, reference

OPTIMIZATION = Optimization(
    name="packing",
    summary="the documents of a micro-step behind one another in a pack, instead of one a row, padded to the longest",
    exactness=Exactness.ROUNDING,
    why_exact="no document sees another, and a padded position is seen by none and has no label; products of other shapes "
    "are blocked otherwise, and gradients and losses are summed over rows in another order",
    eligible=patch.eligible,
    apply=patch.apply,
    op=Op(reference.padded_layers, kernel.packed_layers, op.inputs, op.WORKLOADS, op.bytes_moved, op.flops),
    source=(
        "Krell et al. 2021, efficient sequence packing without cross-contamination: arXiv 2107.02027",
        "D. S. Johnson, near-optimal bin packing algorithms, MIT, 1973",
    ),
    # Packs of like lengths would hardly need padding; batches of random documents do.
    recipe={"data": {"rows": "padded", "fill": "shuffled"}},
)
