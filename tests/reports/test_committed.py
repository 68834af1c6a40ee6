"""The reports in the repository are what their records say. What a user measured since then is the user's own."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from abtest.report import records, sensitivity_records
from bench import micro_records
from bench.cross_compile.records import load
from bench.profile import records as profile_records
from bench.records import read
from bench.report import differences, readme
from bench.report.devices import NO_DEVICES
from bench.search import trials
from kernels.cross_compile import TARGETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    """reports/ as it was committed, README.md beside it."""
    try:
        archive = subprocess.run(
            ["git", "archive", "HEAD", "reports", "README.md"], cwd=ROOT, capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: nothing says what was committed")
    folder = tmp_path_factory.mktemp("committed")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none, and asks for none
        files.extractall(folder)
    return folder / "reports"


def test_rendering_the_committed_records_changes_nothing(reports, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", reports.parent)
    assert readme.with_table((reports.parent / "README.md").read_text(encoding="utf-8"), "") is not None
    assert differences(reports / "data", reports) == []


def test_committed_records_say_where_they_come_from(reports):
    paths = sorted(path for path in (reports / "data").glob("*/*.jsonl") if path.parent.name not in NO_DEVICES)
    assert paths
    for path in paths:
        for record in read(path):
            environment = record.environment
            assert environment["device_slug"] == path.parent.name
            assert len(environment["git_sha"]) == 40 and environment["git_dirty"] is False
            assert record.command.startswith(("python -m bench.run", "python -m bench.search"))
            assert record.recipe["data"].get("path") is None, "a path of somebody's machine"


def test_committed_gates_say_where_they_come_from(reports):
    data = reports / "data"
    gated = [one.record for one in records.load(data)]
    runs = [(record.environment, record.command, record.recipe) for record in gated]
    runs += [(one.facts["environment"], one.facts["command"], one.facts["recipe"]) for one in sensitivity_records.load(data)]
    if not runs:
        pytest.skip("no gate was committed")
    for environment, command, recipe in runs:
        assert len(environment["git_sha"]) == 40 and environment["git_dirty"] is False
        assert command.startswith("python -m abtest.")
        assert recipe["data"].get("path") is None, "a path of somebody's machine"


def test_committed_microbenchmarks_say_where_they_come_from(reports):
    found = [record for kept in micro_records.load(reports / "data").values() for record in kept]
    if not found:
        pytest.skip("no microbenchmark was committed")
    for record in found:
        assert len(record.environment["git_sha"]) == 40 and record.environment["git_dirty"] is False
        words = record.command.split()
        assert words[:3] == ["python", "-m", "bench.micro"] and "--record" in words
        assert record.optimization in words[words.index("--optimization") :]


def test_committed_profiles_say_where_they_come_from(reports):
    found = [record for kept in profile_records.load(reports / "data").values() for record in kept]
    if not found:
        pytest.skip("no profile was committed")
    for record in found:
        assert len(record.environment["git_sha"]) == 40 and record.environment["git_dirty"] is False
        assert record.command.startswith("python -m bench.profile") and "--record" in record.command
        assert record.result["recipe"]["data"].get("path") is None, "a path of somebody's machine"
        frames = record.result["stacks"].get("frames", [])
        assert not [frame for frame in frames if "(/" in frame], "a path of somebody's machine"


def test_committed_searches_say_where_they_come_from(reports):
    found = [trial for kept in trials.load(reports / "data").values() for trial in kept]
    if not found:
        pytest.skip("no search was committed")
    for trial in found:
        assert len(trial.environment["git_sha"]) == 40 and trial.environment["git_dirty"] is False
        assert trial.command.startswith("python -m bench.search")
        assert trial.recipe["data"].get("path") is None, "a path of somebody's machine"


def test_committed_compilations_say_where_they_come_from_and_passed(reports):
    outcomes = load(reports / "data")
    if not outcomes:
        pytest.skip("no cross-compilation was committed")
    assert {outcome.target for outcome in outcomes} == set(TARGETS)
    assert len({outcome.git_sha for outcome in outcomes}) == 1, "one record, one commit"
    for outcome in outcomes:
        assert len(outcome.git_sha) == 40 and outcome.git_dirty is False
        assert outcome.passed, f"{outcome.optimization}, {outcome.case}, {outcome.target}: {outcome.faults}"
        assert {"triton", "ptxas"} <= set(outcome.compilers) or "nvcc" in outcome.compilers
