"""From a configuration to a dataset: read, tokenise (or find it in the cache), judge bad examples, pack."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loop.config import DataConfig
from loop.data import pychats, pydocs
from loop.data.cache import digest, load_documents, save_documents
from loop.data.dataset import Dataset, Document
from loop.data.packing import pack_best_fit_decreasing, pack_best_fit_shuffled
from loop.data.reading import BadExample, Example, parse_examples, read_bytes
from loop.data.template import chat_template_of
from loop.data.tokenise import Tokenised, tokenise
from loop.errors import UserError

VERSION = "1"  # goes into every cache key; raise it when reading, rendering or masking changes


def load_dataset(config: DataConfig, tokenizer: Any, seed: int) -> Dataset:
    """Documents of `config.path`, or of the Python documentation, tokenised and packed to `config.pack_length`.

    tokenizer: a fast transformers tokenizer with a chat template. seed: of the order of packs, nothing else.
    Raises UserError, with file and line, for bad examples when `config.on_bad_example` is "stop", and whenever the file
    cannot be read or nothing remains.
    """
    _check(config)
    chat_template_of(tokenizer)
    documents = _documents(config, tokenizer)
    too_long = _too_long(documents, config.pack_length)
    bad = sorted([*documents.bad, *too_long], key=lambda example: example.line)
    if config.path is not None and bad and config.on_bad_example == "stop":
        raise UserError(_report(config, bad, "; --on-bad-example skip leaves bad lines out"))
    kept = np.flatnonzero(documents.lengths <= config.pack_length)
    if not len(kept):
        raise UserError(_nothing_left(config, bad))
    chosen = tuple(_document(documents, int(index)) for index in kept)
    fill = pack_best_fit_shuffled if config.fill == "shuffled" else pack_best_fit_decreasing
    return Dataset(
        documents=chosen,
        packs=fill([len(document) for document in chosen], config.pack_length),
        pack_length=config.pack_length,
        pad_token_id=_pad_token_id(tokenizer),
        skipped=dict(sorted(Counter(example.reason for example in bad).items())),
        source=pydocs.SOURCE if config.path is None else str(config.path),
        seed=seed,
    )


def _check(config: DataConfig) -> None:
    if config.pack_length < 2:
        raise UserError(
            f"pack_length {config.pack_length} is too short; a pack needs at least 2 tokens, and usually hundreds"
        )
    if config.max_examples is not None and config.max_examples < 1:
        raise UserError(f"max_examples {config.max_examples} must be at least 1; leave it out to take all examples")


def _documents(config: DataConfig, tokenizer: Any) -> Tokenised:
    """All documents, also those too long for a pack, so that one cache file serves every pack length and policy."""
    if config.path is None:
        source = [pydocs.fingerprint(), str(config.pack_length)]
    else:
        data = read_bytes(config.path)
        source = [digest(data)]
    key = digest(VERSION, *source, str(config.max_examples), config.supervise, tokenizer_identity(tokenizer))
    cache = config.cache_dir / f"documents-{key[:32]}.safetensors"
    documents = load_documents(cache)
    if documents is None:
        examples, bad = _default_examples(config) if config.path is None else parse_examples(data, config.max_examples)
        documents = tokenise(examples, bad, tokenizer, config.supervise)
        save_documents(cache, documents)
    return documents


def _default_examples(config: DataConfig) -> tuple[list[Example], list[BadExample]]:
    chats = pychats.chats(config.pack_length)[: config.max_examples]
    return [Example(line, tuple(messages)) for line, messages in enumerate(chats, start=1)], []


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 of what decides how a conversation is tokenised: vocabulary and rules, special tokens, chat template."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = (rules, specials, chat_template_of(tokenizer))
    return digest(type(tokenizer).__name__, *(json.dumps(part, sort_keys=True) for part in parts))


def _too_long(documents: Tokenised, pack_length: int) -> list[BadExample]:
    right = f"the pack holds {pack_length}; shorten it or raise pack_length"
    return [
        BadExample(int(documents.lines[i]), "too_long", f"is {documents.lengths[i]} tokens long, {right}")
        for i in np.flatnonzero(documents.lengths > pack_length)
    ]


def _document(documents: Tokenised, index: int) -> Document:
    part = slice(documents.bounds[index], documents.bounds[index + 1])
    return Document.from_mask(documents.ids[part], documents.supervised[part])


def _pad_token_id(tokenizer: Any) -> int:
    """What fills the tail of a pack; it is never attended to from a document and never supervised."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _report(config: DataConfig, bad: Sequence[BadExample], advice: str) -> str:
    first, rest = bad[0], Counter(example.reason for example in bad[1:])
    message = f"{config.path}:{first.line}: {first.problem}"
    if rest:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(rest.items()))
        message += f" (and {rest.total()} more bad line{'s' * (rest.total() > 1)}: {counts})"
    return message + advice


def _nothing_left(config: DataConfig, bad: Sequence[BadExample]) -> str:
    if config.path is None:
        return f"pack_length {config.pack_length} is too short for the default data; 128 or more is needed"
    return f"{_report(config, bad, '')}: no good example is left, so there is nothing to train on"
