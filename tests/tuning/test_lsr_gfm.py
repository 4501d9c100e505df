"""LSR with a graph foundation model as the retriever: the shipped LM teaches it, on the small world."""

from __future__ import annotations

import copy

import pytest
import torch
from ragkit_kernels.lsr_loss import lm_distribution, retrieval_distribution

from ragkit import quickstart_graph
from ragkit.config import LSRConfig, QuickstartConfig
from ragkit.evaluation import evaluate
from ragkit.gfm import GFMRetriever
from ragkit.inputs import Retrieval
from ragkit.rag import Generator, HybridRetriever, RAGSystem
from ragkit.runs import Run
from ragkit.threads import pick_threads
from ragkit.tuning.candidates import COSINE_SPREAD, collate
from ragkit.tuning.lsr import LSRModel, LSRTrainer, trained_parameters
from ragkit.tuning.qa_data import QAData, load_qa

pytestmark = pytest.mark.slow
STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A GFM that was fine-tuned for a moment on two-hop questions, the shipped LM, and one-hop questions."""
    pick_threads()
    config = QuickstartConfig()
    config.rag.device, config.gfm.train.max_steps = "cpu", 12
    run = Run.create(config, tmp_path_factory.mktemp("gfm"))
    _, retriever = quickstart_graph.tune_graph(quickstart_graph.load_graph_step(config), config, run)
    generator = Generator("default", device="cpu")
    one_hop = [[e for e in load_qa("small_world", split=s) if e.metadata["hops"] == 1] for s in ("train", "test")]
    return retriever, generator, config.rag, QAData(one_hop[0][:64], "train"), QAData(one_hop[1][:80], "test")


@pytest.fixture(scope="module")
def rows(world, tmp_path_factory):
    return trainer_of(world, settings(tmp_path_factory.mktemp("rows"))).rows()


def settings(folder, name="run", **changes):
    train = {"batch_size": 16, "learning_rate": 1e-3, "max_steps": STEPS, "warmup_steps": 2, "save_steps": 5}
    return LSRConfig(**{"top_k": 6, "output_dir": str(folder), "name": name, "train": train, **changes})


def trainer_of(world, config, **options):
    """A trainer with a copy of the GFM; graph, encoder and linker are shared."""
    retriever, generator, rag, train, _ = world
    own = copy.copy(retriever)
    own.model = copy.deepcopy(retriever.model)
    return LSRTrainer(RAGSystem(own, generator, rag), train, config, **options)


def shares(trainer, rows):
    """(mean KL(P_R||Q_LM), mean P_R of the LM's favourite), from the retriever as it is."""
    batch = collate(rows)
    with torch.no_grad():
        scores = trainer.system.retriever.score(batch["questions"], batch["passage_ids"]) * trainer.score_scale()
    p = retrieval_distribution(scores, trainer.config.gamma, batch["mask"])
    q = lm_distribution(batch["lm_scores"], trainer.config.beta, batch["mask"])
    kl = (p * (p.clamp(min=1e-30) / q.clamp(min=1e-30)).log()).sum(-1)
    return kl.mean().item(), p.gather(1, q.argmax(-1, keepdim=True)).mean().item()


def recall(trainer, test):
    return evaluate(Retrieval(trainer.system.retriever), test, ks=(1,), generate=False, bootstrap=50)["recall@1"]


def test_the_lm_teaches_the_gfm(world, rows, tmp_path, capsys):
    trainer = trainer_of(world, settings(tmp_path), rows=rows)
    test = world[4]
    scores = [trainer.system.retriever.score([r.question], [r.passage_ids])[0].detach() for r in rows]
    spread = torch.stack([s.std(correction=0) for s in scores]).mean().item()
    assert trainer.score_scale() == pytest.approx(COSINE_SPREAD / spread, rel=1e-4)  # sums over entities, no cosines
    held_out = trainer_of((*world[:3], test, None), settings(tmp_path, "held-out")).rows()
    assert not {row.id for row in rows} & {row.id for row in held_out}
    before, before_out, first = shares(trainer, rows), shares(trainer, held_out), recall(trainer, test)
    weights = {name: tensor.clone() for name, tensor in trainer.system.retriever.model.state_dict().items()}
    lm = {name: tensor.clone() for name, tensor in trainer.system.generator.model.state_dict().items()}
    result = trainer.train()
    assert all(event["grad_norm"] > 0 for event in result.history if "grad_norm" in event)
    after = trainer.system.retriever.model.state_dict()
    assert sum(not torch.equal(after[name], weights[name]) for name in weights) > len(weights) // 2
    assert all(torch.equal(tensor, lm[name]) for name, tensor in trainer.system.generator.model.state_dict().items())
    now, now_out, last = shares(trainer, rows), shares(trainer, held_out), recall(trainer, test)
    with capsys.disabled():
        print(f"\nLSR on a GFM: KL {before[0]:.2f} -> {now[0]:.2f}, P_R of the best {before[1]:.2f} -> {now[1]:.2f};")
        print(f"held out: KL {before_out[0]:.2f} -> {now_out[0]:.2f}, recall@1 {first:.3f} -> {last:.3f}")
    assert now[0] < 0.8 * before[0] and now[1] > before[1] + 0.1
    assert now_out[0] < before_out[0] and now_out[1] > before_out[1]
    assert last > first


def test_stopped_and_resumed_equals_unbroken_with_refreshed_candidates(world, rows, tmp_path):
    changes = {"refresh_steps": 4, "train_part": "both"}
    runs = {}
    for name in ("whole", "broken"):
        config = settings(tmp_path / name, name, **changes)
        config.train.max_steps = 7
        trainer = trainer_of(world, config, rows=rows)
        if name == "broken":
            score, calls = trainer.system.retriever.score, []

            def stopping(*args, score=score, calls=calls, trainer=trainer, **kwargs):
                calls.append(torch.is_grad_enabled())
                if sum(calls) == 5:  # the scale is measured without gradient
                    trainer.run.request_stop()
                return score(*args, **kwargs)

            trainer.system.retriever.score = stopping
            assert trainer.train().steps == 5
            trainer = trainer_of(world, config)  # rows and scale are read back
            trainer.train(resume=True)
        else:
            trainer.train()
        runs[name] = trainer
    whole, broken = runs["whole"], runs["broken"]
    losses = [[e["loss"] for e in t.run.events() if "loss" in e] for t in (whole, broken)]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert broken.rows() == whole.rows() != rows and broken.score_scale() == whole.score_scale()
    expected = whole.system.retriever.model.state_dict()
    for name, tensor in broken.system.retriever.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_teacher_that_harms_leaves_the_gfm_as_it_was(world, tmp_path, capsys):
    def wrong(example, passages):
        return [-5.0 if passage.id in example.supporting else 0.0 for passage in passages]

    ends = {}
    for keep in ("best", "last"):
        config = settings(tmp_path, keep, keep=keep, valid_share=0.25)
        config.train.max_steps = 8
        trainer = trainer_of(world, config, teacher=wrong)
        before = {name: tensor.clone() for name, tensor in trainer.system.retriever.model.state_dict().items()}
        result = trainer.train()
        after = trainer.system.retriever.model.state_dict()
        ends[keep] = result.kept, sum(not torch.equal(after[name], before[name]) for name in before)
    assert ends["best"][0].step == 0 and ends["best"][0].questions >= 12 and ends["best"][1] == 0
    assert ends["last"][0] is None and ends["last"][1] > 5
    assert "kept the encoder of step 0: training did not help" in capsys.readouterr().out


def test_what_of_it_is_trained(world, tmp_path):
    retriever = world[0]
    trained = {freeze: trained_parameters(LSRModel(retriever, LSRConfig()), freeze) for freeze in (True, False)}
    assert len(trained[True]) == len(trained[False]) == len(list(retriever.model.parameters()))
    hybrid = HybridRetriever([retriever, retriever])
    with pytest.raises(ValueError, match=r"HybridRetriever cannot be trained.*Train what it fuses \(GFMRetriever\)"):
        LSRTrainer(RAGSystem(hybrid, world[1], world[2]), world[3], settings(tmp_path))
    assert isinstance(hybrid.retrievers[0], GFMRetriever)
