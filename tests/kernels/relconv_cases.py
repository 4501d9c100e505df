"""Checks of the Triton backend that run wherever its kernels do: on a GPU, or on the CPU in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernels/relconv_cases.py    # one JSON line per check

Every function of the backend is compared with float64 PyTorch on the same rounded inputs. New memory is filled with
NaN first (`torch.use_deterministic_algorithms`), so that an element which is never written is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import case_tools
import torch
from case_tools import DTYPES, Result, compare, copy_to
from ragkit_kernels.relational_conv import build_layout, reference
from ragkit_kernels.relational_conv.layout import GraphLayout
from relconv_graphs import GRAPHS, Edges
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of every conv function.

    Attributes:
        graph: A name of `relconv_graphs.GRAPHS`, or "rectangular".
        B, D: Queries and columns.
        boundary: "none", "dense", "expanded" (one row for all nodes), or "factored".
        weight, keep: With edge weights (0 and negative ones among them), with removed edges.
        per_query: A relation table per query.
        strided: States and boundary are columns of wider tensors, the result is the right half of a buffer.
    """

    graph: str
    B: int
    D: int
    message: str
    aggregate: str
    dtype: str = "fp32"
    boundary: str = "none"
    weight: bool = False
    keep: bool = False
    per_query: bool = False
    strided: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("weight", "keep", "per_query", "strided") if getattr(self, name)]
        return "-".join(
            [self.graph.replace(" ", "_"), f"B{self.B}-D{self.D}", self.message, self.aggregate, self.dtype]
            + [self.boundary, *flags]
        )


MAIN = {"boundary": "factored", "strided": True}
FULL = {"boundary": "dense", "weight": True, "keep": True}
SPLIT = "degrees around the split size"
CASES = [
    *(
        Case(g, 2, 5, "distmult", a, **FULL)
        for g in ("no node", "no edge", "one node")
        for a in ("mean", "max", "pna")
    ),
    Case("no edge", 1, 1, "transe", "sum"),
    Case("one node", 1, 1, "transe", "sum", "fp16", boundary="factored"),
    Case("isolated nodes, self loops, equal edges", 3, 5, "distmult", "sum", **MAIN),
    Case("isolated nodes, self loops, equal edges", 3, 5, "transe", "mean", "fp16", weight=True),
    Case("isolated nodes, self loops, equal edges", 3, 5, "distmult", "max", "fp16", boundary="factored"),
    Case("isolated nodes, self loops, equal edges", 9, 31, "transe", "pna", per_query=True),
    Case("a hub with all edges", 1, 31, "distmult", "sum", "fp16", **MAIN),
    Case("a hub with all edges", 2, 31, "distmult", "mean", **FULL),
    Case("a hub with all edges", 1, 31, "transe", "max", boundary="expanded", keep=True),
    Case("a hub with all edges", 1, 5, "distmult", "pna", "fp16", boundary="factored", weight=True),
    Case("one relation with all edges", 1, 100, "distmult", "sum", boundary="expanded", strided=True),
    Case("one relation with all edges", 3, 31, "transe", "max", "fp16", weight=True),
    Case("one relation with all edges", 1, 5, "distmult", "pna", keep=True),
    Case("one relation with all edges", 2, 5, "transe", "sum", per_query=True, weight=True),
    Case("unused relation ids", 3, 31, "distmult", "sum", "fp16", per_query=True, keep=True),
    Case("unused relation ids", 1, 1, "transe", "pna", boundary="dense"),
    Case(SPLIT, 1, 31, "distmult", "sum", **FULL),
    Case(SPLIT, 1, 31, "transe", "max", "fp16", boundary="factored"),
    Case(SPLIT, 1, 31, "distmult", "pna", "fp32", boundary="factored", weight=True),
    Case("random", 1, 512, "distmult", "sum", boundary="factored"),
    Case("random", 1, 600, "transe", "max", "fp16", weight=True, strided=True),
    Case("random", 8, 64, "distmult", "mean", "fp16", **FULL),
    Case("unused relation ids", 9, 130, "transe", "pna", boundary="factored", strided=True),
    Case("rectangular", 3, 31, "distmult", "sum", **MAIN),
    Case("rectangular", 2, 5, "transe", "max", boundary="dense", weight=True),
    Case("isolated nodes, self loops, equal edges", 3, 5, "distmult", "sum", "bf16", **MAIN),
    Case("unused relation ids", 1, 31, "transe", "max", "bf16", boundary="dense"),
    Case("unused relation ids", 2, 31, "distmult", "pna", "bf16", weight=True),
]


def graph_of(case: Case) -> GraphLayout:
    if case.graph != "rectangular":
        return GRAPHS[case.graph].layout()
    g = torch.Generator().manual_seed(6)
    dst, src, rel = (torch.randint(k, (90,), generator=g) for k in (6, 11, 4))
    dst[:70] = 2
    return build_layout(dst, src, rel, num_nodes=11, num_relations=4, num_dst=6)


@dataclass
class Inputs:
    """Arguments of the backend, on the CPU; weight and keep in the order of `by_dst`."""

    layout: GraphLayout
    x: Tensor
    relation: Tensor
    boundary: Tensor | None
    mask: Tensor | None
    query: Tensor | None
    weight: Tensor | None
    keep: Tensor | None


def inputs_of(case: Case) -> Inputs:
    layout = graph_of(case)
    N, M, R, E = layout.num_nodes, layout.num_dst, layout.num_relations, layout.num_edges
    B, D, dtype = case.B, case.D, DTYPES[case.dtype]
    g = torch.Generator().manual_seed(len(str(case)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    pad = 3 if case.strided else 0
    x = draw(B, N, D + pad).transpose(0, 1)[..., pad:] if case.strided else draw(N, B, D)
    relation = draw(*((B,) if case.per_query else ()), R, D + pad)[..., :D]
    boundary = mask = query = None
    if case.boundary == "dense":
        boundary = draw(M, B, D + pad)[..., :D]
    elif case.boundary == "expanded":
        boundary = draw(B, D).expand(M, B, D)
    elif case.boundary == "factored":
        mask = (torch.rand(B, M, generator=g) < 0.5).float().T * 2
        query = draw(B, D + pad)[:, :D]
    weight = (torch.randn(E, generator=g) * (torch.arange(E) % 7 != 3)) if case.weight else None
    keep = (torch.rand(E, generator=g) < 0.7).to(torch.uint8) if case.keep else None
    return Inputs(layout, x, relation, boundary, mask, query, weight, keep)


def conv_results(case: Case, device: str) -> Iterator[Result]:
    """Forward and the three gradients of one case."""
    from ragkit_kernels.relational_conv import triton_backend as backend

    i, dtype = inputs_of(case), DTYPES[case.dtype]
    x, relation, boundary, mask, query, weight, keep = (
        None if t is None else copy_to(t, device)
        for t in (i.x, i.relation, i.boundary, i.mask, i.query, i.weight, i.keep)
    )
    layout = i.layout.to(device)
    M, (B, D) = layout.num_dst, i.x.shape[1:]
    C = D * (4 if case.aggregate == "pna" else 1)
    buffer = x.new_full((M, B, C * (2 if case.strided else 1)), float("nan"))
    out = buffer[..., -C:] if C else buffer
    won = backend.conv_forward(
        x, relation, boundary, mask, query, weight, keep, layout, case.message, case.aggregate, out
    )
    assert not case.strided or buffer[..., :C].isnan().all(), "wrote beside its result"

    def forward(as_dtype: torch.dtype) -> Tensor:
        given = i.boundary if i.boundary is not None else None if i.mask is None else (i.mask, i.query)
        cast = tuple(t.to(as_dtype) for t in given) if isinstance(given, tuple) else given
        by_edge = torch.empty(i.layout.num_edges, dtype=torch.long)
        by_edge[i.layout.order.long()] = torch.arange(i.layout.num_edges)  # the reference takes the order given
        return reference.relational_conv_reference(
            i.x.to(as_dtype),
            i.relation.to(as_dtype),
            i.layout,
            boundary=cast.to(as_dtype) if isinstance(cast, Tensor) else cast,
            edge_weight=None if i.weight is None else i.weight[by_edge].to(as_dtype),
            edge_mask=None if i.keep is None else i.keep[by_edge].bool(),
            message=case.message,
            aggregate=case.aggregate,
        )

    exact, same = forward(torch.float64), forward(dtype)
    planes = ("mean", "max", "min", "std") if case.aggregate == "pna" else ("out",)
    for k, name in enumerate(planes):
        part = slice(k * D, (k + 1) * D)
        yield compare(name, out[..., part], exact[..., part], same[..., part], dtype, gradient=False)

    g = torch.Generator().manual_seed(7)
    wide = torch.randn(M, B, C + 4, generator=g).to(dtype)
    grad = wide[..., 2 : C + 2] if case.strided else wide[..., :C].contiguous()
    base = torch.randn(i.x.shape, generator=g).to(dtype)
    wanted, rough = (passed_back(case, i, grad, base, kind) for kind in (torch.float64, torch.float32))
    arguments = (copy_to(grad, device), won, x, relation)
    dx = torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)
    tail = (layout, case.message, case.aggregate)
    backend.conv_backward_x(*arguments, weight, keep, *tail, copy_to(base, device), dx)
    yield compare("dx", dx, wanted[0], rough[0], dtype, gradient=True)
    drelation = backend.conv_backward_relation(*arguments, weight, keep, *tail)
    assert drelation.dtype == dtype
    yield compare("drelation", drelation, wanted[1], rough[1], dtype, gradient=True)
    dweight = backend.conv_backward_weight(*arguments, keep, *tail)
    assert dweight.dtype == torch.float32
    yield compare("dweight", dweight, wanted[2], rough[2], torch.float32, gradient=True)


def passed_back(case: Case, i: Inputs, grad: Tensor, base: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients (plus `base` for the states) of what the nodes pass back to their messages, by autograd.

    `grad` [N, B, D] is that of the sum ("sum", "mean") or of the winning message ("max"); for PNA its planes are those
    of the sum, the largest, the smallest and the sum of squares.
    """
    x, relation = (t.detach().to(dtype).requires_grad_() for t in (i.x, i.relation))
    E, M, (B, D) = i.layout.num_edges, i.layout.num_dst, x.shape[1:]
    weight = (torch.ones(E) if i.weight is None else i.weight).to(dtype).requires_grad_()
    kept = torch.arange(E) if i.keep is None else i.keep.nonzero().squeeze(1)
    src, rel, _ = i.layout.by_dst.edges.long()[:, kept]
    dst = torch.arange(M).repeat_interleave(i.layout.by_dst.ptr.diff().long())[kept]
    r = relation[rel].unsqueeze(1) if relation.ndim == 2 else relation[:, rel].transpose(0, 1)
    plain = x[src] * r if case.message == "distmult" else x[src] + r  # [E, B, D]
    messages = plain * weight[kept][:, None, None]
    given = i.boundary if i.boundary is not None else None if i.mask is None else (i.mask.to(dtype), i.query.to(dtype))
    start = reference.dense_boundary(given, torch.zeros(M, B, D)).to(dtype)
    zero = torch.zeros(M, B, D, dtype=dtype)
    if case.aggregate == "max":
        parts = [reference._largest(messages, dst, start)]
    else:
        parts = [zero.index_add(0, dst, messages)]
    if case.aggregate == "pna":
        parts += [reference._largest(messages, dst, start), -reference._largest(-messages, dst, -start)]
        parts += [zero.index_add(0, dst, plain.square() * weight[kept][:, None, None])]
    value = (torch.cat(parts, -1) * grad.to(dtype)).sum() + (x * base.to(dtype)).sum()
    found = torch.autograd.grad(value, [x, relation, weight], allow_unused=True, materialize_grads=True)
    return tuple(found)


@contextlib.contextmanager
def long_strips() -> Iterator[None]:
    """Few programs, each with several steps over its rows, as for inputs of a hundred thousand rows."""
    from ragkit_kernels.relational_conv import triton_backend as backend

    usual, backend.STRIPS = backend.STRIPS, 2
    try:
        yield
    finally:
        backend.STRIPS = usual


NORMS = [
    (shape, dtype, norm, residual)
    for shape, norm, residual in (
        ((5, 3, 31), True, True),
        ((0, 2, 8), True, True),
        ((37, 1, 1), True, False),
        ((9, 2, 100), False, True),
        ((3, 1, 512), True, True),
        ((70, 3, 7), True, True),
    )
    for dtype in ("fp32", "fp16", "bf16")
]


def norm_results(case: tuple, device: str) -> Iterator[Result]:
    """LayerNorm + ReLU + residual into the left half of a buffer, forward and backward."""
    from ragkit_kernels.relational_conv import triton_backend as backend

    (N, B, D), name, norm, residual = case
    dtype, g = DTYPES[name], torch.Generator().manual_seed(N + D)
    h = torch.randn(N, B, D, generator=g).to(dtype)
    x = torch.randn(B, N, D + 2, generator=g).to(dtype).transpose(0, 1)[..., 1:-1] if residual else None
    weight, bias = (torch.randn(D, generator=g), torch.randn(D, generator=g)) if norm else (None, None)
    grad = torch.randn(N, B, 2 * D, generator=g).to(dtype)[..., D:]
    buffer = torch.full((N, B, 2 * D), float("nan"), dtype=dtype, device=device)
    on = [None if t is None else copy_to(t, device) for t in (h, x, weight, bias, grad)]
    backend.norm_forward(*on[:4], 1e-5, buffer[..., :D])
    assert buffer[..., D:].isnan().all(), "wrote beside its result"
    found = backend.norm_backward(on[4], on[0], *on[2:4], 1e-5)
    with long_strips():
        again = backend.norm_backward(on[4], on[0], *on[2:4], 1e-5)

    def exact(kind: torch.dtype, rounded: torch.dtype) -> list[Tensor]:
        leaves = [None if t is None else t.to(kind).requires_grad_() for t in (h, weight, bias)]
        other = None if x is None else x.to(kind)
        value = reference.norm_relu_residual_reference(leaves[0], other, leaves[1], leaves[2], 1e-5)
        grads = torch.autograd.grad(value, [t for t in leaves if t is not None], grad.to(kind))
        more = [] if norm else [torch.zeros(D, dtype=kind)] * 2
        return [value.to(rounded), *grads, *more]

    wanted, rough = exact(torch.float64, torch.float64), exact(torch.float32, dtype)
    yield compare("norm", buffer[..., :D], wanted[0], rough[0], dtype, gradient=False)
    for k, part in enumerate(("dh", "dweight", "dbias")):
        kind = dtype if k == 0 else torch.float32
        for ours in (found, again):
            yield compare(part, ours[k], wanted[k + 1], rough[k + 1], kind, gradient=True)


DOTS = [
    (shape, dtype, shared)
    for shape, shared in (
        ((7, 3, 31), False),
        ((0, 2, 8), False),
        ((40, 1, 1), False),
        ((5, 2, 300), True),
        ((33, 5, 6), True),
    )
    for dtype in ("fp32", "fp16", "bf16")
]


def dot_results(case: tuple, device: str) -> Iterator[Result]:
    """The scoring head, forward and backward."""
    from ragkit_kernels.relational_conv import triton_backend as backend

    (N, B, H), name, shared = case
    dtype, g = DTYPES[name], torch.Generator().manual_seed(N + H)
    h = torch.randn(N, 1 if shared else B, H + 1, generator=g).to(dtype)[..., 1:]
    c, w, grad = (torch.randn(*shape, generator=g) for shape in ((B, H), (H,), (N, B)))
    on = [copy_to(t, device) for t in (grad, h, c, w)]
    out, found = backend.dot_forward(*on[1:]), backend.dot_backward(*on)
    with long_strips():
        again = backend.dot_backward(*on)

    def exact(kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (h, c, w)]
        value = reference.relu_dot_reference(*leaves)
        return [value, *torch.autograd.grad(value, leaves, grad.to(kind))]

    wanted, rough = exact(torch.float64), exact(torch.float32)
    yield compare("dot", out, wanted[0], rough[0], torch.float32, gradient=False)
    for k, part in enumerate(("dh", "dc", "dw")):
        kind = dtype if k == 0 else torch.float32
        for ours in (found, again):
            yield compare(part, ours[k], wanted[k + 1], rough[k + 1], kind, gradient=True)


FAR = [
    (message, aggregate, axis)
    for axis in ("node", "query")
    for message, aggregate in (("distmult", "sum"), ("transe", "pna"))
]
STRIDE = 2**27  # times 17 is more than 2³¹, and the stride itself still fits into 32 bits


def far_results(case: tuple[str, str, str], device: str) -> Iterator[Result]:
    """The last row (or query) of every strided tensor lies more than 2³¹ elements from the first.

    One allocation of 5 GB holds them all; only the few pages that are touched become real memory.
    """
    from ragkit_kernels.relational_conv import triton_backend as backend

    message, aggregate, axis = case
    N, B, D, R = (18, 2, 4, 18) if axis == "node" else (3, 18, 4, 3)
    C = D * (4 if aggregate == "pna" else 1)
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty(18 * STRIDE, dtype=torch.float16, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    taken = iter(range(0, 1 << 20, 1 << 12))

    def place(shape: tuple[int, ...], values: Tensor | None = None) -> Tensor:
        """A tensor [rows, B, ...] with one far stride."""
        near = shape[1] * shape[2] if axis == "node" else shape[0] * shape[2]
        strides = (STRIDE, near // shape[1], 1) if axis == "node" else (near // shape[0], STRIDE, 1)
        view = memory.as_strided(shape, strides, next(taken))
        view.copy_(torch.full(shape, float("nan")) if values is None else values)
        return view

    g = torch.Generator().manual_seed(3)
    last, few = N - 1, torch.arange(N)
    edges = Edges(few.flip(0), few, few % R, N, R)
    layout = edges.layout()
    x = torch.randn(N, B, D, generator=g).half()
    table = torch.randn(B, R, D, generator=g).half()
    start = torch.randn(N, B, D, generator=g).half()
    grad = torch.randn(N, B, C, generator=g).half()
    far_table = place((R, B, D), table.transpose(0, 1)).transpose(0, 1)
    far_x, far_start, far_grad = place(x.shape, x), place(x.shape, start), place(grad.shape, grad)
    far_out, far_dx = place(grad.shape), place(x.shape)
    moved = layout.to(device)
    won = backend.conv_forward(far_x, far_table, far_start, None, None, None, None, moved, message, aggregate, far_out)
    tail = (moved, message, aggregate)
    backend.conv_backward_x(far_grad, won, far_x, far_table, None, None, *tail, far_start, far_dx)
    drelation = backend.conv_backward_relation(far_grad, won, far_x, far_table, None, None, *tail)
    dweight = backend.conv_backward_weight(far_grad, won, far_x, far_table, None, *tail)
    assert far_x.stride(0 if axis == "node" else 1) * max(last, B - 1) > 2**31

    case_ = Case("far", B, D, message, aggregate, "fp16", boundary="dense", per_query=True)
    i = Inputs(layout, x, table, start, None, None, None, None)
    for kind, dtype in (("exact", torch.float64), ("rough", torch.float32)):
        value = reference.relational_conv_reference(
            x.to(dtype), table.to(dtype), layout, boundary=start.to(dtype), message=message, aggregate=aggregate
        )
        both = [value, *passed_back(case_, i, grad, start, dtype)]
        if kind == "exact":
            wanted = both
    for k, (name, ours) in enumerate(
        (("out", far_out), ("dx", far_dx), ("drelation", drelation), ("dweight", dweight))
    ):
        yield compare(name, ours, wanted[k], both[k], torch.float32 if k == 3 else torch.float16, gradient=k > 0)


def all_checks() -> dict[str, tuple]:
    """Name -> (function, case), in the order in which they run."""
    checks: dict[str, tuple] = {f"conv-{case}": (conv_results, case) for case in CASES}
    checks |= {f"norm-{'x'.join(map(str, s))}-{d}-{n}-{r}": (norm_results, (s, d, n, r)) for s, d, n, r in NORMS}
    checks |= {f"dot-{'x'.join(map(str, s))}-{d}-{r}": (dot_results, (s, d, r)) for s, d, r in DOTS}
    return checks | {"far-" + "-".join(case): (far_results, case) for case in FAR}


if __name__ == "__main__":
    case_tools.main(all_checks())
