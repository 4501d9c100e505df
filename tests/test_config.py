from __future__ import annotations

import subprocess
import sys
from types import NoneType

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ragkit.config import (
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    GFMFinetuneConfig,
    GFMPretrainConfig,
    LSRConfig,
    QueryConfig,
    QuickstartConfig,
    RAGConfig,
    RALTConfig,
    TrainConfig,
    help_text,
    load_config,
)
from ragkit.lsr_config import LSR_PRESETS
from ragkit.setting_types import choices_of, options_of, unit_of
from ragkit.settings import nearest_key, walk, yaml_value

ALL = [TrainConfig, RAGConfig, DataConfig, LSRConfig, RALTConfig, EvaluateConfig, QueryConfig, QuickstartConfig]


def refused(cls, *overrides, path=None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, overrides)
    return caught.value


# ---- every field is described ----


def test_the_defaults_behind_null_are_described_as_they_are():
    from ragkit.rag.encoder import DEFAULT_MAX_TOKENS
    from ragkit.rag.qdrant import DEFAULT_PATH

    described = {name: str(field.description) for name, field in RAGConfig.model_fields.items()}
    assert f'null (and no URL): "{DEFAULT_PATH}"' in described["qdrant_path"]
    assert '":memory:": none' in described["qdrant_path"]
    assert f'{DEFAULT_MAX_TOKENS} for "default"' in described["max_passage_tokens"]


@pytest.mark.parametrize("cls", ALL)
def test_every_field_has_a_description_and_every_number_a_unit_and_a_range(cls):
    for key, field, inner in walk(cls):
        assert field.description and len(field.description) > 8, key
        if inner is not None:
            continue
        kinds = set(options_of(field.annotation)) - {NoneType}
        if kinds & {int, float} and bool not in kinds:
            assert unit_of(field), f"{key}: no unit"
            names = ("ge", "gt", "le", "lt")
            assert any(getattr(limit, name, None) is not None for limit in field.metadata for name in names), key


@pytest.mark.parametrize("cls", ALL)
def test_help_names_every_key_with_its_default(cls):
    text = help_text(cls, "lsr")
    for key, field, inner in walk(cls):
        assert key in text
        if inner is None:
            assert " ".join(field.description.split()) in " ".join(text.split())
    assert "key=value" in text


def test_help_shows_the_default_of_this_class_not_of_the_group():
    assert "train.learning_rate  (a number, more than 0, at most 10, unit: weight change per step, default 0.001)" in (
        help_text(RALTConfig, "ralt")
    )
    assert "one of replug, ra_dit, fedrag or null" in help_text(LSRConfig, "lsr")


def test_a_long_default_stays_on_its_line():
    text = yaml_value([{"name": "listce", "weight": 0.7, "is_doc_loss": True}] * 3)
    assert "\n" not in text and yaml.safe_load(text) == [{"name": "listce", "weight": 0.7, "is_doc_loss": True}] * 3


@pytest.mark.parametrize("cls", [*ALL, GFMPretrainConfig, GFMFinetuneConfig])
def test_help_of_a_choice_names_what_can_be_chosen(cls):
    for key, field, inner in walk(cls):
        words = [] if inner is not None else [choice for choice in choices_of(field) if isinstance(choice, str)]
        if len(words) > 1:
            assert any(word in field.description for word in words), f"{key}: {field.description}"


# ---- YAML ----


@pytest.mark.parametrize("cls", ALL)
def test_yaml_round_trip_of_the_defaults(cls):
    assert cls.from_yaml(cls().to_yaml()) == cls()


def test_yaml_round_trip_of_a_file_with_odd_texts(tmp_path):
    config = LSRConfig(
        rag=RAGConfig(
            system_prompt="Answer: briefly\n# no comment", query_prompt="yes", prompt="{passages}\n{question}"
        ),
        data={"columns": {"question": "q"}, "corpus": "données.jsonl"},
        train={"learning_rate": 3e-7, "report_to": ["tensorboard"]},
        name="12",
    )
    path = config.save(tmp_path / "c.yaml")
    assert LSRConfig.from_yaml(path) == config
    assert LSRConfig.from_yaml(str(path)) == config
    assert load_config(LSRConfig, path, ["name=other"]).rag == config.rag


@example(1.0, 1, None, "\x85")
@example(1.0, 1, None, "a\u2028b\r\n\ufeff: '\"")
@given(
    st.floats(1e-9, 10, exclude_min=True), st.integers(1, 10**6), st.one_of(st.none(), st.integers(1, 99)), st.text()
)
def test_yaml_round_trip_of_any_values(rate, batch, steps, prompt):
    config = LSRConfig(
        train=TrainConfig(learning_rate=rate, batch_size=batch, max_steps=steps), rag=RAGConfig(query_prompt=prompt)
    )
    assert LSRConfig.from_yaml(config.to_yaml()) == config


def test_checkpoints_are_saved_on_the_way_unless_the_training_is_short():
    for kind in (LSRConfig, RALTConfig):
        assert 1 <= kind().train.save_steps <= 100
    assert QuickstartConfig().lsr.train.save_steps is QuickstartConfig().ralt.train.save_steps is None


def test_what_was_given_is_told_from_the_defaults_of_a_group():
    assert load_config(LSRConfig).explicit() == {}
    given = load_config(LSRConfig, None, ["train.batch_size=16", "gamma=0.05"])
    assert given.explicit() == {"train": {"batch_size": 16}, "gamma": 0.05}
    assert load_config(LSRConfig, None, ["top_k=4"], base=given).explicit() == {**given.explicit(), "top_k": 4}
    small = load_config(QuickstartConfig, None, ["ralt.train.max_steps=2"])
    assert small.explicit() == {"ralt": {"train": {"max_steps": 2}}}
    assert (small.ralt.context, small.ralt.train.learning_rate) == ("joined", 3e-3)
    assert QuickstartConfig.from_yaml(small.to_yaml()) == small


def test_numbers_that_yaml_reads_as_text(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  learning_rate: 1e-4\n")
    assert yaml.safe_load(path.read_text()) == {"train": {"learning_rate": "1e-4"}}  # the trap
    assert load_config(LSRConfig, path).train.learning_rate == 1e-4
    assert load_config(LSRConfig, None, ["train.learning_rate=2e-4"]).train.learning_rate == 2e-4


def test_files_that_are_no_configuration(tmp_path):
    (tmp_path / "small.yaml").write_text("top_k: 4\n")
    assert "small.yaml" in str(refused(LSRConfig, path=tmp_path / "smal.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert "expected a mapping" in str(refused(LSRConfig, path=tmp_path / "list.yaml"))
    (tmp_path / "text.yaml").write_text("just words\n")
    assert "found a str" in str(refused(LSRConfig, path=tmp_path / "text.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1,\n")
    message = str(refused(LSRConfig, path=tmp_path / "broken.yaml"))
    assert "broken.yaml" in message and "line" in message
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "UTF-8" in str(refused(LSRConfig, path=tmp_path / "binary.yaml"))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(LSRConfig, tmp_path / "empty.yaml") == LSRConfig()
    assert "expected a group of settings" in str(refused(LSRConfig, "train=5"))


def test_yaml_never_runs_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n")
    assert "not valid YAML" in str(refused(LSRConfig, path=path))


# ---- overrides ----


def test_overrides_in_both_forms_and_the_later_wins(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {batch_size: 2, seed: 3}\n")
    config = load_config(LSRConfig, path, ["train.batch_size=4", "--train.batch_size=8", "top_k=5"])
    assert (config.train.batch_size, config.train.seed, config.top_k) == (8, 3, 5)
    assert load_config(LSRConfig, None, ["train={batch_size: 6}", "train.seed=1"]).train.batch_size == 6


def test_override_values_by_kind_of_setting():
    assert load_config(LSRConfig, None, ["rag.system_prompt=Answer: briefly"]).rag.system_prompt == "Answer: briefly"
    assert load_config(LSRConfig, None, ["rag.system_prompt='quoted'"]).rag.system_prompt == "quoted"
    assert load_config(LSRConfig, None, ["rag.query_prompt=yes"]).rag.query_prompt == "yes"
    assert load_config(LSRConfig, None, ["name=null"]).name is None
    assert load_config(LSRConfig, None, ["name=007"]).name == "007"
    assert load_config(LSRConfig, None, ["include_eos=no"]).include_eos is False
    assert load_config(EvaluateConfig, None, ["ks=1,3"]).ks == [1, 3]
    assert load_config(EvaluateConfig, None, ["ks=[1, 3]"]).ks == [1, 3]
    assert load_config(EvaluateConfig, None, ["ks=7"]).ks == [7]
    assert load_config(QueryConfig, None, ["question=Who: me, or you?"]).question == ["Who: me, or you?"]
    assert load_config(QueryConfig, None, ['question=["a?", "b?"]']).question == ["a?", "b?"]
    assert load_config(LSRConfig, None, ["data.columns.question=q", "data.columns.answer=a"]).data.columns == {
        "question": "q",
        "answer": "a",
    }


def test_override_without_a_value():
    error = refused(QuickstartConfig, "--control")
    assert "key=value" in str(error) and "controls=..." in str(error)


def test_a_base_counts_only_where_it_was_set():
    base = RALTConfig(lora_r=4)
    base.train.batch_size = 3  # a change in a group does not mark the group itself as set
    config = load_config(RALTConfig, None, ["train.seed=9"], base=base)
    assert (config.lora_r, config.train.batch_size, config.train.seed) == (4, 3, 9)
    assert config.train.learning_rate == 1e-3


def test_a_group_given_in_part_keeps_the_defaults_of_its_class():
    assert RALTConfig(train={"batch_size": 4}).train.learning_rate == 1e-3
    assert LSRConfig(train={"batch_size": 4}).train.learning_rate == 2e-5
    assert QuickstartConfig(ralt={"train": {"seed": 2}}).ralt.train.seed == 2
    plain, other = LSRConfig(), LSRConfig()
    plain.train.batch_size = 1
    assert other.train.batch_size == 16 and LSRConfig().train.batch_size == 16


# ---- errors ----


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("batch_size", "train.batch_size"),
        ("train.batchsize", "train.batch_size"),
        ("learning_rate", "train.learning_rate"),
        ("trian.seed", "train.seed"),
        ("gama", "gamma"),
        ("rag.topk", "rag.top_k"),
        ("corpus", "data.corpus"),
        ("tran.learning-rate", "train.learning_rate"),
    ],
)
def test_unknown_keys_name_the_nearest(key, nearest):
    error = refused(LSRConfig, f"{key}=4")
    assert f'did you mean "{nearest}"' in str(error) and "found" in str(error)
    assert error.problems[0].nearest == nearest and error.problems[0].unknown


def test_an_unknown_key_like_no_other_lists_the_valid_ones():
    error = refused(LSRConfig, "zzzzqqq=4")
    assert nearest_key(LSRConfig, "zzzzqqq") is None
    assert "valid keys: preset, data, rag" in str(error)


def test_values_out_of_range_are_all_named_at_once():
    error = refused(LSRConfig, "train.batch_size=0", "gamma=-1", "score=mean_logprop", "top_k=many")
    assert {problem.key for problem in error.problems} == {"train.batch_size", "gamma", "score", "top_k"}
    text = str(error)
    assert "train.batch_size: found 0, expected a whole number, 1 or more, in examples" in text
    assert "top_k: found 'many'" in text
    assert 'one of mean_logprob, logprob, token_prob, prob; did you mean "mean_logprob"?' in text


@pytest.mark.parametrize(
    "override",
    [
        "warmup_steps=-1",
        "learning_rate=0",
        "seed=-1",
        "num_epochs=.inf",
        "num_epochs=.nan",
        "batch_size=2.5",
        "seed=1e99",
    ],
)
def test_train_ranges(override):
    error = refused(TrainConfig, override)
    assert override.split("=")[0] in str(error)


def test_a_wrong_item_of_a_list_is_named():
    assert "ks: found '0'" in str(refused(EvaluateConfig, "ks=1,0"))
    assert "(item 1)" in str(refused(EvaluateConfig, "ks=1,0"))
    assert "not empty" in str(refused(EvaluateConfig, "ks=[]"))


def test_direct_use_and_assignment_raise_the_same_error():
    with pytest.raises(ConfigError, match='unknown key "topk".*did you mean "top_k"'):
        RAGConfig(topk=3)
    with pytest.raises(ConfigError, match="train.batch_size: found 0"):
        LSRConfig(train={"batch_size": 0})
    config = LSRConfig()
    with pytest.raises(ConfigError, match="batch_size: found 0, expected a whole number, 1 or more"):
        config.train.batch_size = 0
    with pytest.raises(ConfigError, match='did you mean "gamma"'):
        config.gama = 1.0
    assert config == LSRConfig()


# ---- presets ----


def test_a_preset_fills_only_what_the_user_left_alone():
    assert (LSRConfig(preset="replug").gamma, LSRConfig(preset="replug").beta) == (0.1, 0.1)
    assert (LSRConfig(preset="replug", beta=0.7).gamma, LSRConfig(preset="replug", beta=0.7).beta) == (0.1, 0.7)
    assert load_config(LSRConfig, None, ["gamma=0.3", "preset=ra_dit"]).gamma == 0.3
    assert LSRConfig(preset="ra_dit").beta == 0.01
    config = LSRConfig(gamma=0.3)
    config.preset = "replug"
    assert (config.gamma, config.beta) == (0.3, 0.1)
    assert LSRConfig.from_yaml(config.to_yaml()) == config
    assert load_config(LSRConfig, None, ["beta=2"], base=LSRConfig(preset="replug")).gamma == 0.1


def test_every_preset_value_is_a_valid_setting():
    for name, values in LSR_PRESETS.items():
        config = LSRConfig(**values)
        assert all(getattr(LSRConfig(preset=name), key) == getattr(config, key) for key in values)


# ---- cheap ----


def test_importing_the_settings_loads_no_heavy_library():
    code = (
        "import sys, ragkit.config, ragkit.runs, ragkit.evaluation; "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_groups_are_settings_classes():
    assert all(issubclass(cls, Config) for cls in ALL)
