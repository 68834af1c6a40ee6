"""Every optimization, one folder each.

Nothing but this docstring: transformers imports `kernels` to probe for a hub package of that name, and finds ours.
"""
