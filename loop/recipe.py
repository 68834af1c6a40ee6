"""TOML recipes: the same keys as the configuration's dataclasses."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from loop.errors import UserError

T = TypeVar("T")


def load_recipe(path: Path, default: T) -> T:
    """`default` with the values of the TOML file at `path`. Raises UserError naming file and key for what is wrong."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--recipe {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path}: can't be read: {error}") from error
    except (ValueError, RecursionError) as error:  # tomllib's own, an endless number, arrays nested without end
        raise UserError(f"--recipe {path}: not valid TOML: {error}") from error
    return _fill(default, values, str(path), "")


def _fill(default: T, values: dict[str, Any], path: str, prefix: str) -> T:
    hints = typing.get_type_hints(type(default))
    known = [field.name for field in dataclasses.fields(default)]
    changes = {}
    for key, value in values.items():
        name = prefix + key
        if key not in known:
            raise UserError(f"{path}: unknown key {name}; known here: {', '.join(prefix + k for k in known)}")
        old = getattr(default, key)
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {name} must be a table, [{name}]")
            changes[key] = _fill(old, value, path, name + ".")
        else:
            changes[key] = _convert(value, hints[key], path, name)
    return dataclasses.replace(default, **changes)


def _convert(value: Any, hint: Any, path: str, name: str) -> Any:
    """`value` as the annotated type `hint`: the few kinds a configuration has."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(value, arguments[0], path, name)
    if origin in (typing.Union, types.UnionType):
        return _convert(value, next(a for a in arguments if a is not type(None)), path, name)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise UserError(f"{path}: {name} is {value!r}; it must be one of {', '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, arguments[0], path, f"{name}[{index}]") for index, item in enumerate(value))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and (type(value) is float or (type(value) is int and abs(value) < 2**1023)):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise UserError(f"{path}: {name} is {value!r}, of type {type(value).__name__}; {wanted} is expected")


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON or TOML values; None is left out. `from_plain` is the inverse."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out[field.name] = to_plain(value)
        elif value is not None:
            out[field.name] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return out


def from_plain(default: T, values: dict[str, Any]) -> T:
    """`default` with `values`, checked as a recipe is."""
    return _fill(default, values, "configuration", "")
