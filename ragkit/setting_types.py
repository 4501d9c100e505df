"""What a setting takes: its type and range in words, and how the text after `key=` is read."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

# Units that say what a number is, not what it counts: "a number in similarity" is no English.
NOT_COUNTED = {"factor", "factor times rank", "gradient norm", "probability", "seed number", "share per unit of rate"}
NOT_COUNTED |= {"similarity", "unit of the score", "weight change per step"}


def expectation(field: FieldInfo, with_unit: bool = True) -> str:
    """What a field takes, in words: "a whole number, 1 or more, in questions"."""
    form = _extra(field, "form")
    parts = [form] if form else [_type_words(field.annotation), *_limit_words(field.metadata)]
    unit = unit_of(field) if with_unit else None
    return ", ".join([*parts, _unit_words(unit)] if unit else parts)


def _unit_words(unit: str) -> str:
    """The unit as a part of `expectation`."""
    if unit == "share":
        return "as a share (0.1 is a tenth)"
    return f"unit: {unit}" if unit in NOT_COUNTED else f"in {unit}"


def _limit_words(metadata: Sequence[Any]) -> list[str]:
    """The range of a field in words."""
    parts = []
    for limit in metadata:
        for name, words in (
            ("ge", "{} or more"),
            ("gt", "more than {}"),
            ("le", "at most {}"),
            ("lt", "less than {}"),
        ):
            if getattr(limit, name, None) is not None:
                parts.append(words.format(getattr(limit, name)))
        if getattr(limit, "min_length", None):
            parts.append("not empty")
        if getattr(limit, "pattern", None):
            parts.append(f"of the form {limit.pattern}")
    return parts


def unit_of(field: FieldInfo) -> str | None:
    """The unit given to `setting`, if any."""
    return _extra(field, "unit")


def _extra(field: FieldInfo, name: str) -> str | None:
    extra = field.json_schema_extra
    return str(extra[name]) if isinstance(extra, dict) and name in extra else None


def parse_value(annotation: Any, raw: str) -> Any:
    """Reads the text after `=`: YAML, but text stays text where the setting is a text ("Answer: briefly")."""
    kinds = _kinds(annotation)
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        # A list whose bracket is not closed is not a list of one text.
        if str not in kinds and (list not in kinds or raw.lstrip().startswith("[")):
            raise
        value = raw
    if str in kinds and value is not None and not isinstance(value, str):
        return raw
    if list in kinds and value is not None and not isinstance(value, list):
        of_text = any(str in get_args(option) for option in options_of(annotation))
        return [raw if not isinstance(value, str) else value] if of_text else [part.strip() for part in raw.split(",")]
    return value


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _kinds(annotation: Any) -> set[Any]:
    return {get_origin(option) or option for option in options_of(annotation)}


def _type_words(annotation: Any) -> str:
    """A type in words a user knows."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    options = options_of(annotation)
    if len(options) > 1:
        if set(options) == {int, float}:
            return words[float]
        return " or ".join(_type_words(option) for option in options)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is Annotated:
        inner, *limits = get_args(annotation)
        metadata = [rule for limit in limits for rule in getattr(limit, "metadata", [limit])]
        return " of ".join([_type_words(inner), *_limit_words(metadata)])
    if get_origin(annotation) is list:
        return f"a list, each {_type_words(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "a mapping of texts to texts"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a group of settings"
    return words.get(annotation, str(annotation))


def choices_of(field: FieldInfo) -> list[str]:
    """The allowed texts of a field that takes one of a few."""
    options = options_of(field.annotation)
    return [str(choice) for option in options if get_origin(option) is Literal for choice in get_args(option)]
