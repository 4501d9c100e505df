"""The run as text: Python, YAML and the shell line each give an equal settings object back."""

from __future__ import annotations

import math
import shlex
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ragkit import commands
from ragkit.config import (
    Config,
    GFMFinetuneConfig,
    GFMPretrainConfig,
    LSRConfig,
    RALTConfig,
    load_config,
)
from ragkit.gfm_config import LossConfig
from ragkit.run_text import WIDTH, as_command, as_python, changes, compact, number_text, text_of
from ragkit.setting_types import options_of, parse_value
from ragkit.settings import walk

COMMANDS = {LSRConfig: "lsr", RALTConfig: "ralt", GFMPretrainConfig: "gfm-pretrain", GFMFinetuneConfig: "gfm-finetune"}


# ---- settings of which any part is changed ----


def limits(metadata) -> dict:
    found: dict = {}
    for rule in metadata:
        for part in getattr(rule, "metadata", [rule]):
            for name in ("ge", "gt", "le", "lt", "min_length", "pattern"):
                if getattr(part, name, None) is not None:
                    found[name] = getattr(part, name)
    return found


def values_of(annotation, rules):
    """Values that a type and its limits allow, odd ones among them."""
    options = [option for option in options_of(annotation) if option is not NoneType]
    allowed = st.one_of([one_kind(option, rules) for option in options])
    return allowed if NoneType not in options_of(annotation) else st.none() | allowed


def one_kind(kind, rules):
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return one_kind(inner, limits(more))
    if get_origin(kind) is list:
        return st.lists(one_kind(get_args(kind)[0], {}), min_size=rules.get("min_length", 0), max_size=4)
    if get_origin(kind) is dict:
        return st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)
    if kind is bool:
        return st.booleans()
    if kind is str and "pattern" in rules:
        return st.sampled_from(["auto", "cpu", "cuda", "cuda:1", "mps"])
    if kind is str:
        odd = [
            "null",
            "true",
            "12",
            "2e-5",
            "",
            " a ",
            "a: b",
            "[a]",
            "{a: 1",
            "it's",
            '"',
            "a=b",
            "--x",
            "é\n\\\n$HOME",
        ]
        return st.sampled_from([o for o in odd if len(o) >= rules.get("min_length", 0)]) | st.text(
            min_size=rules.get("min_length", 0), max_size=12
        )
    if kind is int:
        least = rules.get("ge", rules.get("gt", -1) + 1)
        most = rules.get("le", rules.get("lt", 2**40) - 1)
        return st.integers(int(least), int(most))
    if kind is float:
        low, high = rules.get("ge", rules.get("gt", -1e300)), rules.get("le", rules.get("lt", 1e300))
        return st.floats(low, high, exclude_min="gt" in rules, exclude_max="lt" in rules)
    assert issubclass(kind, Config), kind
    return settings_of(kind)


def settings_of(cls, most=12):
    """Objects of a class in which up to `most` settings are changed."""
    fields = {
        key: values_of(field.annotation, limits(field.metadata)) for key, field, inner in walk(cls) if inner is None
    }

    def made(chosen):
        config = {}
        for key, value in chosen.items():
            *above, last = key.split(".")
            inner = config
            for part in above:
                inner = inner.setdefault(part, {})
            inner[last] = value
        if cls is LossConfig and config.get("name") == "bce" and config.get("is_doc_loss"):
            config["doc_score"] = "simple"
        if cls is LSRConfig:
            config.get("train", {}).pop("gradient_checkpointing", None)  # refused there
        return cls(**config)

    def some(keys):
        return st.fixed_dictionaries({key: fields[key] for key in sorted(keys)})

    return st.sets(st.sampled_from(sorted(fields)), max_size=most).flatmap(some).map(made)


@pytest.mark.parametrize("cls", list(COMMANDS))
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors])
@given(data=st.data())
def test_all_three_texts_give_an_equal_object_back(cls, data):
    config = data.draw(settings_of(cls))
    assert from_python(config) == config
    assert from_shell(config) == config
    assert cls.from_yaml(config.to_yaml()) == config
    assert compact(config) == config


def from_python(config):
    """Runs the text with a `run` that only takes note of what it is given."""
    ran = []
    names: dict = {}
    text = as_python(config).replace("from ragkit.commands import run\n", "")
    exec(compile(text, "<run>", "exec"), {"run": ran.append}, names)
    assert ran == [names["config"]]
    return ran[0]


def from_shell(config, processes=1):
    text = as_command(config, COMMANDS[type(config)], processes)
    words = shlex.split(text.replace(" \\\n", " "))
    start = words.index("ragkit")
    assert words[start + 1] == COMMANDS[type(config)]
    return load_config(type(config), overrides=words[start + 2 :])


# ---- what the texts look like ----


def test_only_what_differs_is_written_and_it_runs():
    config = LSRConfig(top_k=4, train={"learning_rate": 3e-6, "max_steps": None}, gamma=0.05)
    assert as_python(config) == (
        "from ragkit.commands import run\n"
        "from ragkit.config import LSRConfig\n\n"
        'config = LSRConfig(train={"learning_rate": 3e-6}, top_k=4)\n'
        "run(config)\n"
    )
    assert as_command(config, "lsr") == "python -m ragkit lsr train.learning_rate=3e-6 top_k=4"
    assert as_python(LSRConfig()).splitlines()[3] == "config = LSRConfig()"
    assert as_command(RALTConfig(), "ralt") == "python -m ragkit ralt"


def test_the_text_calls_the_real_run(monkeypatch):
    """The import in the text is that of `ragkit.commands.run`, whose command is found by the class."""
    ran = []
    monkeypatch.setitem(commands.COMMANDS, "lsr", (LSRConfig, lambda config, out: ran.append(config) or 0))
    config = LSRConfig(top_k=4)
    exec(as_python(config), {})
    assert ran == [config]


def test_run_takes_a_copy_and_refuses_what_no_command_takes(monkeypatch):
    def change(config, out):
        config.top_k = 9
        out("said")
        return 7

    monkeypatch.setitem(commands.COMMANDS, "lsr", (LSRConfig, change))
    config, said = LSRConfig(), []
    assert commands.run(config, said.append) == 7
    assert config == LSRConfig() and said == ["said"]
    with pytest.raises(commands.CommandError, match="class LossConfig, which no command takes; expected .*LSRConfig"):
        commands.run(LossConfig())


def test_torchrun_stands_first_where_there_are_several_processes():
    text = as_command(GFMFinetuneConfig(), "gfm-finetune", 4)
    assert text == "torchrun --nproc_per_node 4 -m ragkit gfm-finetune"
    assert from_shell(LSRConfig(top_k=3), 2).top_k == 3
    with pytest.raises(ValueError, match="processes: found 0, expected 1 or more"):
        as_command(LSRConfig(), "lsr", 0)


def test_texts_are_at_most_a_hundred_columns_wide():
    config = GFMFinetuneConfig(
        datasets={"train_names": ["hotpotqa", "musique", "2wikimultihopqa"], "max_train": 10_000},
        model={"entity_model": {"input_dim": 128, "hidden_dims": [128] * 6}},
        train={"batch_size": 4, "max_steps": 1000, "eval_steps": 100, "precision": "bf16"},
        task={"losses": [{"name": "bce"}, {"name": "listce", "is_doc_loss": True}]},
    )
    for text in (as_python(config), as_command(config, "gfm-finetune")):
        assert max(map(len, text.splitlines())) <= WIDTH
        assert len(text.splitlines()) > 3
    assert '{"name": "listce", "is_doc_loss": True}' in as_python(config)


@pytest.mark.parametrize("preset", ["replug", "ra_dit", "fedrag"])
def test_a_paper_preset_with_a_setting_put_back_to_ragkits_default(preset):
    config = LSRConfig(preset=preset, gamma=0.05, beta=1.0)
    assert from_python(config) == from_shell(config) == config
    assert changes(LSRConfig(preset=preset)) == {"preset": preset}


# ---- the words after key= ----


@example("on")
@example("~")
@given(st.text())
def test_a_text_after_the_key_reads_as_itself(text):
    for annotation in (str, str | None, Literal["auto", "on", "off"]):
        if annotation is str or annotation == (str | None) or text in ("auto", "on", "off"):
            assert parse_value(annotation, text_of(annotation, text)) == text
    assert "\n" not in text_of(str, text)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_numbers_are_short_and_exact(number):
    text = number_text(number)
    assert float(text) == number if isinstance(number, float) else int(text) == number
    assert "e-0" not in text and not math.isnan(number)
