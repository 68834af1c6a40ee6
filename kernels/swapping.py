"""What must be known of a module before another one takes its place, or its weight is used without calling it."""

from __future__ import annotations

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has put hooks on the calls of `module`, or a forward into it: both would no longer be called.

    Hooks on saving and loading don't count: what takes the module's place has the same parameters under the same names.
    """
    own = vars(module)
    return "forward" in own or any(own[key] for key in own if key.endswith("_hooks") and "state_dict" not in key)
