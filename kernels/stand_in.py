"""What takes the place of a layer's submodules while its forward is run on known values, to see what it does with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]
Answer = Callable[[torch.Tensor], torch.Tensor]


class StandIn(nn.Module):
    """Takes a submodule's place in a probe: writes down its calls and answers with a simple function of the first tensor."""

    def __init__(self, name: str, calls: Calls, answer: Answer):
        super().__init__()
        self.name, self.calls, self.answer = name, calls, answer

    def forward(self, *arguments: Any, beside: bool = False, **keywords: Any) -> Any:
        if len(arguments) == 2:  # rms_norm's fused norm: x and residual
            total = arguments[1] + arguments[0]
            self.calls.append((self.name, (total,), keywords))
            return self.answer(total), total
        self.calls.append((self.name, arguments, keywords))
        answer = self.answer(arguments[0] if arguments else keywords["hidden_states"])
        if self.name == "self_attn":  # returns its weights, too
            return answer, None
        return (answer, arguments[0]) if beside else answer


def stand_ins(layer: nn.Module, calls: Calls, answers: Mapping[str, Answer] | None = None) -> dict[str, nn.Module]:
    """One for every submodule of `layer`, each with another function, or with the one of `answers`."""

    def simple(factor: float) -> Answer:
        return lambda x: x * factor + 1.0

    chosen = {name: simple(1.5 + index) for index, name in enumerate(layer._modules)} | dict(answers or {})
    return {name: StandIn(name, calls, chosen[name]) for name in layer._modules}
