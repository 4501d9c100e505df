"""Federated tuning in one process: weights, losses and counts are real, and rounds change nothing by themselves."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")

from ragkit.config import ConfigError, LSRConfig, RALTConfig  # noqa: E402
from ragkit.federated import apps  # noqa: E402
from ragkit.federated.config import FederatedConfig  # noqa: E402
from ragkit.federated.errors import FederatedError  # noqa: E402
from ragkit.federated.local import train_round  # noqa: E402
from ragkit.federated.server import serve  # noqa: E402
from ragkit.federated.simulation import LocalGrid, simulated  # noqa: E402
from ragkit.federated.task import FederatedTask  # noqa: E402
from ragkit.runs import Run  # noqa: E402
from ragkit.tuning.lsr import LSRTrainer  # noqa: E402
from ragkit.tuning.manager import TrainerManager  # noqa: E402
from ragkit.tuning.ralt import RALTTrainer  # noqa: E402
from ragkit.tuning.ralt_rows import Collator  # noqa: E402

TRAIN = {"batch_size": 2, "warmup_steps": 2, "learning_rate": 1e-3, "schedule": "linear"}


def teacher(example, passages):
    """Scores in nats without an LM: the supporting passage helps."""
    return [0.0 if passage.id in example.supporting else -3.0 for passage in passages]


@pytest.fixture
def lsr(make_system, questions, tmp_path):
    def make(rows=None, eval_data=None, **train):
        config = LSRConfig(output_dir=str(tmp_path / "runs"), top_k=3, train={**TRAIN, **train})
        return LSRTrainer(make_system(), rows or questions, config, eval_data=eval_data, teacher=teacher)

    return make


@pytest.fixture
def ralt(make_system, questions, tmp_path):
    def make(rows=None, eval_data=None, model=None, method="lora", **train):
        settings = {"output_dir": str(tmp_path / "runs"), "top_k": 1, "method": method, "lora_r": 2}
        config = RALTConfig(**settings, train={**TRAIN, **train})
        return RALTTrainer(make_system(model), rows or questions[:6], config, eval_data=eval_data)

    return make


def task_of(trainer, **settings):
    kind = trainer.trains
    return TrainerManager(kind, **{f"{kind}_trainer": trainer}).get_federated_task(**settings)


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.trained_parameters().items()}


def farthest(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# ---- one client is no federation ----


@pytest.mark.slow
def test_a_client_goes_on_from_its_folder_alone(make_system, questions, tmp_path):
    """A SuperNode starts a process for every message: here every message finds a new system and trainer."""

    def task(rows, folder=None):
        settings = {"output_dir": str(tmp_path / "runs"), "top_k": 3, "train_part": "both"}
        config = LSRConfig(**settings, train={**TRAIN, "warmup_steps": 0})
        made = LSRTrainer(make_system(), rows, config, eval_data=questions[6:8], teacher=teacher)
        return FederatedTask(made, FederatedConfig(rounds=2, local_steps=1), folder)

    parts = [questions[:3], questions[3:6]]
    kept = task(questions[:6])
    result = kept.simulate(partition=parts, eval_partition=[questions[6:7], questions[7:8]])
    assert not kept.trainer.system.retriever.stale
    server = task(questions[:6])
    run = Run.create(server.config, tmp_path, "anew")
    app = apps.client_app(lambda context: task(parts[context.node_config["partition-id"]], run.dir))
    with simulated(0):
        anew = serve(server, LocalGrid(app, 2, 0), run, 2)
    assert farthest(anew.weights, result.weights) < 1e-7
    assert anew.curve("recall@1") == result.curve("recall@1")


@pytest.mark.slow
def test_one_client_over_rounds_is_the_central_lsr(lsr, questions):
    check_one_client(lsr, questions[:4])


def test_one_client_over_rounds_is_the_central_ralt(ralt, questions):
    check_one_client(ralt, questions[:6])


def check_one_client(make, rows):
    central = make(rows, num_epochs=3)
    start = trained(central)
    done = central.train()
    federated = make(rows)
    result = task_of(federated, rounds=3).simulate(num_clients=1)
    assert farthest(trained(federated), trained(central)) < 1e-6
    assert farthest(result.weights, trained(central)) < 1e-6
    assert farthest(start, trained(central)) > 1e-4
    losses = [event["loss"] for event in done.history if event.get("loss") is not None]
    steps = done.steps // 3
    means = {r: sum(losses[(r - 1) * steps : r * steps]) / steps for r in (1, 2, 3)}
    assert result.curve("train_loss") == pytest.approx(means, abs=1e-5)
    assert result.steps() == {0: 0, 1: steps, 2: 2 * steps, 3: 3 * steps}


def test_a_reset_optimizer_makes_adams_first_step_in_each_round(ralt):
    """Adam's first step is the learning rate itself wherever there is a gradient; its second depends on the first."""
    rate, steps = 1e-3, {}
    for optimizer in ("keep", "reset"):
        trainer = ralt(schedule="constant", warmup_steps=0, max_grad_norm=0)
        task = task_of(trainer, rounds=2, local_steps=1, optimizer=optimizer)
        seen = [trained(trainer)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(apps, "train_round", lambda *given, seen=seen: remember(seen, train_round(*given)))
            task.simulate(num_clients=1)
        # B of the adapter has a gradient in every entry; A has none in the first step, as B is zero then.
        moved = [(seen[2][n] - seen[1][n]).abs() for n in seen[1] if "lora_B" in n]
        steps[optimizer] = torch.cat([m.flatten() for m in moved])
    assert torch.isclose(steps["reset"], torch.tensor(rate), rtol=1e-2).float().mean() > 0.95
    assert torch.isclose(steps["keep"], torch.tensor(rate), rtol=1e-2).float().mean() < 0.5


def remember(seen, result):
    seen.append(result[0])
    return result


# ---- several clients ----


def test_fedavg_is_the_mean_of_the_locally_trained_weights_by_their_rows(ralt, questions):
    parts = [questions[:4], questions[4:6]]
    alone = []
    for part in parts:
        trainer = ralt(part, num_epochs=1)
        loss = trainer.train().loss
        alone.append((trained(trainer), loss))
    trainer = ralt(questions[:6])
    start = trained(trainer)
    task = task_of(trainer, rounds=1)
    result = task.simulate(partition=[[row["id"] for row in part] for part in parts])
    mean = {name: (4 * alone[0][0][name] + 2 * alone[1][0][name]) / 6 for name in start}
    assert farthest(trained(trainer), mean) < 1e-7
    assert farthest(alone[0][0], alone[1][0]) > 1e-4  # the clients did train on different rows
    assert result.clients == {"0": 4, "1": 2}
    assert result.curve("train_loss", client=0)[1] == pytest.approx(alone[0][1], abs=1e-6)
    assert result.curve("train_loss", client=1)[1] == pytest.approx(alone[1][1], abs=1e-6)
    assert result.loss == pytest.approx((4 * alone[0][1] + 2 * alone[1][1]) / 6, abs=1e-6)


def test_every_round_trains_the_weights_it_is_given(ralt, tmp_path):
    """Also the later ones, whose checkpoint holds the client's own: AdamW moves no weight farther than its rate."""
    trainer = ralt(schedule="constant", warmup_steps=0, weight_decay=0.0)
    given = [{name: tensor + shift for name, tensor in trained(trainer).items()} for shift in (0.0, 0.5, -0.5)]
    for number, weights in enumerate(given, start=1):
        orders = apps.Orders(server_round=number, rounds=3, local_steps=1)
        moved, _ = train_round(trainer, weights, orders, tmp_path / "client", "0")
        assert 0 < farthest(moved, weights) < 10 * TRAIN["learning_rate"]


def test_scores_are_real_and_only_the_adapter_travels(ralt, questions, tmp_path):
    trainer = ralt(questions[:4], eval_data=questions[6:9])
    base = {n: p.detach().clone() for n, p in trainer.system.generator.core.named_parameters()}
    result = task_of(trainer, rounds=2, generate=True).simulate(num_clients=2)
    assert all("lora_" in name for name in result.weights)
    size = sum(tensor.numel() for tensor in result.weights.values())
    down = [e["bytes_down"] for e in result.history if e["phase"] == "train"]
    assert 4 * size < min(down) < 4 * size + 400 * len(result.weights)  # the numbers and their headers, no more
    now = dict(trainer.system.generator.core.named_parameters())
    assert all(torch.equal(now[name.replace(".weight", ".base_layer.weight") if name not in now else name], tensor)
               for name, tensor in base.items())  # fmt: skip

    rows = trainer.for_data(questions[6:9]).rows()  # an oracle: the model's own loss with labels
    batch = Collator(trainer.system.generator.pad_id)(rows)
    batch.pop("ids")
    with torch.no_grad():
        own = float(trainer.system.generator.model(**batch).loss)
    curve = result.curve("loss")
    assert curve[2] == pytest.approx(own, abs=1e-5) and curve[2] < curve[0]
    assert result.curve("loss", phase="evaluate")[2] == pytest.approx(curve[2], abs=0.5)
    assert result.metrics["eval_loss"] == curve[2] and 0 <= result.metrics["eval_em"] <= 1
    assert [e["examples"] for e in result.history if e["phase"] == "evaluate"] == [2, 1, 2, 1]

    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    assert len(events) == len(result.history) and events[-1]["total"] == 2
    assert farthest(load_file(result.run_dir / "final.safetensors"), result.weights) == 0
    assert "FedAvg" in repr(result) and "<table" in result._repr_html_() and "server's loss" in repr(result)
    with pytest.raises(KeyError, match="no 'los' in the history; there are"):
        result.curve("los")


def test_a_retriever_is_scored_by_what_it_retrieves(lsr, questions):
    trainer = lsr(questions[:4], eval_data=questions[6:10], warmup_steps=0)
    start = trained(trainer)
    task = task_of(trainer, rounds=1, local_steps=1)
    result = task.simulate(num_clients=2)
    assert all(name.startswith("trained.query_encoder.") for name in result.weights)
    assert farthest(start, trained(trainer)) > 1e-4
    passages = trainer.system.retriever
    assert passages.query_encoder is not passages.passage_encoder and not passages.stale
    assert result.curve("recall@1")[1] == trainer.evaluate(bootstrap=10)["recall@1"]
    assert 0 in result.curve("recall@1") and result.curve("recall@1", phase="evaluate").keys() == {1}


def test_two_simulations_are_the_same(ralt, questions):
    runs = []
    for _ in range(2):
        options = {"fraction_train": 0.5}
        task = task_of(ralt(warmup_steps=0), rounds=2, local_steps=1, strategy_options=options)
        runs.append(task.simulate(num_clients=3))
    first, second = runs
    assert farthest(first.weights, second.weights) == 0
    assert [e["client"] for e in first.history] == [e["client"] for e in second.history]
    assert len([e for e in first.history if e["round"] == 1]) == 1  # half of three, rounded down


def test_fedprox_pulls_each_step_towards_the_given_weights(ralt, questions):
    """Against plain PyTorch: AdamW on the loss plus mu/2 times the squared distance."""
    mu, rate = 5.0, 1e-3
    settings = {"schedule": "constant", "warmup_steps": 0, "max_grad_norm": 0, "batch_size": 4}
    trainer = ralt(questions[:4], method="full", **settings)  # one batch holds all rows: no order to reproduce
    parameters = trainer.trained_parameters()
    start = trained(trainer)
    batch = Collator(trainer.system.generator.pad_id)(trainer.rows())
    batch.pop("ids")
    result = task_of(trainer, rounds=1, local_steps=3, strategy="FedProx", strategy_options={"proximal_mu": mu})
    federated = result.simulate(num_clients=1).weights

    def by_hand(mu):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        for _ in range(3):
            distance = sum(((p - start[name]) ** 2).sum() for name, p in parameters.items())
            optimizer.zero_grad()
            (trainer.system.generator.model(**batch).loss + mu / 2 * distance).backward()
            optimizer.step()
        return trained(trainer)

    assert farthest(federated, by_hand(mu)) < 2e-5
    assert farthest(federated, by_hand(0.0)) > 2e-4  # the term matters


# ---- clients that fail ----


def failing(client, server_round):
    """train_round, but one client raises in one round."""

    def train(trainer, given, orders, folder, name):
        if name == client and orders.server_round == server_round:
            raise RuntimeError("the disk is full")
        return train_round(trainer, given, orders, folder, name)

    return train


def test_a_round_goes_on_without_a_client_that_fails(ralt, monkeypatch):
    monkeypatch.setattr(apps, "train_round", failing("1", 2))
    result = task_of(ralt(), rounds=3, local_steps=1).simulate(num_clients=2)
    (failure,) = result.failures
    assert (failure["client"], failure["round"]) == ("1", 2) and "the disk is full" in failure["error"]
    assert [e["client"] for e in result.history if e["round"] == 2 and "error" not in e] == ["0"]
    assert [e["client"] for e in result.history if e["round"] == 3] == ["0", "1"]  # it is back
    assert "first failure: client 1 in round 2" in repr(result)


def test_too_few_clients_end_the_training_and_the_common_weights_stay(ralt, monkeypatch):
    trainer, seen, fail = ralt(warmup_steps=0), [], failing("1", 2)

    def train(trainer, given, *rest):
        seen.append({name: tensor.clone() for name, tensor in given.items()})
        return fail(trainer, given, *rest)

    monkeypatch.setattr(apps, "train_round", train)
    with pytest.raises(FederatedError, match=r"round 2: 1 of 2 clients trained, .* 2 \(min_clients\).*disk is full"):
        task_of(trainer, rounds=2, local_steps=1, min_clients=2).simulate(num_clients=2)
    assert len(seen) == 4 and farthest(seen[0], seen[3]) > 1e-4
    assert farthest(trained(trainer), seen[3]) == 0  # those of round 1, not what client 0 made of them in round 2


# ---- bad input ----


def test_bad_input_is_named_before_anything_is_trained(ralt, questions, tmp_path):
    task = task_of(ralt(questions[:3], eval_data=questions[4:6]))
    with pytest.raises(FederatedError, match="strategy: found 'FedAdm', .*did you mean 'FedAdam'"):
        task.simulate(2, strategy="FedAdm")
    with pytest.raises(FederatedError, match="FedProx has no parameter 'mu'"):
        task.simulate(2, strategy="FedProx", strategy_options={"mu": 1.0})
    with pytest.raises(FederatedError, match="QFedAvg needs 'client_learning_rate'"):
        task.simulate(2, strategy="QFedAvg")
    with pytest.raises(FederatedError, match="client 3 has no rows .1 of 4 clients have none, of 3 rows"):
        task.simulate(4, eval_partition=None)
    with pytest.raises(FederatedError, match="2 evaluation rows cannot be dealt to 3 clients; set eval_partition"):
        task.simulate(3)
    with pytest.raises(FederatedError, match="found 2 parts, expected 3"):
        task.simulate(3, partition=[["q-Peru"], ["q-Ghana"]])
    with pytest.raises(FederatedError, match="min_clients: found 3, but there are 2 clients"):
        task.simulate(2, min_clients=3)
    with pytest.raises(ConfigError, match='unknown key "round".*did you mean "rounds"'):
        task.simulate(2, round=3)
    with pytest.raises(FederatedError, match="privacy_options: server-fixed needs 'noise_multiplier' and 'clipping"):
        task.simulate(2, privacy="server-fixed")
    with pytest.raises(FederatedError, match="noise multiplier should be a non-negative"):
        task.simulate(2, privacy="server-fixed", privacy_options={"noise_multiplier": -1, "clipping_norm": 1})
    with pytest.raises(FederatedError, match="local privacy: 'sensitivity' and 'epsilon' and 'delta' must be given"):
        task.simulate(2, privacy="local", privacy_options={"clipping_norm": 1.0})
    assert not list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True


def test_weights_of_another_model_are_refused_by_name(ralt, tmp_path, questions):
    trainer = ralt()
    given = trained(trainer)
    orders = apps.Orders(server_round=1, rounds=1, local_steps=1)
    name = next(iter(given))
    with pytest.raises(FederatedError, match=f"client 7: the received weights .*'{name}' is missing"):
        train_round(trainer, {k: v for k, v in given.items() if k != name}, orders, tmp_path / "c", "7")
    with pytest.raises(FederatedError, match="'x' is not trained here"):
        train_round(trainer, {**given, "x": torch.zeros(1)}, orders, tmp_path / "c", "7")
    with pytest.raises(FederatedError, match=r"has the shape \[1\], here it is"):
        train_round(trainer, {**given, name: torch.zeros(1)}, orders, tmp_path / "c", "7")
    assert farthest(trained(trainer), given) == 0 and not (tmp_path / "c").exists()


def test_rounds_beyond_the_plan_are_refused(ralt, tmp_path):
    trainer = ralt()
    orders = apps.Orders(server_round=1, rounds=1, local_steps=1)
    weights, metrics = train_round(trainer, trained(trainer), orders, tmp_path / "c", "0")
    assert metrics["steps"] == 1 and metrics["num-examples"] == 6 and math.isfinite(metrics["train_loss"])
    with pytest.raises(FederatedError, match="round 1 would end at step 2, but 1 rounds of 1 steps were planned"):
        train_round(trainer, weights, orders, tmp_path / "c", "0")


# ---- one client is another's neighbour ----


def without_ids(rows):
    return [{key: value for key, value in row.items() if key != "id"} for row in rows]


def test_rows_without_ids_are_not_taken_for_those_of_the_same_number(ralt, lsr, questions):
    """Rows without ids are numbered: the first of one data set is not the first of another."""
    train, other = without_ids(questions[:4]), without_ids(questions[6:9])
    for make in (ralt, lsr):
        trainer = make(train, eval_data=other)
        made = trainer.rows()
        assert [row.question for row in trainer.for_data(other).rows()] == [row["question"] for row in other]
        part = trainer.for_data(trainer.data[1:3]).rows()  # those of the same data are kept, not made again
        assert all(any(row is known for known in made) for row in part) and len(part) == 2


def test_clients_score_their_evaluation_rows_not_their_training_rows(ralt, questions):
    trainer = ralt(without_ids(questions[:4]), eval_data=without_ids(questions[6:8]))
    trainer.rows()  # looked at before training
    result = task_of(trainer, rounds=1, local_steps=1).simulate(num_clients=1)
    assert result.curve("loss", phase="evaluate")[1] == pytest.approx(result.curve("loss")[1], abs=1e-6)
    rows = trainer.for_data(trainer.eval_data).rows()
    assert [row.question for row in rows] == [row["question"] for row in questions[6:8]]
    batch = Collator(trainer.system.generator.pad_id)(rows)
    batch.pop("ids")
    with torch.no_grad():
        assert result.curve("loss")[1] == pytest.approx(float(trainer.system.generator.model(**batch).loss), abs=1e-5)


def test_a_client_that_failed_in_the_middle_of_a_round_is_back_in_the_next(ralt, monkeypatch):
    """Its half round is not trained on: the next one begins with the common weights and the client's own state."""
    from ragkit.engine import RunTrainer

    real, calls = RunTrainer.training_step, []

    def step(self, *given, **named):
        calls.append(self.run.dir.name)
        if calls[-1] == "client-1" and calls.count("client-1") == 2:
            raise RuntimeError("out of memory")
        return real(self, *given, **named)

    monkeypatch.setattr(RunTrainer, "training_step", step)
    result = task_of(ralt(), rounds=2, local_steps=2).simulate(num_clients=2)
    assert [(f["client"], f["round"]) for f in result.failures] == [("1", 1)]
    back = [e for e in result.history if e.get("client") == "1" and e["phase"] == "train" and e["round"] == 2]
    assert len(back) == 1 and back[0]["steps"] == 2 and 0 < back[0]["train_loss"] < 20


def test_a_simulation_again_starts_from_what_the_first_gave(ralt, questions):
    trainer = ralt(warmup_steps=0)
    task = task_of(trainer, rounds=1, local_steps=1)
    first = task.simulate(num_clients=2)
    second = task.simulate(num_clients=2)
    assert first.run_dir != second.run_dir and not second.failures
    assert farthest(first.weights, second.weights) > 1e-4


def test_each_round_of_a_client_says_nothing_of_questions_held_out(lsr, questions, capsys):
    task_of(lsr(questions[:3]), rounds=1, local_steps=1).simulate(num_clients=2)
    assert "hold some out" not in capsys.readouterr().out
