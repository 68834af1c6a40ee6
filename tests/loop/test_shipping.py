"""What `python -m loop.train` takes from a report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loop.config import Config
from loop.device import device_slug
from loop.errors import UserError
from loop.shipping import Shipping, read_shipping


def written(tmp_path: Path, text: str | bytes) -> Path:
    folder = tmp_path / "reports" / "box-1"
    folder.mkdir(parents=True)
    (folder / "shipping.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / "reports"


def test_what_passed_is_enabled_in_its_order(tmp_path):
    reports = written(tmp_path, 'schema = 1\nmethod = "lora"\nenable = ["b", "a"]\n\n[not_enabled]\nc = "slower"\n')
    shipping = read_shipping(Config(), "box-1", reports)
    assert shipping == Shipping(("b", "a"), "b, a: passed the gate and paid on box-1 (box-1/shipping.toml)")


def test_nothing_passed(tmp_path):
    shipping = read_shipping(Config(), "box-1", written(tmp_path, "enable = []"))
    assert shipping.enable == () and shipping.why.startswith("nothing: ")


def test_another_device_has_no_say(tmp_path):
    reports = written(tmp_path, 'enable = ["a"]')
    shipping = read_shipping(Config(), "box-2", reports)
    assert shipping.enable == () and "no box-2 in reports/" in shipping.why and "bench.run" in shipping.why
    assert read_shipping(Config(), "box-1", tmp_path / "nowhere").enable == ()


@pytest.mark.parametrize(("measured", "trained"), [("lora", "full"), ("full", "lora")])
def test_another_method_was_measured(tmp_path, measured, trained):
    reports = written(tmp_path, f'method = "{measured}"\nenable = ["a"]')
    shipping = read_shipping(Config(method=trained), "box-1", reports)
    assert shipping.enable == ()
    assert shipping.why == f"nothing: box-1/shipping.toml was measured for method {measured}, not {trained}"
    assert read_shipping(Config(method=measured), "box-1", reports).enable == ("a",)


@pytest.mark.parametrize(
    "text",
    [
        "enable = [",
        'method = "lora"',
        'enable = "static_lora"',
        "enable = 3",
        "enable = [1]",
        "enable = {a = 1}",
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    reports = written(tmp_path, text)
    with pytest.raises(UserError, match=r"box-1/shipping.toml: .*python -m bench.report") as error:
        read_shipping(Config(), "box-1", reports)
    assert "\n" not in str(error.value)


def test_this_device_has_a_folder_name():
    slug = device_slug(torch.device("cpu"))
    assert slug.startswith("cpu-") and Path(slug).name == slug and slug == slug.lower()
