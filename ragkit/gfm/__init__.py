"""The graph foundation model: scores a graph's entities for questions, and ranks documents by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragkit.gfm.checkpoint import as_link_predictor, as_retriever, export_v1, load_gfm, save_gfm
from ragkit.gfm.evaluate import evaluate_datasets, evaluate_gfm, evaluate_rankers
from ragkit.gfm.explain import explain
from ragkit.gfm.link_evaluation import evaluate_links
from ragkit.gfm.losses import bce_loss, link_prediction_loss, listce_loss, retrieval_loss
from ragkit.gfm.model import GNNRetriever, QueryGNN
from ragkit.gfm.neighbourhood import Neighbourhood, neighbourhood
from ragkit.gfm.neighbourhood_drawing import draw_neighbourhood
from ragkit.gfm.path_drawing import draw_paths
from ragkit.gfm.paths import Explanation, Path, PathStep
from ragkit.gfm.question_rows import QuestionError, QuestionReport
from ragkit.gfm.questions import QuestionBatch, QuestionSet
from ragkit.gfm.rankers import RANKERS, Incidence, entity_weights
from ragkit.gfm.settings import GFMSettings
from ragkit.gfm.shards import mean_metrics, merge_shards
from ragkit.gfm.text_encoder import TextEncoder, embed_relations
from ragkit.gfm.triples import TrueTriples, corrupt, graph_triples, hold_out
from ragkit.gfm.weights_file import CheckpointError
from ragkit.lazy import lazy_names

if TYPE_CHECKING:
    from ragkit.gfm.entity_search import EntitySearch
    from ragkit.gfm.fact_search import FactLinker, FactSearch
    from ragkit.gfm.finetune import GFMFinetuneTrainer
    from ragkit.gfm.linking import make_linker, relinked
    from ragkit.gfm.pretrain import GFMPretrainTrainer
    from ragkit.gfm.retriever import GFMRetriever

__all__ = [
    "RANKERS",
    "CheckpointError",
    "EntitySearch",
    "Explanation",
    "FactLinker",
    "FactSearch",
    "GFMFinetuneTrainer",
    "GFMPretrainTrainer",
    "GFMRetriever",
    "GFMSettings",
    "GNNRetriever",
    "Incidence",
    "Neighbourhood",
    "Path",
    "PathStep",
    "QueryGNN",
    "QuestionBatch",
    "QuestionError",
    "QuestionReport",
    "QuestionSet",
    "TextEncoder",
    "TrueTriples",
    "as_link_predictor",
    "as_retriever",
    "bce_loss",
    "corrupt",
    "draw_neighbourhood",
    "draw_paths",
    "embed_relations",
    "entity_weights",
    "evaluate_datasets",
    "evaluate_gfm",
    "evaluate_links",
    "evaluate_rankers",
    "explain",
    "export_v1",
    "graph_triples",
    "hold_out",
    "link_prediction_loss",
    "listce_loss",
    "load_gfm",
    "make_linker",
    "mean_metrics",
    "merge_shards",
    "neighbourhood",
    "relinked",
    "retrieval_loss",
    "save_gfm",
]

_LATER = {  # these import transformers
    "EntitySearch": "ragkit.gfm.entity_search",
    "FactLinker": "ragkit.gfm.fact_search",
    "FactSearch": "ragkit.gfm.fact_search",
    "GFMFinetuneTrainer": "ragkit.gfm.finetune",
    "GFMPretrainTrainer": "ragkit.gfm.pretrain",
    "GFMRetriever": "ragkit.gfm.retriever",
    "make_linker": "ragkit.gfm.linking",
    "relinked": "ragkit.gfm.linking",
}


__getattr__, __dir__ = lazy_names(__name__, _LATER)
