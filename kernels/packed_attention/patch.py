"""Selects document-wise attention in the model's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loop.attention import REFERENCES

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    if run.model.config._attn_implementation not in REFERENCES:
        return f"attention is {run.model.config._attn_implementation}; only {' and '.join(REFERENCES)} are replaced"
    return None


def apply(run: Run) -> None:
    from transformers import AttentionInterface

    from .kernel import NAME, attend_within_documents

    AttentionInterface.register(NAME, attend_within_documents)  # no mask function: transformers then builds no mask
    run.model.set_attn_implementation(NAME)
