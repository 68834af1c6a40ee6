"""What `python -m loop.train` takes from a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from loop.config import Config
from loop.device import device_slug
from loop.errors import UserError
from loop.shipping import Shipping, read_shipping

WHERE = "box-1/shipping.toml"
TRAINED = 'model = "qwen3.5-tiny"\nmethod = "lora"\ndtype = "float32"\n'


def written(tmp_path: Path, text: str | bytes) -> Path:
    folder = tmp_path / "reports" / "box-1"
    folder.mkdir(parents=True)
    (folder / "shipping.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / "reports"


def setting(*enable: str, model="qwen3.5-tiny", method="lora", dtype="float32", pack_length: int | None = 512) -> str:
    length = "" if pack_length is None else f"pack_length = {pack_length}\n"
    return (
        f'[[setting]]\nmodel = "{model}"\nmethod = "{method}"\n{length}dtype = "{dtype}"\nrun_id = "r"\n'
        f'enable = {list(enable)}\n\n[setting.not_enabled]\n"other" = "slower"\n\n'
    )


def read(tmp_path: Path, *settings: str, slug="box-1", dtype="float32", **changes) -> Shipping:
    reports = written(tmp_path, "schema = 2\n\n" + "".join(settings))
    return read_shipping(dataclasses.replace(Config(), **changes), slug, dtype, reports)


def packed(length: int):
    return dataclasses.replace(Config().data, pack_length=length)


def test_what_passed_is_enabled_in_its_order(tmp_path):
    assert read(tmp_path, setting("b", "a")) == Shipping(("b", "a"), f"b, a: passed the gate and paid on box-1 ({WHERE})")


def test_nothing_passed(tmp_path):
    assert read(tmp_path, setting()) == Shipping((), f"nothing: no optimization passed the gate and paid on box-1 ({WHERE})")


def test_another_device_has_no_say(tmp_path):
    shipping = read(tmp_path, setting("a"), slug="box-2")
    assert shipping.enable == () and "no box-2 in reports/" in shipping.why and "bench.run" in shipping.why
    assert read_shipping(Config(), "box-1", "float32", tmp_path / "nowhere").enable == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("tiny-lora",)),
        ({"model": "qwen3.5-2b"}, ("big-lora",)),
        ({"model": "qwen3.5-2b", "method": "full"}, ("big-full", "more")),
        ({"dtype": "bfloat16"}, ("tiny-bf16",)),
    ],
)
def test_each_setting_has_its_own(tmp_path, changes, expected):
    settings = [
        setting("big-lora", model="qwen3.5-2b"), setting("big-full", "more", model="qwen3.5-2b", method="full"),
        setting("tiny-lora"), setting("tiny-bf16", dtype="bfloat16"),
    ]  # fmt: skip
    assert read(tmp_path, *settings, **changes).enable == expected


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"method": "full"}, "qwen3.5-tiny full float32"),
        ({"model": "./qwen3.5-tiny"}, "./qwen3.5-tiny lora float32"),
        ({"dtype": "bfloat16"}, "qwen3.5-tiny lora bfloat16"),
    ],
)
def test_something_else_was_measured(tmp_path, changes, trained):
    """The same architecture in a folder counts as something else, too: nothing here knows that it is the same."""
    shipping = read(tmp_path, setting("a", "b"), setting(method="full", dtype="float16"), **changes)
    assert shipping.enable == ()
    assert shipping.why.startswith(
        f"nothing: {WHERE} was measured for qwen3.5-tiny lora float32 (a, b), qwen3.5-tiny full float16 (nothing), "
        f"not {trained}; `--enable "
    )


def test_what_was_measured_can_be_had_all_the_same(tmp_path):
    settings = setting("c", method="full"), setting("a", "b", model="qwen3.5-2b")
    assert read(tmp_path, *settings).why.endswith("; `--enable a b` switches that on all the same")


def test_what_was_measured_for_another_method_is_no_advice(tmp_path):
    assert read(tmp_path, setting("a"), method="full").why.endswith("; `--enable NAME ...` switches on what you choose")


def test_a_file_without_settings(tmp_path):
    shipping = read(tmp_path)
    assert shipping.enable == () and "was measured for nothing, not qwen3.5-tiny lora float32" in shipping.why


@pytest.mark.parametrize(
    ("length", "chosen", "at"),
    [(512, "short", ""), (600, "short", " at pack length 512"), (5376, "long", ""), (9000, "long", " at pack length 5376"),
     (2944, "short", " at pack length 512"), (2945, "long", " at pack length 5376")],
)  # fmt: skip
def test_of_several_pack_lengths_the_nearest_counts(tmp_path, length, chosen, at):
    settings = setting("long", pack_length=5376), setting("short"), setting("unknown", pack_length=None)
    settings += (setting("full", method="full", pack_length=length),)
    shipping = read(tmp_path, *settings, data=packed(length))
    assert shipping == Shipping((chosen,), f"{chosen}: passed the gate and paid on box-1{at} ({WHERE})")


@pytest.mark.parametrize(
    ("length", "supervise", "chosen"),
    [(512, "assistant", "usual"), (512, "all", "every"), (5376, "assistant", "long"), (5376, "all", "long")],
)
def test_of_two_that_differ_in_what_is_supervised_the_own_one_counts(tmp_path, length, supervise, chosen):
    """A nearer pack length goes first: what passed passed for both, and the length changes more."""
    every = setting("every").replace('run_id = "r"', 'supervise = "all"\nrun_id = "r"')
    data = dataclasses.replace(packed(length), supervise=supervise)
    assert read(tmp_path, every, setting("usual"), setting("long", pack_length=5376), data=data).enable == (chosen,)


@pytest.mark.parametrize(
    ("rank", "chosen", "at"),
    [(16, "low", ""), (24, "low", " with rank 16"), (128, "high", ""), (100, "high", " with rank 128")],
)
def test_of_several_ranks_the_nearest_counts_and_is_said(tmp_path, rank, chosen, at):
    settings = [
        setting(name).replace('run_id = "r"', f'rank = {own}\nrun_id = "r"') for name, own in (("high", 128), ("low", 16))
    ]
    lora = dataclasses.replace(Config().lora, rank=rank)
    shipping = read(tmp_path, setting("unknown"), *settings, setting("full", method="full"), lora=lora)
    assert shipping == Shipping((chosen,), f"{chosen}: passed the gate and paid on box-1{at} ({WHERE})")


def test_a_pack_length_that_is_unknown_is_better_than_none(tmp_path):
    assert read(tmp_path, setting("a", pack_length=None)).enable == ("a",)


@pytest.mark.parametrize("schema", ["schema = 1\n", "", "schema = 3\n"])
def test_a_file_of_another_schema_says_how_to_renew_it(tmp_path, schema):
    reports = written(tmp_path, f'{schema}method = "lora"\nenable = ["a"]\n')
    number = schema[9:10] or "1"
    with pytest.raises(UserError, match=rf"box-1/shipping.toml: schema {number}, not 2; `python -m bench.report`"):
        read_shipping(Config(), "box-1", "float32", reports)


@pytest.mark.parametrize(
    "text",
    [
        "schema = 2\nsetting = [",
        'schema = 2\nsetting = "lora"',
        "schema = 2\nsetting = [1]",
        "schema = 2\n[setting]\n",
        f"schema = 2\n[[setting]]\n{TRAINED}",
        f'schema = 2\n[[setting]]\n{TRAINED}enable = "static_lora"',
        f"schema = 2\n[[setting]]\n{TRAINED}enable = [1]",
        f"schema = 2\n[[setting]]\n{TRAINED}enable = {{a = 1}}",
        f'schema = 2\n[[setting]]\n{TRAINED}pack_length = "512"\nenable = []',
        f"schema = 2\n[[setting]]\n{TRAINED}rank = 1.5\nenable = []",
        'schema = 2\n[[setting]]\nmodel = "m"\nmethod = "lora"\nenable = []',
        "[" * 5000,
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    reports = written(tmp_path, text)
    with pytest.raises(UserError, match=r"box-1/shipping.toml: .*python -m bench.report") as error:
        read_shipping(Config(), "box-1", "float32", reports)
    assert "\n" not in str(error.value)


def test_this_device_has_a_folder_name():
    slug = device_slug(torch.device("cpu"))
    assert slug.startswith("cpu-") and Path(slug).name == slug and slug == slug.lower()
