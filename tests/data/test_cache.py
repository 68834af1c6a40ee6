"""Tokenised once; a damaged cache file costs time and nothing else."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from loop.data import load, load_dataset
from loop.data.cache import digest, load_documents, load_text, save_text
from loop.errors import UserError

LINES = [{"instruction": f"Question {i}", "output": f"Answer {i}"} for i in range(20)]


@pytest.fixture
def counted(monkeypatch):
    """How often anything is tokenised."""
    calls = []
    tokenise = load.tokenise

    def count(*arguments):
        calls.append(1)
        return tokenise(*arguments)

    monkeypatch.setattr(load, "tokenise", count)
    return calls


def test_the_second_load_reads_the_cache_and_gives_the_same(make_tokenizer, write, config, counted):
    path = write(*LINES)
    first, second = (load_dataset(config(path), make_tokenizer(), seed=0) for _ in range(2))
    assert len(counted) == 1
    assert first.content_hash == second.content_hash
    assert [d.labels for d in first.documents] == [d.labels for d in second.documents]


def test_one_cache_file_serves_every_pack_length_policy_and_seed(make_tokenizer, write, config, counted):
    path = write(*LINES)
    hashes = {
        load_dataset(config(path, pack_length=length, on_bad_example=policy), make_tokenizer(), seed=seed).content_hash
        for length in (64, 128)
        for policy in ("stop", "skip")
        for seed in (0, 1)
    }
    assert len(counted) == 1
    assert len(hashes) == 2  # one a pack length


def test_bad_lines_are_remembered(make_tokenizer, write, config, counted):
    path = write(*LINES, "oops")
    for _ in range(2):
        with pytest.raises(UserError, match=r":21: is not JSON"):
            load_dataset(config(path), make_tokenizer(), seed=0)
    assert load_dataset(config(path, on_bad_example="skip"), make_tokenizer(), seed=0).skipped == {"malformed_json": 1}
    assert len(counted) == 1


def test_whatever_changes_the_tokens_changes_the_key(make_tokenizer, write, config, counted):
    path = write(*LINES)
    tokenizer = make_tokenizer()
    load_dataset(config(path), tokenizer, seed=0)
    load_dataset(config(path, supervise="all"), tokenizer, seed=0)
    load_dataset(config(path, max_examples=3), tokenizer, seed=0)
    load_dataset(config(path), make_tokenizer(tokenizer.chat_template + " "), seed=0)
    load_dataset(config(path), make_tokenizer(kind="metaspace"), seed=0)
    load_dataset(config(write(*LINES, LINES[0])), tokenizer, seed=0)
    assert len(counted) == 6
    moved = write(*LINES, name="moved.jsonl")
    load_dataset(config(moved), tokenizer, seed=0)
    assert len(counted) == 6


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "folder"])
def test_a_damaged_cache_file_is_built_again_with_a_warning(make_tokenizer, write, config, counted, caplog, damage):
    settings = config(write(*LINES))
    first = load_dataset(settings, make_tokenizer(), seed=0)
    (cached,) = settings.cache_dir.glob("documents-*.safetensors")
    data = cached.read_bytes()
    if damage == "folder":
        cached.unlink()
        cached.mkdir()
    else:
        flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        cached.write_bytes({"cut": data[:-20], "flip": flipped, "empty": b"", "text": b"hello" * 9}[damage])
    with caplog.at_level(logging.WARNING):
        second = load_dataset(settings, make_tokenizer(), seed=0)
    assert "damaged cache file" in caplog.text and str(cached) in caplog.text
    assert second.content_hash == first.content_hash
    assert len(counted) == 2
    if damage != "folder":
        assert load_documents(cached) is not None


def test_processes_at_once_leave_one_whole_file(make_tokenizer, write, config):
    settings = config(write(*LINES))
    tokenizers = [make_tokenizer() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        hashes = set(pool.map(lambda tokenizer: load_dataset(settings, tokenizer, 0).content_hash, tokenizers))
    assert len(hashes) == 1
    assert [path.suffix for path in settings.cache_dir.iterdir()] == [".safetensors"]


def test_a_cache_folder_that_cannot_be_written_is_a_warning(make_tokenizer, write, config, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert len(load_dataset(config(write(*LINES)), make_tokenizer(), seed=0).documents) == 20
    assert "cannot be written" in caplog.text


def test_text_entries_are_checked(tmp_path, caplog):
    path = tmp_path / "entry.json"
    assert load_text(path) is None and not caplog.text
    save_text(path, "héllo")
    assert load_text(path) == "héllo"
    for wrong in ("{", "[]", json.dumps({"sha256": "0", "text": "héllo"}), json.dumps({"text": 3})):
        path.write_text(wrong)
        assert load_text(path) is None
    assert caplog.text.count("damaged cache file") == 4


def test_digest_keeps_parts_apart():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
