"""Exact top-k rows of a matrix by dot product, in bounded memory.

A full [B, N] score matrix is never held, and no full row is ever sorted: within a chunk the rows are taken in
blocks of 64; only the `k` blocks of highest maximum can hold a top-k row, so the sort sees k * 64 scores, not N.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_CHUNK = 256
ROW_CHUNK = 16384
BLOCK = 64


def top_k_rows(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` rows of highest dot product for each query.

    Args:
        queries: [B, D] float32.
        rows: [N, D] float32 on the same device.
        k: Rows for each query; at most N are given.

    Returns:
        Scores [B, K] float32, highest first, and row numbers [B, K] int64; equal scores in the order of the rows.
        A score depends on its query and row only, not on B, N or the chunks.
    """
    k = min(k, rows.shape[0])
    if k == 0 or queries.shape[0] == 0:
        empty = queries.new_empty(queries.shape[0], k)
        return empty, empty.long()
    parts = [_search_chunk(chunk, rows, k) for chunk in queries.split(QUERY_CHUNK)]
    return torch.cat([scores for scores, _ in parts]), torch.cat([index for _, index in parts])


def _search_chunk(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best: Tensor | None = None  # [b, <= k] keys of the best rows so far
    for start in range(0, rows.shape[0], ROW_CHUNK):
        scores = queries @ rows[start : start + ROW_CHUNK].T  # [b, n]
        keys = _chunk_top_k(scores, k) - start  # a key holds minus the row number in its low half
        best = keys if best is None else torch.cat([best, keys], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    assert best is not None
    index = _row_of(best)  # [b, k]
    # Score again, one fixed summation for every pair: a matrix product may round equal rows differently.
    exact = torch.cat([torch.linalg.vecdot(q.unsqueeze(1), rows[i]) for q, i in _pieces(queries, index)])  # [b, k]
    order = _keys(exact, index).argsort(dim=1, descending=True)
    return exact.gather(1, order), index.gather(1, order)


def _chunk_top_k(scores: Tensor, k: int) -> Tensor:
    """Keys [b, <= k] of the best columns of `scores` [b, n], in no order."""
    b, n = scores.shape
    blocks = n // BLOCK
    if blocks <= 2 * k:  # nothing to gain
        columns = torch.arange(n, device=scores.device).expand(b, n)
        return _keys(scores, columns).topk(min(k, n), dim=1).values
    body = scores[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))  # [b, blocks, BLOCK]
    # If k other blocks come before block j (higher maximum, or the same and further left), each of them holds a row
    # that comes before every row of j; so the k first blocks hold the k first rows, ties included.
    block_keys = _keys(body.amax(dim=2), torch.arange(blocks, device=scores.device).expand(b, blocks))
    chosen = _row_of(block_keys.topk(k, dim=1).values)  # [b, k]
    columns = (chosen.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)  # [b, k * BLOCK]
    tail = torch.arange(blocks * BLOCK, n, device=scores.device).expand(b, n - blocks * BLOCK)
    columns = torch.cat([columns, tail], dim=1)
    return _keys(scores.gather(1, columns), columns).topk(k, dim=1).values


def _keys(scores: Tensor, index: Tensor) -> Tensor:
    """int64 keys whose order is: score, highest first; among equal scores the lower index first."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the bits of a float, in the order of the floats
    return (ordered.long() << 32) + (0xFFFFFFFF - index)


def _row_of(keys: Tensor) -> Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _pieces(queries: Tensor, index: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Slices small enough that the gathered rows [b, k, D] stay under about 2**24 numbers."""
    size = max(1, 2**24 // (index.shape[1] * queries.shape[1]))
    return list(zip(queries.split(size), index.split(size), strict=True))
