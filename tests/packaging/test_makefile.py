"""The Makefile: what the commands run, that an install cut short is done again, and clear words for a wrong Python.

A stand-in for Python makes a virtual environment whose own Python only writes down how it was called; nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) exit {too_old} ;;
  --version) echo "Python 3.9.1" ;;
  *ensurepip*) exit {no_venv} ;;
  *_base_executable*) echo "$0" ;;
  "-m venv --clear .venv")
    rm -rf .venv; mkdir -p .venv/bin
    printf '#!/bin/sh\\necho "$@" >> calls.txt\\n[ ! -e pip-fails ]\\n' > .venv/bin/python
    chmod +x .venv/bin/python ;;
  *) exit 9 ;;
esac
"""


@pytest.fixture
def checkout(root, tmp_path) -> Path:
    folder = tmp_path / "a folder"  # with a space, as home folders have
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, folder)
    return folder


def python(folder: Path, too_old: int = 0, no_venv: int = 0) -> str:
    path = folder / "python-stand-in"
    path.write_text(PYTHON.format(too_old=too_old, no_venv=no_venv), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if not (folder / "tools").exists():
        set_gpus(folder, 0)
    return run(["make", "-C", str(folder), "--no-print-directory", *arguments], folder)


def run(command: list[str], folder: Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that sees the folder's nvidia-smi in place of this machine's, and nothing of an outer make."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    environment |= {"PATH": f"{folder / 'tools'}:{os.environ['PATH']}", **variables}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=60, stdin=subprocess.DEVNULL
    )


def set_gpus(folder: Path, count: int) -> None:
    tool = folder / "tools" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\n[ {count} -gt 0 ] && echo 'GPU 0: a GPU (UUID: x)'\n", encoding="utf-8")
    tool.chmod(0o755)


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def test_bench_installs_torch_first_then_the_package_and_runs(checkout):
    done = make(checkout, "bench", f"PYTHON={python(checkout)}", "ARGS=--steps 3")
    assert done.returncode == 0, done.stderr
    torch, package, run = calls(checkout)
    assert torch.endswith("install -c constraints.txt torch setuptools")
    assert package.endswith("install -c constraints.txt --no-build-isolation -e .[dev]")
    assert run == "-m bench.run --steps 3"
    assert done.stdout == ""  # whatever the install says must not precede the command's own output


def test_the_second_command_installs_nothing(checkout):
    make(checkout, "install", f"PYTHON={python(checkout)}")
    before = calls(checkout)
    done = make(checkout, "test", f"PYTHON={python(checkout)}")
    assert done.returncode == 0 and calls(checkout)[len(before) :] == ["-m pytest -n 2 --dist loadfile"]


def test_an_install_cut_short_is_done_again(checkout):
    (checkout / "pip-fails").touch()
    assert make(checkout, "test", f"PYTHON={python(checkout)}").returncode != 0
    assert (checkout / ".venv").is_dir() and not (checkout / ".venv/.installed").exists()
    assert len(calls(checkout)) == 1  # nothing ran after the step that failed
    (checkout / "pip-fails").unlink()
    assert make(checkout, "test", f"PYTHON={python(checkout)}").returncode == 0
    assert len(calls(checkout)) == 4


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_pin_or_dependency_installs_again(checkout, changed):
    make(checkout, "install", f"PYTHON={python(checkout)}")
    stamp = checkout / ".venv/.installed"
    os.utime(checkout / changed, (stamp.stat().st_mtime + 5,) * 2)
    assert make(checkout, "install", f"PYTHON={python(checkout)}").returncode == 0
    assert len(calls(checkout)) == 4


def test_a_gpu_brings_the_gpu_extra_also_after_the_fact(checkout):
    make(checkout, "install", f"PYTHON={python(checkout)}")
    set_gpus(checkout, 1)
    make(checkout, "install", f"PYTHON={python(checkout)}")
    assert calls(checkout)[-1].endswith("-e .[dev,gpu]")
    assert (checkout / ".venv/.installed").read_text(encoding="utf-8") == "dev gpu\n"


def test_extras_once_chosen_stay(checkout):
    make(checkout, "install", f"PYTHON={python(checkout)}", "EXTRAS=peers dev")
    assert calls(checkout)[-1].endswith("-e .[dev,peers]")
    make(checkout, "install", f"PYTHON={python(checkout)}")
    assert len(calls(checkout)) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [({"too_old": 1}, "is Python 3.9.1; isoloss needs Python 3.11 or newer"), ({"no_venv": 1}, "apt install python3-venv")],
)
def test_a_python_that_will_not_do_is_named(checkout, fault, words):
    done = make(checkout, "bench", f"PYTHON={python(checkout, **fault)}")
    assert done.returncode != 0 and words in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_not_there_is_named(checkout):
    done = make(checkout, "bench", "PYTHON=python-nowhere")
    assert done.returncode != 0 and "python-nowhere is not here" in done.stderr


def test_an_interpreter_that_has_the_packages_needs_no_install(checkout):
    done = make(checkout, "-n", "bench", "WITH=python3")
    assert done.stdout.split() == ["python3", "-m", "bench.run"]


def test_ci_lints_and_tests_from_any_folder_without_stdin(root, checkout):
    (checkout / ".ci").mkdir()
    shutil.copy(root / ".ci/run", checkout / ".ci")
    set_gpus(checkout, 0)
    done = run([str(checkout / ".ci/run")], checkout, cwd=checkout.parent, PYTHON=python(checkout))
    assert done.returncode == 0, done.stderr
    assert calls(checkout)[2:] == ["-m ruff check .", "-m ruff format --check .", "-m pytest -n 2 --dist loadfile"]
    assert done.stdout.splitlines() == ["== make lint", "== make test", "== lint and test passed"]
