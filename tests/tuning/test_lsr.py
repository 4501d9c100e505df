"""LSR on a real encoder: which weights move, that probability goes where the teacher says, and exact resume."""

from __future__ import annotations

import json

import pytest
import torch
from ragkit_kernels.lsr_loss import retrieval_distribution
from safetensors.torch import load_file
from watching import losses

from ragkit.config import ConfigError, LSRConfig
from ragkit.runs import Run
from ragkit.tuning.lsr import LSRModel, LSRTrainer, collate
from ragkit.tuning.qa_data import DataError
from ragkit.tuning.scoring import score_passages
from ragkit.tuning.teacher import LSRRow, shuffle_scores


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        train = {"batch_size": 4, "learning_rate": 1e-4, "max_steps": 4, "warmup_steps": 0, **changes.pop("train", {})}
        return LSRConfig(**{"top_k": 4, "output_dir": str(tmp_path / "runs"), "train": train, **changes})

    return make


def prefers_food(example, passages):
    """A teacher for whom only the passages about food help."""
    return [0.0 if passage.id.endswith("food") else -5.0 for passage in passages]


def test_only_the_query_encoder_moves(system, questions, config, weights, same):
    before_query = weights(system.retriever.query_encoder.model)
    before_lm, store = weights(system.generator.model), system.retriever.store
    ids = [passage.id for passage in store.passages()]
    before_index = store.embeddings(ids)
    seen = []
    score = system.retriever.score

    def watched(*args, **kwargs):
        lm = any(parameter.requires_grad for parameter in system.generator.model.parameters())
        passages = any(p.requires_grad for p in system.retriever.passage_encoder.model.parameters())
        training = any(module.training for module in system.retriever.query_encoder.model.modules())
        seen.append((lm, passages, training))
        return score(*args, **kwargs)

    system.retriever.score = watched
    result = LSRTrainer(system, questions, config()).train()

    assert seen == [(False, False, False)] * 4  # frozen by requires_grad, dropout off, in every step
    assert result.steps == 4 and len(losses(result)) == 4
    assert all(event["grad_norm"] > 0 for event in result.history if "loss" in event)
    assert not same(system.retriever.query_encoder.model, before_query)
    assert same(system.retriever.passage_encoder.model, before_query)
    assert same(system.generator.model, before_lm)
    assert torch.equal(store.embeddings(ids), before_index) and not system.retriever.stale
    moved = weights(system.retriever.query_encoder.model)
    for name, tensor in before_query.items():
        if "embeddings." in name:  # tokens, positions, segments and their layer norm
            assert torch.equal(moved[name], tensor) or "LayerNorm" in name
    for module in (system.generator.model, system.retriever.query_encoder.model):
        assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("direction", ["KL(P_R||Q_LM)", "KL(Q_LM||P_R)"])
def test_probability_goes_to_the_passages_that_help(system, questions, config, direction):
    settings = config(direction=direction, train={"max_steps": 15, "batch_size": 10})
    trainer = LSRTrainer(system, questions, settings, teacher=prefers_food)
    batch = collate(trainer.rows())
    helps = torch.tensor([[identity.endswith("food") for identity in ids] for ids in batch["passage_ids"]])

    def share():
        with torch.no_grad():
            scores = system.retriever.score(batch["questions"], batch["passage_ids"])
        return (retrieval_distribution(scores, settings.gamma) * helps).sum(-1).mean().item()

    before = share()
    result = trainer.train()
    assert share() > before + 0.3
    assert losses(result)[-1] < 0.5 * losses(result)[0]


def test_both_encoders_move_and_the_index_follows(system, questions, config, weights, same):
    retriever = system.retriever
    before = weights(retriever.query_encoder.model)
    LSRTrainer(system, questions, config(train_part="both"), teacher=prefers_food).train()
    assert retriever.shared and not retriever.stale
    assert not same(retriever.query_encoder.model, before)
    passages = list(retriever.store.passages())
    fresh = retriever.encode_passages([passage.full_text for passage in passages])
    torch.testing.assert_close(retriever.store.embeddings([p.id for p in passages]), fresh, atol=1e-5, rtol=0)


def test_embeddings_train_if_asked(system, questions, config, weights):
    encoder = system.retriever.query_encoder.model
    before = weights(encoder)
    LSRTrainer(system, questions, config(freeze_embeddings=False), teacher=prefers_food).train()
    after = weights(system.retriever.query_encoder.model)
    assert any("word_embeddings" in name and not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_stop_and_resume_in_a_new_process_equals_the_unbroken_run(make_system, questions, config, same, tmp_path):
    unbroken = make_system()
    wanted = LSRTrainer(unbroken, questions, config(train={"max_steps": 6})).train()

    settings = config(name="broken", train={"max_steps": 6})
    first = LSRTrainer(make_system(), questions, settings)
    score, calls = first.system.retriever.score, []

    def stop_in_the_third_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            first.run.request_stop()
        return score(*args, **kwargs)

    first.system.retriever.score = stop_in_the_third_step
    half = first.train()
    assert half.stopped and half.steps == 3

    fresh = make_system()  # initial weights, as a new process has them

    def no_scoring(*args, **kwargs):
        raise AssertionError("the LM scores are to be read back")

    fresh.generator.sequence_logprob = no_scoring
    result = LSRTrainer(fresh, questions, settings).train(resume=True)
    assert losses(result) == losses(wanted) and result.steps == 6 and not result.stopped
    assert same(fresh.retriever.query_encoder.model, unbroken.retriever.query_encoder.model.state_dict())

    checkpoint = Run.open(tmp_path / "runs" / "broken").last_checkpoint()
    saved = load_file(checkpoint / "model.safetensors")
    assert saved and all("query_encoder" in name and "word_embeddings" not in name for name in saved)


def test_resume_in_the_same_process_keeps_the_candidates(system, questions, config):
    settings = config(train={"max_steps": 4})
    trainer = LSRTrainer(system, questions, settings, teacher=prefers_food)
    rows = trainer.rows()
    trainer.train()
    # The query encoder has moved: retrieving again would find other candidates, the kept ones are used.
    again = LSRTrainer(system, questions, settings, run=trainer.run, teacher=prefers_food)
    again.train(resume=True)
    assert again.rows() == rows


def test_teacher_scores_are_minus_the_hf_loss_times_tokens(system, questions, config):
    trainer = LSRTrainer(system, questions, config(score="logprob"))
    rows, generator = trainer.rows(), system.generator
    by_id = {passage.id: passage for passage in system.retriever.store.passages()}
    for row, question in list(zip(rows, questions, strict=True))[:3]:
        assert row.passage_ids == tuple(p.id for p in system.retriever.retrieve([row.question], 4)[0])
        for identity, score in zip(row.passage_ids, row.lm_scores, strict=True):
            prompt = generator.encode_prompt("plain", row.question, [by_id[identity]])
            response = generator.encode_response(question["answer"], eos=True)
            ids = torch.tensor([list(prompt) + list(response)])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            with torch.no_grad():
                loss = generator.model(input_ids=ids, labels=labels).loss.item()
            assert score == pytest.approx(-loss * len(response), abs=1e-4)
            per_token = LSRTrainer(system, questions[:3], config()).rows()
    assert per_token[0].lm_scores[0] == pytest.approx(
        rows[0].lm_scores[0] / len(generator.encode_response(questions[0]["answer"], eos=True)), abs=1e-6
    )


def test_scores_do_not_depend_on_the_batch_size(system, questions):
    from ragkit.tuning.qa_data import load_qa

    examples = load_qa(questions)[:4]
    found = system.retriever.retrieve([example.question for example in examples], 3)
    found[1] = found[1][:1]  # rows of unequal K keep their places
    pairs = list(zip(examples, found, strict=True))
    one = score_passages(system.generator, pairs, LSRConfig(score_batch_size=1, score_cache=None))
    all_at_once = score_passages(system.generator, pairs, LSRConfig(score_batch_size=64, score_cache=None))
    assert [len(row) for row in one] == [3, 1, 3, 3]
    for left, right in zip(one, all_at_once, strict=True):
        assert left == pytest.approx(right, abs=1e-4)


def test_shuffled_teacher_permutes_within_the_question(system, questions, config):
    rows = LSRTrainer(system, questions, config()).rows()
    shuffled = LSRTrainer(system, questions, config(), teacher="shuffled", rows=rows).rows()
    assert [row.passage_ids for row in shuffled] == [row.passage_ids for row in rows]
    assert [sorted(row.lm_scores) for row in shuffled] == [sorted(row.lm_scores) for row in rows]
    assert shuffled != rows
    assert shuffle_scores(rows, 0) == shuffled and shuffle_scores(rows, 1) != shuffled
    assert shuffle_scores(rows[3:4], 0) == shuffled[3:4]  # whatever other rows there are


def test_rows_of_unequal_length_are_padded_and_masked(system):
    rows = [
        LSRRow("a", "What is the capital of Peru?", ("Peru-capital", "Peru-food", "Fiji-food"), (-1.0, -3.0, -4.0)),
        LSRRow("b", "What is the capital of Fiji?", ("Fiji-food", "Fiji-capital"), (-3.0, -0.5)),
    ]
    model = LSRModel(system.retriever, LSRConfig())
    both = model(**{k: v for k, v in collate(rows).items() if k != "ids"})["loss"]
    alone = [model(**{k: v for k, v in collate([row]).items() if k != "ids"})["loss"] for row in rows]
    torch.testing.assert_close(both, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)
    both.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_kept_scores_of_other_data_are_refused(system, questions, config):
    settings = config(name="kept", train={"max_steps": 1})
    LSRTrainer(system, questions, settings, teacher=prefers_food).train()
    run = Run.open(f"{settings.output_dir}/kept")
    with pytest.raises(DataError, match="this run was started with other questions"):
        LSRTrainer(system, questions[:5], settings, run=run, teacher=prefers_food).train(resume=True)
    with pytest.raises(DataError, match="started with other settings and language model"):
        LSRTrainer(system, questions, settings, run=run).train(resume=True)
    (run.dir / "lm_scores" / "rows.json").write_text('{"key": ')
    with pytest.raises(DataError, match="cannot be read .* delete the folder to score again"):
        LSRTrainer(system, questions, settings, run=run, teacher=prefers_food).train(resume=True)


def test_kept_scores_are_plain_files(system, questions, config):
    trainer = LSRTrainer(system, questions, config(train={"max_steps": 1}))
    trainer.train()
    folder = trainer.run.dir / "lm_scores"
    tensors = load_file(folder / "scores.safetensors")
    saved = json.loads((folder / "rows.json").read_text())
    assert [tuple(row["passage_ids"]) for row in saved["rows"]] == [row.passage_ids for row in trainer.rows()]
    assert tensors["lm_scores"].tolist() == [score for row in trainer.rows() for score in row.lm_scores]


def test_questions_that_cannot_be_used_are_reported(system, questions, config, capsys):
    data = [*questions, {"id": "mute", "question": "What is the capital of Atlantis?", "answer": ""}]
    trainer = LSRTrainer(system, data, config(), teacher=prefers_food)
    assert len(trainer.rows()) == 10 and trainer.left_out == [("mute", "no answer")]
    assert "1 of 11 questions cannot be trained on (mute: no answer)" in capsys.readouterr().out
    passages = list(system.retriever.store.passages())
    system.retriever.store.delete([passage.id for passage in passages[1:]])
    with pytest.raises(DataError, match="10 of 10 questions cannot .* 1 passage retrieved, at least 2 are needed"):
        LSRTrainer(system, questions, config(), teacher=prefers_food).rows()


def test_evaluation_while_training_and_after(system, questions, config):
    settings = config(train={"max_steps": 2, "eval_steps": 1})
    trainer = LSRTrainer(system, questions, settings, eval_data=questions[:4], teacher=prefers_food)
    result = trainer.train()
    evaluations = [event for event in result.history if any(name.startswith("eval_recall") for name in event)]
    assert {event["step"] for event in evaluations} == {1, 2}
    assert trainer.evaluate().metrics.keys() >= {"recall@1", "mrr"}
    with pytest.raises(DataError, match="nothing to evaluate on"):
        LSRTrainer(system, questions, config()).evaluate()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"teacher": "gpt"}, "teacher: found 'gpt'"),
        ({"train": {"gradient_checkpointing": True}}, {}, "train.gradient_checkpointing"),
        ({"train": {"eval_steps": 5}}, {}, "train.eval_steps is set, but there is no eval_data"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(system, questions, config, changes, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        LSRTrainer(system, questions, config(**changes), **options)


def test_a_teacher_of_the_wrong_length_is_named(system, questions, config):
    with pytest.raises(DataError, match="the teacher gave 1 scores for 4 passages of 'q-Peru'"):
        LSRTrainer(system, questions, config(), teacher=lambda example, passages: [0.0]).rows()
