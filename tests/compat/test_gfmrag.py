"""GFM-RAG's training files and checkpoints: exact values, overrides, reports, and everything that can be wrong."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml

from ragkit import commands
from ragkit.commands import BAD_INPUT, DONE, main
from ragkit.compat.gfmrag import is_gfmrag_config, read_gfmrag_config
from ragkit.compat.hydra_yaml import leaves
from ragkit.config import GFMFinetuneConfig, GFMPretrainConfig
from ragkit.gfm import CheckpointError, GFMSettings, GNNRetriever, QueryGNN, load_gfm
from ragkit.settings import ConfigError, load_config

# Written from the table of v1's settings, not from its files.
LAYERS = {
    "_target_": "gfmrag.ultra.models.QueryNBFNet",
    "input_dim": 512,
    "hidden_dims": [512] * 6,
    "message_func": "distmult",
    "aggregate_func": "sum",
    "short_cut": True,
    "layer_norm": True,
}
DATASETS = {
    "cfgs": {"root": "./data", "force_rebuild": False, "text_emb_model_cfgs": "${text_emb_model}"},
    "train_names": ["hotpotqa_train_example"],
    "init_datasets": True,
    "feat_dim": 768,
    "max_datasets_in_memory": 10,
    "data_loading_workers": 4,
}
FINETUNE = {
    "hydra": {"run": {"dir": "outputs/qa_finetune/${now:%Y-%m-%d}/${now:%H-%M-%S}"}},
    "defaults": ["_self_", {"doc_ranker": "idf_topk_ranker"}, {"text_emb_model": "mpnet"}],
    "seed": 1024,
    "datasets": {
        "_target_": "gfmrag.datasets.QADataset",
        **DATASETS,
        "valid_names": ["hotpotqa_test", "musique_test", "2wikimultihopqa_test"],
    },
    "model": {"_target_": "gfmrag.models.GNNRetriever", "entity_model": LAYERS},
    "task": {
        "strict_negative": True,
        "metric": ["mrr", *(f"hits@{k}" for k in (1, 2, 3, 5, 10, 20, 50, 100))],
        "losses": [
            {
                "name": "ent_bce_loss",
                "loss": {"_target_": "gfmrag.losses.BCELoss", "adversarial_temperature": 0.2},
                "cfg": {"weight": 0.3, "is_doc_loss": False},
            },
            {
                "name": "ent_pcr_loss",
                "loss": {"_target_": "gfmrag.losses.ListCELoss"},
                "cfg": {"weight": 0.7, "is_doc_loss": False},
            },
        ],
    },
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 5e-4},
    "train": {
        "batch_size": 8,
        "num_epoch": 20,
        "log_interval": 100,
        "batch_per_epoch": None,
        "save_best_only": True,
        "save_pretrained": True,
        "do_eval": True,
        "timeout": 60,
        "init_entities_weight": True,
        "checkpoint": None,
    },
}
PRETRAIN = {
    "hydra": {"run": {"dir": "outputs/kg_pretrain/${now:%Y-%m-%d}/${now:%H-%M-%S}"}},
    "defaults": ["_self_", {"text_emb_model": "mpnet"}],
    "seed": 1024,
    "datasets": {"_target_": "gfmrag.datasets.KGDataset", **DATASETS, "valid_names": []},
    "model": {"_target_": "gfmrag.models.QueryGNN", "entity_model": LAYERS},
    "task": {
        "num_negative": 128,
        "strict_negative": False,
        "adversarial_temperature": 0.5,
        "metric": ["mr", "mrr", "hits@1", "hits@3", "hits@10"],
    },
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 5e-4},
    "train": {"batch_size": 8, "num_epoch": 10, "log_interval": 100, "fast_test": 700, "save_best_only": False,
              "save_pretrained": False, "batch_per_epoch": None, "timeout": 60, "checkpoint": None},
}  # fmt: skip
V2 = {
    "hydra": {"run": {"dir": "outputs/x/${now:%Y}"}, "searchpath": ["pkg://gfmrag.workflow.config"]},
    "defaults": ["_self_", {"text_emb_model": "mpnet"}, {"wandb": "default"}],
    "timeout": 60,
    "load_model_from_pretrained": "hub/model",
    "datasets": {"cfgs": {"root": "d", "text_emb_model_cfgs": "${text_emb_model}"}, "train_names": ["a", "b"]},
    "model": {"_target_": "gfmrag.models.gfm_reasoner.GraphReasoner", "dtype": "bfloat16", "use_ent_emb": "late"},
    "losses": [
        {
            "name": "b",
            "loss": {"_target_": "x.BCELoss", "adversarial_temperature": 0.1},
            "weight": 0.4,
            "target_node_type": "document",
        },
        {"name": "p", "loss": {"_target_": "x.ListCELoss"}, "weight": 0.6, "target_node_type": "entity"},
        {"name": "m", "loss": {"_target_": "x.MSELoss"}, "weight": 1, "is_distillation_loss": True},
    ],
    "trainer": {
        "_target_": "gfmrag.trainers.SFTTrainer",
        "args": {
            "train_batch_size": 4,
            "eval_batch_size": 16,
            "num_epoch": 3,
            "logging_steps": 7,
            "max_steps_per_epoch": 50,
            "resume_from_checkpoint": None,
            "eval_strategy": "step",
            "eval_steps": 25,
            "metric_for_best_model": "document_recall@3",
            "dtype": "${model.dtype}",
            "split_graph_inference": False,
        },
        "metrics": ["mrr", "recall@2", "hits@5"],
    },
}


def changed(base, **changes):
    """A copy with dotted keys (__ for a dot) set."""
    made = copy.deepcopy(base)
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = made
        for name in groups:
            node = node.setdefault(name, {})
        node[last] = value
    return made


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


# ---- exact values ----


def test_v1_finetuning_file():
    config, report = read_gfmrag_config(FINETUNE)
    assert config == GFMFinetuneConfig(
        seed=1024,
        output_dir="outputs/qa_finetune",
        datasets={
            "root": "./data",
            "train_names": ["hotpotqa_train_example"],
            "valid_names": ["hotpotqa_test", "musique_test", "2wikimultihopqa_test"],
            "valid_share": 0.0,
        },
        text_emb_model={"text_emb_model_name": "sentence-transformers/all-mpnet-base-v2", "batch_size": 32},
        model={"entity_model": {k: v for k, v in LAYERS.items() if k != "_target_"}},
        optimizer={"lr": 5e-4},
        doc_ranker={"name": "idf_topk", "top_k": 20},
        task={
            "losses": [
                {"name": "bce", "weight": 0.3, "adversarial_temperature": 0.2},
                {"name": "listce", "weight": 0.7},
            ],
            "ks": [1, 2, 3, 5, 10, 20, 50, 100],
        },
        train={
            "batch_size": 8,
            "num_epoch": 20,
            "log_interval": 100,
            "watched_metric": "ent_filtered_mrr",
            "max_grad_norm": 0,
            "warmup_steps": 0,
            "schedule": "constant",
        },
    )
    assert {key for key, _, _ in report.unused} == {
        *(f"datasets.{name}" for name in ("init_datasets", "feat_dim", "max_datasets_in_memory")),
        "datasets.data_loading_workers",
        "task.strict_negative",
        *(f"train.{name}" for name in ("save_best_only", "save_pretrained", "timeout")),
    }
    assert report.unknown == []
    reasons = {key: reason for key, _, reason in report.unused}
    assert reasons["datasets.data_loading_workers"] == "batches are index lists, there is nothing to load"
    text = str(report)
    assert "datasets.data_loading_workers=4: batches are index lists" in text
    assert "train.watched_metric=ent_filtered_mrr" in text and len(text.splitlines()) < 20


def test_v1_pretraining_file():
    config, report = read_gfmrag_config(PRETRAIN)
    assert type(config) is GFMPretrainConfig and report.kind == "pretrain"
    task, train = config.task, config.train
    assert (task.num_negative, task.strict_negative, task.adversarial_temperature) == (128, False, 0.5)
    assert task.max_valid == 700 and task.ks == [1, 3, 10] and config.output_dir == "outputs/kg_pretrain"
    assert (train.num_epoch, train.watched_metric, train.max_grad_norm, train.log_interval) == (10, "mrr", 0, 100)
    reasons = {key: reason for key, _, reason in report.unused}
    assert "v1 ignores it too" in reasons["datasets.valid_names"] and report.unknown == []
    assert any("facts that it trains on" in note for note in report.notes)


def test_v2_training_arguments():
    config, report = read_gfmrag_config(V2)
    t = config.train
    assert (t.batch_size, t.eval_batch_size, t.num_epoch, t.log_interval) == (4, 16, 3, 7)
    assert (t.batch_per_epoch, t.eval_steps, t.precision, t.checkpoint) == (50, 25, "bf16", "hub/model")
    assert t.watched_metric == "doc_recall@3" and config.task.ks == [2, 3, 5]  # 3 is watched, so it is scored
    bce, listce = config.task.losses
    assert (bce.name, bce.weight, bce.adversarial_temperature) == ("bce", 0.4, 0.1)
    assert (bce.is_doc_loss, bce.doc_score) == (True, "simple")
    assert (listce.name, listce.weight, listce.is_doc_loss) == ("listce", 0.6, False)
    left = {key: value for key, value, _ in report.unused}
    assert left["losses[2].loss._target_"] == "MSELoss" and left["wandb"] == "default" and report.unknown == []
    assert {"timeout", "model.use_ent_emb", "trainer.args.split_graph_inference"} <= set(left)
    notes = " ".join(report.notes)
    assert "counted in each data set" in notes and "not its optimizer and epoch" in notes
    epochs = changed(V2, trainer__args__eval_strategy="epoch")
    config, report = read_gfmrag_config(epochs)
    assert config.train.eval_steps is None and "trainer.args.eval_steps" in {key for key, _, _ in report.unused}


def test_the_model_of_a_silent_file_is_v1s():
    given = changed(FINETUNE, model__entity_model={"input_dim": 64, "hidden_dims": [64, 64]})
    config, report = read_gfmrag_config(given)
    inner = config.model.entity_model
    assert (inner.short_cut, inner.layer_norm, inner.hidden_dims) == (False, False, [64, 64])
    assert any("short_cut, layer_norm off" in note for note in report.notes)


def test_losses_on_documents_and_the_class_default_of_the_temperature():
    losses = [{"name": "d", "loss": {"_target_": "gfmrag.losses.BCELoss"}, "cfg": {"weight": 1, "is_doc_loss": True}}]
    config, _ = read_gfmrag_config(changed(FINETUNE, task__losses=losses))
    (term,) = config.task.losses
    assert (term.is_doc_loss, term.doc_score, term.adversarial_temperature) == (True, "simple", 0.0)


@pytest.mark.parametrize(
    ("choice", "name", "k"),
    [("simple_ranker", "simple", None), ("idf_ranker", "idf", None), ("topk_ranker", "topk", 10)],
)
def test_rankers_by_name(choice, name, k):
    config, _ = read_gfmrag_config(FINETUNE, overrides=[f"doc_ranker={choice}"])
    assert (config.doc_ranker.name, config.doc_ranker.top_k) == (name, k)


def test_validation_without_names():
    config, report = read_gfmrag_config(changed(FINETUNE, datasets__valid_names=[]))
    assert config.datasets.valid_share == 0.1 and any("no datasets.valid_names" in note for note in report.notes)
    config, _ = read_gfmrag_config(changed(FINETUNE, datasets__valid_names=[], train__do_eval=False))
    assert config.datasets.valid_share == 0.0 and config.train.do_eval is False


# ---- files beside the file ----


def test_choices_are_read_from_the_folders_beside(tmp_path):
    path = write(tmp_path / "config" / "stage2_qa_finetune.yaml", FINETUNE)
    write(tmp_path / "config/doc_ranker/idf_topk_ranker.yaml", {"_target_": "g.IDFWeightedTopKRanker", "top_k": 33})
    encoder = {"text_emb_model_name": "mine", "query_instruct": "Q: ", "passage_instruct": None, "normalize": False}
    write(tmp_path / "text_emb_model" / "mpnet.yaml", {**encoder, "api_key": "hidden"})  # the folder above counts too
    config, report = read_gfmrag_config(path)
    assert config.doc_ranker.top_k == 33
    assert config.text_emb_model.text_emb_model_name == "mine" and config.text_emb_model.query_instruct == "Q: "
    assert config.text_emb_model.passage_instruct == ""
    text = str(report)
    assert "hidden" not in text and "api_key=..." in text and "normalize=False" in text


def test_the_file_wins_over_what_stands_before_self(tmp_path):
    given = changed(FINETUNE, doc_ranker={"top_k": 7})
    given["defaults"] = [{"doc_ranker": "idf_topk_ranker"}, "_self_", {"text_emb_model": "mpnet"}]
    assert read_gfmrag_config(given)[0].doc_ranker.top_k == 7
    given["defaults"] = ["_self_", {"doc_ranker": "idf_topk_ranker"}, {"text_emb_model": "mpnet"}]
    assert read_gfmrag_config(given)[0].doc_ranker.top_k == 20
    write(tmp_path / "base.yaml", FINETUNE)
    path = write(tmp_path / "mine.yaml", {"defaults": ["base"], "train": {"batch_size": 3}})
    config, _ = read_gfmrag_config(path)
    assert config.train.batch_size == 3 and config.train.log_interval == 100


def test_a_missing_choice(tmp_path):
    given = copy.deepcopy(FINETUNE)
    given["defaults"][1] = {"doc_ranker": "idf_topk_rankr"}
    path = write(tmp_path / "f.yaml", given)
    with pytest.raises(ConfigError, match=r'no doc_ranker/idf_topk_rankr.yaml .*did you mean "idf_topk_ranker"'):
        read_gfmrag_config(path)
    with pytest.raises(ConfigError, match=r"no text_emb_model/bge.yaml .*there are mpnet"):
        read_gfmrag_config(path, overrides=["doc_ranker=idf_ranker", "text_emb_model=bge"])
    with pytest.raises(ConfigError, match='defaults names "base", but there is no base.yaml'):
        read_gfmrag_config(write(path, {"defaults": ["base"], **{k: v for k, v in given.items() if k != "defaults"}}))
    with pytest.raises(ConfigError, match=r"defaults: expected a list"):
        read_gfmrag_config(changed(FINETUNE, defaults="doc_ranker"))
    with pytest.raises(ConfigError, match=r"expected a name or `group: choice`, found 3"):
        read_gfmrag_config(changed(FINETUNE, defaults=[3]))


# ---- overrides ----


def test_overrides_under_both_names():
    given = ["train.batch_size=4", "datasets.cfgs.root=/d", "+train.max_steps=9", "--device=cpu"]
    config, _ = read_gfmrag_config(FINETUNE, overrides=given)
    assert (config.train.batch_size, config.datasets.root, config.train.max_steps) == (4, "/d", 9)
    assert config.device == "cpu" and "max_steps" in config.explicit()["train"]
    given = ["datasets.root=/e", "datasets.train_names=[a,b]", "text_emb_model.batch_size=5", "doc_ranker.name=simple"]
    config, _ = read_gfmrag_config(FINETUNE, overrides=given)
    assert config.datasets.root == "/e" and config.datasets.train_names == ["a", "b"]
    assert config.text_emb_model.batch_size == 5
    assert (config.doc_ranker.name, config.doc_ranker.top_k) == ("simple", None)  # 20 was the other ranker's
    config, _ = read_gfmrag_config(
        FINETUNE, overrides=["datasets.cfgs.text_emb_model_cfgs.batch_size=6", "task.losses=[{name: bce, weight: 1}]"]
    )
    assert config.text_emb_model.batch_size == 6 and [term.name for term in config.task.losses] == ["bce"]
    config, _ = read_gfmrag_config(FINETUNE, overrides=["doc_ranker.name=topk", "doc_ranker.top_k=4"])
    assert (config.doc_ranker.name, config.doc_ranker.top_k) == ("topk", 4)
    config, _ = read_gfmrag_config(PRETRAIN, overrides=["train.fast_test=5000", "task.valid_share=0.1"])
    assert config.task.max_valid == 5000 and config.task.valid_share == 0.1
    config, _ = read_gfmrag_config(FINETUNE, overrides=["hydra.run.dir=runs/x"])
    assert config.output_dir == "runs/x"


def test_wrong_overrides():
    with pytest.raises(ConfigError, match=r'unknown key "train.batchsize" .*did you mean "train.batch_size"'):
        read_gfmrag_config(FINETUNE, overrides=["train.batchsize=4"])
    with pytest.raises(ConfigError, match="is not a setting; write key=value"):
        read_gfmrag_config(FINETUNE, overrides=["--verbose"])
    with pytest.raises(ConfigError, match=r"write train.checkpoint=null"):
        read_gfmrag_config(FINETUNE, overrides=["~train.checkpoint="])
    with pytest.raises(ConfigError, match="seed is 1024, not a group"):
        read_gfmrag_config(FINETUNE, overrides=["seed._target_=3"])
    with pytest.raises(ConfigError, match="references lead back to themselves"):
        read_gfmrag_config(changed(FINETUNE, optimizer="${optimizer}"), overrides=["optimizer.lr=1"])
    with pytest.raises(ConfigError, match=r"train.batch_size: found 0, expected a whole number, 1 or more"):
        read_gfmrag_config(FINETUNE, overrides=["train.batch_size=0"])


# ---- references ----


def test_references():
    given = changed(FINETUNE, where="data", datasets__cfgs__root="/x/${where}", train__batch_size="${size.${kind}}")
    given.update(size={"big": 64}, kind="big", more={"a": "${.b}", "b": 1})
    config, report = read_gfmrag_config(given)
    assert config.datasets.root == "/x/data" and config.train.batch_size == 64
    assert ("more.a", 1, None) in report.unknown and ("size.big", 64, None) in report.unknown


def test_references_mean_what_they_mean_to_omegaconf():
    """The expected values are those of OmegaConf.to_container(OmegaConf.create(tree), resolve=True), version 2.4."""
    tree = {
        "a": {"b": 1, "c": "${.b}", "d": {"e": "${..b}", "f": "x${a.b}-${.e}"}},
        "k": "b",
        "n": "${a.${k}}",
        "g": "${a.d}",
        "l": ["${a.b}", {"q": "${k}"}, "${g.e}"],
        "ll": "${l.1.q}",
        "t": "${g.f}",
        "none": None,
        "s": "v=${none}",
        "env": "${oc.env:RAGKIT_NOT_SET,3}",
    }
    assert dict(leaves(tree)) == {
        **{"a.b": 1, "a.c": 1, "a.d.e": 1, "a.d.f": "x1-1", "k": "b", "n": 1, "g.e": 1, "g.f": "x1-1"},
        **{"l": [1, {"q": "b"}, 1], "ll": "b", "t": "x1-1", "none": None, "s": "v=None", "env": "3"},
    }


def test_references_to_the_environment(monkeypatch):
    monkeypatch.setenv("RAGKIT_TEST_ROOT", "/env")
    given = changed(FINETUNE, datasets__cfgs__root="${oc.env:RAGKIT_TEST_ROOT}/d", seed="${oc.env:RAGKIT_NOT_SET,7}")
    config, _ = read_gfmrag_config(given)
    assert (config.datasets.root, config.seed) == ("/env/d", 7)
    monkeypatch.delenv("RAGKIT_TEST_ROOT")
    with pytest.raises(ConfigError, match="datasets.cfgs.root: .* the environment has no RAGKIT_TEST_ROOT"):
        read_gfmrag_config(given)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "${train.batch_sise}",
            r'train.num_epoch: refers to .*no key "train.batch_sise"; did you mean "train.batch_s',
        ),
        ("${train.num_epoch}", "leads back to itself"),
        ("${a}", "leads back to itself"),
        ("${mine:3}", r"train.num_epoch: \$\{mine:3\} is computed by a resolver that only Hydra has"),
        ("${train", "not closed"),
        ("x${datasets}", "is a group, and cannot be part of a text"),
    ],
)
def test_wrong_references_of_what_is_used(value, message):
    with pytest.raises(ConfigError, match=message):
        read_gfmrag_config(changed(FINETUNE, train__num_epoch=value, a="${b}", b="${a}"))


def test_wrong_references_of_what_is_not_used_are_reported():
    _, report = read_gfmrag_config(changed(FINETUNE, train__timeout="${nowhere}", extra="${mine:3}"))
    assert "train.timeout=${nowhere}" in str(report) and "extra=${mine:3}" in str(report)


# ---- what is wrong in a file ----


def test_unknown_keys_and_other_classes_are_reported():
    given = changed(
        FINETUNE,
        train__batchsize=3,
        optimizer={"_target_": "torch.optim.Adam", "lr": 0.001, "betas": [0.8, 0.9]},
        doc_ranker={"_target_": "gfmrag.doc_rankers.DocEntRanker"},
    )
    given["defaults"] = given["defaults"][2:]
    config, report = read_gfmrag_config(given)
    assert report.unknown == [("train.batchsize", 3, "train.batch_size")]
    assert "train.batchsize=3; did you mean train.batch_size?" in str(report)
    left = {key: reason for key, _, reason in report.unused}
    assert "the optimizer is AdamW" in left["optimizer._target_"] and "optimizer.betas" in left
    assert "the ranker is idf_topk" in left["doc_ranker._target_"]
    assert config.optimizer.lr == 0.001 and config.doc_ranker.name == "idf_topk"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__num_epoch": 0}, "0 epochs train nothing; gfm-evaluate"),
        ({"model__entity_model__message_func": "rotate"}, "message_func: found 'rotate', expected one of distmult"),
        ({"model__entity_model__activation": "gelu"}, "activation: 'gelu' is not supported; there is relu"),
        ({"task__losses": [{"name": "x", "loss": {"_target_": "x.KLDivLoss"}, "cfg": {"weight": 1}}]}, "none of its"),
        ({"task__losses": [{"name": "x", "loss": {"_target_": "x.BCELoss"}}]}, r"losses\[0\]: expected a weight"),
        ({"task__losses": [{"name": "x"}]}, "expected loss with a _target_"),
        ({"task__losses": "bce"}, "expected a list of losses"),
        ({"datasets__train_names": 3}, "datasets.train_names: found 3"),
        ({"datasets__cfgs__root": ""}, r"datasets.root: found ''[\s\S]*datasets.root is datasets.cfgs.root in the"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_gfmrag_config(changed(FINETUNE, **changes))


def test_the_kind_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match="is a file for pretrain, not for finetune"):
        read_gfmrag_config(PRETRAIN, "finetune")
    with pytest.raises(ConfigError, match=r"marks of both .*GNNRetriever, .*QueryGNN"):
        read_gfmrag_config(changed(FINETUNE, extra={"_target_": "gfmrag.models.QueryGNN"}))
    with pytest.raises(ConfigError, match="it has no mark of either; give kind="):
        read_gfmrag_config({"hydra": {}, "train": {"batch_size": 3}})
    assert read_gfmrag_config({"hydra": {}, "train": {"batch_size": 3}}, "pretrain")[0].train.batch_size == 3
    assert type(read_gfmrag_config({"defaults": [{"doc_ranker": "idf_ranker"}]})[0]) is GFMFinetuneConfig
    with pytest.raises(ConfigError, match=r"a file of stage 3 .*GFMRetriever.from_config"):
        read_gfmrag_config({"hydra": {}, "graph_retriever": {"model_path": "x"}})
    with pytest.raises(ValueError, match="kind: expected auto"):
        read_gfmrag_config(FINETUNE, "lsr")  # type: ignore[arg-type]
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: {batch_size: 3")
    with pytest.raises(ConfigError, match=r"broken.yaml: not valid YAML"):
        read_gfmrag_config(broken)
    with pytest.raises(ConfigError, match=r'no configuration file .*did you mean ".*broken.yaml"'):
        read_gfmrag_config(tmp_path / "broke.yaml")


def test_recognition():
    for theirs in (FINETUNE, PRETRAIN, V2, {"defaults": []}, {"datasets": {"cfgs": {}}}, {"a": [{"_target_": "x"}]}):
        assert is_gfmrag_config(theirs)
    ours = [GFMFinetuneConfig(), GFMPretrainConfig(), GFMFinetuneConfig(train={"checkpoint": "a"})]
    for config in [*(config.model_dump() for config in ours), {}, [], None, {"train": {"batch_size": 3}}]:
        assert not is_gfmrag_config(config)


# ---- the command ----


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(*arguments): the command line in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(commands, "silence_libraries", lambda: None)  # its settings would outlive the test

    def run(*arguments):
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_command_takes_their_files_and_ours(tmp_path, monkeypatch, run_here):
    seen = []
    for name in ("gfm-finetune", "gfm-pretrain"):
        kind, _ = commands.COMMANDS[name]
        monkeypatch.setitem(commands.COMMANDS, name, (kind, lambda config, out: seen.append(config) or DONE))
    path = str(write(tmp_path / "stage2_qa_finetune.yaml", FINETUNE))
    status, out, _ = run_here("gfm-finetune", path, "train.batch_size=4", "datasets.cfgs.root=/d")
    assert status == DONE and seen[-1].train.batch_size == 4 and seen[-1].datasets.root == "/d"
    assert "not used:" in out and "batches are index lists" in out
    status, _, error = run_here("gfm-pretrain", path)
    assert (
        status == BAD_INPUT and "is a file for finetune, not for pretrain; use python -m ragkit gfm-finetune" in error
    )
    own = GFMFinetuneConfig(train={"batch_size": 3}).save(tmp_path / "own.yaml")
    status, out, _ = run_here("gfm-finetune", str(own), "train.max_steps=2")
    assert status == DONE and out == "" and seen[-1] == load_config(GFMFinetuneConfig, own, ["train.max_steps=2"])
    status, _, error = run_here("gfm-finetune", str(tmp_path / "nowhere.yaml"))
    assert status == BAD_INPUT and "no configuration file" in error
    status, _, error = run_here("gfm-evaluate", path)
    assert status == BAD_INPUT and "unknown key" in error


def toy_data(root):
    """Two data sets in v1's layout."""
    for name in ("toy_train", "toy_test"):
        stage1, raw = root / name / "processed" / "stage1", root / name / "raw"
        stage1.mkdir(parents=True)
        raw.mkdir()
        towns = {"peru": "lima", "chile": "santiago", "bolivia": "sucre", "ecuador": "quito"}
        (stage1 / "kg.txt").write_text("".join(f"{town},capital of,{land}\n" for land, town in towns.items()))
        (stage1 / "document2entities.json").write_text(json.dumps({c: [c, t] for c, t in towns.items()}))
        (raw / "dataset_corpus.json").write_text(
            json.dumps({c: f"{t} is the capital of {c}." for c, t in towns.items()})
        )
        rows = [
            {
                "id": country,
                "question": f"What is the capital of {country}?",
                "answer": town,
                "supporting_facts": [country],
                "question_entities": [country],
                "supporting_entities": [country, town],
            }
            for country, town in towns.items()
        ]
        for split in ("train", "test"):
            (stage1 / f"{split}.json").write_text(json.dumps(rows))
    return root


@pytest.mark.slow
def test_a_v1_file_trains_and_its_retriever_answers(tmp_path, run_here, monkeypatch):
    from ragkit.compat.gfmrag import GFMRetriever

    monkeypatch.chdir(tmp_path)
    toy_data(tmp_path / "data")
    given = changed(
        FINETUNE,
        datasets__train_names=["toy_train"],
        datasets__valid_names=["toy_test"],
        model__entity_model={**LAYERS, "input_dim": 8, "hidden_dims": [8, 8]},
        train__batch_size=2,
    )
    write(tmp_path / "stage2.yaml", given)
    write(tmp_path / "text_emb_model/mpnet.yaml", {"text_emb_model_name": "default", "batch_size": 8})
    limits = [
        "train.max_steps=1",
        "train.num_threads=1",
        "device=cpu",
        "datasets.cache=false",
        "datasets.test_names=[]",
    ]
    status, out, error = run_here("gfm-finetune", "stage2.yaml", "optimizer.lr=1e-3", *limits)
    assert status == DONE, error
    assert "best ent_filtered_mrr" in out
    (run,) = (tmp_path / "outputs" / "qa_finetune").iterdir()
    config = load_config(GFMFinetuneConfig, run / "config.yaml")
    assert config.optimizer.lr == 1e-3 and config.train.max_grad_norm == 0 and config.datasets.valid_share == 0
    stage3 = {
        "defaults": ["_self_", {"doc_ranker": "idf_ranker"}],
        "dataset": {"_target_": "gfmrag.datasets.QADataset", "root": "data", "data_name": "toy_test"},
        "graph_retriever": {
            "model_path": str(run / "model"),
            "doc_ranker": "${doc_ranker}",
            "ner_model": {"_target_": "gfmrag.x"},
            "init_entities_weight": True,
        },
    }
    retriever = GFMRetriever.from_config(write(tmp_path / "stage3.yaml", stage3), device="cpu", cache=False)
    inner = retriever.retriever
    assert inner.ranker == "idf" and inner.init_entities_weight
    question = "What is the capital of Peru?"
    found = retriever.retrieve(question, top_k=3)
    assert [set(row) for row in found] == [{"title", "content", "score", "norm_score"}] * 3
    (everything,) = inner.retrieve([question], 4)
    scores = [passage.score for passage in everything]
    assert [row["title"] for row in found] == [passage.id for passage in everything[:3]]
    expected = [(score - scores[3]) / (scores[0] - scores[3]) for score in scores[:3]]
    assert [row["norm_score"] for row in found] == pytest.approx(expected) and found[0]["norm_score"] == 1
    assert found[0]["content"].endswith(f"is the capital of {found[0]['title']}.")
    with pytest.raises(TypeError, match="expected one question"):
        retriever.retrieve([question], 3)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        retriever.retrieve(question, 0)


def test_a_retriever_needs_its_settings():
    from ragkit.compat.gfmrag import GFMRetriever

    given = {"dataset": {"root": "data", "data_name": "x"}, "graph_retriever": {"doc_ranker": {"_target_": "a.B"}}}
    with pytest.raises(ConfigError, match="expected graph_retriever.model_path, the model"):
        GFMRetriever.from_config(given)
    with pytest.raises(ConfigError, match="doc_ranker: found a.B, expected one of SimpleRanker"):
        GFMRetriever.from_config(changed(given, graph_retriever__model_path="m"))
    with pytest.raises(ConfigError, match="expected dataset.data_name"):
        GFMRetriever.from_config({"dataset": {"root": "data"}})


# ---- checkpoints of v1's training: one file, no config.json ----


def trained(cls=GNNRetriever, **kinds):
    torch.manual_seed(0)
    model = cls(GFMSettings(**{"rel_emb_dim": 6, "input_dim": 4, "hidden_dims": [4, 4], **kinds}))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return model, {"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("cls", [GNNRetriever, QueryGNN])
@pytest.mark.parametrize(
    "kinds",
    [
        {},
        {"hidden_dims": [4, 4, 3], "concat_hidden": True},
        {"layer_norm": False, "num_mlp_layer": 3},
        {"aggregate_func": "pna"},
        {"aggregate_func": "pna", "hidden_dims": [3]},
    ],
)
def test_a_bare_checkpoint_has_the_shapes_of_its_tensors(tmp_path, capsys, cls, kinds):
    model, state = trained(cls, **kinds)
    torch.save(state, tmp_path / "model_best.pth")
    loaded = load_gfm(tmp_path / "model_best.pth")
    assert type(loaded) is cls and loaded.settings == model.settings and loaded.encoder_info is None
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    said = capsys.readouterr().out
    assert "model_best.pth: no config beside it" in said and "message_func distmult" in said
    assert ("aggregate_func sum" in said) == ("aggregate_func" not in kinds) and "short_cut True" in said


def test_hydras_config_beside_a_checkpoint_counts(tmp_path, capsys):
    model, state = trained(message_func="transe", aggregate_func="max", short_cut=False)
    torch.save(state, tmp_path / "model_best.pth")
    inner = {"input_dim": 4, "hidden_dims": [4, 4], "message_func": "transe", "aggregate_func": "max"}
    values = changed(FINETUNE, model__entity_model=inner, text_emb_model={"_target_": "x", "text_emb_model_name": "e"})
    write(tmp_path / ".hydra" / "config.yaml", values)
    loaded = load_gfm(tmp_path / "model_best.pth", kind="retriever")
    assert loaded.settings == model.settings and loaded.encoder_info == {"text_emb_model_name": "e"}
    assert capsys.readouterr().out == ""
    (tmp_path / ".hydra" / "config.yaml").write_text("{a: ")
    with pytest.raises(CheckpointError, match="not valid YAML"):
        load_gfm(tmp_path / "model_best.pth")


def test_broken_bare_checkpoints(tmp_path):
    _, state = trained()
    path = tmp_path / "model_epoch_3.pth"
    torch.save(state, path)
    whole = path.read_bytes()
    for part in (0, 1, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:part])
        with pytest.raises(CheckpointError, match="model_epoch_3.pth"):
            load_gfm(path)
    state["model"].pop("rel_mlp.bias")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="rel_mlp.bias"):
        load_gfm(path)
    torch.save({"epoch": 3, "optimizer": {}}, path)
    with pytest.raises(CheckpointError, match="epoch, optimizer hold no tensor"):
        load_gfm(path)
