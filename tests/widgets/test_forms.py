"""The form, used as a person would: values are typed, lists opened, buttons clicked; no browser, no kernel."""

from __future__ import annotations

import shlex
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

import pytest
from pydantic import model_validator

from ragkit.config import (
    Config,
    ConfigError,
    EvaluateConfig,
    GFMFinetuneConfig,
    GFMPretrainConfig,
    LSRConfig,
    QuickstartConfig,
    RALTConfig,
    TrainConfig,
    load_config,
    setting,
)
from ragkit.gfm_config import LossConfig
from ragkit.presets import preset
from ragkit.run_text import number_text
from ragkit.setting_types import options_of
from ragkit.settings import group, walk
from ragkit.widgets import ConfigForm
from ragkit.widgets.base import widgets
from ragkit.widgets.fields import Choice, Groups, Line, Tick

ALL = [LSRConfig, RALTConfig, GFMPretrainConfig, GFMFinetuneConfig]
KEYS = [(cls, key) for cls in ALL for key, _, inner in walk(cls) if inner is None]
KEYS.remove((LSRConfig, "train.gradient_checkpointing"))  # it takes one value only
NULLABLE = [(cls, key) for cls in ALL for key, info, _ in walk(cls) if NoneType in options_of(info.annotation)]


def at(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def another(key, info, value):
    """A valid value of a setting that is not `value`, and the text a person would type for it."""
    kind = next(option for option in options_of(info.annotation) if option is not NoneType)
    if get_origin(kind) is Literal:
        other = next(choice for choice in get_args(kind) if choice != value)
        return other, other
    if kind is bool:
        return not value, not value
    if key in ("prompt", "rag.prompt"):
        return "é: {passages} {question}", "é: {passages} {question}"
    if kind is str:
        other = "cuda:1" if any(getattr(rule, "pattern", None) for rule in info.metadata) else "null: a text, é"
        return other, other
    if get_origin(kind) is dict:
        return {"question": "q", "answer": "12"}, '{question: q, answer: "12"}'
    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        inner = get_args(inner)[0] if get_origin(inner) is Annotated else inner
        return ([3, 7], "3, 7") if inner is int else (["a", "b c"], "[a, b c]")
    rules = {
        name: getattr(rule, name)
        for rule in info.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(rule, name) and getattr(rule, name) is not None
    }
    if kind is int or {int, float} <= set(options_of(info.annotation)):
        other = (value or rules.get("ge", 0)) + 1
        return other, str(other)
    other = 3e-7 if 3e-7 > rules.get("gt", rules.get("ge", -1)) else rules["le"]
    return other, number_text(other)


# ---- every setting of every training ----


@pytest.fixture(scope="module")
def forms():
    """Two forms of each class: one that is typed into, one that is filled."""
    return {cls: (ConfigForm(cls), ConfigForm(cls)) for cls in ALL}


@pytest.mark.parametrize(("cls", "key"), KEYS)
def test_what_is_typed_is_in_the_config_and_fills_another_form(forms, cls, key):
    form, second = forms[cls]
    form.config = cls()
    field = form.field(key)
    assert field.info.description.split(";")[0][:40] in field.note.value.replace("&quot;", '"').replace("&#x27;", "'")
    if isinstance(field, Groups):
        value = [LossConfig(name="bce", weight=0.25)]
        while len(field.items) > 1:
            button(field, "Remove loss 2").click()
        field.items[0]["name"].input.value = "bce"
        field.items[0]["weight"].input.value = "0.25"
    else:
        value, typed = another(key, field.info, at(cls(), key))
        field.input.value = typed
    assert form.errors == [] and field.problem == ""
    assert at(form.config, key) == value
    second.config = form.config
    assert second.config == form.config and second.errors == []
    if not isinstance(field, Groups):
        shown = second.field(key).input.value
        second.config = cls()
        second.field(key).input.value = shown  # what a form shows can be typed in
        assert second.config == form.config
    # All three texts say the same.
    assert cls.from_yaml(form.yaml()) == form.config
    words = shlex.split(form.command().replace(" \\\n", " "))[4:]
    assert load_config(cls, overrides=words) == form.config
    names: dict = {}
    exec(form.code().replace("\nrun(config)", ""), names)
    assert names["config"] == form.config


@pytest.mark.parametrize(("cls", "key"), KEYS)
def test_every_input_has_a_label_and_help(forms, cls, key):
    field = forms[cls][0].field(key)
    inputs = [f.input for item in field.items for f in item.values()] if isinstance(field, Groups) else [field.input]
    for each in inputs:
        assert each.description
        state = each.get_state()
        assert len(state.get("tooltip") or state.get("description_tooltip")) > 10
    if field.set is not None:
        assert field.set.description == "set"


@pytest.mark.parametrize(("cls", "key"), NULLABLE)
def test_null_stays_null_until_it_is_set(forms, cls, key):
    form = forms[cls][0]
    form.config = cls()
    field = form.field(key)
    value, typed = another(key, field.info, at(cls(), key))
    if isinstance(field, Choice):
        field.input.value = typed
        assert at(form.config, key) == value
        field.input.value = "null"
    else:
        assert field.set.value == (at(cls(), key) is not None)
        field.input.value = typed  # who types wants it set
        assert field.set.value and at(form.config, key) == value
        field.set.value = False
        assert field.input.value == "" and field.input.placeholder == "null"
        assert at(form.config, key) is None
        field.set.value = True  # the tick brings back what was there
        assert at(form.config, key) == value
        field.set.value = False
    assert at(form.config, key) is None and form.errors == []
    second = forms[cls][1]
    second.config = form.config
    assert at(second.config, key) is None


def button(owner, words):
    """The button that shows these words."""
    found = [w for w in descendants(owner.row if hasattr(owner, "row") else owner) if isinstance(w, widgets.Button)]
    return next(w for w in found if words in w.description)


def descendants(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from descendants(child)


def page(form):
    """All the text of a form's HTML parts."""
    return "\n".join(w.value for w in descendants(form) if isinstance(w, widgets.HTML))


# ---- numbers ----


def test_a_small_learning_rate_is_shown_and_kept():
    form = ConfigForm(LSRConfig)
    field = form.field("train.learning_rate")
    assert field.input.value == "2e-5"
    field.input.value = "0.00003"
    assert form.config.train.learning_rate == 3e-5
    form.config = LSRConfig(train={"learning_rate": 1.5e-300})
    assert field.input.value == "1.5e-300" and form.config.train.learning_rate == 1.5e-300


@pytest.mark.parametrize(
    ("key", "typed", "words"),
    [
        ("train.batch_size", "0", 'found "0", expected a whole number, 1 or more, in examples'),
        ("train.batch_size", "many", 'found "many", expected a whole number'),
        ("train.batch_size", "2.5", 'found "2.5", expected a whole number'),
        ("train.batch_size", "true", 'found "true", expected a whole number'),
        ("train.batch_size", "  ", "found nothing, expected a whole number"),
        ("train.learning_rate", "2e", 'found "2e", expected a number, more than 0, at most 10'),
        ("train.learning_rate", "nan", 'found "nan", expected a number'),
        ("train.max_steps", "-1", 'found "-1", expected a whole number or null, 1 or more, in steps'),
        ("data.corpus", "", "found nothing, expected a text, not empty"),
        ("data.columns", "{question: ", "expected a mapping of texts to texts"),
        ("data.columns", "", "found nothing, expected a mapping"),
        ("train.report_to", "", "found nothing, expected a list"),
        ("rag.device", "gpu", 'found "gpu", expected auto, cpu, mps, cuda or cuda:N'),
        ("rag.prompt", "plane", "unknown prompt template"),
        ("prompt", "{question}", "must hold {passages} exactly once"),
        ("valid_share", "10%", 'found "10%", expected a number or null, 0 or more, less than 1, as a share'),
    ],
)
def test_a_wrong_value_is_named_at_its_field_and_the_last_valid_ones_are_used(key, typed, words):
    form = ConfigForm(LSRConfig, preset="cpu-minute")
    form.field("top_k").input.value = "5"
    before, code = form.config, form.code()
    field = form.field(key)
    field.input.value = typed
    assert [problem.key for problem in form.errors] == [key]
    assert words in field.problem and words.replace('"', "&quot;") in field.note.value and "✗" in field.note.value
    assert (
        f"1 setting is wrong: {key}: " in form._summary.value and "last valid values are used" in form._summary.value
    )
    assert form.config == before and form.code() == code and form.config.top_k == 5
    others = [f for name, f in form._fields.items() if name != key]
    assert not any(f.problem for f in others)
    form.config = before  # puts it right
    assert form.errors == [] and field.problem == "" and "✓" in form._summary.value


def test_an_emptied_number_that_may_be_null_says_how_to_leave_it_open():
    form = ConfigForm(LSRConfig)
    form.field("train.max_steps").set.value = True
    words = 'found nothing, expected a whole number, 1 or more, in steps; to leave it open, take away the tick "set"'
    assert form.field("train.max_steps").problem == words
    form.field("train.max_steps").set.value = False
    assert form.errors == [] and form.config.train.max_steps is None


def test_a_setting_that_has_no_effect_is_refused_beside_its_field():
    form = ConfigForm(LSRConfig)
    form.field("train.gradient_checkpointing").input.value = True
    assert [problem.key for problem in form.errors] == ["train.gradient_checkpointing"]
    assert "where it has no effect" in form.field("train.gradient_checkpointing").problem


def test_a_list_whose_bracket_is_open_is_no_list():
    form = ConfigForm(GFMFinetuneConfig)
    field = form.field("datasets.train_names")
    field.input.value = "[a, b"
    assert field.problem == 'found "[a, b", expected a list, each a text, not empty'
    field.input.value = "a [b]"
    assert field.problem == "" and form.config.datasets.train_names == ["a [b]"]


def test_a_folded_group_says_that_something_in_it_is_wrong():
    form = ConfigForm(LSRConfig)
    box = next(box for box, title, _ in form._groups if title.startswith("train:"))
    assert box.get_title(0) == "train: batches, optimizer, checkpoints"
    form.field("train.seed").input.value = "x"
    form.field("train.weight_decay").input.value = "2"
    assert box.get_title(0) == "✗ train: batches, optimizer, checkpoints (2 wrong)"
    assert "2 settings are wrong" in form._summary.value
    form.field("train.seed").input.value = "1"
    assert box.get_title(0) == "✗ train: batches, optimizer, checkpoints (1 wrong)"


class Pair(Config):
    """Two settings that must fit each other."""

    low: int = setting(0, "The smaller of the two.", unit="steps", ge=0)
    high: int = setting(5, "The larger of the two.", unit="steps", ge=0)

    @model_validator(mode="after")
    def _fits(self):
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self


class Outer(Config):
    """A group whose settings must fit each other."""

    pair: Pair = group(Pair(), "the two")
    flag: bool | None = setting(None, "Neither yes nor no at the start.")


def test_settings_that_do_not_fit_each_other_are_told_at_the_top():
    form = ConfigForm(Outer)
    form.field("pair.low").input.value = "9"
    assert "pair: low must not be above high" in form._summary.value
    assert form.config == Outer()
    form.field("pair.high").input.value = "10"
    assert form.errors == [] and form.config == Outer(pair={"low": 9, "high": 10})
    form.field("flag").input.value = False
    assert form.config.flag is False
    form.field("flag").input.value = "null"
    assert form.config.flag is None
    assert "no command takes them alone" in page(form)


# ---- losses ----


def test_losses_are_added_changed_and_removed():
    form = ConfigForm(GFMFinetuneConfig, preset="cpu-minute")
    field = form.field("task.losses")
    assert isinstance(field, Groups)
    assert [item["name"].input.value for item in field.items] == ["bce", "listce", "listce"]
    button(field, "Add a loss").click()
    assert form.config.task.losses[3] == LossConfig()
    field.items[3]["weight"].input.value = "-1"
    (problem,) = form.errors
    assert problem.key == "task.losses[3].weight"
    assert "expected a number, 0 or more" in field.items[3]["weight"].problem
    assert form.config.task.losses[3].weight == 1.0
    button(field, "Remove loss 1").click()  # the wrong text stays with its loss
    assert form.errors[0].key == "task.losses[2].weight" and field.items[2]["weight"].input.value == "-1"
    field.items[2]["weight"].input.value = "2e-5"
    assert form.errors == [] and form.config.task.losses[2].weight == 2e-5
    field.items[0]["name"].input.value = "bce"
    field.items[0]["is_doc_loss"].input.value = True
    field.items[0]["doc_score"].input.value = "score_weighted_idf"
    assert [problem.key for problem in form.errors] == ["task.losses"]
    assert "a bce loss on documents takes logits" in field.problem
    field.items[0]["doc_score"].input.value = "null"
    assert form.errors == [] and form.config.task.losses[0].doc_score is None
    for _ in range(3):
        button(field, "Remove loss 1").click()
    assert "expected" in field.problem and len(form.config.task.losses) == 1
    assert "1 wrong" in next(box for box, title, _ in form._groups if title.startswith("task:")).get_title(0)
    button(field, "Add a loss").click()
    assert form.errors == [] and form.config.task.losses == [LossConfig()]


# ---- presets ----


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("name", ["cpu-minute", "colab-t4", "full"])
def test_a_preset_fills_the_form(cls, name):
    form = ConfigForm(cls, preset=name)
    assert form.config == preset(cls, name) and form._start.value == name
    form._start.value = "defaults"
    assert form.config == cls()
    form._start.value = name
    assert form.config == preset(cls, name) and form.errors == []


def test_changes_since_the_preset_are_counted_and_taken_back():
    form = ConfigForm(LSRConfig, preset="cpu-minute")
    form.field("top_k").input.value = "3"
    form.field("train.batch_size").input.value = "x"
    assert "Changed since: 1 setting." in form._about.value and "About a minute" in form._about.value
    form._again.click()
    assert form.config == preset(LSRConfig, "cpu-minute") and form.errors == []
    assert "Changed since" not in form._about.value


def test_a_papers_preset_fills_what_is_as_it_was():
    form = ConfigForm(LSRConfig)
    form.field("gamma").input.value = "0.2"
    form.field("preset").input.value = "ra_dit"
    assert form.config == LSRConfig(preset="ra_dit", gamma=0.2)
    assert form.field("beta").input.value == "0.01"
    form.field("preset").input.value = "null"
    assert form.config == LSRConfig(gamma=0.2)


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="unknown preset 'cpu-minut'; did you mean \"cpu-minute\""):
        ConfigForm(LSRConfig, preset="cpu-minut")
    with pytest.raises(ValueError, match="no presets for EvaluateConfig"):
        ConfigForm(EvaluateConfig, preset="full")
    with pytest.raises(ValueError, match="give the class with the preset, or the object alone"):
        ConfigForm(LSRConfig(), preset="full")


# ---- the config from code ----


def test_a_form_of_an_object_starts_with_it_and_can_go_back_to_it():
    config = LSRConfig(top_k=5, train={"max_steps": None, "save_steps": None})
    form = ConfigForm(config)
    assert form.config == config and form._start.value == "as given"
    form._start.value = "defaults"
    assert form.config == LSRConfig()
    form._start.value = "as given"
    assert form.config == config
    form.config = preset(LSRConfig, "full")  # known by its values
    assert form._start.value == "full"


def test_the_config_is_a_copy_and_only_what_differs_counts_as_set():
    form = ConfigForm(LSRConfig, preset="cpu-minute")
    form.config.top_k = 99
    form.config.train.max_steps = 1
    assert form.config == preset(LSRConfig, "cpu-minute")
    form.field("top_k").input.value = "5"
    assert form.config.explicit()["top_k"] == 5 and "gamma" not in form.config.explicit()
    given = LSRConfig(top_k=7)
    form.config = given
    given.top_k = 9
    assert form.config.top_k == 7


def test_a_wrong_object_is_refused_and_the_form_stays():
    form = ConfigForm(LSRConfig, preset="cpu-minute")
    for wrong, words in ((RALTConfig(), "found RALTConfig"), (None, "found NoneType"), (LSRConfig, "the class LSRC")):
        with pytest.raises(TypeError, match=f"form.config: .*{words}.* an object of LSRConfig"):
            form.config = wrong
    broken = LSRConfig()
    broken.train.report_to.append([3])  # past the checks
    with pytest.raises(ConfigError, match="train.report_to"):
        form.config = broken
    assert form.config == preset(LSRConfig, "cpu-minute") and form.errors == []
    for wrong in (3, "LSRConfig", dict):
        with pytest.raises(TypeError, match="expected a settings class such as LSRConfig"):
            ConfigForm(wrong)


def test_listeners_hear_of_valid_changes_only():
    form, heard = ConfigForm(LSRConfig), []
    form.on_change(heard.append)
    form.field("top_k").input.value = "5"
    form.field("top_k").input.value = "x"
    form.field("top_k").input.value = "5"
    form.field("gamma").input.value = "0.1"
    assert [(c.top_k, c.gamma) for c in heard] == [(5, 0.05), (5, 0.1)]
    heard[0].top_k = 77
    assert form.config.top_k == 5


def test_other_settings_classes_have_forms_too():
    for cls in (EvaluateConfig, QuickstartConfig, TrainConfig):
        form = ConfigForm(cls)
        assert form.config == cls() and form.errors == []
    form = ConfigForm(EvaluateConfig)
    form.field("ks").input.value = "1, 3"
    assert form.config.ks == [1, 3] and form.command() == "python -m ragkit evaluate 'ks=[1, 3]'"


def test_the_fields_at_the_top_are_chosen():
    form = ConfigForm(LSRConfig, fields=["train.seed", "beta"])
    assert [f.key for f in form._top] == ["train.seed", "beta"]
    assert form.field("train.seed").input.description == "train.seed"
    with pytest.raises(ValueError, match="no setting 'train.sed'; did you mean 'train.seed'"):
        ConfigForm(LSRConfig, fields=["train.sed"])
    with pytest.raises(KeyError, match="did you mean"):
        form.field("train.sed")


# ---- finding a setting ----


def test_settings_are_found_by_name_and_by_what_they_do():
    form = ConfigForm(LSRConfig)

    def shown():
        return {key for key, field in form._fields.items() if field.row.layout.display != "none"}

    form._search.value = "decoupled WEIGHT"
    assert shown() == {"train.weight_decay"} and "1 setting" in form._found.value
    open_ones = [title for box, title, _ in form._groups if box.selected_index == 0]
    assert [title.split(":")[0] for title in open_ones] == ["train"]
    form._search.value = "gama"
    assert shown() == set() and "did you mean &quot;gamma&quot;?" in form._found.value
    form._search.value = ""
    assert shown() == set(form._fields) and form._found.value.count("setting") == 0
    assert all(box.layout.display is None and box.selected_index is None for box, _, _ in form._groups)


# ---- what to run, and what stands where there are no widgets ----


def test_the_three_texts_follow_the_form():
    form = ConfigForm(LSRConfig)
    form.field("top_k").input.value = "5"
    assert "config = LSRConfig(top_k=5)" in form._texts["Python"].value
    assert "top_k: 5" in form._texts["YAML"].value
    assert "python -m ragkit lsr top_k=5" in form._texts["Shell"].value
    assert form.command(processes=2).startswith("torchrun --nproc_per_node 2 -m ragkit lsr top_k=5")


def test_without_widgets_the_form_says_what_it_holds():
    form = ConfigForm(LSRConfig, preset="cpu-minute")
    assert form.static_text() == (
        "Settings of LSRConfig from the preset cpu-minute, changed from the defaults:\n"
        "  data.max_train = 320\n"
        "  data.max_test = 200\n"
        "  rag.prompt = plain\n"
        "  train.max_steps = 60\n"
        "This is a form in a Jupyter front end. The next cell says the same in code."
    )
    assert ConfigForm(LSRConfig).static_text().startswith("Settings of LSRConfig, changed from the defaults: nothing")
    form.config = LSRConfig(rag={"query_prompt": "<b>"})
    page = form.static_html()
    assert "&lt;b&gt;" in page and "<b>&lt;" not in page and "rag.query_prompt" in page
    assert '<th scope="row"' in page and "The next cell says the same in code." in page
    bundle = form._repr_mimebundle_()
    assert bundle["text/plain"] == form.static_text() and bundle["text/html"] == page


def test_what_each_kind_of_setting_gets():
    form = ConfigForm(LSRConfig)
    kinds = {
        "direction": Choice,
        "preset": Choice,
        "include_eos": Tick,
        "train.learning_rate": Line,
        "train.max_steps": Line,
        "data.columns": Line,
        "rag.system_prompt": Line,
    }
    assert {key: type(form.field(key)) for key in kinds} == kinds
    assert form.field("top_k").set is None and form.field("train.max_steps").set is not None
    assert isinstance(form.field("rag.system_prompt").input, widgets.Textarea)  # may hold several lines
    assert not form.field("train.learning_rate").input.continuous_update  # no error while one types


def test_settings_that_no_command_takes_are_only_made():
    from ragkit.config import RAGConfig

    code = ConfigForm(RAGConfig(top_k=5)).code()
    assert "run" not in code
    made: dict = {}
    exec(code, made)
    assert made["config"] == RAGConfig(top_k=5)
