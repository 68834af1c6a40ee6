"""The reports in the repository are what their records say. What a user measured since then is the user's own."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from bench.records import read
from bench.report import differences

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    """reports/ as it was committed."""
    try:
        archive = subprocess.run(["git", "archive", "HEAD", "reports"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: nothing says what was committed")
    folder = tmp_path_factory.mktemp("committed")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder / "reports"


def test_rendering_the_committed_records_changes_nothing(reports):
    assert differences(reports / "data", reports) == []


def test_committed_records_say_where_they_come_from(reports):
    paths = sorted((reports / "data").glob("*/*.jsonl"))
    assert paths
    for path in paths:
        for record in read(path):
            environment = record.environment
            assert environment["device_slug"] == path.parent.name
            assert len(environment["git_sha"]) == 40 and environment["git_dirty"] is False
            assert record.command.startswith("python -m bench.run")
            assert record.recipe["data"].get("path") is None, "a path of somebody's machine"
