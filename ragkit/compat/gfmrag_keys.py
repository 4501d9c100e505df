"""Every setting of GFM-RAG v1's and v2's training files: what it is called here, or why it has no counterpart."""

from __future__ import annotations

import difflib
from typing import Any

# Choices of the `defaults` lists that v1 ships as files; its users often have only the main file.
KNOWN_CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "doc_ranker": {
        "simple_ranker": {"_target_": "gfmrag.doc_rankers.SimpleRanker"},
        "idf_ranker": {"_target_": "gfmrag.doc_rankers.IDFWeightedRanker"},
        "topk_ranker": {"_target_": "gfmrag.doc_rankers.TopKRanker", "top_k": 10},
        "idf_topk_ranker": {"_target_": "gfmrag.doc_rankers.IDFWeightedTopKRanker", "top_k": 20},
    },
    "text_emb_model": {
        "mpnet": {
            "_target_": "gfmrag.text_emb_models.BaseTextEmbModel",
            "text_emb_model_name": "sentence-transformers/all-mpnet-base-v2",
            "normalize": False,
            "batch_size": 32,
            "query_instruct": None,
            "passage_instruct": None,
            "model_kwargs": None,
        },
    },
}

RANKER_CLASSES = {
    "SimpleRanker": "simple",
    "IDFWeightedRanker": "idf",
    "TopKRanker": "topk",
    "IDFWeightedTopKRanker": "idf_topk",
}
LOSS_CLASSES = {"BCELoss": "bce", "ListCELoss": "listce"}

# What the file's classes say of the stage it is for.
FINETUNE_CLASSES = {"QADataset", "GNNRetriever", "GraphReasoner", "SFTTrainer"}
PRETRAIN_CLASSES = {"KGDataset", "QueryGNN", "KGCTrainer"}
FINETUNE_MARKS = ("task.losses", "losses", "doc_ranker")
PRETRAIN_MARKS = ("task.num_negative", "trainer.num_negative", "train.fast_test", "trainer.fast_test")
OTHER_STAGES = {
    "graph_retriever": "stage 3 (inference); ragkit.compat.gfmrag.GFMRetriever.from_config takes it",
    "kg_constructor": "stage 1 (building the graph), which is no training",
    "graph_constructor": "stage 1 (building the graph), which is no training",
}

# v2's names of what v1 has too.
RENAMED = {
    "trainer.args.train_batch_size": "train.batch_size",
    "trainer.args.eval_batch_size": "train.eval_batch_size",
    "trainer.args.num_epoch": "train.num_epoch",
    "trainer.args.logging_steps": "train.log_interval",
    "trainer.args.max_steps_per_epoch": "train.batch_per_epoch",
    "trainer.args.resume_from_checkpoint": "train.checkpoint",
    "load_model_from_pretrained": "train.checkpoint",
    "trainer.args.do_eval": "train.do_eval",
    "trainer.args.do_train": "train.do_train",
    "trainer.args.eval_strategy": "train.eval_strategy",
    "trainer.args.eval_steps": "train.eval_steps",
    "trainer.args.metric_for_best_model": "train.watched_metric",
    "trainer.args.dtype": "model.dtype",
    "trainer.metrics": "task.metric",
    "trainer.num_negative": "task.num_negative",
    "trainer.strict_negative": "task.strict_negative",
    "trainer.adversarial_temperature": "task.adversarial_temperature",
    "trainer.fast_test": "train.fast_test",
    "model.init_nodes_weight": "train.init_entities_weight",
    "losses": "task.losses",
}
ENCODER_OF_DATASETS = "datasets.cfgs.text_emb_model_cfgs"

# Taken over as they are, under these names; in both trainings where nothing else is said.
SAME = {
    "seed": "seed",
    "datasets.cfgs.root": "datasets.root",
    "datasets.train_names": "datasets.train_names",
    "text_emb_model.text_emb_model_name": "text_emb_model.text_emb_model_name",
    "text_emb_model.batch_size": "text_emb_model.batch_size",
    "text_emb_model.query_instruct": "text_emb_model.query_instruct",
    "text_emb_model.passage_instruct": "text_emb_model.passage_instruct",
    **{
        f"model.entity_model.{name}": f"model.entity_model.{name}"
        for name in (
            *("input_dim", "hidden_dims", "message_func", "aggregate_func"),
            *("short_cut", "layer_norm", "concat_hidden", "num_mlp_layer"),
        )
    },
    "optimizer.lr": "optimizer.lr",
    "optimizer.weight_decay": "optimizer.weight_decay",
    **{
        f"train.{name}": f"train.{name}"
        for name in (
            *("batch_size", "num_epoch", "log_interval", "batch_per_epoch", "checkpoint"),
            *("do_eval", "eval_steps", "eval_batch_size"),
        )
    },
}
SAME_FINETUNE = {
    "datasets.valid_names": "datasets.valid_names",
    "train.init_entities_weight": "train.init_entities_weight",
}
SAME_PRETRAIN = {
    "task.num_negative": "task.num_negative",
    "task.strict_negative": "task.strict_negative",
    "task.adversarial_temperature": "task.adversarial_temperature",
    "train.fast_test": "task.max_valid",
}
# Translated by ragkit.compat.gfmrag_convert.
TRANSLATED = (
    *("hydra.run.dir", "task.metric", "train.watched_metric", "train.eval_strategy", "train.do_train", "model.dtype"),
    *("text_emb_model.normalize", "model.entity_model.activation", "datasets.cfgs.inverse_relation_feat"),
)
TRANSLATED_FINETUNE = ("task.losses", "doc_ranker.top_k", "model.ranker.top_k")

# A plain GNN of v1 has these where its file is silent.
SILENT_MODEL = {"short_cut": False, "layer_norm": False}

_OWN_ENCODER = "the text encoder is loaded by sentence-transformers, with its own settings"
_WHOLE_GRAPH = "a graph is trained on as a whole"
_NO_FEATURES = "entities have no text features here"
# Not used, and why. A key that ends in "." stands for all that is in the group.
UNUSED = {
    "hydra.": "settings of Hydra itself",
    "wandb.": "loggers are named in train.report_to, such as [wandb]",
    "datasets.cfgs.force_rebuild": "caches have keys made of their content, and are never stale (datasets.cache turns "
    "them off)",
    "datasets.cfgs.force_reload": "caches have keys made of their content, and are never stale (datasets.cache turns "
    "them off)",
    "datasets.cfgs.use_node_feat": _NO_FEATURES,
    "datasets.cfgs.use_edge_feat": "edges have no text features here",
    "datasets.cfgs.use_relation_feat": "relations always have their texts' embeddings",
    "datasets.cfgs.target_type": "the model scores entities, documents are ranked by theirs",
    "datasets.init_datasets": "data sets are always read before anything is trained",
    "datasets.feat_dim": "the encoder says how many numbers its embeddings have",
    "datasets.max_datasets_in_memory": "graphs are kept as compact arrays, all of them",
    "datasets.data_loading_workers": "batches are index lists, there is nothing to load",
    "text_emb_model.model_kwargs": _OWN_ENCODER,
    "text_emb_model.model_kwargs.": _OWN_ENCODER,
    "text_emb_model.tokenizer_kwargs": _OWN_ENCODER,
    "text_emb_model.tokenizer_kwargs.": _OWN_ENCODER,
    "text_emb_model.truncate_dim": "embeddings keep all their numbers; weights trained with fewer do not fit",
    "text_emb_model.api_base": _OWN_ENCODER,
    "text_emb_model.api_key": _OWN_ENCODER,
    "text_emb_model.vllm_timeout": _OWN_ENCODER,
    "model.rel_emb_dim": "the encoder says how many numbers its embeddings have",
    "model.feat_dim": "the encoder says how many numbers its embeddings have",
    "model.use_ent_emb": f"{_NO_FEATURES}: this is the model of GFM-RAG v1, not G-reasoner",
    "model.init_nodes_type": "message passing starts at the question's entities",
    "model.entity_model.return_hidden": "the states are always there for who asks",
    "model.entity_model.dependent": "relations are projected in every layer, as in v1's own models",
    "model.entity_model.project_relations": "relations are projected in every layer, as in v1's own models",
    "model.entity_model.remove_one_hop": "only the asked facts are hidden, not all between the same two entities",
    "model.entity_model.num_beam": "explain() finds the best paths exactly, without a beam",
    "model.entity_model.path_topk": "explain() takes the number of paths",
    "optimizer.betas": "AdamW's own (0.9, 0.999) are used",
    "optimizer.eps": "AdamW's own (1e-8) is used",
    "optimizer.amsgrad": "plain AdamW is used",
    "optimizer.fused": "the engine chooses",
    "optimizer.foreach": "the engine chooses",
    "train.save_best_only": "the best model is always kept, with the last train.save_total_limit checkpoints",
    "train.save_pretrained": "the model is always saved, in the run's folder model/",
    "train.timeout": "processes wait for each other as long as PyTorch does",
    "timeout": "processes wait for each other as long as PyTorch does",
    "save_pretrained": "the model is always saved, in the run's folder model/",
    "trainer.target_types": "entities and documents are both scored",
    "trainer.args.save_best_only": "the best model is always kept, with the last train.save_total_limit checkpoints",
    "trainer.args.load_best_model_at_end": "the best weights are always loaded at the end",
    "trainer.args.greater_is_better": "known for each metric",
    "trainer.args.do_predict": "gfm-evaluate output=FILE writes the scores of every question",
    "trainer.args.training_mode": _WHOLE_GRAPH,
    "trainer.args.split_graph_training": _WHOLE_GRAPH,
    "trainer.args.split_graph_inference": _WHOLE_GRAPH,
    "trainer.args.split_graph_partition": _WHOLE_GRAPH,
}
UNUSED_FINETUNE = {
    "task.strict_negative": "v1 does not use it either in fine-tuning",
    "task.num_negative": "fine-tuning scores all entities",
    "train.fast_test": "every validation question is scored",
}
UNUSED_PRETRAIN = {
    "datasets.valid_names": "v1 ignores it too: pre-training is scored on facts of the graphs in train_names",
    "doc_ranker.": "pre-training ranks no documents",
    "task.losses": "pre-training has one loss: binary cross-entropy",
    "train.init_entities_weight": "pre-training starts at the head of a fact",
}
# Names of which nothing is lost, whatever their value.
SILENT_VALUES: dict[str, tuple[Any, ...]] = {
    "text_emb_model.model_kwargs": (None, {}),
    "text_emb_model.tokenizer_kwargs": (None, {}),
    "text_emb_model.truncate_dim": (None,),
    "datasets.cfgs.force_rebuild": (None, False),
    "datasets.cfgs.force_reload": (None, False),
    "model.entity_model.remove_one_hop": (None, False),
}


def canonical(key: str) -> str:
    """v1's name of a key that v2, or another place in v1's file, has under another one."""
    if key.startswith(ENCODER_OF_DATASETS + "."):
        return "text_emb_model." + key.removeprefix(ENCODER_OF_DATASETS + ".")
    return RENAMED.get(key, key)


def is_known(key: str, exactly: bool = False) -> bool:
    """Whether GFM-RAG has such a key, used here or not; exactly: without the groups of which any key is known."""
    key = canonical(key)
    tables = (SAME, SAME_FINETUNE, SAME_PRETRAIN, TRANSLATED, TRANSLATED_FINETUNE)
    unused = (UNUSED, UNUSED_FINETUNE, UNUSED_PRETRAIN)
    if any(key in table for table in (*tables, *unused)) or key.rpartition(".")[2] == "_target_":
        return True
    return not exactly and any(reason_of(key, table) for table in unused)


def known_keys() -> list[str]:
    """All keys that are used in some training."""
    return [*SAME, *SAME_FINETUNE, *SAME_PRETRAIN, *TRANSLATED, *TRANSLATED_FINETUNE, *RENAMED]


def nearest(key: str, candidates: list[str]) -> str | None:
    """The candidate that looks most like a dotted key, by its whole or by its last name."""
    found = difflib.get_close_matches(key, candidates, n=1)
    if found:
        return found[0]
    by_name = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
    names = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1)
    return by_name[names[0]] if names else None


def reason_of(key: str, table: dict[str, str]) -> str | None:
    """Why a key is not used: by its name, or by that of its group ("wandb.")."""
    if key in table:
        return table[key]
    return next((reason for group, reason in table.items() if group.endswith(".") and key.startswith(group)), None)
