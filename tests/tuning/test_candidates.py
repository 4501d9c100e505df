"""In-batch negatives against sums written out, teacher scores, the scale of the retriever's, the teacher's table."""

from __future__ import annotations

import gc
import math
import warnings

import lsr_job as job
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragkit_kernels.lsr_loss import lsr_loss

from ragkit.config import ConfigError, LSRConfig, RAGConfig
from ragkit.rag import Generator, HybridRetriever, RAGSystem
from ragkit.tuning.candidates import COSINE_SPREAD, Candidates, collate, score_scale
from ragkit.tuning.lsr import LSRModel, LSRTrainer, TeacherWarning, lsr_table
from ragkit.tuning.lsr_objective import batch_negatives, lsr_objective, teacher_values
from ragkit.tuning.lsr_table import summarise_teacher
from ragkit.tuning.qa_data import DataError
from ragkit.tuning.teacher import LSRRow, build_rows

DIRECTIONS = ["KL(P_R||Q_LM)", "KL(Q_LM||P_R)"]


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """The engine collects garbage at each start: half a second over all that was imported, which is set aside here."""
    gc.freeze()
    yield
    gc.unfreeze()


# ---- in-batch negatives ----


def by_hand(scores, lm, own, others, config):
    """Every softmax and every sum written out, row by row, in Python floats."""
    total = 0.0
    for s, v, mine, rest in zip(*(t.tolist() for t in (scores, lm, own, others)), strict=True):
        here = [j for j in range(len(s)) if mine[j]]
        there = [j for j in range(len(s)) if rest[j]]
        weight = {j: math.exp(s[j] / config.gamma) for j in here + there}
        p = {j: w / sum(weight.values()) for j, w in weight.items()}
        weight = {j: math.exp(v[j] / config.beta) for j in here}
        q = {j: w / sum(weight.values()) for j, w in weight.items()}
        if config.direction == "KL(Q_LM||P_R)":
            total += sum(q[j] * math.log(q[j] / p[j]) for j in here)
            continue
        floor = config.in_batch_floor if there else 0.0
        q = {j: share * (1 - floor) for j, share in q.items()} | {j: floor / len(there) for j in there}
        total += sum(p[j] * math.log(p[j] / q[j]) for j in p)
    return total / len(scores)


@st.composite
def batches(draw):
    """Rows of unequal K, with unequal numbers of negatives, none among them."""
    number = draw(st.integers(1, 4))
    counts = [(draw(st.integers(1, 4)), draw(st.integers(0, 4))) for _ in range(number)]
    width = max(k + n for k, n in counts)
    column = torch.arange(width)
    own = torch.stack([column < k for k, _ in counts])
    others = torch.stack([(column >= k) & (column < k + n) for k, n in counts])
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scores = torch.randn(number, width, generator=g, dtype=torch.float64).masked_fill(~(own | others), -torch.inf)
    return scores, -3 * torch.rand(number, width, generator=g, dtype=torch.float64), own, others


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(batches(), st.floats(0.2, 2), st.floats(0.3, 2), st.floats(0.001, 0.5))
def test_loss_with_negatives_is_the_divergence_written_out(direction, batch, gamma, beta, floor):
    config = LSRConfig(gamma=gamma, beta=beta, direction=direction, in_batch_floor=floor)
    found = lsr_objective(*batch, config)
    assert found.item() == pytest.approx(by_hand(*batch, config), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_with_negatives_is_that_of_finite_differences(direction):
    config = LSRConfig(gamma=0.5, beta=0.7, direction=direction)
    own = torch.tensor([[True, True, False, False, False], [True, True, True, False, False]])
    others = torch.tensor([[False, False, True, True, False], [False, False, False, True, True]])
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, generator=g, dtype=torch.float64)
    lm = -torch.rand(2, 5, generator=g, dtype=torch.float64)
    leaf = scores.clone().requires_grad_(True)
    lsr_objective(leaf, lm, own, others, config).backward()
    for i in range(2):
        for j in range(5):
            step = torch.zeros_like(scores)
            step[i, j] = 1e-5
            sides = [by_hand(scores + sign * step, lm, own, others, config) for sign in (1, -1)]
            expected = (sides[0] - sides[1]) / 2e-5
            assert leaf.grad[i, j].item() == pytest.approx(expected if own[i, j] or others[i, j] else 0.0, abs=2e-6)
    if direction == "KL(Q_LM||P_R)":  # a negative's score is to fall; in the other direction not below the floor
        assert (leaf.grad[others] > 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_negatives_is_the_plain_loss(direction):
    config = LSRConfig(direction=direction, gamma=0.3)
    scores, lm = torch.randn(2, 3), -torch.rand(2, 3)
    own, none = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    plain = lsr_loss(scores, lm, 0.3, 1.0, direction)
    torch.testing.assert_close(lsr_objective(scores, lm, own, None, config), plain)
    torch.testing.assert_close(lsr_objective(scores, lm, own, none, config), plain, atol=1e-6, rtol=1e-5)


def test_negatives_are_the_others_passages_each_once():
    assert batch_negatives([["a", "b"], ["b", "c"], ["d"]]) == [["c", "d"], ["a", "d"], ["a", "b", "c"]]
    assert batch_negatives([["a", "b"], ["b", "a"]]) == [[], []] and batch_negatives([["a", "b"]]) == [[]]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_model_puts_negatives_behind_its_own(direction):
    retriever = job.make_system().retriever
    config = LSRConfig(in_batch_negatives=True, direction=direction, gamma=0.2)
    rows = [
        LSRRow("a", "the food of Peru", ("Peru-food", "Peru-king", "Fiji-food"), (-1.0, -2.0, -3.0)),
        LSRRow("b", "the king of Fiji", ("Fiji-king", "Fiji-food"), (-0.5, -1.5)),
    ]
    batch = {name: value for name, value in collate(rows).items() if name != "ids"}
    out = LSRModel(retriever, config)(**batch)
    ids = [["Peru-food", "Peru-king", "Fiji-food", "Fiji-king"], ["Fiji-king", "Fiji-food", "Peru-food", "Peru-king"]]
    scores = retriever.score(batch["questions"], ids)
    assert torch.equal(out["scores"], scores)
    own = torch.tensor([[True, True, True, False], [True, True, False, False]])
    lm = torch.tensor([[-1.0, -2.0, -3.0, 9.0], [-0.5, -1.5, 9.0, 9.0]])  # what stands at a negative is not read
    expected = by_hand(scores.double(), lm.double(), own, ~own, config)
    assert out["loss"].item() == pytest.approx(expected, abs=1e-5)
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in retriever.question_encoder.parameters())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_negatives_push_other_questions_passages_down(tmp_path, direction):
    """Without them P_R is free outside of each question's own passages; with them the gold one wins there too."""
    mass = {}
    for negatives in (False, True):
        config = job.settings(
            tmp_path, f"{negatives}", in_batch_negatives=negatives, direction=direction, refresh_steps=None, top_k=2
        )
        config.train.max_steps, config.train.batch_size = 25, 12
        trainer = job.make_trainer(config, teacher=lambda example, found: [2.0 * (p.id == example.id) for p in found])
        trainer.train()
        retriever, rows = trainer.system.retriever, trainer.rows()
        every = [passage.id for passage in retriever.passages]
        with torch.no_grad():
            p = (retriever.score([row.question for row in rows], [every] * len(rows)) / config.gamma).softmax(-1)
        own = torch.tensor([[identity in row.passage_ids for identity in every] for row in rows])
        mass[negatives] = (p * own).sum(-1).mean().item()
    assert mass[True] > mass[False] + 0.1


# ---- scores ----


def test_teacher_values():
    logs = torch.tensor([[-0.5, -2.0, -200.0]])
    for score in ("mean_logprob", "logprob"):
        assert torch.equal(teacher_values(logs, score), logs)
    for score in ("token_prob", "prob"):
        values = teacher_values(logs, score)
        assert values.tolist()[0] == pytest.approx([math.exp(-0.5), math.exp(-2.0), 0.0])
    whole = teacher_values(torch.tensor([[-104.0, -1.0]]), "prob")  # exp in float32 is 0 from -104 on
    assert torch.isfinite(whole).all()


@pytest.mark.filterwarnings("ignore::ragkit.tuning.lsr_table.TeacherWarning")  # as it is for a random LM
@pytest.mark.parametrize(("score", "logs"), [("prob", "logprob"), ("token_prob", "mean_logprob")])
def test_probabilities_are_the_exponentials_of_the_logs(tmp_path, score, logs):
    one, two = (job.make_trainer(job.settings(tmp_path, s, score=s)) for s in (score, logs))
    assert one.rows() == two.rows()  # rows hold logarithms
    one.config.beta = 0.01  # as in RA-DIT: a probability below it counts for nothing
    row = one.rows()[0]
    line = lsr_table(one, 1)[0]
    weights = [math.exp(math.exp(value) / 0.01) for value in row.lm_scores]
    assert line.teacher == pytest.approx([w / sum(weights) for w in weights], rel=1e-5)
    assert line.lm_scores == pytest.approx([math.exp(value) for value in row.lm_scores], rel=1e-5)
    assert all(event["grad_norm"] > 0 for event in one.train().history if "grad_norm" in event)


def test_the_presets_are_the_papers_and_the_other_kits():
    assert LSRConfig(preset="fedrag").direction == "KL(Q_LM||P_R)"
    assert (LSRConfig(preset="fedrag").gamma, LSRConfig(preset="fedrag").beta) == (1.0, 1.0)
    assert {LSRConfig(preset=name).direction for name in ("replug", "ra_dit")} == {"KL(P_R||Q_LM)"}
    # FedRAG's LSRLoss is kl_div(log_softmax(scores), softmax(lm_scores)), the mean over the batch.
    scores, lm = torch.randn(3, 4), torch.randn(3, 4)
    theirs = torch.nn.functional.kl_div(scores.log_softmax(-1), lm.softmax(-1), reduction="batchmean")
    own = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(lsr_objective(scores, lm, own, None, LSRConfig(preset="fedrag")), theirs)


# ---- rows that cannot be used ----


def test_answers_without_a_token_are_left_out_and_named(tmp_path, capsys, monkeypatch):
    trainer = job.make_trainer(job.settings(tmp_path))
    kind = type(trainer.system.generator.tokenizer)
    encode = kind.__call__
    monkeypatch.setattr(
        kind,
        "__call__",
        lambda self, text=None, *a, **k: {"input_ids": []} if text == "Peru food" else encode(self, text, *a, **k),
    )
    assert len(trainer.rows()) == 23
    assert trainer.left_out == [("Peru-food", "the answer 'Peru food' has no token")]
    assert "1 of 24 questions cannot be trained on (Peru-food: the answer" in capsys.readouterr().out


def test_questions_longer_than_the_context_are_left_out_and_named(tmp_path, capsys):
    system, data = job.make_system(), job.questions()
    system.generator.core.config.max_position_embeddings = 64
    data[3]["question"] = "the king of Peru " * 40
    trainer = LSRTrainer(system, data, job.settings(tmp_path))
    assert len(trainer.rows()) == 23 and [identity for identity, _ in trainer.left_out] == [data[3]["id"]]
    assert "1 of 24 questions cannot be trained on" in capsys.readouterr().out
    assert "the prompt needs 166 tokens even with its 1 passages empty" in trainer.left_out[0][1]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_score_that_is_not_finite_is_named(tmp_path, bad):
    teacher = lambda example, found: [bad if p.id == found[1].id else 0.0 for p in found]  # noqa: E731
    with pytest.raises(DataError, match=f"question 'Peru-capital', passage '.*': the teacher's score is {bad}"):
        job.make_trainer(job.settings(tmp_path), teacher=teacher).rows()


# ---- the scale of the scores ----


class Scaled:
    """A retriever whose scores are another's times a factor."""

    def __init__(self, inner, factor, **attributes):
        self.inner, self.factor = inner, factor
        self.__dict__.update(attributes)

    def score(self, questions, passage_ids, part="query"):
        return self.inner.score(questions, passage_ids, part) * self.factor


def test_scores_that_are_not_cosines_are_brought_to_their_spread(tmp_path):
    system = job.make_system()
    config = LSRConfig(top_k=4, output_dir=str(tmp_path))
    rows, _ = build_rows(system, job.LSRTrainer(system, job.questions(), config).data, config)
    rows[0] = LSRRow(rows[0].id, rows[0].question, rows[0].passage_ids[:3], rows[0].lm_scores[:3])
    scores = [system.retriever.score([row.question], [row.passage_ids])[0].detach() for row in rows]
    spread = torch.stack([s.std(correction=0) for s in scores]).mean().item()
    inner = system.retriever
    assert score_scale(inner, rows, config) == 1.0  # it says that they are cosines
    assert score_scale(Scaled(inner, 1.0), rows, config) == 1.0  # says nothing, and they may be
    assert score_scale(Scaled(inner, 40.0), rows, config) == pytest.approx(COSINE_SPREAD / (40 * spread), rel=1e-5)
    assert score_scale(Scaled(inner, 0.5, cosine_scores=False), rows, config) == pytest.approx(
        COSINE_SPREAD / (0.5 * spread), rel=1e-5
    )
    assert score_scale(Scaled(inner, 0.0, cosine_scores=False), rows, config) == 1.0
    assert score_scale(Scaled(inner, 40.0), rows, LSRConfig(rescale="off")) == 1.0
    assert score_scale(inner, rows, LSRConfig(rescale="on")) == pytest.approx(COSINE_SPREAD / spread, rel=1e-5)


def test_the_scale_of_a_run_is_kept(tmp_path, capsys):
    config = job.settings(tmp_path, rescale="on", train={"max_steps": 3})
    trainer = job.make_trainer(config)
    trainer.train()
    assert "multiplied by" in capsys.readouterr().out and trainer.score_scale() != 1.0
    config.train.max_steps = 5
    again = LSRTrainer(trainer.system, job.questions(), config, run=trainer.run)  # its weights have moved
    again.train(resume=True)
    assert again.score_scale() == trainer.score_scale()
    plain = LSRModel(trainer.system.retriever, config)
    scaled = LSRModel(trainer.system.retriever, config, 3.0)
    batch = Candidates(trainer.rows()).batch([trainer.rows()[0].id])
    torch.testing.assert_close(scaled(**batch)["scores"], 3 * plain(**batch)["scores"])


# ---- what the teacher says ----


def rows_of(scores):
    return [LSRRow(f"q{i}", "?", tuple(f"p{j}" for j in range(len(s))), tuple(s)) for i, s in enumerate(scores)]


def test_summary_by_hand():
    summary = summarise_teacher(rows_of([[0.0, 0.0], [0.0, math.log(3.0), 0.0, -math.inf][:3]]), LSRConfig())
    entropy = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2)) / math.log(3)
    assert summary.entropy == pytest.approx((1 + entropy) / 2, abs=1e-6)
    assert summary.agreement == 0.5 and summary.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert summarise_teacher([], LSRConfig()).questions == 0


def test_a_flat_teacher_and_a_noisy_one_are_told():
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(200, 8, generator=g)
    flat = summarise_teacher(rows_of((0.01 * noise).tolist()), LSRConfig()).warning
    assert "nearly uniform" in flat and "1.000 of log K" in flat and "\n" not in flat
    noisy = summarise_teacher(rows_of((3 * noise).tolist()), LSRConfig()).warning
    assert "may be noise" in noisy and "by chance: 12.5%" in noisy and "\n" not in noisy
    helpful = 3 * noise
    helpful[::2, 0] += 9
    assert summarise_teacher(rows_of(helpful.tolist()), LSRConfig()).warning is None
    assert summarise_teacher(rows_of((3 * noise[:20]).tolist()), LSRConfig()).warning is None  # too few to tell


def test_training_says_it_once(tmp_path):
    with pytest.warns(TeacherWarning, match="nearly uniform.*24 questions") as caught:
        job.make_trainer(job.settings(tmp_path, train={"max_steps": 1}), teacher=lambda e, f: [0.0] * len(f)).train()
    assert len([w for w in caught if w.category is TeacherWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", TeacherWarning)
        sharp = lambda e, f: [4.0 * (p.id == e.id) for p in f]  # noqa: E731
        job.make_trainer(job.settings(tmp_path, "sharp", train={"max_steps": 1}), teacher=sharp).train()


def test_table_shows_both_distributions(tmp_path):
    trainer = job.make_trainer(job.settings(tmp_path, refresh_steps=None))
    table = lsr_table(trainer, 2)
    row, line = trainer.rows()[0], table[0]
    with torch.no_grad():
        scores = trainer.system.retriever.score([row.question], [row.passage_ids])
    assert line.retriever == pytest.approx((scores[0] / 0.1).softmax(-1).tolist(), abs=1e-6)
    assert line.teacher == pytest.approx(torch.tensor(row.lm_scores).softmax(-1).tolist(), abs=1e-6)
    assert sum(line.retriever) == pytest.approx(1) and len(table) == 2
    text = repr(table)
    assert "Peru-capital: the capital of Peru -> Peru capital" in text and "P_R" in text and "Q_LM" in text
    assert f"{line.retriever[0]:.3f}" in text and "24 questions (by chance: 25.0%)" in text
    named = lsr_table(trainer, ids=["Fiji-food"])
    assert [one.id for one in named.lines] == ["Fiji-food"]
    with pytest.raises(DataError, match="no row has the id 'Rome-food'; rows begin with Peru-capital"):
        lsr_table(trainer, ids=["Rome-food"])
    page = table._repr_html_()
    assert page.count("<table>") == 2 and "<b>Peru-capital: the capital of Peru → Peru capital</b>" in page


def test_table_follows_the_training(tmp_path):
    trainer = job.make_trainer(
        job.settings(tmp_path, refresh_steps=None), teacher=lambda e, found: [3.0 * (p.id == e.id) for p in found]
    )

    def gap(table):
        return sum(abs(p - q) for one in table.lines for p, q in zip(one.retriever, one.teacher, strict=True))

    before = lsr_table(trainer, 24)
    trainer.train()
    after = lsr_table(trainer, 24)
    assert [line.teacher for line in after.lines] == [line.teacher for line in before.lines]
    assert gap(after) < 0.8 * gap(before)


def test_the_page_escapes_what_texts_hold(tmp_path):
    data = [{**row, "question": row["question"] + " <script>"} for row in job.questions()]
    trainer = LSRTrainer(job.make_system(), data, job.settings(tmp_path))
    page = lsr_table(trainer, 1)._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page


# ---- what can be trained ----


def test_a_fused_retriever_says_what_can_be_trained(tmp_path):
    system = job.make_system()
    hybrid = HybridRetriever([system.retriever, job.make_system().retriever])
    config = RAGConfig(prompt="plain", device="cpu")
    fused = RAGSystem(hybrid, system.generator, config)
    with pytest.raises(ConfigError, match=r"HybridRetriever cannot be trained.*Train what it fuses \(WordRetriever\)"):
        LSRTrainer(fused, job.questions(), job.settings(tmp_path))
    before = [[p.id for p in row] for row in hybrid.retrieve([q["question"] for q in job.questions()], 4)]
    part = RAGSystem(hybrid.retrievers[0], system.generator, config)
    LSRTrainer(part, job.questions(), job.settings(tmp_path)).train()
    after = [[p.id for p in row] for row in hybrid.retrieve([q["question"] for q in job.questions()], 4)]
    assert after != before  # what it fuses was trained in place
    lacking = RAGSystem.__new__(RAGSystem)
    lacking.retriever, lacking.generator, lacking.config = object(), Generator, config
    with pytest.raises(ConfigError, match="object cannot be trained: it has no trainable_modules"):
        LSRTrainer(lacking, job.questions(), job.settings(tmp_path))
