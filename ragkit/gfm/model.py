"""The graph foundation model: one trunk, asked with a question (`GNNRetriever`) or a relation (`QueryGNN`).

Parameter names are those of GFM-RAG v1, so that its checkpoints load. Luo et al. 2025 (arXiv:2502.01113); the maths is
NBFNet's (arXiv:2106.06935) with ULTRA's relation tables (arXiv:2310.04562).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ragkit_kernels.relational_conv import GraphLayout
from torch import Tensor, nn

from ragkit.gfm.active import ActiveRows
from ragkit.gfm.active_states import (
    Background,
    active_logits,
    background_bytes,
    choose_rows,
    compute_background,
    supported,
)
from ragkit.gfm.easy_edges import inverse
from ragkit.gfm.entity_model import EntityModel
from ragkit.gfm.graph_view import GraphView, view_of
from ragkit.gfm.masks import dense_mask
from ragkit.gfm.relation_tables import KeptValue, KeptValues, RelationTables, compute_tables
from ragkit.gfm.settings import GFMSettings
from ragkit.gfm.triple_rows import check_triples, tail_form
from ragkit.graph import GraphError


class GraphModel(nn.Module):
    """What both models share: the relation tables and the entity model.

    Attributes:
        settings: Sizes and kinds.
        encoder_info: What is known of the text encoder that the model was trained with (from its checkpoint).
        new_parameters: Names of parameters that the checkpoint did not have.
    """

    def __init__(self, settings: GFMSettings) -> None:
        super().__init__()
        self.settings = settings
        self.rel_mlp = nn.Linear(settings.rel_emb_dim, settings.input_dim)
        self.entity_model = EntityModel(settings)
        self.encoder_info: dict[str, Any] | None = None
        self.new_parameters: list[str] = []
        self._cache = KeptValue()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.rel_mlp.weight.device

    def relations(self, graph: Any) -> RelationTables:
        """The relation tables of a graph: [R, D] before the layers, and [R, D] for each layer.

        In eval mode without gradient they are kept for the next call with the same graph and weights. PyTorch does not
        count changes through `parameter.data`: after those call `eval()` again, which forgets what was kept.

        Raises:
            GraphError: The graph's relation embeddings are missing or wrong.
        """
        rel_emb = view_of(graph).check_rel_emb(getattr(graph, "rel_emb", None), self.settings.rel_emb_dim)
        keep = self._keeps()
        weights = [*self.rel_mlp.parameters(), *self.entity_model.layers.parameters()]
        made_of = [rel_emb, *weights]
        tables = self._cache.get(made_of) if keep else None
        if tables is None:
            layers: Any = self.entity_model.layers
            tables = compute_tables(self.rel_mlp, layers, rel_emb.to(self.device, self.rel_mlp.weight.dtype))
            if keep:
                self._cache.put(made_of, tables)
        return tables

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Holds only the states between the layers for the backward pass, which runs each layer anew.

        Less memory for more time. `transformers.Trainer` calls it where its arguments ask for checkpointing.

        Args:
            activation_checkpointing_kwargs: None or {"use_reentrant": False}, the kind that there is.
            every_n_layers: 1: every layer.
            offload: False: what is held stays on the device.

        Raises:
            ValueError: Other options.
        """
        found = activation_checkpointing_kwargs, every_n_layers, offload
        if found[0] not in (None, {}, {"use_reentrant": False}) or found[1:] != (1, False):
            raise ValueError(
                'checkpointing: expected None or {"use_reentrant": False}, every_n_layers=1 and offload=False, found '
                f"{found[0]}, {every_n_layers} and {offload}"
            )
        self.entity_model.recompute = True

    def activation_checkpointing_disable(self) -> None:
        """Holds what every layer computed, as at first."""
        self.entity_model.recompute = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """`activation_checkpointing_enable` under the name that transformers had for it before version 5."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` under its older name."""
        self.activation_checkpointing_disable()

    def _keeps(self) -> bool:
        """Whether what depends on the weights alone is kept for the next call."""
        return not torch.is_grad_enabled() and not self.training

    def _forget(self) -> None:
        for value in self.__dict__.values():
            if isinstance(value, (KeptValue, KeptValues)):
                value.clear()

    def relation_tables(self, graph: Any) -> list[Tensor]:
        """For each layer its relation table [R, D]; see `relations`."""
        return self.relations(graph).layers

    def train(self, mode: bool = True) -> Any:
        """Sets the mode, and forgets what was kept."""
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # .to(), .half(), ...
        self._forget()
        return super()._apply(fn, recurse)


class GNNRetriever(GraphModel):
    """Scores every entity of a graph for questions.

        q = question_mlp(question embedding),  x_0[n] = mask[n] · weight[n] · q,  logits[n] = mlp([x_L[n] ; q])

    Args:
        settings: Sizes and kinds.

    Attributes:
        rows: "dense" computes every entity for every question; "active" the graph's background once (kept at
            inference) and for each question the entities that it changes (see `active.py`); "auto" what has fewer
            rows to compute. All give the same logits to rounding.
        background_limit: Bytes of backgrounds (of several graphs, the last used) that may be kept.

    Example:
        >>> model = GNNRetriever(GFMSettings(rel_emb_dim=8, input_dim=4, hidden_dims=[4, 4]))
        >>> logits = model(graph, question_embeddings, [[0], [3, 5]])  # doctest: +SKIP
    """

    def __init__(self, settings: GFMSettings) -> None:
        super().__init__(settings)
        self.question_mlp = nn.Linear(settings.rel_emb_dim, settings.input_dim)
        self.rows = "auto"
        self.background_limit = 2 << 30
        self._kept_backgrounds = KeptValues()

    def forward(
        self,
        graph: Any,
        question_embeddings: Tensor,
        question_entities_mask: Tensor | Sequence[Any],
        entities_weight: Tensor | None = None,
    ) -> Tensor:
        """Logits of all entities.

        Args:
            graph: `KnowledgeGraph`, or PyG `Data` with edge_index, edge_type, num_nodes, num_relations and rel_emb.
                Messages go from `edge_index[1]` to `edge_index[0]`.
            question_embeddings: [B, F], from the encoder of the relation embeddings.
            question_entities_mask: Entities of each question: [B, N] numbers, or B lists of ids.
            entities_weight: [N] factors of the mask (`ragkit.gfm.entity_weights(graph)`); None: ones.

        Returns:
            [B, N] logits, float32.

        Raises:
            GraphError: The graph or its relation embeddings do not fit.
            ValueError: Sizes that differ, ids out of range, NaN or infinite embeddings.
        """
        view = view_of(graph)
        query, mask = self.inputs(view, question_embeddings, question_entities_mask, entities_weight)
        layout, tables = view.layout(self.device), self.relation_tables(graph)
        rows = self.choose_rows(layout, mask)
        if rows is None:
            logits = self.entity_model.score(self.entity_model.states(layout, tables, mask, query), query)
        else:
            background = self.background(graph, layout, tables)
            logits = active_logits(self.entity_model, rows, background, tables, layout, mask, query)
        return logits.t().contiguous()  # [N, B] -> [B, N]

    def choose_rows(self, layout: GraphLayout, mask: Tensor) -> ActiveRows | None:
        """The rows that questions with this mask [N, B] change, or None for the dense path.

        Raises:
            ValueError: `rows` is none of the three, or "active" with settings that it cannot do.
        """
        if self.rows not in ("auto", "dense", "active"):
            raise ValueError(f'rows must be "auto", "dense" or "active", found {self.rows!r}')
        if self.rows == "dense":
            return None
        if mask.requires_grad:  # a gradient also where the mask is 0, which makes no row active
            if self.rows == "active":
                raise ValueError('rows="active" has no gradient for the mask or the entities\' weights; use "dense"')
            return None
        if self.rows == "active":
            if not supported(self.entity_model):
                raise ValueError(
                    'rows="active" needs aggregate_func sum or mean, equal hidden_dims, num_mlp_layer=2, '
                    "and no concat_hidden"
                )
            return choose_rows(self.entity_model, layout, mask, most=float("inf"))
        if background_bytes(self.entity_model, layout.num_nodes) > self.background_limit:
            return None
        return choose_rows(self.entity_model, layout, mask, background_kept=self._keeps())

    def background(self, graph: Any, layout: GraphLayout, tables: list[Tensor]) -> Background:
        """A graph's states without a question; at inference kept while weights and graph stay."""
        if not self._keeps():
            return compute_background(self.entity_model, layout, tables)
        made_of = [graph.rel_emb, layout.order, *self.parameters()]
        kept = self._kept_backgrounds.get(made_of)
        if kept is None:
            kept = compute_background(self.entity_model, layout, tables)
            size = background_bytes(self.entity_model, layout.num_nodes)
            self._kept_backgrounds.put(made_of, kept, size, self.background_limit)
        return kept

    def inputs(
        self,
        view: GraphView,
        question_embeddings: Tensor,
        question_entities_mask: Tensor | Sequence[Any],
        entities_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(query [B, D], weighted mask [N, B]) on the model's device, checked."""
        wanted = self.settings.rel_emb_dim
        e = question_embeddings
        if e.ndim != 2 or not e.is_floating_point():
            raise ValueError(f"question_embeddings: expected floats [B, {wanted}], found {e.dtype} {list(e.shape)}")
        if e.shape[1] != wanted:
            raise ValueError(
                f"question_embeddings: the encoder gives {e.shape[1]}, the model wants {wanted} numbers for a text"
            )
        if not torch.isfinite(e).all():
            row = int((~torch.isfinite(e)).any(1).nonzero()[0])
            raise ValueError(f"question_embeddings: row {row} holds NaN or infinity")
        N, B = view.num_nodes, len(e)
        mask = dense_mask(question_entities_mask, B, N, self.device, "question_entities_mask")
        if entities_weight is not None:
            entities_weight = torch.as_tensor(entities_weight)
            if tuple(entities_weight.shape) != (N,):
                raise ValueError(f"entities_weight: expected [{N}], found {list(entities_weight.shape)}")
            if not torch.isfinite(entities_weight).all():
                raise ValueError("entities_weight holds NaN or infinity")
            mask = mask * entities_weight.to(mask)
        query = self.question_mlp(e.to(self.device, self.question_mlp.weight.dtype))
        return query, mask.t().contiguous()  # [B, N] -> [N, B]


class QueryGNN(GraphModel):
    """Scores candidate tails of (head, relation, ?): the link prediction that pre-trains a `GNNRetriever`.

        q = R0[relation],  x_0 = one-hot(head) · q,  score(tail) = mlp([x_L[tail] ; q])

    Args:
        settings: Sizes and kinds.
    """

    def forward(
        self,
        graph: Any,
        batch_htr: Tensor,
        remove_easy_edges: bool | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Scores of the candidates.

        Args:
            graph: As in `GNNRetriever.forward`; relation r + R/2 is the inverse of relation r.
            batch_htr: [B, 1 + negatives, 3] ids (head, tail, relation), the first of a row positive, the others with
                its head and other tails, or with its tail and other heads. The latter are asked as
                (tail, inverse relation, ?).
            remove_easy_edges: Hides the edges that are candidates themselves, and their inverses, from the message
                passing (GFM-RAG v1 always does); None: while training.
            hidden: [B', K, 3] the triples that are hidden then, where they are not those of `batch_htr`: with several
                processes those of all their batches, so that each walks the graph that one process would.

        Returns:
            [B, 1 + negatives] logits.

        Raises:
            GraphError: The graph or its relation embeddings do not fit.
            ValueError: Ids out of range, or a row whose heads and tails both differ.
        """
        view = paired_view(graph)
        batch_htr = batch_htr.to(self.device)
        check_triples(batch_htr, view.num_nodes, view.num_relations)
        head, tail, rel = batch_htr.unbind(-1)  # [B, K] each
        edge_mask = None
        if self.training if remove_easy_edges is None else remove_easy_edges:
            h, t, r = (head, tail, rel) if hidden is None else hidden.to(self.device).unbind(-1)
            back = inverse(r, view.num_relations)
            edge_mask = view.edges(self.device).mask_without(
                torch.cat([h, t]).flatten(), torch.cat([r, back]).flatten(), torch.cat([t, h]).flatten()
            )
        head, tail, rel = tail_form(head, tail, rel, view.num_relations)
        parts, query = self._walk(graph, view, head[:, 0], rel[:, 0], edge_mask)
        rows = torch.arange(len(head), device=self.device)
        wanted = [part[tail.t(), rows] for part in parts]  # [N, B, D] -> [K, B, D]: the head runs on candidates only
        return self.entity_model.score(wanted, query).t().contiguous()  # [K, B] -> [B, K]

    def score_all(self, graph: Any, head: Tensor, relation: Tensor) -> Tensor:
        """Scores of all entities as tails of (head, relation, ?), with every edge of the graph in place.

        The same as `forward` with all N candidates and `remove_easy_edges=False`.

        Args:
            graph: As in `forward`.
            head: [B] integer ids.
            relation: [B] integer ids; r + R/2 asks for the heads of relation r.

        Returns:
            [B, N] logits.

        Raises:
            GraphError: The graph or its relation embeddings do not fit.
            ValueError: Ids out of range, or not one relation for each head.
        """
        view = paired_view(graph)
        if head.ndim != 1 or head.shape != relation.shape:
            raise ValueError(
                f"expected head [B] and relation [B], found {list(head.shape)} and {list(relation.shape)}"
            )
        batch = torch.stack([head, head, relation], 1).to(self.device)  # [B, 3]
        check_triples(batch[:, None], view.num_nodes, view.num_relations)
        parts, query = self._walk(graph, view, batch[:, 0], batch[:, 2])
        return self.entity_model.score(parts, query).t().contiguous()  # [N, B] -> [B, N]

    def _walk(
        self, graph: Any, view: GraphView, head: Tensor, rel: Tensor, edge_mask: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """States [N, B, D] of B queries (several with concat_hidden), and the queries [B, D]."""
        tables = self.relations(graph)
        query = tables.base[rel]  # [R, D] -> [B, D]
        mask = torch.zeros(view.num_nodes, len(head), device=self.device)
        mask[head, torch.arange(len(head), device=self.device)] = 1.0
        states = self.entity_model.states(view.layout(self.device), tables.layers, mask, query, edge_mask=edge_mask)
        return ([states] if isinstance(states, Tensor) else states), query


def paired_view(graph: Any) -> GraphView:
    """The graph's view, if each relation has its inverse.

    Raises:
        GraphError: The number of relations is odd, or the graph does not fit.
    """
    view = view_of(graph)
    if view.num_relations % 2:
        raise GraphError(
            f"{view.num_relations} relations: link prediction needs an inverse r + R/2 for each relation r"
        )
    return view
