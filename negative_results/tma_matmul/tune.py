"""`python -m negative_results.tma_matmul.tune`: that of `sm121a_matmul` for this folder's tiles."""

from __future__ import annotations

from loop.cli import guarded
from negative_results.sm121a_matmul import tune

from .patch import ENGINE


def main(argv: list[str] | None = None) -> int:
    """As `negative_results.sm121a_matmul.tune.main`."""
    return tune.main(argv, ENGINE)


if __name__ == "__main__":
    guarded(main)
