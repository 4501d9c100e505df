"""Exact top-k rows of a matrix by dot product, in bounded memory, with equal scores in the order of the rows.

All scores [B, N] are never held at once: a chunk of queries meets a chunk of rows, in one buffer that is used again.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_CHUNK = 1024
ROW_CHUNK = 8192  # 1024 x 8192 float32 scores are 32 MiB
BLOCK = 64
# Two ways to sum one dot product of unit vectors differ by less than half of this.
TOLERANCE = 1e-6


@torch.no_grad()
def top_k_rows(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` rows of highest dot product for each query.

    Args:
        queries: [B, D] float32, of length about 1.
        rows: [N, D] float32 on the same device, of length about 1.
        k: Rows for each query; at most N are given.

    Returns:
        Scores [B, K] float32, highest first, and row numbers [B, K] int64; equal scores in the order of the rows.
        A score depends on its query and row only, not on the other queries, the other rows or the chunks.
    """
    k = min(k, rows.shape[0])
    if k == 0 or queries.shape[0] == 0:
        empty = queries.new_empty(queries.shape[0], k)
        return empty, empty.long()
    parts = [_search(chunk, rows, k) for chunk in queries.split(QUERY_CHUNK)]
    return torch.cat([scores for scores, _ in parts]), torch.cat([index for _, index in parts])


def _search(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    keep = min(k + 1, rows.shape[0])  # one more than wanted shows whether the last place is contested
    buffer = queries.new_empty(queries.shape[0] * min(ROW_CHUNK, rows.shape[0]))
    best: Tensor | None = None  # [b, <= keep] scores so far
    index: Tensor | None = None  # [b, <= keep] their rows
    for start in range(0, rows.shape[0], ROW_CHUNK):
        part = rows[start : start + ROW_CHUNK]
        scores = buffer[: queries.shape[0] * part.shape[0]].view(queries.shape[0], part.shape[0])  # [b, n]
        torch.mm(queries, part.T, out=scores)
        floor = best.amin(dim=1, keepdim=True) if best is not None and best.shape[1] == keep else None
        new, where = _chunk_top_k(scores, keep, floor)
        where += start
        if best is None or index is None:
            best, index = new, where
            continue
        best, index = torch.cat([best, new], dim=1), torch.cat([index, where], dim=1)
        best, order = best.topk(min(keep, best.shape[1]), dim=1, sorted=False)
        index = index.gather(1, order)
    assert index is not None
    # A matrix product may round two equal rows differently, so the few that are left are scored in one fixed way.
    exact, index = _rank(queries, rows, index)  # [b, keep]
    if keep > k:
        contested = (exact[:, k - 1] - exact[:, k] <= TOLERANCE).nonzero().flatten()
        exact, index = exact[:, :k], index[:, :k]
        for row in contested.tolist():
            exact[row], index[row] = _search_contested(queries[row], rows, k, float(exact[row, -1]))
    return exact, index


def _chunk_top_k(scores: Tensor, keep: int, floor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best columns of `scores` [b, n], at most `keep`; those below `floor` [b, 1] may be missing."""
    b, n = scores.shape
    blocks = n // BLOCK
    if floor is None or n % BLOCK or blocks < 2 * keep:
        best = scores.topk(min(keep, n), dim=1, sorted=False)
        return best.values, best.indices
    # The maxima of blocks cost an eighth of a top-k, and few blocks reach what was found in earlier chunks already.
    maxima = scores.view(b, blocks, BLOCK).amax(dim=2)  # [b, blocks]
    needed = min(keep, int((maxima >= floor).sum(dim=1).max()))
    chosen = maxima.topk(needed, dim=1, sorted=False).indices  # [b, needed]
    columns = (chosen.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    best = scores.gather(1, columns).topk(min(keep, needed * BLOCK), dim=1, sorted=False)
    return best.values, columns.gather(1, best.indices)


def _search_contested(query: Tensor, rows: Tensor, k: int, last: float) -> tuple[Tensor, Tensor]:
    """Several rows share the last place, perhaps rows that were not found: all that come near it are ranked."""
    near = torch.cat([part @ query for part in rows.split(2**20)]) >= last - 2 * TOLERANCE
    scores, index = _rank(query.unsqueeze(0), rows, near.nonzero().T)
    return scores[0, :k], index[0, :k]


def _rank(queries: Tensor, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Exact scores of `index` [b, m], highest first, equal ones by row number; with the row numbers."""
    index = index.sort(dim=1).values
    size = max(1, 2**24 // max(1, index.shape[1] * rows.shape[1]))  # bounds the gathered [b, m, D]
    pieces = zip(queries.split(size), index.split(size), strict=True)
    scores = torch.cat([torch.linalg.vecdot(q.unsqueeze(1), rows[i]) for q, i in pieces])  # [b, m]
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores, index.gather(1, order)
