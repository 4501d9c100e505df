"""The presets: what they promise, and that the code they are for takes them."""

from __future__ import annotations

import pytest

from ragkit.config import (
    ConfigError,
    EvaluateConfig,
    GFMFinetuneConfig,
    GFMPretrainConfig,
    LSRConfig,
    RALTConfig,
    TrainConfig,
)
from ragkit.engine import training_arguments
from ragkit.presets import PRESETS, preset, presets_of
from ragkit.runs import Run

TUNED = [LSRConfig, RALTConfig]
ALL = [*TUNED, GFMPretrainConfig, GFMFinetuneConfig]


@pytest.mark.parametrize("cls", ALL)
def test_every_training_has_every_preset_and_each_says_something_else(cls):
    assert presets_of(cls) == list(PRESETS) == ["cpu-minute", "colab-t4", "full"]
    made = [cls(), *(preset(cls, name) for name in PRESETS)]
    assert all(type(config) is cls for config in made)
    assert len({config.to_yaml() for config in made}) == 4
    for text in PRESETS.values():
        assert text.endswith(".") and text.count(".") <= 2 and len(text) > 40


def test_cpu_minute_is_what_the_notebooks_run():
    lsr, ralt = preset(LSRConfig, "cpu-minute"), preset(RALTConfig, "cpu-minute")
    assert (lsr.data.max_train, lsr.data.max_test, lsr.top_k, lsr.gamma, lsr.beta) == (320, 200, 8, 0.05, 1.0)
    assert (lsr.train.max_steps, lsr.train.batch_size, lsr.train.learning_rate) == (60, 16, 2e-5)
    assert (ralt.data.max_train, ralt.data.max_test, ralt.context, ralt.add_gold) == (800, 200, "joined", True)
    assert (ralt.top_k, ralt.lora_r, ralt.train.max_steps, ralt.train.batch_size) == (3, 16, 150, 8)
    assert ralt.train.learning_rate == 3e-3
    for cls in (GFMPretrainConfig, GFMFinetuneConfig):
        config = preset(cls, "cpu-minute")
        assert config.datasets.train_names == ["small_world"]
        assert config.model.entity_model.hidden_dims == [32] * 3
    assert preset(GFMPretrainConfig, "cpu-minute").train.max_steps == 300
    assert preset(GFMFinetuneConfig, "cpu-minute").train.max_steps == 160
    for cls in ALL:  # a GPU is used where there is one
        config = preset(cls, "cpu-minute")
        assert (config.rag.device if cls in TUNED else config.device) == "auto"


@pytest.mark.parametrize("cls", ALL)
def test_a_t4_gets_fp16_and_no_bf16(cls):
    config = preset(cls, "colab-t4")
    assert config.train.precision == "fp16"
    # LSR refuses it; on the others it has an effect.
    assert config.train.gradient_checkpointing == (cls is not LSRConfig)
    names = config.to_yaml()
    assert "bfloat16" not in names and "BAAI/bge-small-en-v1.5" in names
    if cls in TUNED:
        assert config.rag.generator == "Qwen/Qwen2.5-0.5B-Instruct" and config.rag.chat_template
    if cls is RALTConfig:
        assert config.rag.dtype == "float32"  # the scaler of fp16 needs float32 weights to train


def test_full_is_what_the_papers_say():
    lsr = preset(LSRConfig, "full")
    assert (lsr.preset, lsr.gamma, lsr.beta, lsr.top_k) == ("replug", 0.1, 0.1, 20)
    assert preset(RALTConfig, "full").context == "each"
    for cls in (GFMPretrainConfig, GFMFinetuneConfig):
        config = preset(cls, "full")
        assert (config.model.entity_model.input_dim, config.model.entity_model.hidden_dims) == (512, [512] * 6)
        assert (config.optimizer.lr, config.train.batch_size) == (5e-4, 4)
    assert preset(GFMPretrainConfig, "full").task.num_negative == 128


@pytest.mark.parametrize("cls", TUNED)
@pytest.mark.parametrize("name", ["cpu-minute", "full"])
def test_the_engine_takes_them(cls, name, tmp_path):
    config = preset(cls, name)
    arguments = training_arguments(config.train, Run.create(config, tmp_path, "run"), device="cpu")
    assert arguments.per_device_train_batch_size == config.train.batch_size


def test_values_laid_over_keep_the_rest_of_a_group():
    config = preset(LSRConfig, "cpu-minute", top_k=4, train={"max_steps": 7}, data={"corpus": "mine.jsonl"})
    assert (config.top_k, config.train.max_steps, config.train.batch_size) == (4, 7, 16)
    assert (config.data.corpus, config.data.max_train) == ("mine.jsonl", 320)
    config = preset(RALTConfig, "cpu-minute", train=TrainConfig(max_steps=7))  # only what is set in the object counts
    assert (config.train.max_steps, config.train.learning_rate) == (7, 3e-3)
    assert preset(RALTConfig, "cpu-minute").train.max_steps == 150  # the preset itself is as before
    with pytest.raises(ConfigError, match="did you mean"):
        preset(LSRConfig, "cpu-minute", top_q=4)


def test_an_unknown_preset_or_class_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r'unknown preset \'cpu-minutes\'; did you mean "cpu-minute"\?'):
        preset(LSRConfig, "cpu-minutes")
    with pytest.raises(ValueError, match="the presets are cpu-minute, colab-t4, full"):
        preset(LSRConfig, "xyz")
    with pytest.raises(ValueError, match="no presets for EvaluateConfig; there are some for LSRConfig"):
        preset(EvaluateConfig, "full")
