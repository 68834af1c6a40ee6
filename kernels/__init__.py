"""Every optimization, one folder each. Kept to this docstring: transformers imports `kernels` to probe for a hub package of that name."""
