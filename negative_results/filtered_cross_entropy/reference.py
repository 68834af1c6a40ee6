"""The reference: the loop's own loss head, logits of every position."""

from loop.model import cross_entropy_head

__all__ = ["cross_entropy_head"]
