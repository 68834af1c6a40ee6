"""The Dockerfile installs what constraints.txt pins, from a pinned base, and runs as an ordinary user."""

from __future__ import annotations

import json
import re

import pytest
from packaging.requirements import Requirement


@pytest.fixture(scope="module")
def instructions(root) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) in order: comments dropped, continued lines joined."""
    text = (root / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1].strip()) for line in joined.splitlines() if line.strip()]


def arguments(instructions, name: str) -> list[str]:
    return [rest for instruction, rest in instructions if instruction == name]


def pip_installs(instructions) -> list[str]:
    return [run for run in arguments(instructions, "RUN") if "pip install" in run]


def test_every_pin_is_the_one_of_the_constraints(instructions, pins):
    found = re.findall(r"([A-Za-z0-9_.-]+)==([^\s'\"]+)", " ".join(arguments(instructions, "RUN")))
    assert "torch" in dict(found)
    for name, version in found:
        assert pins.get(name) == version, f"Dockerfile: {name}=={version}, constraints.txt: {pins.get(name)}"


def test_every_install_is_constrained_and_uses_no_other_index(instructions):
    assert pip_installs(instructions)
    for run in pip_installs(instructions):
        assert run.count("pip install") == run.count("-c constraints.txt")
        assert "://" not in run and "--index-url" not in run and "--find-links" not in run


def test_torch_is_installed_before_anything_that_depends_on_it(instructions):
    first, *others = pip_installs(instructions)
    assert "torch==" in first and not re.search(r"-e|\.\[", first.partition("pip install")[2])
    assert any("-e '.[" in run for run in others)


def test_the_gpu_extra_is_installed(instructions, pyproject):
    extras = re.findall(r"\.\[([a-z,]+)\]", " ".join(pip_installs(instructions)))
    assert extras == ["gpu"]
    gpu = {Requirement(line).name for line in pyproject["project"]["optional-dependencies"]["gpu"]}
    assert "flash-linear-attention" in gpu


def test_the_base_is_an_exact_cuda_13_tag_for_both_architectures(instructions):
    (base,) = arguments(instructions, "FROM")
    assert re.fullmatch(r"docker\.io/nvidia/cuda:13\.0\.\d+-devel-ubuntu24\.04", base)
    assert "--platform" not in base and "x86_64" not in " ".join(rest for _, rest in instructions)


def test_python_is_one_that_the_project_supports(instructions, pyproject):
    version = re.search(r"python(3\.\d+) -m venv", " ".join(arguments(instructions, "RUN")))[1]
    assert Requirement(f"python{pyproject['project']['requires-python']}").specifier.contains(version)


def test_it_ends_as_an_ordinary_user(instructions):
    users = arguments(instructions, "USER")
    assert users and users[-1] not in ("root", "0")
    assert f" {users[-1]}" in next(run for run in arguments(instructions, "RUN") if "useradd" in run)


def test_the_entry_point_is_the_main_command(instructions):
    assert [json.loads(entry) for entry in arguments(instructions, "ENTRYPOINT")] == [["python", "-m", "bench.run"]]
    assert not arguments(instructions, "CMD")


def test_the_context_keeps_git_and_leaves_out_what_is_built(root):
    ignored = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".venv/", ".cache/", "runs/"} <= set(ignored)
    assert ".git" not in ignored and ".git/" not in ignored
