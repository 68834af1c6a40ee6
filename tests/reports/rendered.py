"""Rendered pages, read back."""

from __future__ import annotations

from markdown_it import MarkdownIt


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of plain cell texts, as a GitHub-like renderer sees it."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level >= 4:
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found
