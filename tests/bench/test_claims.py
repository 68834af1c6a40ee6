"""Several processes at one file of records: every line whole, every arm in one pair of hands."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

from abtest import jsonl
from bench.claims import Claims, alone_in

ROOT = Path(__file__).resolve().parents[2]
LINES, LENGTH = 40, 60_000  # as long as a record with many losses, and longer than any buffer
APPENDS = f"""
import sys
from pathlib import Path
from abtest import jsonl
sys.stdin.read(1)
for index in range({LINES}):
    jsonl.append(Path(sys.argv[1]), jsonl.dumps([sys.argv[2], index, sys.argv[2] * {LENGTH}]))
"""
HOLDS = """
import sys
from pathlib import Path
from bench.claims import Claims
claims = Claims(Path(sys.argv[1]), "r")
print(claims.take("arm"), flush=True)
sys.stdin.read()
"""


def python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_processes_that_append_at_once_leave_whole_lines_and_readers_see_no_half_ones(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'["torn"')  # by a process that was killed
    writers = [python(APPENDS, str(path), name) for name in "ab"]
    for writer in writers:
        writer.stdin.write("go")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        jsonl.read(path, lambda line: json.loads(line) if line != '["torn"' else None)
    assert [writer.wait() for writer in writers] == [0, 0]
    torn, *lines = path.read_text(encoding="utf-8").splitlines()
    assert torn == '["torn"' and len(lines) == 2 * LINES
    for name in "ab":
        own = [json.loads(line) for line in lines if line.startswith(f'["{name}"')]
        assert own == [[name, index, name * LENGTH] for index in range(LINES)]
    for writer in writers:
        writer.communicate()


def test_a_claim_is_one_commands_and_ends_with_it(tmp_path):
    with Claims(tmp_path, "r") as one, Claims(tmp_path, "r") as other, Claims(tmp_path, "s") as elsewhere:
        assert one.take("arm") and one.take("arm") and not other.take("arm")
        assert other.take("another arm") and elsewhere.take("arm")
        one.let_go("arm")
        assert other.take("arm") and not one.take("arm")
    assert not list(tmp_path.iterdir())


def test_a_claim_of_a_process_that_was_killed_is_nobodys(tmp_path):
    process = python(HOLDS, str(tmp_path))
    with Claims(tmp_path, "r") as mine:
        assert process.stdout.readline() == "True\n" and not mine.take("arm")
        process.kill()
        process.communicate()
        assert mine.take("arm")
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_let_go_before_it_was_locked_is_no_claim(tmp_path, monkeypatch):
    one, other = Claims(tmp_path, "r"), Claims(tmp_path, "r")
    assert one.take("arm")
    locked = other._locked
    monkeypatch.setattr(other, "_locked", lambda file, path: (one.let_go("arm"), locked(file, path))[1])
    assert not other.take("arm")  # its file is gone, and a third command may hold the next one
    monkeypatch.undo()
    assert other.take("arm")
    other.let_go("arm")


def test_only_one_command_renders_at_a_time(tmp_path):
    order, entered = [], threading.Event()

    def second() -> None:
        entered.set()
        with alone_in(tmp_path):
            order.append("second")

    with alone_in(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
