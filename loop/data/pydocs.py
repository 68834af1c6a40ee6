"""Text that every Python ships with: the reference topics of `pydoc_data` and the standard library's docstrings.

Docstrings of modules written in Python are read from their source with `ast`, so nothing is imported and `-OO` does not
matter; only the C modules named here are imported. Everything is in a fixed order, whatever the hash seed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import platform
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SOURCE = f"documentation of {platform.python_implementation()} {platform.python_version()}"

C_MODULES = ("builtins", "math", "cmath", "itertools", "operator", "array", "binascii", "struct", "unicodedata", "time")
PYTHON_MODULES = """
abc argparse ast base64 bdb bisect calendar cmd code codecs codeop collections configparser contextlib copy csv _pydecimal
_pydatetime datetime dataclasses difflib dis doctest enum filecmp fileinput fnmatch fractions ftplib functools getopt gettext
glob graphlib gzip hashlib heapq hmac imaplib inspect io ipaddress linecache locale lzma mailbox mimetypes netrc numbers
operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats
py_compile pyclbr pydoc queue quopri random re reprlib sched secrets selectors shelve shlex shutil signal smtplib socket
socketserver ssl statistics string stringprep subprocess symtable sysconfig tarfile tempfile textwrap threading timeit
tokenize trace traceback tracemalloc turtle types typing uuid warnings wave weakref webbrowser xmlrpc/client zipapp zipfile
asyncio/base_events asyncio/events asyncio/futures asyncio/locks asyncio/queues asyncio/streams asyncio/subprocess
asyncio/tasks concurrent/futures/_base concurrent/futures/process concurrent/futures/thread email/charset email/generator
email/header email/headerregistry email/message email/parser email/policy email/utils html html/parser http http/client
http/cookiejar http/cookies http/server importlib/abc importlib/util json json/decoder json/encoder logging logging/config
logging/handlers multiprocessing/managers multiprocessing/pool multiprocessing/shared_memory unittest/case unittest/loader
unittest/mock unittest/result unittest/suite urllib/error urllib/parse urllib/request urllib/robotparser wsgiref/handlers
wsgiref/headers wsgiref/simple_server wsgiref/util xml/dom/minidom xml/dom/pulldom xml/etree/ElementTree xml/sax/handler
xml/sax/saxutils xml/sax/xmlreader zoneinfo
"""


@dataclass(frozen=True)
class Passage:
    """A piece of documentation. kind: "topic", "module", "class" or "function"; owner: its class, or "".

    header: the `def` or `class` line; body: the source below the docstring; both "" where there is none.
    """

    kind: str
    name: str
    text: str
    owner: str = ""
    header: str = ""
    body: str = ""


@lru_cache(maxsize=1)
def passages() -> tuple[Passage, ...]:
    """All passages in a fixed order; a text that several names share is told once, under the first."""
    seen: set[str] = set()
    kept = []
    for passage in (*_topics(), *_c_passages(), *_source_passages()):
        if passage.text and passage.text not in seen:
            seen.add(passage.text)
            kept.append(passage)
    return tuple(kept)


def fingerprint() -> str:
    """SHA-256 of everything that `passages` reads: which Python's documentation this is. Parses nothing."""
    total = hashlib.sha256()
    for passage in (*_topics(), *_c_passages()):
        total.update(repr((passage.kind, passage.name, passage.header, passage.text)).encode("utf-8", "replace"))
    for name, path in _sources():
        total.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _topics() -> Iterator[Passage]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship it in a package of its own
        return
    for name in sorted(topics):
        yield Passage("topic", name, topics[name].strip())


def _c_passages() -> Iterator[Passage]:
    for module in C_MODULES:
        try:
            members = vars(importlib.import_module(module))
        except ImportError:  # optional in a Python built without it
            continue
        for name in sorted(members):
            value = members[name]
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isbuiltin(value)):
                continue  # what `site` or a shell put into builtins is neither
            prefix = "" if module == "builtins" else f"{module}."
            yield _c_passage("class" if inspect.isclass(value) else "function", f"{prefix}{name}", value, "")
            if inspect.isclass(value):
                for method in sorted(vars(value)):
                    if not method.startswith("_") and inspect.isroutine(vars(value)[method]):
                        yield _c_passage("function", f"{prefix}{name}.{method}", vars(value)[method], f"{prefix}{name}")


def _c_passage(kind: str, name: str, value: object, owner: str) -> Passage:
    doc, signature = value.__doc__, getattr(value, "__text_signature__", None)
    text = inspect.cleandoc(doc) if isinstance(doc, str) else ""
    header = f"{name}{signature}" if isinstance(signature, str) else ""
    return Passage(kind, name, text, owner, header)


def _sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of the modules whose source this interpreter has; a package stands in its __init__.py."""
    library = Path(sysconfig.get_path("stdlib"))
    for entry in PYTHON_MODULES.split():
        for path in (library / f"{entry}.py", library / entry / "__init__.py"):
            if path.is_file():
                yield entry.replace("/", "."), path
                break


def _source_passages() -> Iterator[Passage]:
    for module, path in _sources():
        text = path.read_text(encoding="utf-8", errors="replace")
        tree = ast.parse(text)
        yield Passage("module", module, ast.get_docstring(tree) or "")
        lines = text.split("\n")  # not splitlines: ast does not count form feeds as line ends
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                yield from _class_passages(module, node, lines)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield _source_passage("function", f"{module}.{node.name}", node, lines, "")


def _class_passages(module: str, node: ast.ClassDef, lines: list[str]) -> Iterator[Passage]:
    owner = f"{module}.{node.name}"
    yield _source_passage("class", owner, node, lines, "")
    for method in node.body:
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _source_passage("function", f"{owner}.{method.name}", method, lines, owner)


def _source_passage(
    kind: str, name: str, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], owner: str
) -> Passage:
    text = ast.get_docstring(node)
    if not text:
        return Passage(kind, name, "")
    doc = node.body[0]
    header = lines[node.lineno - 1 : max(node.lineno, doc.lineno - 1)]
    body = lines[doc.end_lineno : node.end_lineno] if kind == "function" else []
    whole = textwrap.dedent("\n".join([*header, *body])).rstrip().split("\n")
    return Passage(kind, name, text.strip(), owner, "\n".join(whole[: len(header)]), "\n".join(whole[len(header) :]))
