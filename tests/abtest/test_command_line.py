"""The command in a record: what to type for the same again, and no path of the machine that measured."""

from __future__ import annotations

import pytest

from abtest.command import command_line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ""),
        (["--arms", "silu_mul", "--run", "r"], " --arms silu_mul --run r"),
        (["--reports", "/mine/reports", "--arms", "a b"], " --arms 'a b'"),
        (["--arms", "a", "--reports=/mine"], " --arms a"),
        (["--units", "/mine", "--gate.oracle-cache", "/mine", "--data.cache-dir=/mine", "--record"], " --record"),
        (["--record", "--reports"], " --record"),
        (["--reports-of", "x", "--data", "my.jsonl"], " --reports-of x --data my.jsonl"),
    ],
)
def test_a_record_s_command_has_no_path_of_the_machine(arguments, words):
    assert command_line("bench.run", arguments) == "python -m bench.run" + words
