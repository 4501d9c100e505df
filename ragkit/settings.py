"""The machinery under `ragkit.config`: one description of a setting serves code, YAML, command line, help and forms.

A settings class is a pydantic model whose fields are made with `setting` (a value) or `group` (a nested class). From
that one description come the checks, the YAML, the `key=value` overrides, the help text and the error messages.
"""

from __future__ import annotations

import difflib
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ragkit.files import atomic_write_text
from ragkit.setting_types import choices_of, expectation, options_of, parse_value

C = TypeVar("C", bound="Config")
OURS = ("value_error", "missing")  # pydantic's kinds of errors whose words are written here


@dataclass(frozen=True)
class Problem:
    """One wrong setting: its dotted key, the value found, what is expected, the nearest valid key if it is unknown."""

    key: str
    found: Any
    expected: str
    nearest: str | None = None
    unknown: bool = False

    def __str__(self) -> str:
        if self.unknown:
            hint = f'; did you mean "{self.nearest}"?' if self.nearest else f"; {self.expected}"
            return f'unknown key "{self.key}" (found {self.found!r}){hint}'
        return f"{self.key}: found {self.found!r}, expected {self.expected}"


class ConfigError(ValueError):
    """Settings that cannot be used: every wrong key with what was found, what is expected and the nearest valid key.

    Attributes:
        problems: The single findings, empty where the file as a whole could not be read.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


if TYPE_CHECKING:
    _ConfigType = type  # type checkers do not follow a metaclass that is found at run time
else:

    class _ConfigType(type(BaseModel)):
        """Lets `LSRConfig(train=...)` raise `ConfigError` too.

        An overridden `__init__` would do the same, but pydantic then calls it for every nested group, and the error of
        a nested group would lose its full key; calling the class is only ever done by people.
        """

        def __call__(cls, *args, **values):
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise _readable(error, cls) from error


class Config(BaseModel, metaclass=_ConfigType):
    """Base of all settings classes: unknown keys are refused, assignments are checked, YAML goes in and out."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _merge_group_defaults(cls, values: Any) -> Any:
        """A group given in part keeps the other defaults of *this* class.

        `LSRConfig(train={"batch_size": 4})` must keep LSR's learning rate, not fall back to that of `TrainConfig`.
        """
        if not isinstance(values, dict):
            return values
        merged = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(merged.get(name), dict):
                default = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
                if isinstance(default, Config):
                    merged[name] = deep_merge(default.explicit(), merged[name])
        return merged

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise _readable(error, type(self)) from error

    def explicit(self) -> dict[str, Any]:
        """The values that somebody set (nested groups included), without those that are only defaults."""
        values: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Config):
                inner = value.explicit()
                if inner:
                    values[name] = inner
            elif name in self.model_fields_set:
                values[name] = value
        return values

    def to_yaml(self) -> str:
        """All settings as YAML, in the order of the fields; `from_yaml` gives an equal object back."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> Path:
        """Writes `to_yaml()` to `path` atomically."""
        return atomic_write_text(path, self.to_yaml())

    @classmethod
    def from_yaml(cls: type[C], text_or_path: str | Path) -> C:
        """Reads settings from YAML text, or from a file (a `Path`, or one line that ends in .yaml or .yml)."""
        return load_config(cls, text_or_path)


def setting(default: Any, description: str, unit: str | None = None, form: str | None = None, **limits: Any) -> Any:
    """A field with its description, unit and range.

    Args:
        default: Value where the user gives none.
        description: One sentence for `--help`, forms and docs.
        unit: What a number counts ("questions", "steps"); numbers without a dimension say "factor" or the like.
        form: What a `pattern` allows, in words: messages say it in the place of the regular expression.
        **limits: `ge`, `gt`, `le`, `lt`, `min_length`, `pattern` as pydantic's `Field` takes them.
    """
    extra = {name: words for name, words in (("unit", unit), ("form", form)) if words} or None
    if isinstance(default, list | dict):
        return Field(default_factory=default.copy, description=description, json_schema_extra=extra, **limits)  # type: ignore[arg-type]
    return Field(default=default, description=description, json_schema_extra=extra, **limits)  # type: ignore[arg-type]


def group(default: Config, description: str) -> Any:
    """A nested group of settings; every object gets its own copy of `default`."""
    return Field(default_factory=lambda: default.model_copy(deep=True), description=description)


def load_config(
    cls: type[C], path: str | Path | None = None, overrides: Sequence[str] = (), base: Config | None = None
) -> C:
    """Builds settings from a base object, then a YAML file, then `key=value` overrides; later wins.

    Args:
        cls: The settings class.
        path: YAML file (or YAML text that holds a line break or a colon); None: no file.
        overrides: `"train.batch_size=4"` or `"--train.batch_size=4"`; values are read as YAML.
        base: Settings whose explicitly set values are the starting point.

    Returns:
        An object of `cls`.

    Raises:
        ConfigError: The file is missing or not a mapping, an override is not key=value, a key is unknown or a value
            is out of its range.
    """
    values: dict[str, Any] = base.explicit() if base is not None else {}
    if path is not None:
        values = deep_merge(values, read_yaml(path))
    for override in overrides:
        values = deep_merge(values, _parse_override(cls, override))
    made = cls(**{str(key): value for key, value in values.items()})
    _forget_defaults(made, values)
    return made


def _forget_defaults(made: Config, given: dict[str, Any]) -> None:
    """Keeps the defaults of nested groups out of `explicit()`: only what was given counts as set."""
    for name in type(made).model_fields:
        inner = getattr(made, name)
        if isinstance(inner, Config):
            below = given.get(name)
            below = below if isinstance(below, dict) else {}
            inner.model_fields_set.intersection_update(below)
            _forget_defaults(inner, below)


def deep_merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """`second` laid over `first`, dictionaries key by key; neither is changed."""
    merged = dict(first)
    for key, value in second.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = deep_merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def walk(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[Config] | None]]:
    """Yields (dotted key, field, class if it is a group or None) for every setting, groups before their fields."""
    for name, field in cls.model_fields.items():
        inner = field.annotation if isinstance(field.annotation, type) else None
        if inner is not None and issubclass(inner, Config):
            yield prefix + name, field, inner
            yield from walk(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field, None


def help_text(cls: type[Config], command: str) -> str:
    """The text of `python -m ragkit COMMAND --help`: every key with type, default, range, unit and description."""
    lines = [f"python -m ragkit {command} [config.yaml] [key=value | --key=value ...]", ""]
    lines += textwrap.wrap((cls.__doc__ or "").strip().split("\n\n")[0], 100) + ["", "Settings:"]
    for key, field, inner in walk(cls):
        depth = "  " * (key.count(".") + 1)
        if inner is not None:
            lines += ["", f"{depth}{key}.*  {field.description}"]
            continue
        default = default_of(cls, key)
        shown = "" if default is None else f", default {yaml_value(default)}"
        lines.append(f"{depth}{key}  ({expectation(field)}{shown})")
        lines += textwrap.wrap(
            field.description or "", 110, initial_indent=depth + "    ", subsequent_indent=depth + "    "
        )
    return "\n".join(lines) + "\n"


def nearest_key(cls: type[Config], key: str) -> str | None:
    """The valid dotted key of `cls` that looks most like `key`; a right name in a wrong group counts as near."""
    name = key.rsplit(".", 1)[-1]
    best, best_score = None, 0.6  # difflib's own cut-off for "close"
    for candidate, _, _ in walk(cls):
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, name, candidate.rsplit(".", 1)[-1]).ratio()
        # Between groups that hold the same name, the full key decides (0.1 never beats a better last name).
        score = max(whole, last) + 0.1 * whole
        if max(whole, last) >= 0.6 and score > best_score:
            best, best_score = candidate, score
    return best


class _Dumper(yaml.SafeDumper):
    """Writes texts with unusual line breaks in double quotes, where they are escaped; PyYAML would fold them."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in "\r\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def read_yaml(source: str | Path) -> dict[str, Any]:
    """Reads a mapping from a YAML file, or from YAML text."""
    text = str(source)
    is_text = not isinstance(source, Path) and ("\n" in text or ":" in text) and not text.endswith((".yaml", ".yml"))
    where = "the YAML text" if is_text else text
    if not is_text:
        path = Path(source)
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
            hint = f'; did you mean "{path.parent / near[0]}"?' if near else ""
            raise ConfigError(f'there is no configuration file "{path}"{hint}')
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read as UTF-8 text: {error}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    if values is None:
        return {}  # an empty file asks for the defaults
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping (key: value lines), found a {type(values).__name__}")
    return values


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = [item.model_dump() if isinstance(item, Config) else item for item in value]
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value})
    return found


def _parse_override(cls: type[Config], override: str) -> dict[str, Any]:
    """Turns `a.b=4` into {"a": {"b": 4}}."""
    key, sign, raw = override.removeprefix("--").partition("=")
    key = key.strip()
    if not sign or not key:
        near = nearest_key(cls, key) if key else None
        example = f"{near or 'train.batch_size'}=..."
        raise ConfigError(f'"{override}" is not a setting; write key=value or --key=value, for example {example}')
    try:
        value: Any = parse_value(_annotation(cls, key), raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {raw!r} is not valid YAML: {error}") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _annotation(cls: type[Config], key: str) -> Any:
    """The type of a dotted key; None if it is unknown (pydantic then reports it)."""
    return next((field.annotation for candidate, field, _ in walk(cls) if candidate == key), None)


def default_of(cls: type[Config], key: str) -> Any:
    """The default of a dotted key as seen from `cls` (a group's default may differ from its class's)."""
    value: Any = cls
    for part in key.split("."):
        if isinstance(value, type):
            value = value.model_fields[part].get_default(call_default_factory=True)  # type: ignore[attr-defined]
        else:
            value = getattr(value, part)
    return value


def yaml_value(value: Any) -> str:
    """A value as it stands in YAML, on one line."""
    if isinstance(value, list):
        value = [item.explicit() if isinstance(item, Config) else item for item in value]
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n...\n").strip() or "''"


def _readable(error: ValidationError, cls: type[Config]) -> ConfigError:
    """A pydantic error in our words."""
    fields = {key: field for key, field, _ in walk(cls)}
    problems: dict[str, Problem] = {}
    for found in error.errors():
        # The location of a union's member ends in the name of the type; keep only what leads to a setting.
        parts = [str(part) for part in found["loc"]]
        unknown = found["type"] in ("extra_forbidden", "no_such_attribute")
        known = len(parts)
        while known and not unknown and ".".join(parts[:known]) not in fields:
            known -= 1
        key = ".".join(parts[:known]) or cls.__name__
        value: Any = found["input"]
        if unknown:
            valid = "valid keys: " + ", ".join(name for name in fields if "." not in name)
            for leaf, inner in _leaves(key, value):
                problems[leaf] = Problem(leaf, inner, valid, nearest_key(cls, leaf), unknown=True)
            continue
        inside = ".".join(parts[known + 1 :]) if len(parts) > known + 1 and parts[known].isdigit() else ""
        if inside:  # a list of groups: which of them, and which of its settings
            field = next((item.model_fields.get(inside) for item in _item_classes(fields[key])), None)
            key, said = f"{key}[{parts[known]}].{inside}", found["msg"].removeprefix("Value error, ")
            problem = Problem(key, value, said if field is None or found["type"] in OURS else expectation(field))
        elif found["type"] in OURS or key not in fields:
            said = found["msg"].removeprefix("Value error, ")
            about, _, rest = said.partition(": ")
            if about in fields:  # a check of several settings says which of them it is about
                key, said, value = about, rest, _value_at(value, about)
            problem = Problem(key, value, said)
        else:
            item = [f" (item {part})" for part in parts[known:] if part.isdigit()]
            near = difflib.get_close_matches(str(value), choices_of(fields[key]), n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            problem = Problem(key, value, expectation(fields[key]) + "".join(item[:1]) + hint)
        problems.setdefault(key, problem)
    lines = [str(problem) for problem in problems.values()]
    head = f"{cls.__name__}: " if len(lines) == 1 else f"{cls.__name__}: {len(lines)} settings are wrong\n  "
    return ConfigError(head + "\n  ".join(lines), list(problems.values()))


def _item_classes(field: FieldInfo) -> list[type[Config]]:
    """The class of the groups that a setting is a list of."""
    items = [item for option in options_of(field.annotation) for item in get_args(option)]
    return [item for item in items if isinstance(item, type) and issubclass(item, Config)]


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else getattr(values, part, None)
    return values


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings inside an unknown group: the wrong name of a group is told from what was meant to be in it."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value
