"""Recipes are the configuration as TOML: what was written comes back, and what is wrong is named by file and key."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loop.config import Config, DataConfig, LoraConfig, OptimConfig
from loop.errors import UserError
from loop.recipe import from_plain, load_recipe, to_plain

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f"), max_size=12)
PATHS = TEXT.map(lambda text: Path(text.replace("\x00", "")))
VALUES = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: TEXT,
    Path: PATHS,
    Path | None: st.none() | PATHS,
    int | None: st.none() | st.integers(1, 2**40),
    tuple[str, ...]: st.lists(TEXT, max_size=4).map(tuple),
}


def any_of(kind: type) -> st.SearchStrategy:
    """Any instance of a configuration's dataclass, from its annotations: a new field joins without a change here."""
    parts = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            parts[name] = any_of(hint)
        elif typing.get_origin(hint) is typing.Literal:
            parts[name] = st.sampled_from(typing.get_args(hint))
        else:
            parts[name] = VALUES[hint]
    return st.builds(kind, **parts)


def toml(values: dict, prefix: str = "") -> str:
    """TOML of nested dictionaries: JSON's strings, numbers and arrays are TOML's too, but for infinity."""
    lines = [f"{key} = {_scalar(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"[{prefix}{key}]", toml(value, f"{prefix}{key}.")]
    return "\n".join(lines)


def _scalar(value: object) -> str:
    return str(value) if isinstance(value, float) and math.isinf(value) else json.dumps(value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_of(Config))
def test_plain_values_and_toml_bring_the_configuration_back(config):
    plain = to_plain(config)
    assert from_plain(Config(), plain) == config
    assert from_plain(Config(), json.loads(json.dumps(plain))) == config
    assert from_plain(Config(), tomllib.loads(toml(plain))) == config


def test_every_field_has_a_place(tmp_path):
    """Every key of every table is accepted with its own default."""
    path = tmp_path / "all.toml"
    full = Config(
        output=Path("a"), lora=LoraConfig(start_from=Path("b")), data=DataConfig(path=Path("c"), max_examples=7)
    )  # what is None by default has no TOML value
    path.write_text(toml(to_plain(full)))
    values = tomllib.loads(path.read_text())
    assert load_recipe(path, Config()) == full
    assert set(values) == {field.name for field in dataclasses.fields(Config)}
    for key, kind in (("lora", LoraConfig), ("data", DataConfig), ("optim", OptimConfig)):
        assert set(values[key]) == {field.name for field in dataclasses.fields(kind)}


def test_a_recipe_changes_what_it_names_and_nothing_else(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('steps = 7\n[optim]\nlr = 1\n[lora]\ntargets = ["q_proj"]\n')
    default = Config(seed=5, lora=LoraConfig(rank=3))
    recipe = load_recipe(path, default)
    assert recipe == dataclasses.replace(
        default,
        steps=7,
        optim=OptimConfig(lr=1.0),
        lora=LoraConfig(rank=3, targets=("q_proj",)),
    )
    assert type(recipe.optim.lr) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", r"unknown key stepz; known here: model, method, steps"),
        ("[optim]\nlearning_rate = 1.0", r"unknown key optim.learning_rate; known here: optim.lr, optim.beta1"),
        ("[data.path]\nfile = 'a'", r"data.path is {'file': 'a'}, of type dict; Path is expected"),
        ("steps = '3'", r"steps is '3', of type str; int is expected"),
        ("steps = 3.0", r"steps is 3.0, of type float; int is expected"),
        ("steps = true", r"steps is True, of type bool; int is expected"),
        ("resume = 1", r"resume is 1, of type int; bool is expected"),
        ("model = 5", r"model is 5, of type int; str is expected"),
        ("output = 5", r"output is 5, of type int; Path is expected"),
        ("lora = 4", r"lora must be a table, \[lora\]"),
        ("method = 'qlora'", r"method is 'qlora'; it must be one of 'lora', 'full'"),
        ("[lora]\ntargets = 'q_proj'", r"lora.targets is 'q_proj', of type str"),
        ("[lora]\ntargets = ['q_proj', 2]", r"lora.targets\[1\] is 2, of type int; str is expected"),
        ("[optim]\nlr = 'fast'", r"optim.lr is 'fast', of type str; float is expected"),
        ("[optim]\nlr = 1" + "0" * 400, r"optim.lr is 10+, of type int; float is expected"),
        ("steps = 1" + "0" * 5000, r"not valid TOML"),
        ("steps = ", r"not valid TOML: .*end of document"),
        ("seed = 1\nsteps = x", r"not valid TOML: .*line 2"),
        ("steps = " + "[" * 20000, r"not valid TOML"),
        ("steps = 1\nsteps = 2", r"not valid TOML"),
        ("= 3", r"not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path, Config())
    assert str(path) in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(UserError, match=r"--recipe .*nowhere\.toml: no such file"):
        load_recipe(tmp_path / "nowhere.toml", Config())
    with pytest.raises(UserError, match=r"can't be read: .*directory"):
        load_recipe(tmp_path, Config())
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(UserError, match=r"b.toml: can't be read"):
        load_recipe(binary, Config())
