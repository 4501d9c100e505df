"""The graph foundation model: scores a graph's entities for questions, and ranks documents by them."""

from __future__ import annotations

from ragkit.gfm.losses import bce_loss, link_prediction_loss, listce_loss, retrieval_loss
from ragkit.gfm.model import GNNRetriever, QueryGNN
from ragkit.gfm.rankers import RANKERS, Incidence, entity_weights
from ragkit.gfm.settings import GFMSettings

__all__ = [
    "RANKERS",
    "GFMSettings",
    "GNNRetriever",
    "Incidence",
    "QueryGNN",
    "bce_loss",
    "entity_weights",
    "link_prediction_loss",
    "listce_loss",
    "retrieval_loss",
]
