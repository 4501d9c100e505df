"""A form for the settings of a run, generated from their class: the same settings as Python, YAML and shell line.

It knows nothing of any one command but which settings people change first (`FIRST`); names, types, ranges, units and
descriptions come from `ragkit.config`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from ragkit.commands import COMMANDS, command_of
from ragkit.config import Config, ConfigError, Problem
from ragkit.presets import PRESETS, preset, presets_of
from ragkit.prompts import PromptError, get_template
from ragkit.run_text import as_command, as_python, changes, compact, text_of
from ragkit.settings import nearest_key, walk
from ragkit.widgets.base import (
    QUIET,
    TEXT,
    StaticBox,
    accordion,
    code_html,
    error_html,
    escape,
    set_titles,
    set_tooltip,
    tabs,
    widgets,
)
from ragkit.widgets.fields import Field, Groups, make_field
from ragkit.widgets.form_words import FIRST, changes_html, problem_words

DEFAULTS, GIVEN = "defaults", "as given"
HERE = "This is a form in a Jupyter front end. The next cell says the same in code."
PROMPTS = ("prompt", "rag.prompt")  # settings that name a template or hold one


class ConfigForm(StaticBox):
    """A form whose `config` is always a valid settings object.

    Args:
        settings: A settings class, or an object to start from.
        preset: Name of a preset to start from ("cpu-minute", "colab-t4", "full"); with a class only.
        fields: Dotted keys of the settings that stand at the top; None: the class's own list.

    Raises:
        TypeError: `settings` is neither a settings class nor an object of one.
        ValueError: An unknown preset, a preset beside an object, or an unknown name in `fields`.

    Example:
        >>> form = ConfigForm(LSRConfig, preset="cpu-minute")  # doctest: +SKIP
        >>> form.config.train.max_steps  # doctest: +SKIP
        60
    """

    def __init__(self, settings: Any, preset: str | None = None, fields: Sequence[str] | None = None) -> None:
        super().__init__(layout={"max_width": "1150px", "overflow": "visible"})
        is_class = isinstance(settings, type)
        self.cls: type[Config] = settings if is_class else type(settings)
        if not issubclass(self.cls, Config):
            raise TypeError(f"found {settings!r}, expected a settings class such as LSRConfig, or an object of one")
        if preset is not None and not is_class:
            raise ValueError(
                "found a settings object and a preset; give the class with the preset, or the object alone"
            )
        self._starts: dict[str, Config] = {DEFAULTS: self.cls()}
        self._starts |= {name: preset_of(self.cls, name) for name in presets_of(self.cls)}
        first = preset_of(self.cls, preset) if preset is not None else self.cls() if is_class else settings
        self._config: Config = self.cls()
        self._written: Config | None = None  # the settings that "What to run" shows
        self._problems: list[Problem] = []
        self._listeners: list[Callable[[Config], None]] = []
        self._fields = self._make_fields()
        self._make_parts(list(fields) if fields is not None else FIRST.get(self.cls, []))
        self.config = first

    # ---- what code sees ----

    @property
    def config(self) -> Any:
        """The settings; while something in the form is wrong, the last valid ones.

        Each call gives a copy: to change the form, change it and set it again (`form.config = changed`).

        Raises:
            TypeError: On setting, an object of another class.
            ConfigError: On setting, an object that was made invalid; the form stays as it was.
        """
        return self._config.model_copy(deep=True)

    @config.setter
    def config(self, config: Any) -> None:
        if type(config) is not self.cls:
            found = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
            raise TypeError(
                f"form.config: found {found}, expected an object of {self.cls.__name__}; make another form for other "
                "settings: ConfigForm(config)"
            )
        checked = compact(self.cls(**config.model_dump(warnings=False)))
        name = next((name for name, start in self._starts.items() if start == checked), GIVEN)
        self._starts.setdefault(name, checked)
        if name == GIVEN:
            self._starts[GIVEN] = checked
        self._choose(name)
        self._fill(checked)

    @property
    def errors(self) -> list[Problem]:
        """What is wrong in the form now: key, what was found, what is expected. Empty: nothing."""
        return list(self._problems)

    def field(self, key: str) -> Field:
        """The row of a setting, by its dotted key; its `input.value` is what a person would type.

        Raises:
            KeyError: There is no such setting.
        """
        if key not in self._fields:
            near = nearest_key(self.cls, key)
            raise KeyError(
                f"{self.cls.__name__} has no setting {key!r}" + (f'; did you mean "{near}"?' if near else "")
            )
        return self._fields[key]

    def on_change(self, listener: Callable[[Config], None]) -> None:
        """Has `listener(config)` called whenever the valid settings change."""
        self._listeners.append(listener)

    def code(self) -> str:
        """The run as Python; settings that no command takes alone are only made."""
        return as_python(self._config, self._runs())

    def yaml(self) -> str:
        """All settings as YAML."""
        return self._config.to_yaml()

    def command(self, processes: int = 1) -> str:
        """The run as a shell line; with more than one process through torchrun."""
        return as_command(self._config, command_of(self._config), processes)

    # ---- what stands where there are no widgets ----

    def static_text(self) -> str:
        rows = [f"  {key} = {value}" for key, value in self._changed_rows()]
        return "\n".join([f"{self._title()}:" if rows else f"{self._title()}: nothing is changed", *rows, HERE])

    def static_html(self) -> str:
        return changes_html(self._title(), self._changed_rows(), HERE)

    def _title(self) -> str:
        start = self._start.value
        words = {DEFAULTS: "", GIVEN: ""}.get(start, f" from the preset {start}")
        return f"Settings of {self.cls.__name__}{words}, changed from the defaults"

    def _changed_rows(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        given = changes(self._config)
        for key, _, inner in walk(self.cls):
            value: Any = given
            for part in key.split("."):
                value = value.get(part, ...) if isinstance(value, dict) else ...
            if inner is None and value is not ...:
                found.append((key, text_of(self.field(key).info.annotation, value)))
        return found

    # ---- how it is built ----

    def _make_fields(self) -> dict[str, Field]:
        defaults = self.cls()
        rows = [(key, info) for key, info, inner in walk(self.cls) if inner is None]
        return {key: make_field(key, info, _at(defaults, key), self._changed) for key, info in rows}

    def _make_parts(self, first: list[str]) -> None:
        for key in first:
            if key not in self._fields:
                near = nearest_key(self.cls, key)
                raise ValueError(f"fields: {self.cls.__name__} has no setting {key!r}; did you mean {near!r}?")
            self._fields[key].input.description = key  # alone at the top, it needs its full name
        self._start = widgets.Dropdown(
            options=[DEFAULTS],
            description="Start from",
            layout={"width": "340px"},
            style={"description_width": "90px"},
        )
        set_tooltip(self._start, "Fills the form with a preset's values")
        self._again = widgets.Button(description="Fill in again", icon="undo", layout={"width": "130px"})
        set_tooltip(self._again, "Takes back every change made since")
        self._about = widgets.HTML(layout={"flex": "1 1 300px"})
        self._summary = widgets.HTML()
        self._search = widgets.Text(
            description="Find a setting",
            placeholder="part of a name or of what it does",
            continuous_update=True,
            layout={"width": "430px"},
            style={"description_width": "90px"},
        )
        self._found = widgets.HTML()
        self._groups: list[tuple[Any, str, list[Field]]] = []
        for name, title in self._group_titles().items():
            members = [f for key, f in self._fields.items() if _group_of(key) == name and key not in first]
            if members:
                box = widgets.VBox([field.row for field in members], layout={"overflow": "visible"})
                self._groups.append((accordion(box, title, is_open=not first and not self._groups), title, members))
        self._top = [self._fields[key] for key in first]
        self._texts = {name: widgets.HTML() for name in ("Python", "YAML", "Shell")}
        hint = widgets.HTML(f'<div style="color: {QUIET}">A click selects the text; copy it with Ctrl+C.</div>')
        run = widgets.VBox([hint, tabs(list(self._texts.values()), list(self._texts))])
        self._start.observe(lambda _: self._restart(), "value")
        self._again.on_click(lambda _: self._restart())
        self._search.observe(lambda _: self._filter(), "value")
        wrap = {"flex_flow": "row wrap", "align_items": "center", "overflow": "visible"}
        self.children = [
            widgets.HBox([self._start, self._again, self._about], layout=wrap),
            self._summary,
            *(field.row for field in self._top),
            widgets.HBox([self._search, self._found], layout=wrap),
            *(box for box, _, _ in self._groups),
            accordion(run, "What to run: the same as Python, YAML and shell", is_open=True),
        ]

    def _group_titles(self) -> dict[str, str]:
        titles = {"": "more settings of the run" if any(inner for _, _, inner in walk(self.cls)) else "settings"}
        for key, info, inner in walk(self.cls):
            if inner is not None:
                titles[key] = f"{key}: {info.description}"
        return titles

    # ---- what happens when something changes ----

    def _restart(self) -> None:
        """Fills the form with what "Start from" names."""
        if not getattr(self, "_choosing", False):
            self._fill(self._starts[self._start.value])

    def _choose(self, name: str) -> None:
        """Sets "Start from" without filling the form."""
        self._choosing = True
        try:
            self._start.options = list(self._starts)
            self._start.value = name
        finally:
            self._choosing = False

    def _fill(self, config: Config) -> None:
        for key, field in self._fields.items():
            field.fill(_at(config, key))
        self._check()

    def _changed(self, field: Field) -> None:
        """A person changed a row."""
        if field.key == "preset" and "preset" in self.cls.model_fields:
            self._follow_preset(field.read())
        self._check()

    def _follow_preset(self, name: str | None) -> None:
        """A paper's preset fills the settings that still are as the one before it left them."""
        before = self.cls(**{"preset": self._config.preset})  # type: ignore[attr-defined]
        after = self.cls(**{"preset": name})
        for key, field in self._fields.items():
            old, new = _at(before, key), _at(after, key)
            if key != "preset" and old != new and not field.problem and _at(self._config, key) == old:
                field.fill(new)

    def _check(self) -> None:
        """Reads all rows; the settings change if they are valid, else each problem is shown where it is."""
        values: dict[str, Any] = {}
        for key, field in self._fields.items():
            *above, last = key.split(".")
            inner = values
            for part in above:
                inner = inner.setdefault(part, {})
            inner[last] = field.read()
        try:
            made = compact(self.cls(**values))
        except ConfigError as error:
            self._problems = list(error.problems) or [Problem(self.cls.__name__, "", str(error))]
        else:
            self._problems = self._prompt_problems()
        if not self._problems:
            is_new = made != self._config
            self._config = made if is_new else self._config
        self._show()
        if not self._problems and is_new:
            for listener in self._listeners:
                listener(self.config)

    def _prompt_problems(self) -> list[Problem]:
        """Prompt templates that do not exist: the settings classes, a room below, do not know which there are."""
        problems = []
        for key in PROMPTS:
            if key in self._fields:
                template = self._fields[key].read()
                try:
                    _ = get_template(template)
                except PromptError as error:
                    problems.append(Problem(key, template, f"a prompt template: {error}"))
        return problems

    def _show(self) -> None:
        wrong: dict[int, str] = {}
        for problem in self._problems:
            row = self._row_of(problem.key)
            if row is not None:
                wrong[id(row)] = problem_words(problem, with_key=False)
        for field in self._fields.values():
            rows = [row for item in field.items for row in item.values()] if isinstance(field, Groups) else []
            for row in (field, *rows):
                row.show(wrong.get(id(row), ""))
        for box, title, members in self._groups:
            keys = {field.key for field in members}
            count = sum(re.sub(r"\[.*", "", problem.key) in keys for problem in self._problems)
            set_titles(box, [f"✗ {title} ({count} wrong)" if count else title])
        self._summary.value = self._summary_html()
        self._about.value = f'<div style="line-height: 1.35; color: {QUIET}">{escape(self._about_words())}</div>'
        if self._config is not self._written:
            self._written = self._config
            texts = {"Python": self.code(), "YAML": self.yaml(), "Shell": self._shell()}
            for name, text in texts.items():
                self._texts[name].value = code_html(text, f"the run as {name}")

    def _row_of(self, key: str) -> Field | None:
        """The row that a problem belongs to: "task.losses[0].weight" is the weight of the first loss."""
        item = re.fullmatch(r"(.+)\[(\d+)\]\.(\w+)", key)
        if item is None:
            return self._fields.get(key)
        field = self._fields.get(item[1])
        return field.items[int(item[2])].get(item[3], field) if isinstance(field, Groups) else field

    def _summary_html(self) -> str:
        if not self._problems:
            count = len(self._changed_rows())
            differ = (
                f"{count} {'differs' if count == 1 else 'differ'} from the defaults" if count else "all are defaults"
            )
            return f'<div style="line-height: 1.4; color: {TEXT}">✓ All settings are valid; {differ}.</div>'
        count = len(self._problems)
        head = "1 setting is wrong" if count == 1 else f"{count} settings are wrong"
        which = "; ".join(problem_words(problem, with_key=True) for problem in self._problems)
        return error_html(f"{head}: {which}. Until that is right, the last valid values are used.")

    def _about_words(self) -> str:
        name = self._start.value
        start = self._starts[name]
        about = PRESETS.get(name) or {
            DEFAULTS: "The values that ragkit has where you say nothing.",
            GIVEN: "The values that the form was given.",
        }.get(name, "")
        count = sum(_at(self._config, key) != _at(start, key) for key in self._fields)
        return f"{about} Changed since: {count} {'setting' if count == 1 else 'settings'}." if count else about

    def _runs(self) -> bool:
        """Whether there is a command for these settings."""
        return any(self.cls is kind for kind, _ in COMMANDS.values())

    def _shell(self) -> str:
        if self._runs():
            return self.command()
        return "These settings are a part of others; no command takes them alone."

    def _filter(self) -> None:
        """Shows only the settings that hold all words of "Find a setting"."""
        words = self._search.value.casefold().split()
        count = 0
        for field in self._fields.values():
            is_there = field.matches(words)
            count += is_there
            field.row.layout.display = None if is_there else "none"
        for box, _, members in self._groups:
            hits = any(field.matches(words) for field in members)
            box.layout.display = None if hits else "none"
            box.selected_index = 0 if words and hits else None
        near = ""
        if words and not count:
            names = difflib.get_close_matches(words[-1], [key.rsplit(".", 1)[-1] for key in self._fields], n=1)
            near = f'; did you mean "{names[0]}"?' if names else "; try another word"
        text = f"{count} {'setting' if count == 1 else 'settings'}{near}" if words else ""
        self._found.value = f'<div style="color: {TEXT}" role="status">{escape(text)}</div>'


def preset_of(cls: type[Config], name: str) -> Any:
    """`ragkit.presets.preset`, whose name the form's argument hides."""
    return preset(cls, name)


def _at(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _group_of(key: str) -> str:
    return key.rpartition(".")[0]
