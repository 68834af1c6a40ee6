"""What every kernel compiles to, for GPUs that need not be here. The contract is `kernels/cross_compile.py`."""
