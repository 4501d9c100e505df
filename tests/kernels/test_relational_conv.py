"""The op against a loop written out by hand, the float64 reference, gradcheck, and properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragkit_kernels.relational_conv import build_layout, relational_conv, relational_conv_reference
from relconv_graphs import GRAPHS, any_edges, edges, random_edges
from torch.library import opcheck

VARIANTS = list(itertools.product(["distmult", "transe"], ["sum", "mean", "max", "pna"]))
BOUNDARIES = ["none", "dense", "factored"]


def operands(case, B, D, dtype=torch.float64, boundary="factored", per_query=False, seed=0):
    """Random inputs, each with gradient, and the keyword arguments of the op."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    x = draw(case.nodes, B, D)
    relation = draw(*((B,) if per_query else ()), case.relations, D)
    mask = (torch.rand(case.nodes, B, generator=g) < 0.4).to(dtype).requires_grad_()
    given = {"none": None, "dense": draw(case.nodes, B, D), "factored": (mask, draw(B, D))}[boundary]
    weight = (torch.rand(len(case), generator=g, dtype=torch.float64) * 2 - 0.7).to(dtype).requires_grad_()
    keep = torch.rand(len(case), generator=g) < 0.8
    return x, relation, {"boundary": given, "edge_weight": weight, "edge_mask": keep}


def leaves(x, relation, options):
    given = options["boundary"]
    more = [] if given is None else list(given) if isinstance(given, tuple) else [given]
    weight = options.get("edge_weight")
    return [x, relation, *more, *([] if weight is None else [weight])]


def by_hand(case, x, relation, *, boundary, edge_weight, edge_mask, message, aggregate):
    """The docstring's formula, edge by edge, in Python floats: [N][B][D or 4 D]."""
    N, B, D = x.shape
    x, relation, edge_weight = x.detach(), relation.detach(), edge_weight.detach()
    if boundary is not None:
        boundary = tuple(t.detach() for t in boundary) if isinstance(boundary, tuple) else boundary.detach()
    out = torch.zeros(N, B, D * (4 if aggregate == "pna" else 1), dtype=torch.float64)
    for n, b, d in itertools.product(range(N), range(B), range(D)):
        if boundary is None:
            start = 0.0
        elif isinstance(boundary, tuple):
            start = float(boundary[0][n, b]) * float(boundary[1][b, d])
        else:
            start = float(boundary[n, b, d])
        plain, weights = [], []
        for e in range(len(case)):
            if int(case.dst[e]) == n and bool(edge_mask[e]):
                table = relation if relation.ndim == 2 else relation[b]
                r, s = float(table[case.rel[e], d]), float(x[case.src[e], b, d])
                plain.append(r * s if message == "distmult" else r + s)
                weights.append(float(edge_weight[e]))
        messages = [w * m for w, m in zip(weights, plain, strict=True)]
        count = len(messages) + 1
        mean = (start + sum(messages)) / count
        if aggregate == "sum":
            out[n, b, d] = start + sum(messages)
        elif aggregate == "mean":
            out[n, b, d] = mean
        elif aggregate == "max":
            out[n, b, d] = max([start, *messages])
        else:
            second = (start**2 + sum(w * m * m for w, m in zip(weights, plain, strict=True))) / count
            std = math.sqrt(max(second - mean**2, 1e-6))
            for k, value in enumerate([mean, max([start, *messages]), min([start, *messages]), std]):
                out[n, b, k * D + d] = value
    return out


@pytest.mark.parametrize(("message", "aggregate"), VARIANTS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_both_backends_compute_the_formula(message, aggregate, boundary):
    case = random_edges(7, 30, 3, seed=5, hub=6)
    x, relation, options = operands(case, B=2, D=3, boundary=boundary)
    expected = by_hand(case, x, relation, **options, message=message, aggregate=aggregate)
    for backend in ("kernel", "reference"):
        out = relational_conv(
            x, relation, case.layout(), **options, message=message, aggregate=aggregate, backend=backend
        )
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("message", "aggregate"), VARIANTS)
@pytest.mark.parametrize("name", GRAPHS)
def test_kernel_equals_reference_on_awkward_graphs(name, message, aggregate):
    """Values and every gradient, float64; B and D are odd, D larger than one slab of columns once."""
    case = GRAPHS[name]
    layout = case.layout()
    for B, D, boundary, per_query in ((3, 5, "factored", False), (1, 131, "dense", False), (2, 3, "none", True)):
        x, relation, options = operands(case, B, D, boundary=boundary, per_query=per_query)
        inputs = leaves(x, relation, options)
        run = {"message": message, "aggregate": aggregate, **options}
        out = relational_conv(x, relation, layout, **run, backend="kernel")
        wanted = relational_conv_reference(x, relation, layout, **run)
        torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-11)
        g = torch.randn_like(wanted)
        if not wanted.requires_grad:  # no edge and no boundary: a constant
            assert all(not t.any() for t in torch.autograd.grad(out, inputs, g))
            continue
        absent = {"allow_unused": True, "materialize_grads": True}  # without edges the reference has no path to x
        theirs_all = torch.autograd.grad(wanted, inputs, g, **absent)
        for ours, theirs in zip(torch.autograd.grad(out, inputs, g), theirs_all, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize(("message", "aggregate"), VARIANTS)
def test_narrow_dtypes_stay_within_their_rounding(message, aggregate, dtype, tolerance):
    """RMS of the error over the RMS of the result, against float64 on the same rounded inputs."""
    case = GRAPHS["random"]
    x, relation, options = operands(case, 2, 32, dtype=dtype)
    run = {"message": message, "aggregate": aggregate}
    inputs = leaves(x, relation, options)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    wide_options = {**options, "boundary": (wide[2], wide[3]), "edge_weight": wide[4]}
    out = relational_conv(x, relation, case.layout(), **run, **options, backend="kernel")
    wanted = relational_conv_reference(wide[0], wide[1], case.layout(), **run, **wide_options)
    assert out.dtype == dtype
    assert ratio(out, wanted) < tolerance
    g = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(out, inputs, g)
    theirs = torch.autograd.grad(wanted, wide, g.double())
    if aggregate == "pna" and dtype != torch.float32:
        # The gradient of the deviation divides by it: its stored 16-bit value is what the backward pass has.
        tolerance *= 4
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert ratio(a, b) < 2 * tolerance


def ratio(ours, wanted):
    return float((ours.double() - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())


@pytest.mark.parametrize(("message", "aggregate"), VARIANTS)
def test_gradcheck(message, aggregate):
    case = random_edges(6, 25, 3, seed=7, hub=5)
    x, relation, options = operands(case, 2, 2)
    keep = options.pop("edge_mask")

    def run(x, relation, mask, query, weight):
        return relational_conv(
            x, relation, case.layout(), boundary=(mask, query), edge_weight=weight, edge_mask=keep, message=message,
            aggregate=aggregate, backend="kernel",
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves(x, relation, options))


@settings(max_examples=60)
@given(any_edges(), st.sampled_from([1, 3, 8, 9]), st.sampled_from([1, 31, 64, 100]), st.sampled_from(VARIANTS))
def test_any_graph(case, B, D, variant):
    """Strided inputs: the states are the middle columns of a wider tensor, the boundary is expanded over the nodes."""
    message, aggregate = variant
    g = torch.Generator().manual_seed(B + D)
    wide = torch.randn(case.nodes, B, D + 5, generator=g, dtype=torch.float64)
    x = wide[..., 2 : D + 2]
    relation = torch.randn(case.relations, 2 * D, generator=g, dtype=torch.float64)[:, :D]
    boundary = torch.randn(B, D, generator=g, dtype=torch.float64).expand(case.nodes, B, D)
    run = {"boundary": boundary, "message": message, "aggregate": aggregate}
    out = relational_conv(x, relation, case.layout(), **run, backend="kernel")
    torch.testing.assert_close(out, relational_conv_reference(x, relation, case.layout(), **run))


@settings(max_examples=25)
@given(any_edges(), st.randoms(use_true_random=False))
def test_the_order_of_the_edges_does_not_change_a_bit(case, random):
    order = list(range(len(case)))
    random.shuffle(order)
    other = build_layout(case.dst[order], case.src[order], case.rel[order], case.nodes, case.relations)
    x, relation, options = operands(case, 2, 5, dtype=torch.float32, boundary="dense")
    for aggregate in ("sum", "mean", "max", "pna"):
        a = relational_conv(x, relation, case.layout(), boundary=options["boundary"], aggregate=aggregate)
        b = relational_conv(x, relation, other, boundary=options["boundary"], aggregate=aggregate)
        assert torch.equal(a, b)


@settings(max_examples=25)
@given(any_edges())
def test_linear_in_states_relations_and_weights(case):
    x, relation, options = operands(case, 2, 3)
    y, table, _ = operands(case, 2, 3, seed=1)
    weight, keep = options["edge_weight"], options["edge_mask"]

    def run(x, relation, weight):
        return relational_conv(x, relation, case.layout(), edge_weight=weight, edge_mask=keep, backend="kernel")

    whole = run(x, relation, weight)
    torch.testing.assert_close(run(2 * x + y, relation, weight), 2 * whole + run(y, relation, weight))
    torch.testing.assert_close(run(x, 2 * relation + table, weight), 2 * whole + run(x, table, weight))
    torch.testing.assert_close(run(x, relation, -3 * weight), -3 * whole)


@settings(max_examples=25)
@given(any_edges())
def test_the_gradient_is_the_forward_pass_of_the_reversed_graph(case):
    x, relation, _ = operands(case, 2, 3)
    g = torch.randn(case.nodes, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (dx,) = torch.autograd.grad(relational_conv(x, relation, case.layout(), backend="kernel"), x, g)
    back = build_layout(case.src, case.dst, case.rel, case.nodes, case.relations)
    torch.testing.assert_close(dx, relational_conv(g, relation.detach(), back, backend="kernel"))


@settings(max_examples=25)
@given(any_edges(), st.integers(0, 1000))
def test_relabelling_the_nodes_permutes_the_result(case, seed):
    p = torch.randperm(case.nodes, generator=torch.Generator().manual_seed(seed))
    new = torch.empty_like(p)
    new[p] = torch.arange(case.nodes)  # node n becomes new[n]
    other = build_layout(new[case.dst], new[case.src], case.rel, case.nodes, case.relations)
    x, relation, options = operands(case, 2, 3, boundary="dense")
    for aggregate in ("sum", "mean", "max", "pna"):
        run = {"aggregate": aggregate, "backend": "kernel"}
        ours = relational_conv(x[p], relation, other, boundary=options["boundary"][p], **run)
        torch.testing.assert_close(
            ours, relational_conv(x, relation, case.layout(), boundary=options["boundary"], **run)[p]
        )


def test_a_masked_edge_is_an_edge_that_is_not_there():
    case = random_edges(10, 60, 3, seed=8, hub=20)
    keep = torch.arange(60) % 3 > 0
    without = build_layout(case.dst[keep], case.src[keep], case.rel[keep], 10, 3)
    x, relation, _ = operands(case, 2, 4)
    for message, aggregate in VARIANTS:
        run = {"message": message, "aggregate": aggregate, "backend": "kernel"}
        masked = relational_conv(x, relation, case.layout(), edge_mask=keep, **run)
        torch.testing.assert_close(masked, relational_conv(x, relation, without, **run))


def test_of_equal_messages_the_boundary_then_the_first_edge_has_the_gradient():
    case = edges([(0, 1, 0), (0, 2, 0)], 3, 1)
    x = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
    relation = torch.ones(1, 1, dtype=torch.float64)
    for start, wanted in ((0.0, [0.0, 1.0, 0.0]), (1.0, [0.0, 0.0, 0.0])):
        boundary = torch.full((3, 1, 1), start, dtype=torch.float64)
        out = relational_conv(x, relation, case.layout(), boundary=boundary, aggregate="max", backend="kernel")
        (dx,) = torch.autograd.grad(out[0].sum(), x)
        assert dx.flatten().tolist() == wanted


def test_messages_go_from_src_to_dst():
    """One edge 2 -> 0: only node 0 hears it. (GFM-RAG's checkpoints need dst = head, src = tail.)"""
    layout = build_layout(torch.tensor([0]), torch.tensor([2]), torch.tensor([0]), 3, 1)
    x = torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    out = relational_conv(x, torch.full((1, 1), 2.0), layout)
    assert out.flatten().tolist() == [200.0, 0.0, 0.0]


def test_one_thread_gives_the_same_bits_as_two():
    case = random_edges(300, 3000, 9, seed=9, hub=1000)
    x, relation, options = operands(case, 2, 40, dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = relational_conv(x, relation, case.layout(), **options, backend="kernel")
            results.append([out, *torch.autograd.grad(out.sum(), leaves(x, relation, options))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_nan_state_is_seen_in_sums():
    case = edges([(0, 1, 0)], 2, 1)
    x = torch.tensor([0.0, float("nan")]).reshape(2, 1, 1)
    assert relational_conv(x, torch.ones(1, 1), case.layout())[0].isnan().all()


@pytest.mark.parametrize(
    ("message", "aggregate"), [("distmult", "sum"), ("transe", "mean"), ("distmult", "max"), ("distmult", "pna")]
)
def test_opcheck(message, aggregate):
    case = random_edges(8, 40, 3, seed=6)
    x, relation, options = operands(case, 2, 3)
    mask, query = options["boundary"]
    flat = case.layout().flat()
    wide = torch.randn(8, 2, 7, dtype=torch.float64)[..., 1:4].requires_grad_()
    for states in (x, wide):
        opcheck(
            torch.ops.ragkit.relational_conv.default,
            (
                states,
                relation,
                None,
                mask,
                query,
                options["edge_weight"],
                options["edge_mask"],
                flat,
                message,
                aggregate,
            ),
        )


def test_compiles_into_one_graph():
    case = random_edges(8, 40, 3, seed=6)
    layout = case.layout()
    x, relation, options = operands(case, 2, 3)

    def model(x, relation):
        return relational_conv(x, relation, layout, **options).relu().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x, relation), [x, relation]),
        torch.autograd.grad(model(x, relation), [x, relation]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast_runs_in_the_narrow_dtype():
    case = random_edges(8, 40, 3, seed=6)
    x, relation, options = operands(case, 2, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = relational_conv(x, relation, case.layout(), **options, backend="kernel")
    assert out.dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(out.float().sum(), x)
    assert dx.dtype == torch.float32
    wanted = relational_conv_reference(x, relation, case.layout(), **options)
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.05)


def test_second_derivatives_say_so():
    case = random_edges(8, 40, 3, seed=6)
    x, relation, options = operands(case, 2, 3)
    out = relational_conv(x.tanh(), relation, case.layout(), backend="kernel").square().sum()
    (dx,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(dx.sum(), relation)


def test_only_what_needs_a_gradient_is_computed():
    case = random_edges(8, 40, 3, seed=6)
    x, relation, _ = operands(case, 2, 3)
    out = relational_conv(x.detach(), relation, case.layout(), backend="kernel")
    (drelation,) = torch.autograd.grad(out.sum(), relation)
    wanted = relational_conv_reference(x.detach(), relation, case.layout())
    torch.testing.assert_close(drelation, torch.autograd.grad(wanted.sum(), relation)[0])


BAD = {
    "x must be [N, B, D] with N = 4 nodes": lambda a: a | {"x": torch.zeros(3, 1, 2)},
    "relation must be [2, 2] or [1, 2, 2] for this graph, found [5, 2]": lambda a: a | {"relation": torch.zeros(5, 2)},
    "boundary must be [4, 1, 2]": lambda a: a | {"boundary": torch.zeros(4, 2, 2)},
    "boundary mask must be [4, 1]": lambda a: a | {"boundary": (torch.zeros(4, 2), torch.zeros(1, 2))},
    "edge_weight must be [3], found [2]": lambda a: a | {"edge_weight": torch.zeros(2)},
    "edge_mask must be bool": lambda a: a | {"edge_mask": torch.zeros(3)},
    "message must be one of distmult, transe; found 'rotate'": lambda a: a | {"message": "rotate"},
    "aggregate must be one of sum, mean, max, pna; found 'min'": lambda a: a | {"aggregate": "min"},
    "backend must be one of auto, kernel, reference; found 'cuda'": lambda a: a | {"backend": "cuda"},
    "relation is torch.float64, x is torch.float32": lambda a: a | {"relation": torch.zeros(2, 2).double()},
    "the last dimension of x must be contiguous": lambda a: a | {"x": torch.zeros(4, 1, 4)[..., ::2]},
    "x is on meta, the graph's layout on cpu; use layout.to": lambda a: a | {"x": torch.zeros(4, 1, 2, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    layout = build_layout(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 0]), 4, 2)
    good = {"x": torch.zeros(4, 1, 2), "relation": torch.zeros(2, 2), "layout": layout}
    relational_conv(**good)
    with pytest.raises(ValueError) as error:
        relational_conv(**BAD[message](good))
    assert message in str(error.value)
