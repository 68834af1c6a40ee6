"""constraints.txt covers what pyproject.toml asks for, all the way down, and names no address."""

from __future__ import annotations

import ast
import importlib.metadata
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Import name -> distribution, where the two differ.
DISTRIBUTIONS = {"fla": "flash-linear-attention", "PIL": "pillow", "yaml": "pyyaml", "liger_kernel": "liger-kernel"}
OWN = {"abtest", "bench", "kernels", "loop", "negative_results"}


@pytest.fixture(scope="module")
def declared(pyproject) -> dict[str, list[Requirement]]:
    """Where it is declared -> requirements: the base, the build system and each extra."""
    project = pyproject["project"]
    groups = {"base": project["dependencies"], "build": pyproject["build-system"]["requires"]}
    groups |= project["optional-dependencies"]
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def test_every_dependency_is_pinned_inside_its_range(declared, pins):
    for group, requirements in declared.items():
        for requirement in requirements:
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin, f"{requirement.name} of {group} is not in constraints.txt"
            assert requirement.specifier.contains(pin), f"{requirement} of {group} excludes the pin {pin}"
            assert requirement.url is None


def test_dependencies_have_both_bounds(declared):
    for requirement in (requirement for group, many in declared.items() if group != "build" for requirement in many):
        operators = {spec.operator for spec in requirement.specifier}
        assert {">=", "<"} <= operators, f"{requirement} lacks a lower or an upper bound"


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1", "2.13.0"])
def test_the_torch_versions_of_gpu_hosts_are_in_range(declared, version):
    (torch,) = (requirement for requirement in declared["base"] if requirement.name == "torch")
    assert torch.specifier.contains(version)


def test_everything_that_gets_installed_is_pinned(declared, pins):
    """Walks the installed packages' own requirements from what is declared; an extra that is absent here is not walked."""
    queue = [requirement for requirements in declared.values() for requirement in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        assert key[0] in pins, f"{key[0]} gets installed but is not in constraints.txt"
        try:
            lines = importlib.metadata.requires(key[0]) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for needed in map(Requirement, lines):
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                queue.append(needed)
    assert len(seen) > 40


def test_constraints_name_no_address_and_no_local_version(root, pins):
    text = (root / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text and "--" not in text and " @ " not in text
    assert pins["torch"] == "2.13.0"


def test_there_is_no_lock_file(root):
    locks = ("uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "pylock.toml")
    assert not [name for name in locks if (root / name).exists()]


def test_every_import_of_the_packages_is_declared(sources, declared):
    allowed = {canonicalize_name(requirement.name) for many in declared.values() for requirement in many}
    for path, tree in sources.items():
        for name in imported(tree) - OWN - set(sys.stdlib_module_names):
            distribution = canonicalize_name(DISTRIBUTIONS.get(name, name))
            assert distribution in allowed, f"{path} imports {name}, which pyproject.toml does not declare"


def imported(tree: ast.Module) -> set[str]:
    """Top-level names of all absolute imports, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names
