"""Triton's interpreter, without what it does over and over.

Around a launch it exchanges what `triton.language` names for functions that compute. It looks for all of those anew at every
call of every jitted function, which takes a third of the time of small kernels, and finds the same ones each time.
"""

from __future__ import annotations

import functools
import types
from typing import Any


def exchange_language_once() -> None:
    """Has them looked for once in this process; each launch still puts them in, and takes them out again.

    Does nothing where there is no Triton, where it compiles, or where it is built otherwise: that one is only slower.
    """
    try:
        import triton
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if not triton.knobs.runtime.interpret or not hasattr(interpreter, "_LangPatchScope"):
        return
    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))  # both of its modules
    exchanged = {(id(owner), name): (owner, name, vars(owner)[name]) for owner, name, _ in scope._changes}
    scope.restore()
    _, _, load = exchanged[id(tl), "load"]

    @functools.wraps(interpreter._patch_lang)
    def exchange(function: Any) -> Any:
        """What a launch restores at its end. A function that a kernel calls finds everything exchanged."""
        scope = interpreter._LangPatchScope()
        if tl.load is not load:
            for owner, name, value in exchanged.values():
                scope.set_attr(owner, name, value)
        return scope

    interpreter._patch_lang = exchange
