"""The rows of a form: one setting each, with its input, what it takes, and what is wrong with it.

Which input a setting gets follows from its type: a choice is a list to pick from, true or false a tick, everything
else a line of text that pydantic reads, so that 2e-5 stays 2e-5 and a wrong value is named, not bent into a right one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from ragkit.run_text import number_text, plain_value, text_of
from ragkit.setting_types import expectation, options_of, parse_value
from ragkit.settings import Config
from ragkit.widgets.base import QUIET, error_html, escape, set_tooltip, widgets

NULL = "null"  # how "not set" is called, as in YAML and on the command line
NAME_WIDTH = 225  # pixels, of the column of names
INPUT_WIDTH = NAME_WIDTH + 205
SET_WIDTH = 62


def make_field(key: str, info: FieldInfo, default: Any, changed: Callable[[Field], None], label: str = "") -> Field:
    """The row that fits a setting.

    Args:
        key: Its dotted key, for example "train.batch_size".
        info: Its description, type and range.
        default: What it is where nobody sets it; the row starts with it.
        changed: Called with the row after a person changed it.
        label: Name shown before the input; "": the key's last part.
    """
    kinds = [option for option in options_of(info.annotation) if option is not NoneType]
    made: type[Field] = Line
    if get_origin(kinds[0]) is Literal or (kinds == [bool] and optional(info)):
        made = Choice
    elif kinds == [bool]:
        made = Tick
    elif item_class(info) is not None:
        made = Groups
    return made(key, info, default, changed, label or key.rsplit(".", 1)[-1])


def optional(info: FieldInfo) -> bool:
    """Whether a setting may be null."""
    return NoneType in options_of(info.annotation)


def item_class(info: FieldInfo) -> type[Config] | None:
    """The class of the items, for a list of groups of settings."""
    for option in options_of(info.annotation):
        items = get_args(option) if get_origin(option) is list else ()
        if items and isinstance(items[0], type) and issubclass(items[0], Config):
            return items[0]
    return None


def words_for(value: Any) -> str:
    """A value as it is written after `key=`."""
    return text_of(None, plain_value(value)) if not isinstance(value, str) else f'"{value}"' if value else "empty"


class Field(ABC):
    """One setting of a form.

    Attributes:
        key: Dotted key.
        row: The widgets, side by side: name and input, then what the setting is for and what is wrong with it.
        input: The widget that holds the value.
        problem: What is wrong with it, in words; "" when nothing is.
    """

    input: Any
    set: Any = None

    def __init__(self, key: str, info: FieldInfo, default: Any, changed: Callable[[Field], None], label: str) -> None:
        self.key, self.info, self.default, self.label = key, info, default, label
        self.problem = ""
        self._changed, self._quiet = changed, False
        self.note = widgets.HTML(layout={"flex": "1 1 260px", "min_width": "220px", "margin": "2px 0 6px 0"})
        self._make()
        if self.input.has_trait("value"):
            set_tooltip(self.input, f"{key}: {info.description}")  # not on boxes: JupyterLab fails to show them then
            self.input.observe(self._by_hand, "value")
        layout = {"flex_flow": "row wrap", "align_items": "flex-start", "overflow": "visible"}
        self.row = widgets.HBox([*self._controls(), self.note], layout=layout)
        self.show("")
        self.fill(default)

    @abstractmethod
    def _make(self) -> None:
        """Makes `input`."""

    def _controls(self) -> list[Any]:
        return [self.input]

    @abstractmethod
    def read(self) -> Any:
        """What is in the input; the settings class says whether that is right."""

    def fill(self, value: Any) -> None:
        """Shows a valid value; nobody is told of a change."""
        with self.quiet():
            self.input.value = value

    def show(self, message: str) -> None:
        """Shows what is wrong under what the setting is for; "": nothing is wrong."""
        if message == self.problem and self.note.value:
            return
        self.problem = message
        takes = takes_words(self.info)
        hint = "; ".join([*([takes] if takes else []), f"default: {words_for(self.default)}"])
        self.note.value = (
            f'<div style="line-height: 1.35; color: {QUIET}">{escape(self.info.description)} '
            f"<small>({escape(hint)})</small></div>{error_html(message)}"
        )

    def matches(self, words: list[str]) -> bool:
        """Whether all words are in the key or the description."""
        text = f"{self.key} {self.info.description}".casefold()
        return all(word in text for word in words)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """While it lasts, changes are ours and not a person's."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _by_hand(self, change: Any) -> None:
        if not self._quiet:
            self._changed(self)


def takes_words(info: FieldInfo) -> str:
    """Type, range and unit in words, where the input does not show them itself."""
    kinds = [option for option in options_of(info.annotation) if option is not NoneType]
    if get_origin(kinds[0]) is Literal or kinds == [bool] or item_class(info):
        return ""
    return expectation(info).removeprefix("a text, ").replace("a text or null", NULL)


class Choice(Field):
    """One of a few values, with null among them where the setting may be null."""

    def _make(self) -> None:
        values = [choice for option in options_of(self.info.annotation) for choice in get_args(option)]
        values = values or [True, False]  # bool or null
        named = [(str(value), value) for value in values]
        if optional(self.info):
            named.insert(0, (NULL, NULL))  # as a text: a Dropdown shows nothing for the value None
        self.input = widgets.Dropdown(options=named, description=self.label, **_looks())

    def read(self) -> Any:
        return None if self.input.value == NULL else self.input.value

    def fill(self, value: Any) -> None:
        super().fill(NULL if value is None else value)


class Tick(Field):
    """True or false."""

    def _make(self) -> None:
        self.input = widgets.Checkbox(description=self.label, indent=True, **_looks())

    def read(self) -> Any:
        return self.input.value


class Line(Field):
    """A number, a text, or a list or mapping in YAML; a tick says whether a setting that may be null is set."""

    def _make(self) -> None:
        kinds = {get_origin(option) or option for option in options_of(self.info.annotation)}
        self.kind = "text" if str in kinds else "number" if kinds & {int, float} else "yaml"
        long = self.kind == "text" and "prompt" in self.key
        made = widgets.Textarea if long else widgets.Text
        more = {"rows": 1} if long else {}
        self.input = made(description=self.label, continuous_update=False, **more, **_looks(optional(self.info)))
        self._last = ""
        if optional(self.info):
            self.set = widgets.Checkbox(description="set", indent=False, layout=_layout(SET_WIDTH))
            set_tooltip(self.set, f"Set {self.key}; without the tick it is {NULL}")
            self.set.observe(self._ticked, "value")

    def _controls(self) -> list[Any]:
        return [self.input] if self.set is None else [self.input, self.set]

    def read(self) -> Any:
        if self.set is not None and not self.set.value:
            return None
        text = self.input.value
        if self.kind == "text":
            return text
        text = text.strip()
        if self.kind == "number" or not text:
            return text  # pydantic reads it, or says what is wrong with it
        try:
            return parse_value(self.info.annotation, text)
        except yaml.YAMLError:
            return text

    def fill(self, value: Any) -> None:
        with self.quiet():
            if self.set is not None:
                self.set.value = value is not None
                self.input.placeholder = NULL
            if value is None:
                self.input.value = self._last = ""
            elif isinstance(value, str):  # a text, or what somebody wrote and nobody could read
                self.input.value = value
            else:
                number = isinstance(value, int | float)
                self.input.value = number_text(value) if number else text_of(self.info.annotation, value)

    def _by_hand(self, change: Any) -> None:
        if not self._quiet and self.set is not None and not self.set.value and self.input.value:
            with self.quiet():  # who writes a value wants it set
                self.set.value = True
        super()._by_hand(change)

    def _ticked(self, change: Any) -> None:
        if self._quiet:
            return
        with self.quiet():
            if not self.set.value:
                self._last, self.input.value = self.input.value, ""
            elif not self.input.value:
                self.input.value = self._last
        self._changed(self)


class Groups(Field):
    """A list of groups of settings, such as the terms of a loss: a box for each, which can be added and removed."""

    items: list[dict[str, Field]]

    def _make(self) -> None:
        self.items = []
        found = item_class(self.info)
        assert found is not None
        self.kind = found
        self.name = self.label.removesuffix("es") if self.label.endswith("sses") else self.label.removesuffix("s")
        self.heading = widgets.HTML(f"<b>{escape(self.label)}</b>", layout=_layout(NAME_WIDTH))
        self.add = widgets.Button(description=f"Add a {self.name}", icon="plus", layout=_layout(180))
        self.add.on_click(lambda _: self._edit(lambda values: values.append(plain_value(self.kind()))))
        self.input = widgets.VBox(layout={"width": "100%"})

    def _controls(self) -> list[Any]:
        self.note.layout.flex = "1 1 400px"
        return [self.heading]

    def read(self) -> Any:
        return [{name: field.read() for name, field in item.items()} for item in self.items]

    def fill(self, value: Any) -> None:
        values = [item.model_dump() if isinstance(item, Config) else item for item in value]
        self.items, boxes = [], []
        for place, one in enumerate(values):
            fields = {}
            for name, info in self.kind.model_fields.items():
                default = info.get_default(call_default_factory=True)  # type: ignore[call-arg]
                field = make_field(f"{self.key}[{place}].{name}", info, default, lambda _: self._by_hand(None))
                if name in one:
                    field.fill(one[name])
                fields[name] = field
            remove = widgets.Button(description=f"Remove {self.name} {place + 1}", icon="trash", layout=_layout(180))
            remove.on_click(lambda _, place=place: self._edit(lambda values: values.pop(place)))
            title = widgets.HTML(f"<b>{escape(self.name)} {place + 1}</b>", layout=_layout(NAME_WIDTH))
            boxes.append(
                widgets.VBox(
                    [widgets.HBox([title, remove]), *(field.row for field in fields.values())],
                    layout={"border": "1px solid var(--jp-border-color2, #888)", "margin": "4px 0", "padding": "4px"},
                )
            )
            self.items.append(fields)
        self.input.children = [*boxes, self.add]
        self.row.children = [self.heading, self.note, self.input]

    def _edit(self, change: Callable[[list[Any]], Any]) -> None:
        """Adds or removes an item; what is in the others stays as it is, right or wrong."""
        values = self.read()
        change(values)
        self.fill(values)
        self._changed(self)


def _layout(width: int) -> Any:
    return widgets.Layout(width=f"{width}px", flex="0 0 auto")


def _looks(with_tick: bool = False) -> dict[str, Any]:
    """Name and input in columns that are the same in every row; a row without a tick keeps its place free."""
    layout = _layout(INPUT_WIDTH)
    layout.margin = "2px" if with_tick else f"2px {SET_WIDTH + 6}px 2px 2px"
    return {"layout": layout, "style": {"description_width": f"{NAME_WIDTH}px"}}
