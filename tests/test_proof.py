"""The claim of the kit, on held-out questions and three seeds: LSR makes the retriever better, RALT the generator.

Better means that the 95 % bootstrap interval of the paired difference lies above 0. The controls and what may not move
are checked beside it.
"""

from __future__ import annotations

import pytest
import torch

from ragkit import quickstart as qs
from ragkit.config import QuickstartConfig
from ragkit.evaluation import compare
from ragkit.runs import Run
from ragkit.threads import pick_threads

SEEDS = (0, 1, pytest.param(2, marks=pytest.mark.long))
# RALT takes a minute a seed, and the notebooks 00 and 04 show seed 0 in every run.
RALT_SEEDS = (pytest.param(0, marks=pytest.mark.long), 1, pytest.param(2, marks=pytest.mark.long))
pytestmark = pytest.mark.slow


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(before: dict[str, torch.Tensor], module: torch.nn.Module) -> bool:
    after = module.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def world():
    """Questions, an untuned system and its scores."""
    pick_threads()
    config = QuickstartConfig(n_train=600, n_test=300)
    train, test = qs.load_questions(config)
    system = qs.build(config)
    return train, test, system, qs.score(system, test, config)


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    """The LM's scores of the training passages: the same for every seed, so they are computed once."""
    train, _, system, _ = world
    config = QuickstartConfig()
    config.lsr.train.max_steps = 1
    run = Run.create(config, tmp_path_factory.mktemp("scores"))
    return qs.tune_retriever(qs.untuned_copy(system), train, config, run)[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_lsr_raises_recall_on_held_out_questions(world, scored, tmp_path, seed):
    from ragkit.tuning.lsr import LSRTrainer

    train, test, system, before = world
    config = QuickstartConfig(seed=seed)
    tuned = qs.untuned_copy(system)
    settings = config.lsr.model_copy(deep=True)
    settings.output_dir, settings.train.seed, settings.train.max_steps = str(tmp_path), seed, 80
    generator, passages = weights(tuned.generator.model), weights(tuned.retriever.passage_encoder.model)
    result = LSRTrainer(tuned, train, settings, rows=scored).train()
    assert result.steps == 80 and all(event["grad_norm"] > 0 for event in result.history if "grad_norm" in event)
    assert same(generator, tuned.generator.model) and same(passages, tuned.retriever.passage_encoder.model)
    assert not same(passages, tuned.retriever.query_encoder.model)
    after = qs.score(tuned, test, config, generate=False)
    change = compare(before, after)
    assert change.difference["recall@1"].low > 0, str(change)
    assert change.difference["mrr"].low > 0, str(change)


@pytest.mark.parametrize("seed", RALT_SEEDS)
def test_ralt_raises_exact_match_on_held_out_questions(world, tmp_path, seed):
    train, test, _, before = world
    config = QuickstartConfig(seed=seed)
    config.ralt.train.max_steps = 160
    system = qs.build(config)
    retriever, generator = weights(system.retriever.query_encoder.model), weights(system.generator.model)
    result = qs.tune_generator(system, train, config, Run.create(config, tmp_path))
    assert result.steps == 160
    assert same(retriever, system.retriever.query_encoder.model)
    lora = {n: t for n, t in system.generator.model.state_dict().items() if "lora_B" in n}
    assert lora and all(tensor.abs().max() > 0 for tensor in lora.values())  # B starts at 0: every adapter moved
    base = {n.replace(".base_layer", ""): t for n, t in system.generator.model.get_base_model().state_dict().items()}
    assert all(torch.equal(tensor, base[name]) for name, tensor in generator.items())
    after = qs.score(system, test, config)
    change = compare(before, after)
    assert change.difference["em"].low > 0 and change.difference["f1"].low > 0, str(change)
    blind = qs.score_with_random_passages(system, test, config)
    assert blind["em"] < 0.5 * after["em"]


def test_a_shuffled_teacher_does_not_raise_recall(world, scored, tmp_path):
    from ragkit.tuning.lsr import LSRTrainer

    train, test, system, before = world
    config = QuickstartConfig()
    tuned = qs.untuned_copy(system)
    settings = config.lsr.model_copy(deep=True)
    settings.output_dir, settings.train.max_steps = str(tmp_path), 80
    LSRTrainer(tuned, train, settings, teacher="shuffled", rows=scored).train()
    after = qs.score(tuned, test, config, generate=False)
    assert after["recall@1"] < before["recall@1"]
