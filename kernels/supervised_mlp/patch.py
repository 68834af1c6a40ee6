"""Swaps the last decoder layer and its MLP, where nothing behind that MLP brings positions together."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.silu_mul.patch import FusedMLP, is_gated_silu_mlp
from kernels.stand_in import Calls, stand_ins
from kernels.swapping import is_watched

from .layer import SupervisedLayer, SupervisedMLP, with_rows

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: the model's last layer is not known to leave positions on their own behind its attention."""
    layer, norm = last_layer(run.model), getattr(run.model.get_decoder(), "norm", None)
    if layer is None or norm is None:
        return f"{type(run.model).__name__} has no decoder with `layers`, whose last has an `mlp`, and a `norm` behind them"
    if not (type(layer.mlp) is FusedMLP or is_gated_silu_mlp(layer.mlp)):
        form = "down_proj(silu(gate_proj(x)) * up_proj(x))"
        return f"the last layer's MLP is a {type(layer.mlp).__name__}, not of the form {form}"
    if is_watched(layer) or is_watched(layer.mlp):
        return "the last layer or its MLP has hooks or a forward of its own, which would no longer be called"
    if _drops(layer.mlp):
        return "the MLP drops at random, which on fewer rows would draw other numbers"
    if not leaves_positions_alone(layer):
        return f"{type(layer).__name__} does more with its MLP's output than to add it to each position"
    if not _alone(norm, run):
        return f"the last norm, a {type(norm).__name__}, brings positions together"
    return None


def apply(run: Run) -> None:
    """The parameters stay the same objects, under the same names."""
    layer = last_layer(run.model)
    replaced = with_rows(SupervisedLayer, layer)
    replaced._modules = layer._modules | {"mlp": with_rows(SupervisedMLP, layer.mlp)}
    run.model.get_decoder().layers[-1] = replaced


def last_layer(model: nn.Module) -> nn.Module | None:
    """The last of the decoder's layers, if there are any and it has an MLP."""
    layers = getattr(model.get_decoder(), "layers", None)
    found = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    return found if isinstance(getattr(found, "mlp", None), nn.Module) else None


def _drops(mlp: nn.Module) -> bool:
    """A LoRA layer's dropout is a module of its own, or a number where it is fused."""
    chances = (getattr(m, "p", 0) if isinstance(m, nn.Dropout) else getattr(m, "dropout", 0) for m in mlp.modules())
    return any(isinstance(chance, int | float) and chance > 0 for chance in chances)


def leaves_positions_alone(layer: nn.Module) -> bool:
    """Whether `layer` calls its MLP once, for all positions, and what that answers for one changes the output of this one
    alone: its forward is run on known values, with simple functions in place of its submodules."""
    x = torch.linspace(-2.0, 3.0, 12, device="cpu").view(1, 3, 4)
    keywords = {name: object() for name in ("position_embeddings", "attention_mask", "position_ids", "past_key_values")}
    outcomes = []
    for moved in (0.0, 0.5):
        change = torch.tensor([0.0, moved, 0.0], device="cpu")[:, None]
        calls: Calls = []
        probe = copy.copy(layer)
        probe.__dict__["_modules"] = stand_ins(layer, calls, {"mlp": lambda x, change=change: 2.5 * x + change})
        try:
            outcomes.append(type(layer).forward(probe, x, **keywords))
        except (TypeError, KeyError, AttributeError, ValueError, RuntimeError):
            return False  # of another kind, with submodules that are called in another way
        own = [arguments for name, arguments, _ in calls if name == "mlp"]
        if len(own) != 1 or len(own[0]) != 1 or own[0][0].shape != x.shape:
            return False
    one, other = outcomes
    if not (isinstance(one, torch.Tensor) and one.shape == x.shape):
        return False
    return (one != other).any(-1).tolist() == [[False, True, False]]


@torch.no_grad()
def _alone(norm: nn.Module, run: Run) -> bool:
    """Whether a change of one position leaves the others' bits behind `norm` as they were."""
    D = run.model.get_input_embeddings().embedding_dim
    x = torch.linspace(-2.0, 3.0, 3 * D, device=run.device).view(1, 3, D).to(run.dtype)
    other = x.clone()
    other[:, 1] = x[:, 1].flip(-1) - 1
    return (norm(x) != norm(other)).any(-1).tolist() == [[False, True, False]]
