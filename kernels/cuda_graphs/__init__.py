"""The whole micro-step as one CUDA graph."""

from kernels.contract import Exactness, Needs, Optimization

from . import patch

OPTIMIZATION = Optimization(
    name="cuda_graphs",
    summary="forward, loss and backward into the optimizer's gradients captured once a kind of pack, and replayed",
    exactness=Exactness.BITWISE,
    why_exact="a replay launches the kernels that the loop would launch, in its order, on tensors of the same shapes",
    eligible=patch.eligible,
    apply=patch.apply,
    needs=Needs(cuda=True),
    source=(
        "CUDA graphs in PyTorch: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs",
        "MLPerf training with whole-iteration graphs: https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/",
    ),
)
