"""An optimization's folder as far as cross-compilation goes; test_cross_compile makes it kernels/planted of a checkout."""
