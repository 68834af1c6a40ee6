"""What README and CONTRIBUTING tell people to type exists, links lead somewhere, and the worked example works as printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loop.config import Config
from loop.recipe import load_recipe

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
EXAMPLE = "native_rms_norm"


def page(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


def commands(text: str) -> str:
    """Everything in code: spans between backticks, fenced blocks, and indented blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`]+)`", rest), *re.findall(r"^ {4,}(.+)$", rest, re.MULTILINE)])


@pytest.mark.parametrize("name", PAGES)
def test_every_make_target_exists(root, name):
    targets = set(re.findall(r"^([a-z]+):", page(root, "Makefile"), re.MULTILINE))
    for words in re.findall(r"\bmake ((?:[a-z]+ ?)+)", commands(page(root, name))):
        assert set(words.split()) <= targets, f"{name}: make {words}"


def test_the_two_commands_come_first(root):
    assert re.search(r"^## Start\n.*?^    make bench .*?\n    make test ", page(root, "README.md"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_every_module_that_is_run_exists(root, name):
    for module in re.findall(r"python -m ([a-z_.]+)", commands(page(root, name))):
        path = root / module.replace(".", "/")
        installed = module in ("pip", "pytest")
        assert installed or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), (
            f"{name}: python -m {module}"
        )


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_resolves(root, name):
    for target in re.findall(r"\]\(([^)\s]+)\)", page(root, name)):
        if "://" not in target:
            assert (root / target.partition("#")[0]).exists(), f"{name} links to {target}"


def test_every_level_is_explained(root):
    from abtest.verdict import Level

    for level in Level:
        assert re.search(rf"^\| {level.value} \|", page(root, "README.md"), re.MULTILINE), level


def test_the_layout_names_folders_that_exist(root):
    layout = page(root, "README.md").split("## Layout")[1].split("\n[")[0]
    for folder in re.findall(r"^\| `([a-z_]+)/` \|", layout, re.MULTILINE):
        assert (root / folder).is_dir(), folder


def test_the_recipe_of_the_readme_is_one(root, tmp_path):
    (block,) = re.findall(r"^```toml\n(.*?)^```", page(root, "README.md"), re.MULTILINE | re.DOTALL)
    path = tmp_path / "recipe.toml"
    path.write_text(block, encoding="utf-8")
    config = load_recipe(path, Config())
    assert (config.lora.rank, config.data.pack_length, config.grad_accum) == (128, 5376, 4)


def test_the_version_is_the_newest_released_of_the_changelog(root, pyproject):
    versions = re.findall(r"^## (\S+)", page(root, "CHANGELOG.md"), re.MULTILINE)
    versions = versions[1:] if versions[0] == "Unreleased" else versions
    assert versions[0] == pyproject["project"]["version"]
    assert versions == sorted(versions, key=lambda v: tuple(map(int, v.split("."))), reverse=True)


CHECK = f"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from kernels import registry
from loop.config import Config
from loop.run import Run

optimization = registry.discover()[{EXAMPLE!r}]
torch.manual_seed(0)
shape = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(shape)
run = Run(Config(), torch.device("cpu"), torch.float32, model, None, None, None)
tokens = torch.arange(24).reshape(2, 12)
parameters = dict(model.named_parameters())


def outcome():
    model.zero_grad()
    logits = model(tokens).logits
    logits.square().mean().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in parameters.values())]


reference = outcome()
registry.enable(run, [{EXAMPLE!r}])
assert run.enabled == [{EXAMPLE!r}] and not run.refused
assert sum(type(module).__name__ == "NativeRMSNorm" for module in model.modules()) == 5
assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
for one, other in zip(reference, outcome(), strict=True):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
assert "none of" in registry.refusal(optimization, run)  # nothing is left to replace, and it says so

op = optimization.op
for workload in op.workloads:
    if workload.small:
        sides = []
        for function in (op.reference, op.candidate):
            inputs = op.inputs(workload, torch.device("cpu"), 0)
            out = function(*inputs)
            sides.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for one, other in zip(*sides, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert op.bytes_moved(workload) > 0 and op.flops(workload) > 0
print("the example works")
"""


@pytest.fixture(scope="module")
def worked_example(root, tmp_path_factory) -> Path:
    """A checkout whose only optimization is CONTRIBUTING.md's, written out from the page."""
    folder = tmp_path_factory.mktemp("example")
    for package in ("loop", "abtest"):
        (folder / package).symlink_to(root / package)
    for name in ("kernels/__init__.py", "kernels/contract.py", "kernels/registry.py", "negative_results/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, folder / name)
    shutil.copy(root / "pyproject.toml", folder)
    blocks = re.findall(
        r"^`(kernels/[^`]+\.py)`\n\n```python\n(.*?)^```$", page(root, "CONTRIBUTING.md"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == page(root, "CONTRIBUTING.md").count("```python")  # none without a file to put it in
    for name, code in blocks:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code, encoding="utf-8")
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_worked_example_works_as_printed(worked_example):
    done = python(worked_example, "-c", CHECK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("the example works")


def test_the_worked_example_keeps_the_house_style(worked_example):
    for arguments in (("check", "--no-cache"), ("format", "--check", "--no-cache")):
        done = python(worked_example, "-m", "ruff", *arguments, f"kernels/{EXAMPLE}")
        assert done.returncode == 0, done.stdout + done.stderr
