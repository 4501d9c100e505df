"""A run as text: the Python and the shell line that mean the same as a settings object.

Only what differs from the defaults is written. The third face, YAML, is `config.to_yaml()`. All three give an equal
object back.
"""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from ragkit.setting_types import parse_value
from ragkit.settings import Config

WIDTH = 100  # columns of the Python and of the shell line


def changes(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, groups as dicts: `type(config)(**changes(config)) == config`.

    A class whose setting `preset` fills others (LSR) is compared with what that preset gives.
    """
    start: dict[str, Any] = {}
    if getattr(config, "preset", None) is not None:
        start["preset"] = config.preset  # type: ignore[attr-defined]
    return {**start, **_differences(config, type(config)(**start))}


def compact(config: Config) -> Any:
    """An equal object in which only `changes(config)` counts as set (see `Config.explicit`)."""
    return type(config)(**changes(config))


def as_python(config: Config, runs: bool = True) -> str:
    """Python that makes the same settings and runs them.

    Args:
        config: The settings, for example an `LSRConfig`.
        runs: Whether a command takes them; False (for a `RAGConfig`, a part of others): they are only made.

    Returns:
        Text with imports, `config = ...` and `run(config)`, at most 100 columns wide where texts allow it.
    """
    name = type(config).__name__
    call = _python_call(name, changes(config))
    if not runs:
        return f"from ragkit.config import {name}\n\nconfig = {call}\n"
    return f"from ragkit.commands import run\nfrom ragkit.config import {name}\n\nconfig = {call}\nrun(config)\n"


def as_command(config: Config, command: str, processes: int = 1) -> str:
    """The shell line of the same run.

    Args:
        config: The settings.
        command: Name of the command, for example "lsr".
        processes: Processes of torchrun, one for each device; 1: no torchrun.

    Returns:
        `python -m ragkit lsr key=value ...`, quoted for a POSIX shell; lines end in a backslash where it goes on.

    Raises:
        ValueError: `processes` is below 1.
    """
    if processes < 1:
        raise ValueError(f"processes: found {processes}, expected 1 or more")
    start = f"torchrun --nproc_per_node {processes}" if processes > 1 else "python"
    lines = [f"{start} -m ragkit {command}"]
    for key, annotation, value in _leaves(type(config), changes(config)):
        word = shlex.quote(f"{key}={text_of(annotation, value)}")
        if len(lines[-1]) + 1 + len(word) + 2 > WIDTH and lines[-1].strip():
            lines.append("   ")  # the word's own space makes it four
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def text_of(annotation: Any, value: Any) -> str:
    """What stands after `key=` for a value: `parse_value(annotation, text_of(annotation, value))` means the same.

    Args:
        annotation: The type of the setting.
        value: A value of that type, groups in lists as dicts.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return number_text(value)
    if isinstance(value, str):
        plain = value.isprintable() and value == value.strip() and _reads_as(annotation, value, value)
        return value if plain else _double_quoted(value)
    return _flow(value)


def number_text(value: int | float) -> str:
    """A number as people write it: 2e-5, not 2e-05; nothing is rounded."""
    text = repr(value)
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else text


def _differences(config: Config, reference: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        value, usual = getattr(config, name), getattr(reference, name)
        if isinstance(value, Config):
            inner = _differences(value, usual)
            if inner:
                found[name] = inner
        elif value != usual:
            found[name] = plain_value(value)
    return found


def plain_value(value: Any) -> Any:
    """A value without settings classes: an item of a list of groups becomes a dict of its name and its changes."""
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    if isinstance(value, Config):
        first = next(iter(type(value).model_fields))  # names the item, so it is written even where it is the default
        return {first: getattr(value, first), **changes(value)}
    return value


def _leaves(cls: type[Config], values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, type, value) of every setting in nested values."""
    found: list[tuple[str, Any, Any]] = []
    for name, value in values.items():
        annotation: Any = cls.model_fields[name].annotation
        if isinstance(annotation, type) and issubclass(annotation, Config):
            found += _leaves(annotation, value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, annotation, value))
    return found


def _reads_as(annotation: Any, text: str, value: str) -> bool:
    try:
        read = parse_value(annotation, text)
    except yaml.YAMLError:
        return False
    return isinstance(read, str) and read == value


def _double_quoted(text: str) -> str:
    """YAML in double quotes on one line; everything unusual is escaped."""
    dumped = yaml.safe_dump(text, default_style='"', width=float("inf"), allow_unicode=True)
    return dumped.removesuffix("\n")


def _flow(value: Any) -> str:
    """A list or mapping as YAML on one line: [a, b], {name: bce, weight: 0.3}."""
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        simple = value.replace("_", "").replace("-", "").replace("/", "").replace(".", "").isalnum()
        return value if simple and value.isascii() and yaml.safe_load(value) == value else _double_quoted(value)
    return text_of(None, value)


# ---- Python ----


def _python_call(name: str, values: dict[str, Any]) -> str:
    items = [(f"{key}=", value) for key, value in values.items()]
    return _python_items(f"{name}(", items, ")", indent=0, before=len("config = "))


def _python_items(opening: str, items: list[tuple[str, Any]], closing: str, indent: int, before: int) -> str:
    """Items on one line where they fit, else each on a line of its own."""
    short = opening + ", ".join(start + _python_one_line(value) for start, value in items) + closing
    if indent + before + len(short) + 1 <= WIDTH or not items:
        return short
    pad = " " * (indent + 4)
    lines = [f"{pad}{start}{_python_value(value, indent + 4, len(start))}," for start, value in items]
    return "\n".join([opening, *lines, " " * indent + closing])


def _python_value(value: Any, indent: int, before: int) -> str:
    if isinstance(value, dict):
        return _python_items("{", [(f"{_text(key)}: ", item) for key, item in value.items()], "}", indent, before)
    if isinstance(value, list):
        return _python_items("[", [("", item) for item in value], "]", indent, before)
    return _python_one_line(value)


def _python_one_line(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_python_one_line(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python_one_line, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool) or value is None:
        return repr(value)
    return number_text(value)


def _text(text: str) -> str:
    """A Python text in double quotes; `repr` takes them only where the text holds a single one."""
    written = repr(text)
    return written if '"' in written else f'"{written[1:-1]}"'
