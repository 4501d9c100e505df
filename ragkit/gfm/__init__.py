"""The graph foundation model: scores a graph's entities for questions, and ranks documents by them."""

from __future__ import annotations

from ragkit.gfm.checkpoint import as_link_predictor, as_retriever, export_v1, load_gfm, save_gfm
from ragkit.gfm.losses import bce_loss, link_prediction_loss, listce_loss, retrieval_loss
from ragkit.gfm.model import GNNRetriever, QueryGNN
from ragkit.gfm.rankers import RANKERS, Incidence, entity_weights
from ragkit.gfm.settings import GFMSettings
from ragkit.gfm.weights_file import CheckpointError

__all__ = [
    "RANKERS",
    "CheckpointError",
    "GFMSettings",
    "GNNRetriever",
    "Incidence",
    "QueryGNN",
    "as_link_predictor",
    "as_retriever",
    "bce_loss",
    "entity_weights",
    "export_v1",
    "load_gfm",
    "link_prediction_loss",
    "listce_loss",
    "retrieval_loss",
    "save_gfm",
]
