"""The manager: the quick start as people write it, one part at a time, and every mix-up named."""

from __future__ import annotations

import pytest

from ragkit.config import LSRConfig, RALTConfig
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.manager import TrainerManager
from ragkit.tuning.ralt import RALTTrainer


@pytest.fixture
def trainers(tmp_path):
    def make(system, data):
        shared = {"output_dir": str(tmp_path), "top_k": 3}
        lsr = LSRConfig(**shared, train={"batch_size": 2, "max_steps": 2, "warmup_steps": 0})
        ralt = RALTConfig(**shared, train={"batch_size": 2, "max_steps": 2, "warmup_steps": 0})
        return LSRTrainer(system, data, lsr), RALTTrainer(system, data, ralt)

    return make


QUICK_START = [
    {"query": ["What is the capital of Peru?", "What do markets in Fiji sell?"], "response": ["Lima", "fish"]}
]


def test_quick_start_trains_one_part_at_a_time(system, questions, trainers, weights, same):
    retriever_trainer, generator_trainer = trainers(system, QUICK_START)
    manager = TrainerManager(
        mode="retriever", retriever_trainer=retriever_trainer, generator_trainer=generator_trainer
    )
    lm, encoder = weights(system.generator.model), weights(system.retriever.query_encoder.model)
    result = manager.train()
    assert result.loss > 0 and result.steps == 2 and result.history and result.run_dir.is_dir()
    assert same(system.generator.model, lm)
    assert not same(system.retriever.query_encoder.model, encoder)

    manager.mode = "generator"
    encoder = weights(system.retriever.query_encoder.model)
    result = manager.train()
    assert result.loss > 0 and result.run_dir.is_dir()
    assert same(system.retriever.query_encoder.model, encoder)
    assert any(
        "lora_B" in name and tensor.abs().max() > 0 for name, tensor in system.generator.model.named_parameters()
    )
    assert manager.evaluate(questions).metrics["recall@1"].n == len(questions)
    assert "mode='generator'" in repr(manager)


def test_the_wrong_trainer_is_told_which_one_is_right(system, trainers):
    lsr, ralt = trainers(system, QUICK_START)
    with pytest.raises(TypeError, match="retriever_trainer .* RALTTrainer trains the generator; use LSRTrainer"):
        TrainerManager("retriever", retriever_trainer=ralt)
    with pytest.raises(TypeError, match="but LSRTrainer trains the retriever; use RALTTrainer"):
        TrainerManager("generator", generator_trainer=lsr)
    with pytest.raises(TypeError, match="found str; use LSRTrainer"):
        TrainerManager("retriever", retriever_trainer="lsr")


def test_modes_and_missing_trainers_are_named(system, trainers):
    lsr, _ = trainers(system, QUICK_START)
    with pytest.raises(ValueError, match="expected 'retriever' or 'generator'; did you mean 'retriever'?"):
        TrainerManager("retriver", retriever_trainer=lsr)
    with pytest.raises(
        ValueError, match=r"mode 'generator' needs generator_trainer=RALTTrainer\(system, train_data\)"
    ):
        TrainerManager("generator", retriever_trainer=lsr)
    manager = TrainerManager("retriever", retriever_trainer=lsr)
    with pytest.raises(ValueError, match="needs generator_trainer"):
        manager.mode = "generator"
    assert manager.mode == "retriever" and manager.system is system


def test_two_systems_are_refused(make_system, trainers):
    lsr, _ = trainers(make_system(), QUICK_START)
    _, ralt = trainers(make_system(), QUICK_START)
    with pytest.raises(ValueError, match="two different RAG systems"):
        TrainerManager("retriever", retriever_trainer=lsr, generator_trainer=ralt)
