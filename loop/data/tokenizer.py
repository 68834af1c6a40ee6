"""Tokenizers: a model's own, or a small byte-level BPE trained on the default data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loop.config import DataConfig
from loop.data import pydocs
from loop.data.cache import digest, load_text, save_text
from loop.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = "1"  # goes into the cache key; raise it when training changes
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(model: str | None, config: DataConfig, vocab_size: int = 4096) -> Any:
    """The tokenizer of a model folder or hub id; for None, one trained on the default data and cached.

    vocab_size: of the trained one, special tokens included. Raises UserError when there is no tokenizer to be had.
    """
    if model is None:
        return _default_tokenizer(config.cache_dir, vocab_size)
    # Here, since it imports triton: a command may have to say first that it interprets.
    from transformers import AutoTokenizer

    _check_folder(model)
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        right = "give a folder or hub id that holds a tokenizer (tokenizer.json)"
        raise UserError(f"{model}: its tokenizer cannot be loaded ({reason}); {right}") from None


def _check_folder(model: str) -> None:
    """Say plainly what a folder lacks; transformers takes a path that does not exist for a hub id."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"{model}: holds no tokenizer; a model folder needs tokenizer.json")
        try:
            rules = folder / "tokenizer.json"
            if rules.is_file():
                json.loads(rules.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{rules}: cannot be read as JSON ({error}); copy the model's tokenizer.json again") from None
    elif folder.is_file() or model.startswith((".", "~", os.sep)) or model.count("/") > 1:
        raise UserError(f"{model}: no such folder; give a model folder or a hub id such as Qwen/Qwen3-0.6B")


def _default_tokenizer(cache_dir: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size {vocab_size} is too small; bytes and special tokens alone take {SMALLEST_VOCABULARY}")
    key = digest(VERSION, pydocs.fingerprint(), str(vocab_size))
    cache = cache_dir / f"tokenizer-{key[:32]}.json"
    rules = load_text(cache)
    if rules is None:
        rules = _train(vocab_size).to_str()
        save_text(cache, rules)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(rules),
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _train(vocab_size: int) -> Tokenizer:
    """Byte-level BPE (as GPT-2 has it) on the documentation and the code around it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for passage in pydocs.passages() for text in (passage.text, passage.header, passage.body) if text)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
