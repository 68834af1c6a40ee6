"""Puts the chunked head and loss in place of the loop's, where the head is nothing but a product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from kernels.linear_cross_entropy.patch import AFTER_THE_HEAD
from kernels.swapping import is_watched
from loop.model import cross_entropy_head

from .kernel import head

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: see `beyond_a_product`; or a frozen head, whose weight has no gradient."""
    reason = beyond_a_product(run)
    if reason is None and not run.model.get_output_embeddings().weight.requires_grad:
        return "the head is frozen: its weight has no gradient that could be added up"
    return reason


def beyond_a_product(run: Run) -> str | None:
    """None, or why head and loss can't be one product and a cross-entropy: another loss head, or a head that does more."""
    if run.loss_head is not cross_entropy_head:
        return "another optimization already owns the loss head"
    output = run.model.get_output_embeddings()
    if type(output) is not nn.Linear or output.bias is not None:
        return f"the head is no plain nn.Linear without a bias but {output}"
    if is_watched(output):
        return "the head has hooks or a forward of its own, which would no longer be called"
    config = run.model.config.get_text_config()
    scaled = [name for name in AFTER_THE_HEAD if getattr(config, name, None) not in (None, 1)]
    return f"the model changes its logits after the head: {scaled[0]}" if scaled else None


def apply(run: Run) -> None:
    run.loss_head = head
