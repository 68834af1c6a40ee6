"""Puts the filtering head and loss in place of the loop's, where the head is nothing but a product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from negative_results.bf16_head_gradient.patch import beyond_a_product

from .kernel import head

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: another optimization owns the loss head, or the head is more than one product."""
    return beyond_a_product(run)


def apply(run: Run) -> None:
    run.loss_head = head
