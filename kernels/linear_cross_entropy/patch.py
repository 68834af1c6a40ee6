"""Puts the fused head and loss in place of the loop's, where the head is nothing but a product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from kernels.contract import Needs
from kernels.full_ft_linear.kernel import MainGradLinear
from kernels.full_ft_linear.patch import collects
from kernels.registry import unmet
from kernels.swapping import is_watched

from .reference import cross_entropy_head

if TYPE_CHECKING:
    from loop.run import Run

# What transformers' configurations call a change of the logits behind the head: Gemma, Cohere, Granite and Falcon-H1.
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def eligible(run: Run) -> str | None:
    """None, or why not: no Triton, another loss head in the run, or a head that is more than one product."""
    if run.loss_head is not cross_entropy_head:
        return "another optimization already owns the loss head"
    return unmet(Needs(triton=True), run.device) or _more_than_a_product(run.model) or _scaled_logits(run.model)


def _more_than_a_product(model: nn.Module) -> str | None:
    """Why multiplying by the head's weight would leave something of the head out. Imports triton."""
    from .kernel import DTYPES

    head = model.get_output_embeddings()
    if head is None:
        return f"{type(model).__name__} has no output head"
    if type(head) not in (nn.Linear, MainGradLinear):  # neither is called, and autograd delivers the weight's gradient
        return f"the head is a {type(head).__module__}.{type(head).__name__}, not a plain nn.Linear (LoRA on it, say)"
    if head.bias is not None:
        return "the head has a bias"
    if is_watched(head):
        return "the head has hooks or a forward of its own, which would no longer be called"
    if head.weight.dtype not in DTYPES:
        return f"the head's weight is {head.weight.dtype}, not one of {', '.join(map(str, DTYPES))}"
    return None


def _scaled_logits(model: nn.Module) -> str | None:
    config = model.config.get_text_config()
    for name in AFTER_THE_HEAD:
        value = getattr(config, name, None)
        if value is not None and value != 1:
            return f"the model changes its logits after the head: {name} is {value}"
    return None


def apply(run: Run) -> None:
    from .kernel import linear_cross_entropy_head
    from .main_grad import MainGradHead

    trained = collects(run, run.model.get_output_embeddings().weight)
    run.loss_head = MainGradHead(run.optimizer) if trained else linear_cross_entropy_head
