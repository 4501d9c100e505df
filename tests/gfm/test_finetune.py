"""Fine-tuning: one step equals v1's to the last bits of float32, a toy world is learnt, the best weights are kept."""

from __future__ import annotations

import gc
import json
import logging

import finetune_job as job
import pytest
import torch
from watching import losses

from ragkit.gfm import GFMSettings, GNNRetriever, QueryGNN, entity_weights, export_v1, load_gfm, save_gfm
from ragkit.gfm.batches import EpochBatches
from ragkit.gfm.datasets import FinetuneData, GraphQuestions
from ragkit.gfm.finetune import GFMFinetuneTrainer
from ragkit.gfm.question_rows import QuestionReport
from ragkit.gfm.questions import QuestionSet
from ragkit.gfm.ragged import Ragged
from ragkit.gfm.training import best_of
from ragkit.graph import GraphError, KnowledgeGraph
from ragkit.graph.documents import Documents
from ragkit.graph.names import Names
from ragkit.graph.parts import GraphParts
from ragkit.graph.report import LoadReport
from ragkit.settings import ConfigError


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """The engine collects garbage at each start: half a second over all that was imported, which is set aside here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def root(tmp_path):
    return job.write_two(tmp_path)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ---- one step against v1 ----


@pytest.fixture
def golden_run(golden, tmp_path):
    """golden_run(name): the golden case, and a trainer whose only batch is its questions."""

    def make(name):
        case = golden(name)
        t, meta = case.t, case.meta
        N, R = meta["num_nodes"], meta["num_relations"] // 2
        graph = graph_of(t, N, R)
        graph.rel_emb = t["graph.rel_emb"]
        lists = [
            Ragged.of([row.nonzero()[:, 0].tolist() for row in t[key]])
            for key in ("question_entities_mask", "target_entities", "target_docs")
        ]
        count = len(t["question_embeddings"])
        ids = [f"q{i}" for i in range(count)]
        questions = QuestionSet(
            ids, list(range(count)), ids, t["question_embeddings"], *lists, torch.zeros(count, dtype=torch.bool),
            QuestionReport("golden"),
        )  # fmt: skip
        config = job.config(
            tmp_path,
            optimizer={"lr": 5e-4, "weight_decay": 0.01},
            train={"batch_size": count, "num_epoch": 1, "max_grad_norm": 0.0, "watched_metric": "ent_mrr"},
        )
        data = FinetuneData({"golden": GraphQuestions("golden", graph, questions)}, {}, {})
        return case, GFMFinetuneTrainer(config, model=case.model, data=data, encoder=None)

    return make


def graph_of(t, N, R):
    """The golden graph with its own numbers of entities, relations and documents."""
    head, tail = t["graph.target_edge_index"].numpy()
    document, entity = t["ent2doc"].t().nonzero().t()
    counts = torch.bincount(document, minlength=t["ent2doc"].shape[1])
    ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).numpy()
    named = [Names([f"{letter}{i}" for i in range(n)]) for letter, n in (("e", N), ("r", R), ("d", len(counts)))]
    documents = Documents(named[2], ptr, entity.numpy(), None)
    return KnowledgeGraph(
        GraphParts(
            named[0], named[1], head, t["graph.target_edge_type"].numpy(), tail, documents, LoadReport("golden")
        )
    )


@pytest.mark.parametrize("name", ["distmult_sum", "default_depth"])
def test_one_step_is_v1s(golden_run, name):
    case, trainer = golden_run(name)
    t, model = case.t, trainer.model
    before = weights(model)

    module = trainer.loss_module().train()
    (key,) = [keys[0] for keys in trainer._order()]
    batch = {name: value for name, value in trainer.make_batch(key).items() if name != "ids"}
    found = module(**batch)
    torch.testing.assert_close(found["logits"], t["entity_logits"][key.places], rtol=1e-4, atol=1e-5)
    assert abs(found["loss"] - t["loss.total"]) < 1e-5
    found["loss"].backward()
    for parameter, tensor in model.named_parameters():
        wanted = t[f"grad.{parameter}"]
        assert (tensor.grad - wanted).abs().max() < 1e-4 * wanted.abs().max(), parameter
    model.zero_grad(set_to_none=True)

    result = trainer.train()
    assert result.steps == 1 and losses(result) == [pytest.approx(float(t["loss.total"]), abs=1e-5)]
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in before.items()}
    for parameter, tensor in parameters.items():
        tensor.grad = t[f"grad.{parameter}"].clone()
    torch.optim.AdamW(parameters.values(), lr=5e-4, weight_decay=0.01).step()  # v1 gives it all parameters
    after, close, all_of = weights(model), 0, 0
    for parameter, tensor in parameters.items():
        gradient = t[f"grad.{parameter}"]
        apart = (after[parameter] - tensor.detach()).abs()
        # The first step of Adam is lr · sign(g): a gradient of rounding's size may have the other sign.
        sure = (gradient.abs() > 1e-4 * gradient.abs().max()) | (gradient == 0)
        assert apart[sure].max() < 1e-6, parameter
        assert apart.max() < 2.01 * 5e-4, parameter
        close, all_of = close + int((apart < 1e-6).sum()), all_of + apart.numel()
        assert not torch.equal(after[parameter], before[parameter])
    assert close > 0.999 * all_of


# ---- learning ----


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A trainer that has learnt a world of 30 people, and its scores before."""
    root = tmp_path_factory.mktemp("learnt")
    job.write_dataset(root / "one", people=30, seed=5, train=60, test=21)
    job.write_dataset(root / "two", people=16, seed=6, train=30, test=12)
    settings = job.config(
        root,
        datasets={"train_names": ["one", "two"]},
        train={"num_epoch": 12, "batch_size": 8, "watched_metric": "doc_recall@1"},
    )
    trainer = job.make(settings)
    before = weights(trainer.model), trainer.evaluate(trainer.data.valid), trainer.test()
    return trainer, before, trainer.train()


def test_a_world_is_learnt_and_its_new_people_too(learnt):
    trainer, (start, valid, test), result = learnt
    for name in ("one", "two"):
        after = trainer.evaluate(trainer.data.valid)[name], trainer.test()[name]
        for then, now in zip((valid[name], test[name]), after, strict=True):
            assert then["ent_mrr"] < 0.6 and now["ent_mrr"] > 0.9
            assert then["doc_recall@1"] < 0.5 and now["doc_recall@1"] > 0.85
    assert all(not torch.equal(tensor, start[name]) for name, tensor in weights(trainer.model).items())
    found = losses(result)
    assert sum(found[-10:]) < 0.3 * sum(found[:10]) and result.steps == len(found)


def test_every_evaluation_is_logged_and_the_best_one_kept(learnt):
    trainer, _, result = learnt
    events = [event for event in result.history if "eval_doc_recall@1" in event]
    steps = len(trainer._order())
    assert [event["step"] for event in events] == [steps * epoch for epoch in range(1, 13)]
    values = [event["eval_doc_recall@1"] for event in events]
    best = best_of(trainer.run)
    assert best == {"metric": "doc_recall@1", "value": max(values), "step": events[values.index(max(values))]["step"]}
    for event in events:  # each data set counts the same
        both = (event["eval_one/doc_recall@1"] + event["eval_two/doc_recall@1"]) / 2
        assert event["eval_doc_recall@1"] == pytest.approx(both)
        assert {"eval_doc_recall@5", "eval_doc_mrr", "eval_ent_mrr"} <= event.keys()
    assert result.metrics["eval_doc_recall@1"] == values[-1]
    scores = trainer.evaluate(trainer.data.valid)
    assert sum(score["doc_recall@1"] for score in scores.values()) / 2 == pytest.approx(max(values))


def test_the_runs_model_is_the_trainers(learnt):
    trainer, _, result = learnt
    kept = load_gfm(result.run_dir / "model")
    assert isinstance(kept, GNNRetriever) and kept.encoder_info["text_emb_model_name"] == "words"
    assert_equal_weights(kept.state_dict(), weights(trainer.model))
    assert not trainer.model.training


class Falling(GFMFinetuneTrainer):
    """Its validation scores are made up: `ent_mrr` falls after the second evaluation."""

    scores = [0.2, 0.7, 0.7, 0.1]

    def _evaluate(self):
        self.seen = [*getattr(self, "seen", []), weights(self.model)]
        return {"ent_mrr": self.scores[len(self.seen) - 1], "left/doc_recall@5": -self.scores[len(self.seen) - 1]}


@pytest.mark.parametrize(("metric", "best"), [("ent_mrr", 2), ("left/doc_recall@5", 4)])
def test_the_weights_of_the_best_evaluation_are_kept_the_first_of_equal_ones(root, metric, best):
    trainer = Falling(job.config(root, train={"num_epoch": 4, "watched_metric": metric}), encoder=job.WordEncoder())
    result = trainer.train()
    assert len(trainer.seen) == 4 and best_of(trainer.run)["step"] == 8 * best
    assert_equal_weights(weights(trainer.model), trainer.seen[best - 1])
    assert_equal_weights(load_gfm(result.run_dir / "model").state_dict(), trainer.seen[best - 1])


def test_without_anything_to_choose_by_the_last_weights_are_kept(root):
    for name, changes in {"no": {"train": {"do_eval": False}}, "none": {"datasets": {"valid_share": 0.0}}}.items():
        trainer = job.make(job.config(root, name=name, **changes))
        result = trainer.train()
        assert best_of(trainer.run) is None and not any("eval_ent_mrr" in event for event in result.history)
        assert_equal_weights(load_gfm(result.run_dir / "model").state_dict(), weights(trainer.model))


def test_trained_twice_in_a_row_makes_two_runs(root):
    trainer = job.make(job.config(root, train={"num_epoch": 1}))
    first, second = trainer.train(), trainer.train()
    assert first.run_dir != second.run_dir and losses(second)[0] < losses(first)[0]


@pytest.mark.parametrize("metric", ["doc_recall@5", "right/doc_recall@5", "ent_filtered_mrr", "doc_all@1"])
def test_any_metric_can_choose(root, metric):
    trainer = job.make(job.config(root, train={"watched_metric": metric}))
    result = trainer.train()
    values = [event[f"eval_{metric}"] for event in result.history if f"eval_{metric}" in event]
    assert len(values) == 3 and best_of(trainer.run)["value"] == max(values)


def test_an_unknown_metric_is_refused_before_anything_is_computed(root):
    encoder = job.WordEncoder()
    for metric, message in {
        "doc_recal@5": "watched_metric: found 'doc_recal@5', expected one of .*; did you mean \"doc_recall@5\"?",
        "doc_recall@7": "found 'doc_recall@7', expected one of doc_recall@1, doc_recall@5",
        "left/mrr": "found 'left/mrr', expected one of",
    }.items():
        with pytest.raises(ConfigError, match=message):
            GFMFinetuneTrainer(job.config(root, train={"watched_metric": metric}), encoder=encoder)
    assert encoder.texts == 0
    with pytest.raises(ConfigError, match='a data set that is scored .*one of left, right; did you mean "left"?'):
        GFMFinetuneTrainer(job.config(root, train={"watched_metric": "lefft/ent_mrr"}), encoder=encoder)
    assert not (root / "runs").exists()


# ---- where it starts ----


@pytest.fixture
def tiny():
    torch.manual_seed(4)
    return GFMSettings(rel_emb_dim=5, input_dim=8, hidden_dims=[8, 8])


def test_it_starts_from_our_checkpoints_and_from_v1s(root, tiny, tmp_path):
    model = GNNRetriever(tiny)
    paths = {"ours": save_gfm(model, tmp_path / "ours", "words"), "v1": export_v1(model, tmp_path / "v1", "words")}
    curves = {}
    for name, path in paths.items():
        trainer = job.make(job.config(root, name=name, train={"checkpoint": str(path), "num_epoch": 1}))
        assert_equal_weights(weights(trainer.model), weights(model))
        curves[name] = losses(trainer.train())
        assert not torch.equal(trainer.model.rel_mlp.weight, model.rel_mlp.weight)
    given = job.make(job.config(root, name="given", train={"num_epoch": 1}), model=model)
    assert curves["ours"] == curves["v1"] == losses(given.train())


def test_it_starts_from_a_pre_trained_model(root, tiny, tmp_path, capsys):
    model = QueryGNN(tiny)
    path = save_gfm(model, tmp_path / "pretrained", "words")
    trainers = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(trainers))  # what else was drawn does not matter
        trainers.append(job.make(job.config(root, seed=seed, train={"checkpoint": str(path)})))
    assert "new (random) parameters" in capsys.readouterr().out
    found = [weights(trainer.model) for trainer in trainers]
    for state in found:
        assert_equal_weights({name: state[name] for name in model.state_dict()}, weights(model))
    assert trainers[0].model.new_parameters == ["question_mlp.weight", "question_mlp.bias"]
    assert_equal_weights(found[0], found[1])
    assert not torch.equal(found[0]["question_mlp.weight"], found[2]["question_mlp.weight"])
    trainers[0].train()
    assert not torch.equal(trainers[0].model.question_mlp.weight, found[0]["question_mlp.weight"])


def test_new_weights_are_drawn_by_the_seed(root):
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(found))
        found.append(weights(job.make(job.config(root, seed=seed)).model))
    assert_equal_weights(found[0], found[1])
    assert not torch.equal(found[0]["rel_mlp.weight"], found[2]["rel_mlp.weight"])


def test_an_encoder_of_another_size_is_refused_before_training(root, tiny, tmp_path):
    path = save_gfm(GNNRetriever(tiny), tmp_path / "ours", "words")
    with pytest.raises(GraphError, match="the encoder gives 9 numbers for a text, the model wants 5"):
        GFMFinetuneTrainer(job.config(root, train={"checkpoint": str(path)}), encoder=job.WordEncoder(9))
    assert not (root / "runs").exists()


def test_a_checkpoint_that_is_not_there(root):
    with pytest.raises(ValueError, match="nowhere"):
        job.make(job.config(root, train={"checkpoint": str(root / "nowhere")}))


# ---- ways to train ----


def curve_of(root, name, steps=6, **changes):
    changes["train"] = {"max_steps": steps, "do_eval": False, **changes.get("train", {})}
    trainer = job.make(job.config(root, name=name, **changes))
    return trainer, losses(trainer.train())


@pytest.mark.parametrize(
    "terms",
    [
        [{"name": "listce", "is_doc_loss": True}],
        [{"name": "bce", "weight": 0.3, "is_doc_loss": True}, {"name": "listce", "weight": 0.7}],
    ],
)
def test_losses_on_documents_train(root, terms):
    changes = {"task": {"losses": terms}, "train": {"num_epoch": 8}}
    trainer = job.make(job.config(root, **changes))
    before = {name: score["ent_mrr"] for name, score in trainer.evaluate(trainer.data.train).items()}
    found = losses(trainer.train())
    after = {name: score["ent_mrr"] for name, score in trainer.evaluate(trainer.data.train).items()}
    assert sum(found[-8:]) < 0.7 * sum(found[:8])
    assert all(after[name] > before[name] + 0.1 for name in before)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_mean_over_processes_is_the_loss_of_one_with_the_whole_batch(root, world):
    """7 processes: the batch of 4 leaves some with an example that counts for nothing."""
    trainer = job.make(job.config(root, datasets={"max_train": 4, "valid_share": 0.0}))
    module = trainer.loss_module()

    def loss(key):
        return module(**{name: value for name, value in trainer.make_batch(key).items() if name != "ids"})["loss"]

    size = -(-4 // world)
    whole = [keys[0] for keys in EpochBatches(trainer.sizes, size * world, 3)]
    parts = zip(*(EpochBatches(trainer.sizes, size, 3, rank, world) for rank in range(world)), strict=True)
    for key, ranks in zip(whole, parts, strict=True):
        found = torch.stack([loss(keys[0]) for keys in ranks]).mean()
        torch.testing.assert_close(found, loss(key))


def test_question_entities_weigh_by_their_documents_if_asked(root):
    path = root / "left" / "processed" / "stage1" / "document2entities.json"
    lists = json.loads(path.read_text())
    path.write_text(json.dumps({name: [*entities, "p1x0", "p1x11"] for name, entities in lists.items()}))
    found = []
    for on in (True, False):
        trainer = job.make(job.config(root, datasets={"train_names": ["left"]}, train={"init_entities_weight": on}))
        batch = trainer.make_batch(next(iter(trainer._order()))[0])
        part = trainer.data.train["left"]
        weight = 1 / torch.tensor(part.graph.document_frequency).float() if on else None
        logits = trainer.loss_module()(**{k: v for k, v in batch.items() if k != "ids"})["logits"]
        wanted = trainer.model(part.graph, batch["embeddings"], batch["question_entities"], weight)
        torch.testing.assert_close(logits, wanted)
        found.append(trainer.evaluate()["left"]["ent_mrr"])
    assert found[0] != found[1]


def test_recomputing_the_layers_gives_the_same_curve(root):
    _, plain = curve_of(root, "plain")
    trainer, again = curve_of(root, "again", train={"gradient_checkpointing": True})
    assert trainer.model.entity_model.recompute
    assert again == pytest.approx(plain, rel=1e-4)


def test_accumulated_batches_are_one_larger_batch(root):
    """On sizes that divide, the batches of 2 are halves of those of 4; here the order is set so that they meet."""
    datasets = {"train_names": ["left"], "max_train": 16, "valid_share": 0.0}
    large, small = (
        job.make(job.config(root, name=name, datasets=datasets, train={**train, "do_eval": False, "num_epoch": 2}))
        for name, train in {
            "large": {"batch_size": 4},
            "small": {"batch_size": 2, "gradient_accumulation_steps": 2},
        }.items()
    )
    whole = large._order

    class Halves(type(whole())):
        def __iter__(self):
            order = whole()
            order.set_epoch(self.epoch)
            for (key,) in order:
                for part in key.places.split(2):
                    yield [type(key)(key.dataset, part, slice(0, 2), 1.0, key.seed)]

    small._order = lambda: Halves({"left": 16}, 2, 0)
    expected, found = large.train(), small.train()
    assert (expected.steps, found.steps) == (8, 8)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    for name, tensor in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_half_precision_on_a_cpu_stays_near(root):
    _, plain = curve_of(root, "plain")
    trainer, narrow = curve_of(root, "narrow", train={"precision": "bf16"})
    assert narrow == pytest.approx(plain, rel=0.1) and narrow != plain
    assert trainer.model.rel_mlp.weight.dtype == torch.float32
    with pytest.raises(ValueError, match='train.precision: found "fp16", which needs a GPU'):
        curve_of(root, "fp16", train={"precision": "fp16"})


def test_a_question_without_weight_does_not_stop_the_training(root):
    """Entities of no document weigh nothing: the question's embedding alone speaks."""
    path = root / "left" / "processed" / "stage1" / "document2entities.json"
    lists = json.loads(path.read_text())
    keep = {f"about {row['supporting_entities'][0]}" for row in json.loads(path.with_name("train.json").read_text())}
    path.write_text(json.dumps({name: entities for name, entities in lists.items() if name in keep}))
    datasets = {"train_names": ["left"], "valid_share": 0.0}
    trainer, found = curve_of(root, "run", steps=22, datasets=datasets, train={"batch_size": 1})
    part = trainer.data.train["left"]
    weight = entity_weights(part.graph)
    silent = [not weight[ids].any() for ids in part.questions.question_entities.at(range(len(part.questions)))]
    assert any(silent) and not all(silent)
    assert len(found) == 22 and all(0 < value < 100 for value in found)
    assert 0 < trainer.evaluate(trainer.data.train)["left"]["ent_mrr"] <= 1


def test_the_time_that_is_left_is_said_early(root, caplog):
    with caplog.at_level(logging.INFO, logger="ragkit"):
        curve_of(root, "run", steps=8)
    assert sum("estimate: " in message and "peak memory" in message for message in caplog.messages) == 1


def test_evaluations_every_few_steps_and_at_the_end(root):
    trainer = job.make(job.config(root, train={"max_steps": 7, "eval_steps": 3}))
    found = [event["step"] for event in trainer.train().history if "eval_ent_mrr" in event]
    assert found == [3, 6, 7]
    short = job.make(job.config(root, train={"max_steps": 2}))  # less than an epoch
    assert [event["step"] for event in short.train().history if "eval_ent_mrr" in event] == [2]
