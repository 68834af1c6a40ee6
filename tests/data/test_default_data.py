"""The data and the tokenizer that need no file and no network."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loop.batch import IGNORE
from loop.config import DataConfig
from loop.data import load_dataset, load_tokenizer, pydocs
from loop.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache_dir):
    return load_tokenizer(None, DataConfig(cache_dir=cache_dir))


@pytest.fixture(scope="module")
def dataset(cache_dir, tokenizer):
    return load_dataset(DataConfig(cache_dir=cache_dir), tokenizer, seed=0)


def test_there_is_enough_real_text_with_a_long_tail(dataset):
    numbers = dataset.statistics()
    lengths = numbers["lengths"]
    assert numbers["documents"] > 2000
    assert lengths["min"] < 40 and lengths["p50"] < 160 and lengths["p99"] > 2 * lengths["p50"] and lengths["max"] > 400
    assert 0.4 < numbers["supervised_fraction"] < 0.6
    assert numbers["packing_efficiency"] > 0.98
    assert numbers["skipped"] == {}


@pytest.mark.parametrize("pack_length", [128, 2048])
def test_conversations_fit_their_packs(cache_dir, tokenizer, pack_length):
    dataset = load_dataset(DataConfig(cache_dir=cache_dir, pack_length=pack_length), tokenizer, seed=0)
    left_out = sum(dataset.skipped.values())
    assert left_out < 0.01 * len(dataset.documents)
    assert dataset.statistics()["lengths"]["max"] > pack_length // 2


def test_conversations_are_of_several_shapes(dataset, tokenizer):
    texts = [tokenizer.decode(document.input_ids) for document in dataset.documents]
    assert sum(text.count("<|im_start|>assistant") > 1 for text in texts) > 100
    assert sum(text.startswith("<|im_start|>system") for text in texts) > 100
    assert sum("```python" in text for text in texts) > 500
    assert len(set(texts)) > 0.99 * len(texts)


def test_replies_with_their_end_are_supervised_and_questions_are_not(dataset, tokenizer):
    for document in dataset.documents[:300]:
        targets = [label for label in document.labels if label != IGNORE]
        text = tokenizer.decode(document.input_ids)
        replies = [turn.split("<|im_end|>")[0] for turn in text.split("<|im_start|>assistant\n")[1:]]
        assert tokenizer.decode(targets) == "".join(f"{reply}<|im_end|>" for reply in replies)


def test_another_process_and_hash_seed_make_the_same_data(dataset, tmp_path):
    code = (
        "import sys; from pathlib import Path; from loop.config import DataConfig\n"
        "from loop.data import load_dataset, load_tokenizer\n"
        "config = DataConfig(cache_dir=Path(sys.argv[1]))\n"
        "print(load_dataset(config, load_tokenizer(None, config), 0).content_hash)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT), "LANG": "C"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == dataset.content_hash


def test_max_examples_and_short_packs(cache_dir, tokenizer):
    config = DataConfig(cache_dir=cache_dir, max_examples=7)
    assert len(load_dataset(config, tokenizer, seed=0).documents) == 7
    with pytest.raises(UserError, match="pack_length 4 is too short"):
        load_dataset(DataConfig(cache_dir=cache_dir, pack_length=4), tokenizer, seed=0)


def test_passages_are_distinct_and_fingerprinted():
    found = pydocs.passages()
    assert len({passage.text for passage in found}) == len(found)
    assert {"topic", "module", "class", "function"} == {passage.kind for passage in found}
    assert pydocs.fingerprint() == pydocs.fingerprint()


def test_default_tokenizer(tokenizer, cache_dir, caplog):
    assert len(tokenizer) == 4096
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = "def f(x):\n    return 'ünï 你好' # 🙂\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    (cached,) = cache_dir.glob("tokenizer-*.json")
    rules = tokenizer.backend_tokenizer.to_str()
    assert load_tokenizer(None, DataConfig(cache_dir=cache_dir)).backend_tokenizer.to_str() == rules
    cached.write_text("{oops")
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(None, DataConfig(cache_dir=cache_dir)).backend_tokenizer.to_str() == rules
    assert "damaged cache file" in caplog.text


def test_vocabulary_size(cache_dir):
    assert len(load_tokenizer(None, DataConfig(cache_dir=cache_dir), vocab_size=512)) == 512
    with pytest.raises(UserError, match="vocab_size 100 is too small"):
        load_tokenizer(None, DataConfig(cache_dir=cache_dir), vocab_size=100)


def test_tokenizer_of_a_model_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"), DataConfig())
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert loaded("Hello there")["input_ids"] == tokenizer("Hello there")["input_ids"]


def test_folders_without_a_tokenizer_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name, says in (("empty", "holds no tokenizer"), ("broken", "cannot be read as JSON"), ("missing", "no such folder")):
        with pytest.raises(UserError, match=says) as error:
            load_tokenizer(str(tmp_path / name), DataConfig())
        assert "\n" not in str(error.value)
