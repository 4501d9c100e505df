"""Flower's strategies and privacy by name, on clients whose training is a known step; and who gets which rows."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from ragkit.federated import apps  # noqa: E402
from ragkit.federated.config import FederatedConfig  # noqa: E402
from ragkit.federated.errors import FederatedError  # noqa: E402
from ragkit.federated.partition import partition_rows  # noqa: E402
from ragkit.federated.simulation import LocalGrid  # noqa: E402
from ragkit.federated.strategies import STRATEGIES, make_strategy  # noqa: E402
from ragkit.federated.task import FederatedTask  # noqa: E402
from ragkit.tuning.qa_data import load_qa  # noqa: E402

ROWS = [{"id": f"r{i}", "question": f"q{i}?", "answer": "a", "owner": "abc"[min(i % 4, 2)]} for i in range(12)]
SIZE = 2000


class Stub:
    """As much of a trainer as the server and its clients ask for; its weights are plain parameters."""

    trains = "generator"

    def __init__(self, folder, rows=ROWS):
        from ragkit.config import RALTConfig

        self.config = RALTConfig(output_dir=str(folder))
        self.data, self.eval_data = load_qa(rows), None
        self.weights = {"w": torch.nn.Parameter(torch.zeros(SIZE)), "b": torch.nn.Parameter(torch.tensor(1.0))}

    def trained_parameters(self):
        return self.weights

    def for_rounds(self):
        return self

    def for_data(self, data, eval_data=None):
        other = Stub(self.config.output_dir)
        other.data = data
        return other


@pytest.fixture
def simulate(tmp_path, monkeypatch):
    """simulate(steps): each client moves its weights by its own step; returns the result."""

    def run(steps, parts, rounds=1, **settings):
        def train(trainer, given, orders, folder, name):
            random.seed(0)  # as every training does with its seed
            np.random.seed(0)
            moved = {key: tensor + steps[int(name)] for key, tensor in given.items()}
            return moved, {"num-examples": len(trainer.data), "train_loss": 1.0, "steps": 1, "seconds": 0.0}

        monkeypatch.setattr(apps, "train_round", train)
        owners = [client for client, count in enumerate(parts) for _ in range(count)]
        task = FederatedTask(Stub(tmp_path, ROWS[: len(owners)]), FederatedConfig(rounds=rounds, **settings))
        return task.simulate(partition=owners)

    return run


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_aggregates(simulate, name):
    steps, parts = [0.1, 0.2, 0.3, 0.4, 5.0], [2, 2, 2, 2, 4]
    options = {
        "QFedAvg": {"client_learning_rate": 0.1},
        "FedTrimmedAvg": {"beta": 0.2},
        "FedProx": {"proximal_mu": 0.1},
    }.get(name, {})
    if name in ("Krum", "MultiKrum"):
        options = {"num_malicious_nodes": 1}
    moved = float(simulate(steps, parts, strategy=name, strategy_options=options).weights["w"].mean())
    expected = {
        "FedAvg": (2 * sum(steps[:4]) + 4 * steps[4]) / 12,
        "FedProx": (2 * sum(steps[:4]) + 4 * steps[4]) / 12,
        "FedMedian": 0.3,
        "FedTrimmedAvg": 0.3,
    }
    assert np.isfinite(moved) and moved > 0
    if name in expected:
        assert moved == pytest.approx(expected[name], rel=1e-5)
    if "Krum" in name:
        assert moved < 0.5  # the outlier was left out


@pytest.mark.parametrize("kind", ["server-fixed", "client-fixed", "server-adaptive", "client-adaptive"])
def test_privacy_clips_each_clients_update(simulate, kind):
    """Without noise: two updates of norm far above the bound become the mean of two of that norm, unweighted."""
    norm = "clipping_norm" if "fixed" in kind else "initial_clipping_norm"
    options = {"noise_multiplier": 0.0, norm: 0.5}
    result = simulate([1.0, -3.0, 2.0], [1, 1, 4], privacy=kind, privacy_options=options)
    unit = 0.5 / np.sqrt(SIZE + 1)
    assert float(result.weights["w"].mean()) == pytest.approx((unit - unit + unit) / 3, rel=1e-3)
    assert f"{kind} differential privacy" in repr(result)


def test_the_servers_noise_is_new_in_each_round_and_of_the_right_size(simulate):
    options = {"noise_multiplier": 2.0, "clipping_norm": 0.5}
    first = simulate([0.0001] * 4, [1] * 4, 1, privacy="server-fixed", privacy_options=options).weights["w"]
    both = simulate([0.0001] * 4, [1] * 4, 2, privacy="server-fixed", privacy_options=options).weights["w"]
    second = both - first
    for noise in (first, second):
        assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.1)
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 0.1


def test_other_clients_are_drawn_in_each_round(simulate):
    """A client's training seeds Python's random numbers; were they the server's, it would draw the same clients."""
    result = simulate([0.0] * 8, [1] * 8, 5, strategy_options={"fraction_train": 0.25})
    drawn = [tuple(e["client"] for e in result.history if e["round"] == number) for number in range(1, 6)]
    assert all(len(clients) == 2 for clients in drawn) and len(set(drawn[1:])) > 1


def test_clients_draw_noise_of_their_own(simulate):
    """Were the noise of local privacy the same in all clients (each has seeded NumPy alike), a mean would not help."""
    options = {"clipping_norm": 1.0, "sensitivity": 1.0, "epsilon": 1.0, "delta": 1e-2}
    deviation = np.sqrt(2 * np.log(1.25 / 1e-2))
    four = simulate([0.0001] * 4, [1] * 4, privacy="local", privacy_options=options).weights["w"]
    assert float(four.std()) == pytest.approx(deviation / 2, rel=0.1)
    again = simulate([0.0001] * 4, [1] * 4, privacy="local", privacy_options=options).weights["w"]
    assert torch.equal(four, again)


def test_with_privacy_a_failed_client_leaves_the_weights_as_they_were(simulate):
    """Flower's wrappers then aggregate nothing: the noise is calibrated to all clients."""
    options = {"noise_multiplier": 0.0, "clipping_norm": 0.5}
    result = simulate([1.0, None], [1, 1], privacy="server-fixed", privacy_options=options)  # 1 + None raises
    assert len(result.failures) == 1 and torch.equal(result.weights["w"], torch.zeros(SIZE))


def test_with_privacy_a_client_that_does_not_answer_in_time_leaves_them_too(simulate, monkeypatch):
    real = LocalGrid.send_and_receive
    monkeypatch.setattr(LocalGrid, "send_and_receive", lambda self, messages, **named: real(self, messages[1:]))
    options = {"noise_multiplier": 0.0, "clipping_norm": 0.5}
    result = simulate([1.0, 2.0], [1, 1], privacy="server-fixed", privacy_options=options)
    assert "no answer in 3600 s (round_timeout)" in result.failures[0]["error"]
    assert torch.equal(result.weights["w"], torch.zeros(SIZE))
    assert float(simulate([1.0, 2.0], [1, 1]).weights["w"].mean()) in (1.0, 2.0)  # without privacy it goes on


@pytest.mark.parametrize("kind", ["server-fixed", "client-fixed"])
def test_the_noise_is_that_of_as_many_clients_as_are_sampled(simulate, kind):
    options = {"noise_multiplier": 2.0, "clipping_norm": 0.5}
    sampled = {"strategy_options": {"fraction_train": 0.25}}
    moved = simulate([0.0001] * 8, [1] * 8, privacy=kind, privacy_options=options, **sampled).weights["w"]
    assert float(moved.std()) == pytest.approx(2.0 * 0.5 / 2, rel=0.1)  # two of eight train: each is half of the mean


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"strategy_options": {"min_available_nodes": 3}}, 3),
        ({"strategy_options": {"min_train_nodes": 4}}, 4),
        ({"privacy": "server-fixed", "privacy_options": {
            "noise_multiplier": 1.0, "clipping_norm": 1.0, "num_sampled_clients": 5}}, 5),
    ],
)  # fmt: skip
def test_more_clients_than_there_are_are_not_waited_for(simulate, settings, needed):
    with pytest.raises(
        FederatedError, match=f"waits for {needed} clients, but there are 2: give num_clients={needed}"
    ):
        simulate([0.1, 0.2], [1, 1], **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fraction_train", 0),
        ("fraction_train", 1.5),
        ("fraction_train", "half"),
        ("fraction_evaluate", 2.0),
        ("fraction_evaluate", -1.0),
        ("min_train_nodes", 1.5),
    ],
)
def test_shares_that_are_none_are_named(simulate, name, value):
    with pytest.raises(FederatedError, match=f"strategy_options: {name}: found {value!r}, expected a "):
        simulate([0.1, 0.2], [1, 1], strategy_options={name: value})


def test_what_would_do_nothing_is_refused(simulate):
    for mu in ({}, {"proximal_mu": -1.0}):
        with pytest.raises(FederatedError, match="FedProx without a proximal_mu above 0 is FedAvg"):
            simulate([0.1, 0.2], [1, 1], strategy="FedProx", strategy_options=mu)
    with pytest.raises(FederatedError, match="no privacy is set: nothing would be private"):
        simulate([0.1, 0.2], [1, 1], privacy_options={"noise_multiplier": 1.0, "clipping_norm": 1.0})


def test_two_nodes_of_one_name_are_refused(simulate, monkeypatch):
    monkeypatch.setattr(apps, "client_name", lambda context: "0")
    with pytest.raises(FederatedError, match="the nodes [12] and [12] both call themselves client 0.*partition-id"):
        simulate([0.1, 0.2], [1, 1])


def test_clients_may_have_scores_of_different_names(simulate, monkeypatch, tmp_path):
    """Where one client's rows name supporting passages and another's do not, Flower itself would end the training."""

    def score(trainer, given, generate, name):
        return {"recall@1" if name == "client 0" else "em": 0.5}, 1

    monkeypatch.setattr(apps, "score_round", score)
    monkeypatch.setattr(FederatedTask, "_eval_parts", lambda self, parts, *rest: parts)
    result = simulate([0.1, 0.2], [1, 1])
    assert result.curve("recall@1") == result.curve("em") == {1: 0.5}


def test_the_superlinks_answer_for_a_client_that_is_gone_is_put_down_to_that_client(simulate, monkeypatch):
    real = LocalGrid.send_and_receive

    def send_and_receive(self, messages, *, timeout=None):
        replies = real(self, messages, timeout=timeout)
        for reply in replies:
            if reply.has_error():
                reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's own number
        return replies

    monkeypatch.setattr(LocalGrid, "send_and_receive", send_and_receive)
    result = simulate([1.0, None, 2.0], [1, 1, 1], min_clients=2)
    assert [(e["client"], e["round"]) for e in result.failures] == [("1", 1)]
    assert float(result.weights["b"]) == 2.5 and result.clients == {"0": 1, "2": 1}


# ---- who has which rows ----


def test_iid_parts_are_even_seeded_and_in_order():
    data = load_qa(ROWS)
    parts = partition_rows(data, 5, "iid", seed=3)
    assert sorted(map(len, parts)) == [2, 2, 2, 3, 3]
    ids = [[example.id for example in part] for part in parts]
    assert sorted(sum(ids, [])) == sorted(example.id for example in data)
    assert all(row == sorted(row, key=lambda r: int(r[1:])) for row in ids)
    assert ids == [[e.id for e in part] for part in partition_rows(data, 5, "iid", seed=3)]
    assert ids != [[e.id for e in part] for part in partition_rows(data, 5, "iid", seed=4)]
    assert [e.id for e in partition_rows(data, 1, "iid")[0]] == [e.id for e in data]


def test_a_column_keeps_its_values_together():
    data = load_qa(ROWS)  # a: 3 rows, b: 3, c: 6
    three = partition_rows(data, None, "owner")
    assert [{e.metadata["owner"] for e in part} for part in three] == [{"c"}, {"a"}, {"b"}]
    two = partition_rows(data, 2, "owner")
    assert [len(part) for part in two] == [6, 6] and {e.metadata["owner"] for e in two[0]} == {"c"}
    with pytest.raises(FederatedError, match="found 3 values .c?.*cannot be dealt to 4 clients"):
        partition_rows(data, 4, "owner")
    with pytest.raises(FederatedError, match="has no such column .it has 'owner'.*did you mean 'owner'"):
        partition_rows(data, 2, "ower")


def test_given_parts():
    data = load_qa(ROWS)
    numbers = [0] * 5 + [1] * 7
    assert [len(part) for part in partition_rows(data, None, numbers)] == [5, 7]
    named = partition_rows(data, 2, [["r3", "r1"], ["r2"]])
    assert [[e.id for e in part] for part in named] == [["r1", "r3"], ["r2"]]
    own = partition_rows(data, 2, [ROWS[:2], ROWS[5:]])
    assert [len(part) for part in own] == [2, 7]
    with pytest.raises(FederatedError, match="client 1 has no rows"):
        partition_rows(data, 3, [0] * 6 + [2] * 6)
    with pytest.raises(FederatedError, match="client number 2, expected 0 to 1"):
        partition_rows(data, 2, [0] * 6 + [2] * 6)
    with pytest.raises(FederatedError, match="'r99', unknown here"):
        partition_rows(data, 2, [["r99"], ["r2"]])
    with pytest.raises(FederatedError, match="'r2' is given to clients 0, 1"):
        partition_rows(data, 2, [["r2"], ["r2"]])
    with pytest.raises(FederatedError, match="needs num_clients"):
        partition_rows(data, None)
    assert [len(part) for part in partition_rows(data, None, np.array(numbers))] == [5, 7]
    assert [len(part) for part in partition_rows(data, None, torch.tensor(numbers))] == [5, 7]


@pytest.mark.parametrize(("count", "expected"), [(0, "at least 1"), (-2, "at least 1"), (2.5, "a whole number")])
def test_a_number_of_clients_that_is_none_is_named(count, expected):
    for how in ("iid", "owner"):
        with pytest.raises(FederatedError, match=f"num_clients: found {count}, expected {expected}"):
            partition_rows(load_qa(ROWS), count, how)


@pytest.mark.parametrize("how", [None, 3, {"a": [1]}])
def test_a_partition_that_is_none_is_named(how):
    with pytest.raises(FederatedError, match='partition: found .*, expected "iid", the name of a column, or a list'):
        partition_rows(load_qa(ROWS), 2, how)


def test_an_app_folder_is_written_once(tmp_path):
    folder = apps.write_app(tmp_path / "my-app", rounds=7)
    assert sorted(p.name for p in (folder / "my_app").iterdir()) == [
        "__init__.py", "client_app.py", "server_app.py", "task.py"]  # fmt: skip
    assert "rounds = 7" in (folder / "pyproject.toml").read_text()
    larger = apps.write_app(tmp_path / "larger", min_clients=3)
    assert "num_clients = 3" in (larger / "pyproject.toml").read_text().replace("num-clients", "num_clients")
    for path in (folder / "my_app").glob("*.py"):
        compile(path.read_text(), str(path), "exec")
    with pytest.raises(FederatedError, match="holds files already"):
        apps.write_app(folder)
    with pytest.raises(FederatedError, match="cannot be an app's name"):
        apps.write_app(tmp_path / "9 lives")


def test_flower_is_silent_where_only_the_server_scores_and_warns_otherwise(caplog):
    log = logging.getLogger("flwr")
    propagate, log.propagate = log.propagate, True
    try:
        make_strategy(FederatedConfig(client_evaluation=False), 4)
        assert not caplog.records
        log.warning("something else")
        assert [record.getMessage() for record in caplog.records] == ["something else"]
    finally:
        log.propagate = propagate


def test_an_older_python_is_told_that_it_is_too_old(monkeypatch):
    """There the extra is empty: to install it, as the message else says, would change nothing."""
    from ragkit import optional

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    monkeypatch.setattr(optional.sys, "version_info", (3, 10, 4))
    with pytest.raises(
        ImportError, match=r"flwr.serverapp.strategy, which needs Python 3.11 or later; this is Python 3.10"
    ):
        make_strategy(FederatedConfig(), 2)
    with pytest.raises(ImportError, match=r'this needs the library qdrant_client; install it with: pip install "ragk'):
        optional.require("qdrant_client", extra="qdrant")
