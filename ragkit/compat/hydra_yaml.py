"""Hydra's YAML without Hydra: `defaults` lists put together, overrides, `${...}` references."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragkit.settings import ConfigError, deep_merge, read_yaml

Keys = tuple[str, ...]  # that lead to a value
Found = tuple[Any, Keys, tuple[str, ...]]  # a value, where it stands, and the references followed to it
REFERENCE = re.compile(r"\$\{([^${}]*)\}")  # the innermost one of nested references
DEEPEST = 20  # references inside references


@dataclass(frozen=True)
class Unresolved:
    """A value whose reference leads nowhere; an error only if somebody wants the value."""

    text: str
    error: ConfigError

    def __str__(self) -> str:
        return self.text


@dataclass
class Choices:
    """What a `defaults` list may name.

    Attributes:
        chosen: Choices of the command line by group, which win over those of the list; None: leave the group out.
        known: Contents of choices that need no file, by group and name.
        missing: (group, choice) of files that are neither there nor known, where the group is not in `known` at all.
    """

    chosen: dict[str, str | None] = field(default_factory=dict)
    known: Mapping[str, Mapping[str, dict[str, Any]]] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)


# ---- the file and those that it names ----


def groups_of(raw: Mapping[str, Any]) -> list[str]:
    """The groups that a file's `defaults` list chooses from."""
    return [name for entry in _defaults(raw, "defaults")[0] if isinstance(entry, dict) for name, _ in _choice(entry)]


def compose(raw: Mapping[str, Any], folder: Path | None, choices: Choices, where: str) -> dict[str, Any]:
    """A file with what its `defaults` list names, laid over each other in the list's order.

    A choice `group: name` is the file group/name.yaml in the file's own folder or the one above, and goes under the
    key `group`. `_self_` is the file itself; without it, it comes last.

    Args:
        raw: The file's content.
        folder: Its folder; None: it has none, and only known choices can be used.
        choices: Choices of the command line, and known ones.
        where: The file's name, for messages.

    Raises:
        ConfigError: The list is malformed, or names a file that is not there.
    """
    entries, own = _defaults(raw, where)
    parts: list[dict[str, Any]] = []
    listed: set[str] = set()
    for entry in entries:
        if entry == "_self_":
            parts.append(own)
        elif isinstance(entry, str):
            path = _find(folder, entry)
            if path is None:
                raise ConfigError(f'{where}: defaults names "{entry}", but there is no {entry}.yaml beside it')
            parts.append(compose(read_yaml(path), path.parent, choices, str(path)))
        else:
            for group, name in _choice(entry, where):
                listed.add(group)
                name = choices.chosen.get(group, name)
                parts.append(_under(group, _content(group, name, folder, choices, where)))
    for group, name in choices.chosen.items():
        if group not in listed:
            parts.append(_under(group, _content(group, name, folder, choices, where)))
    if "_self_" not in entries:
        parts.append(own)
    made: dict[str, Any] = {}
    for part in parts:
        made = deep_merge(made, part)
    return made


def _defaults(raw: Mapping[str, Any], where: str) -> tuple[list[Any], dict[str, Any]]:
    """(the list, the rest); a list under `hydra` is meant too, as GFM-RAG's documentation prints it."""
    own = {str(key): value for key, value in raw.items() if key != "defaults"}
    entries = raw.get("defaults")
    inner = own.get("hydra")
    if entries is None and isinstance(inner, dict) and "defaults" in inner:
        entries = inner["defaults"]
        own["hydra"] = {key: value for key, value in inner.items() if key != "defaults"}
    if entries is None:
        return [], own
    if not isinstance(entries, list):
        raise ConfigError(f"{where}: defaults: expected a list (- doc_ranker: idf_topk_ranker), found {entries!r}")
    return entries, own


def _choice(entry: Any, where: str = "defaults") -> list[tuple[str, str | None]]:
    if not isinstance(entry, dict) or any(
        value is not None and not isinstance(value, str) for value in entry.values()
    ):
        raise ConfigError(f"{where}: defaults: expected a name or `group: choice`, found {entry!r}")
    return [(re.sub(r"^(override|optional) +", "", str(group)).strip("/"), name) for group, name in entry.items()]


def _under(group: str, content: dict[str, Any]) -> dict[str, Any]:
    if not content:
        return {}
    package = group.partition("@")[2] or group.replace("/", ".")
    for name in reversed(package.split(".")):
        content = {name: content}
    return content


def _find(folder: Path | None, name: str) -> Path | None:
    if folder is None or ".." in Path(name).parts or Path(name).is_absolute():
        return None
    file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    return next((place / file for place in (folder, folder.parent) if (place / file).is_file()), None)


def _content(group: str, name: str | None, folder: Path | None, choices: Choices, where: str) -> dict[str, Any]:
    if name is None:
        return {}
    place = group.partition("@")[0]
    path = _find(folder, f"{place}/{name}")
    if path is not None:
        return compose(read_yaml(path), path.parent, Choices(known=choices.known), str(path))
    known = choices.known.get(place)
    if known is None:
        choices.missing.append((group, name))
        return {}
    if name in known:
        return deepcopy(known[name])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else f"; without a file there are {', '.join(known)}"
    raise ConfigError(f'{where}: there is no {place}/{name}.yaml beside it, as "{group}: {name}" asks{hint}')


# ---- references ----


def leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a tree, with references followed; a list is one value.

    A value whose reference leads nowhere is an `Unresolved`.
    """
    yield from _visit(tree, tree, (), (), ())


def _visit(tree: dict[str, Any], value: Any, key: Keys, path: Keys, trail: tuple[str, ...]) -> Iterator[Any]:
    """Leaves below a value that is reached as `key` and stands at `path`."""
    try:
        if isinstance(value, str) and "${" in value:
            value, path, trail = _follow(tree, value, path, trail)
        if isinstance(value, list):
            value = _deep(tree, value, path, trail)
    except ConfigError as error:
        yield ".".join(key), Unresolved(str(value), error)
        return
    if isinstance(value, dict) and (value or not key):
        for name, inner in value.items():
            yield from _visit(tree, inner, (*key, str(name)), (*path, str(name)), trail)
    else:
        yield ".".join(key), value


def _deep(tree: dict[str, Any], value: Any, path: Keys, trail: tuple[str, ...]) -> Any:
    if isinstance(value, str) and "${" in value:
        value, path, trail = _follow(tree, value, path, trail)
    if isinstance(value, list):
        return [_deep(tree, inner, (*path, str(place)), trail) for place, inner in enumerate(value)]
    if isinstance(value, dict):
        return {name: _deep(tree, inner, (*path, str(name)), trail) for name, inner in value.items()}
    return value


def _follow(tree: dict[str, Any], text: str, path: Keys, trail: tuple[str, ...]) -> Found:
    """What a text with references means."""
    for _ in range(DEEPEST):
        whole = REFERENCE.fullmatch(text)
        if whole:
            return _value(tree, whole[1].strip(), path, trail)

        def piece(match: re.Match[str]) -> str:
            value = _value(tree, match[1].strip(), path, trail)[0]
            if isinstance(value, (dict, list)):
                raise ConfigError(f'{".".join(path)}: "{match[0]}" is a group, and cannot be part of a text')
            return str(value)

        replaced = REFERENCE.sub(piece, text)
        if replaced == text:
            break
        text = replaced
    if "${" in text:
        raise ConfigError(
            f"{'.'.join(path)}: {text!r} holds a reference that is not closed, or too many in each other"
        )
    return text, path, trail


def _value(tree: dict[str, Any], name: str, path: Keys, trail: tuple[str, ...]) -> Found:
    """What `${name}` at `path` stands for; dots before the name count the groups up from there."""
    where = ".".join(path)
    if ":" in name:
        return _resolver(name, where), path, trail
    inner = name.lstrip(".")
    up = len(name) - len(inner)
    target = (*path[: max(0, len(path) - up)], *inner.split(".")) if up else tuple(inner.split("."))
    dotted = ".".join(target)
    if dotted in trail:
        raise ConfigError(f"{where}: the reference ${{{name}}} leads back to itself ({' -> '.join((*trail, dotted))})")
    trail = (*trail, dotted)
    node: Any = tree
    at: Keys = ()
    for part in target:
        if isinstance(node, str) and "${" in node:
            node, at, trail = _follow(tree, node, at, trail)
        at = (*at, part)
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            near = difflib.get_close_matches(dotted, list(_keys(tree)), n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ConfigError(f'{where}: refers to ${{{name}}}, but there is no key "{dotted}"{hint}')
    if isinstance(node, str) and "${" in node:
        return _follow(tree, node, at, trail)
    return node, at, trail


def _keys(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, inner in value.items():
        yield f"{prefix}{name}"
        if isinstance(inner, dict):
            yield from _keys(inner, f"{prefix}{name}.")


def _resolver(call: str, where: str) -> Any:
    kind, _, rest = call.partition(":")
    if kind == "oc.env":
        variable, comma, default = rest.partition(",")
        found = os.environ.get(variable.strip())
        if found is None and not comma:
            raise ConfigError(f"{where}: refers to ${{{call}}}, but the environment has no {variable.strip()}")
        if found is None:
            return None if default.strip() == "null" else default.strip()
        return found
    if call == "hydra:runtime.cwd":
        return os.getcwd()
    raise ConfigError(
        f"{where}: ${{{call}}} is computed by a resolver that only Hydra has; write the value itself, in the file or "
        f"as {where}=..."
    )


# ---- overrides ----


def put(tree: dict[str, Any], key: str, value: Any, depth: int = 0) -> None:
    """Sets a dotted key in place; where a reference to a group stands in the way, in the group that it names.

    Raises:
        ConfigError: A plain value, or a reference to itself, stands in the way.
    """
    if depth > DEEPEST:
        raise ConfigError(f"{key}: references lead back to themselves")
    *groups, last = key.split(".")
    node = tree
    for place, name in enumerate(groups):
        inner = node.get(name)
        whole = REFERENCE.fullmatch(inner) if isinstance(inner, str) else None
        if whole:
            put(tree, ".".join([whole[1].strip(), *groups[place + 1 :], last]), value, depth + 1)
            return
        if inner is None:
            inner = node[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {'.'.join(groups[: place + 1])} is {inner!r}, not a group of settings")
        node = inner
    node[last] = value
