"""A small tokenizer with the special tokens of many model families, and files of examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loop.config import DataConfig

TEXT = ["The quick brown fox answers: Hello world! What is two and two? It is four.", "assistant user system model\n\n"] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip


@pytest.fixture(scope="session")
def byte_level_rules() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def metaspace_rules() -> str:
    """Words begin with U+2581 instead of a space, as in Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    specials = ["<unk>", *SPECIAL_TOKENS]
    tokenizer.train_from_iterator(
        TEXT * 2, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    return tokenizer.to_str()


@pytest.fixture
def make_tokenizer(byte_level_rules: str, metaspace_rules: str) -> Callable[..., PreTrainedTokenizerFast]:
    def make(template: str | None = CHATML, kind: str = "byte_level") -> PreTrainedTokenizerFast:
        rules = Tokenizer.from_str(metaspace_rules if kind == "metaspace" else byte_level_rules)
        if kind == "trimmed":  # as in Llama 3: offsets leave the leading space out
            rules.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="</s>", pad_token="<|endoftext|>")
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes objects (as JSON) and strings or bytes (as they are), one a line."""

    def write_lines(*lines: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(b"\n".join(_encode(line) for line in lines) + b"\n")
        return path

    return write_lines


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DataConfig]:
    def make(path: Path | None, **changes: object) -> DataConfig:
        return DataConfig(path=path, cache_dir=tmp_path / "cache", **{"pack_length": 256, **changes})

    return make


def _encode(line: object) -> bytes:
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()
