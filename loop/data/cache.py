"""Cache files: written whole or not at all, checked when read, rebuilt when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from loop.data.reading import BadExample
from loop.data.tokenise import Tokenised

ARRAYS = ("ids", "supervised", "bounds", "lines")

logger = logging.getLogger(__name__)


def digest(*parts: bytes | str) -> str:
    """SHA-256 of the parts, each with its length, so that no two lists of parts look alike."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a cache file through a temporary file in the same folder; two processes at once leave one whole file.

    A folder that cannot be written costs time and nothing else: it is logged as a warning.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s: the cache cannot be written (%s); going on without it", path, error.strerror)
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def save_documents(path: Path, documents: Tokenised) -> None:
    """Write documents to a safetensors file, with the bad examples and a checksum as JSON in its header."""
    arrays = {name: np.ascontiguousarray(getattr(documents, name)) for name in ARRAYS}
    bad = json.dumps([[example.line, example.reason, example.problem] for example in documents.bad])
    write_atomic(path, save(arrays, metadata={"bad": bad, "sha256": _checksum(arrays, bad)}))


def load_documents(path: Path) -> Tokenised | None:
    """The documents of a cache file; None when there is none, or (with a warning) when it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        return _damaged(path, str(error))
    if metadata.get("sha256") != _checksum(arrays, metadata.get("bad", "")):
        return _damaged(path, "its checksum does not fit")
    bad = tuple(BadExample(*entry) for entry in json.loads(metadata["bad"]))
    return Tokenised(**arrays, bad=bad)


def save_text(path: Path, text: str) -> None:
    """Write text with a checksum, as JSON."""
    write_atomic(path, json.dumps({"sha256": digest(text), "text": text}).encode())


def load_text(path: Path) -> str | None:
    """The text of a file that `save_text` wrote; None when there is none, or (with a warning) when it is damaged."""
    if not path.exists():
        return None
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return _damaged(path, str(error))
    if not (isinstance(entry, dict) and isinstance(entry.get("text"), str) and entry.get("sha256") == digest(entry["text"])):
        return _damaged(path, "its checksum does not fit")
    return entry["text"]


def _checksum(arrays: dict[str, np.ndarray], bad: str) -> str:
    return digest(*(f"{a.dtype}{a.shape}" for a in arrays.values()), *(a.tobytes() for a in arrays.values()), bad)


def _damaged(path: Path, why: str) -> None:
    logger.warning("%s: damaged cache file (%s); building it again", path, " ".join(why.split()))
