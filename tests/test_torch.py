"""The ops as citizens of torch: gradcheck, opcheck, compile, export, checkpointing, autocast, CUDA graphs, streams."""

import functools
import itertools
import math

import pytest
import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gsa_ext import _load, chunk_gsa, fused_recurrent_gsa, gsa_step, ops, testing
from gsa_ext.testing import make_inputs

MODES = ["coupled", "given", "abc"]
modes = pytest.mark.parametrize("mode", MODES)
both = pytest.mark.parametrize("op", [chunk_gsa, fused_recurrent_gsa], ids=["chunk", "recurrent"])


def leaves_of(x):
    """Its tensors that can have a gradient, as leaves, and a function from them to all outputs of an op."""
    names = [name for name in ("q", "k", "v", "s", "g") if x.get(name) is not None]
    leaves = [t.detach().requires_grad_() for t in (*(x[name] for name in names), *x.get("initial_state", ()))]

    def call(op, *leaves):
        state = {"initial_state": leaves[len(names) :]} if len(leaves) > len(names) else {}
        o, final = op(**{**x, **dict(zip(names, leaves)), **state}, output_final_state=True)
        return o, *final

    return leaves, call


def gradients(outputs, leaves):
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents)


def same(a, b):
    assert len(a) == len(b)
    for i, (s, t) in enumerate(zip(a, b)):
        assert torch.equal(s, t), f"tensor {i} differs by {(s.double() - t.double()).abs().max():.2e}"


# ------------------------------------------------------------------------------------------------------------ gradcheck, opcheck

SMALL = [
    {"B": 2, "T": 5, "HQ": 2, "H": 1, "K": 3, "V": 2, "M": 3, "initial_state": True},
    {"B": 2, "T": 18, "HQ": 1, "K": 2, "V": 2, "M": 2, "initial_state": "broadcast"},
    {"lengths": [2, 0, 3], "HQ": 2, "H": 2, "K": 2, "V": 3, "M": 2, "initial_state": True},
    {"B": 1, "T": 67, "HQ": 1, "K": 1, "V": 1, "M": 2},
]


@pytest.mark.parametrize("options", SMALL, ids=["grouped", "broadcast", "packed", "chunks"])
@modes
def test_gradcheck(mode, options):
    """Finite differences of the CPU ops in fp64."""
    x = make_inputs(**options, mode=mode, gate=1.0, dtype=torch.float64)
    leaves, call = leaves_of(x)
    assert torch.autograd.gradcheck(functools.partial(call, chunk_gsa), leaves)
    assert torch.autograd.gradcheck(functools.partial(call, fused_recurrent_gsa), leaves)
    if options["HQ"] > 1:
        assert torch.autograd.gradcheck(functools.partial(call, functools.partial(fused_recurrent_gsa, reverse=True)), leaves)


def opcheck(op, *arguments):
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("mode,packed,state", [*itertools.product(["coupled", "given"], [False, True], [False, True]), ("given", False, "broadcast")])
def test_opcheck_sequences(mode, packed, state, device):
    sizes = {"lengths": [5, 0, 12]} if packed else {"B": 2, "T": 17}
    x = make_inputs(**sizes, HQ=4, H=2, K=8, V=12, M=5, mode=mode, initial_state=state, device=device)
    hk, hv = x.get("initial_state", (None, None))
    for t in (x["q"], x["k"], x["v"], x["s"], x["g"], hk, hv):
        t is None or t.requires_grad_()
    for level in (0, 2):
        opcheck(torch.ops.gsa.chunk, x["q"], x["k"], x["v"], x["s"], x["g"], 0.3, hk, hv, x.get("cu_seqlens"), state is not False, level)
    for reverse in (False, True):
        opcheck(torch.ops.gsa.recurrent, x["q"], x["k"], x["v"], x["s"], x["g"], None, hk, hv, x.get("cu_seqlens"), True, reverse)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype,K,M,images", [(torch.bfloat16, 64, 72, 2), (torch.float16, 128, 8, 1), (torch.bfloat16, 64, 12, 0), (torch.float32, 64, 8, 0)])
def test_kept_has_the_same_shape_without_a_device(dtype, K, M, images, packed, device):
    """Level 0 keeps gates beside states, by shapes alone."""
    x = make_inputs(**({"lengths": [5, 0, 70]} if packed else {"B": 2, "T": 70}), HQ=4, H=2, K=K, V=K, M=M, mode="given", dtype=dtype, device=device)
    arguments = [x[name] for name in "qkvsg"]
    real, meta = ([torch.ops.gsa.chunk(*(t.to(where) for t in arguments), None, None, None, x["cu_seqlens"].to(where) if packed else None, False, level)[3]
                   for level in (0, 1)] for where in (device, "meta"))
    assert [t.shape for t in real] == [t.shape for t in meta]
    slot = (K + K) * M * 2  # bytes of a state
    assert real[0].shape[0] - real[1].shape[0] == math.ceil(real[1].shape[0] * images * 33664 / slot)


@pytest.mark.parametrize("packed,state", [(False, False), (False, True), (True, True), (False, "broadcast")])
def test_opcheck_abc(packed, state, device):
    sizes = {"lengths": [5, 0, 12]} if packed else {"B": 2, "T": 17}
    x = make_inputs(**sizes, HQ=2, H=2, K=8, V=12, M=5, mode="abc", initial_state=state, device=device)
    e, cu = x["s"].requires_grad_(), x.get("cu_seqlens")
    z0 = x["initial_state"][2].requires_grad_() if state else None
    opcheck(torch.ops.gsa.abc_gates, e, z0, cu, packed)
    with torch.no_grad():
        s, g, z = torch.ops.gsa.abc_gates(e, z0, cu, packed)
        opcheck(torch.ops.gsa.abc_gates_backward, torch.ones_like(s), torch.ones_like(g), torch.ones_like(z), e, s, g, z0, cu, packed)


@pytest.mark.parametrize("exact", [False, True])
def test_opcheck_backward(exact, device):
    x = make_inputs(B=2, T=17, HQ=4, H=2, K=8, V=12, M=5, mode="given", initial_state=True, device=device)
    hk, hv = x["initial_state"]
    o, *_ = torch.ops.gsa.chunk(x["q"], x["k"], x["v"], x["s"], x["g"], None, hk, hv, None, True, 2)
    arguments = (torch.ones_like(o), torch.ones_like(hk), None, x["q"], x["k"], x["v"], x["s"], x["g"], None, hk, hv, None, None, exact, exact)
    opcheck(torch.ops.gsa.chunk_backward, *arguments)


@pytest.mark.parametrize("exact", [False, True], ids=["chunk", "recurrent"])
@pytest.mark.parametrize("packed", [False, True])
@modes
def test_opcheck_prefill(mode, packed, exact, device):
    sizes = {"lengths": [5, 0, 12]} if packed else {"B": 3, "T": 17}
    x = make_inputs(**sizes, HQ=4, H=2, K=8, V=12, M=5, mode=mode, device=device)
    pool = make_inputs(B=5, T=1, HQ=4, H=2, K=8, V=12, M=5, mode=mode, device=device, initial_state=True)["initial_state"]
    hk, hv, z = (*pool, None)[:3]
    where = torch.tensor([4, -1, 1], device=device)
    opcheck(torch.ops.gsa.prefill, *(x[name] for name in "qkvsg"), hk, hv, z, 0.3, where, x.get("cu_seqlens"), exact, exact)


@pytest.mark.parametrize("indexed", [False, True])
@modes
def test_opcheck_step(mode, indexed, device):
    x = make_inputs(B=2, T=1, HQ=4, H=2, K=8, V=12, M=5, mode=mode, device=device)
    q, k, v, s, g = (None if x[name] is None else x[name][:, 0].contiguous() for name in "qkvsg")
    pool = make_inputs(B=3 if indexed else 2, T=1, HQ=4, H=2, K=8, V=12, M=5, mode=mode, device=device, initial_state=True)["initial_state"]
    hk, hv, z = (*pool, None)[:3]
    where = torch.tensor([2, -1], device=device) if indexed else None
    opcheck(torch.ops.gsa.step, q, k, v, s, g, hk, hv, z, None, where)
    if mode == "coupled":
        opcheck(torch.ops.gsa.step, q, k, v, s, g, hk, hv, z, None, where, torch.tensor([True, False], device=device), 8.0,
                x["q"][:, 0, 0, :6], x["q"][:, 0, 1, :6], True, True)


class Seen(torch.Tensor):
    seen: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        Seen.seen.append(function)
        return function(*args, **(kwargs or {}))


class SeenOps(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Seen.seen.append(function)
        return function(*args, **(kwargs or {}))


# arguments of the ops that have a short way, without those that have a default
NEEDED = {"step": 10, "conv_step": 3, "window_step": 7, "silu_norm": 1, "mix": 3}


def row_of(name, mode, device):
    """Arguments of an op that has a short way, and the places of those that it writes. mode "extra": with what is optional."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device)

    extra = mode == "extra"
    mask, cos, sin = (torch.tensor([True, False], device=device), normal(1, 6), normal(1, 6)) if extra else (None,) * 3
    if name == "conv_step":
        return [normal(2, 7), normal(2, 2, 7), normal(7, 1, 3), normal(7) if extra else None, mask], (1,)
    if name == "window_step":
        states = normal(2, 5, 2, 8), normal(2, 5, 2, 6), torch.tensor([1, 2], device=device)
        return [normal(2, 4, 8), normal(2, 2, 8), normal(2, 2, 6), *states, 0.3, mask, cos, sin], (3, 4, 5)
    if name == "silu_norm":
        return [normal(2, 3, 24), normal(24) if extra else None, 1e-5], ()
    if name == "mix":
        return [normal(2, 1, 4, 8), normal(2, 1, 4, 8), normal(4)], ()
    x = make_inputs(B=2, T=1, HQ=4, H=2, K=8, V=12, M=5, mode="coupled" if extra else mode, device=device, initial_state=True)
    row = [None if x[name] is None else x[name][:, 0] for name in "qkvsg"]
    return [*row, *(*x["initial_state"], None)[:3], 0.7, None, mask, 8.0 if extra else 0.0, cos, sin, extra, False], (5, 6, 7)[:len(x["initial_state"])]


def of_token(call, *places):
    """``call``, whose arguments at ``places`` have a second axis, of one token, as it is without: with arguments and a result that do not have it."""
    return lambda *args: call(*(x[:, None] if i in places and x is not None else x for i, x in enumerate(args)))[:, 0]


def public_step(q, k, v, s, g, hk, hv, z, scale, where, *others):
    assert others == (None, 0.0, None, None, False, False)
    return gsa_step(q, k, v, s, g, (hk, hv) if z is None else (hk, hv, z), scale, where)


# every way in from Python, with the op that it is for
WAYS = {
    "gsa_step": ("step", public_step, MODES),
    "step": ("step", ops.step, [*MODES, "extra"]),
    "step_of_token": ("step", of_token(ops.step_of_token, 0, 1, 2, 3, 4, 10, 12, 13), [*MODES, "extra"]),
    "conv_step_of_token": ("conv_step", of_token(ops.conv_step_of_token, 0, 4), ["plain", "extra"]),
    "window_step_of_token": ("window_step", of_token(ops.window_step_of_token, 0, 1, 2, 7, 8, 9), ["plain", "extra"]),
    "silu_norm": ("silu_norm", ops.silu_norm, ["plain", "extra"]),
    "mix": ("mix", ops.mix, ["plain"]),
}
ways = pytest.mark.parametrize("way,mode", [(way, mode) for way in WAYS for mode in WAYS[way][2]])


@ways
def test_short_way(way, mode, device, monkeypatch):
    """From Python straight into the dispatcher: bits and version counters as by torch.ops; whoever wants to see the call sees it."""
    name, ours, _ = WAYS[way]
    args, written = row_of(name, mode, device)
    by_torch = getattr(torch.ops.gsa, name)

    def run(call, wrap=lambda t: t):
        given = [wrap(x.clone()) if isinstance(x, torch.Tensor) else x for x in args]
        return [call(*given), *(given[i] for i in written)]

    want = run(by_torch)
    assert all(not torch.equal(after, args[i]) and after._version == 1 for after, i in zip(want[1:], written))
    with monkeypatch.context() as patched:
        patched.setattr(torch._ops.OpOverloadPacket, "__call__", None)  # the longer way is closed
        got = run(ours)
    same(want, got)
    assert [t._version for t in got[1:]] == [1] * len(written)
    for others in (SeenFunctions(), SeenOps()):
        with others:
            Seen.seen.clear()
            same(want, run(ours))
            assert any(f"gsa.{name}" in str(f) for f in Seen.seen)
    Seen.seen.clear()
    same(want, [t.as_subclass(torch.Tensor) for t in run(ours, lambda t: t.as_subclass(Seen))])
    assert any(f"gsa.{name}" in str(f) for f in Seen.seen)
    traced = torch.jit.trace(lambda x: ours(x, *args[1:]), args[0], check_trace=False)
    assert f"gsa::{name}" in str(traced.graph)
    args, _ = row_of(name, mode, device)  # tracing has run it
    with FakeTensorMode() as fake:
        held = [fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        assert ours(*held).shape == want[0].shape
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        same(run(by_torch), run(ours))
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    same(want, run(torch.compile(ours, fullgraph=True, backend=backend)))
    assert f"gsa.{name}" in graphs[0].code


@ways
def test_short_way_refuses_what_torch_refuses(way, mode, device):
    """The same exception with the same words, or the same result, for each argument with another dtype or shape, requiring grad, or a string for a number."""
    name, ours, _ = WAYS[way]
    args, _ = row_of(name, mode, device)

    def told(call, i, wrong):
        given = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        given[i] = wrong()
        try:
            return "", call(*given)
        except Exception as error:
            return f"{type(error).__name__}: {error}", None

    refused = set()
    for i, x in enumerate(args):
        wrongs = {}
        if isinstance(x, torch.Tensor):
            wrongs = {"dtype": lambda x=x: x.to(torch.int8), "shape": lambda x=x: x[..., None].clone(), "grad": lambda x=x: (x * 1.0).requires_grad_()}
        elif isinstance(x, float) and not (way == "gsa_step" and i > 9):     # it has no such argument
            wrongs = {"number": lambda: "1"}
        for kind, wrong in wrongs.items():
            (want, result), (got, ours_result) = told(getattr(torch.ops.gsa, name), i, wrong), told(ours, i, wrong)
            assert got == want and (want or torch.equal(ours_result, result))
            refused |= {kind} if want else set()
    assert refused >= {"dtype"} | ({"shape", "grad"} if "step" in name else set()) | ({"number"} if any(isinstance(x, float) for x in args) else set())


@ways
def test_short_way_knows_what_it_may_take(way, mode, device):
    """What is nothing for it is left to torch, which says what is wrong, or knows more."""
    name = WAYS[way][0]
    good, call = row_of(name, mode, device)[0], _load.library().short_way(name, 0)
    assert isinstance(call(*good), torch.Tensor)
    for i, x in enumerate(good):
        bad = [good[0].as_subclass(Seen), "1", [1.0], *([None] if i == 0 else [])]
        bad += [True, 10**400] if isinstance(x, float) else [0, None] if isinstance(x, bool) else [1.0]
        for wrong in bad:
            assert call(*good[:i], wrong, *good[i + 1:]) is None, (i, wrong)
    for count in {*range(len(good))} - {NEEDED[name]}:
        assert call(*good[:count]) is None
    assert call() is None and call(*good, None) is None
    with pytest.raises(ValueError, match="chunk"):
        _load.library().short_way("chunk", 0)
    few, others = (row_of(name, mode, device)[0][:NEEDED[name]] for _ in range(2))
    assert torch.equal(call(*few), getattr(torch.ops.gsa, name)(*others))
    whole, others = ([2 if isinstance(x, float) and x else x for x in row_of(name, mode, device)[0]] for _ in range(2))  # torch takes an int for a float
    assert torch.equal(call(*whole), getattr(torch.ops.gsa, name)(*others))
    results = []
    with SeenFunctions():
        results.append(call(*good))
    torch.jit.trace(lambda x: (x + 1, results.append(call(*good)))[0], good[0], check_trace=False)
    assert results == [None, None]


# ------------------------------------------------------------------------------------------------------------ compile, export


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@modes
@both
def test_compile(op, mode, packed, device):
    """fullgraph, static and dynamic: outputs and gradients have eager's bits, and a new length compiles nothing new."""
    for dynamic in (False, True):
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend=backend)
        for T in (40, 75, 131) if dynamic else (40,):
            sizes = {"lengths": [T // 3, 0, T - T // 3]} if packed else {"B": 3, "T": T}
            x = make_inputs(**sizes, HQ=4, H=2, K=16, V=24, M=8, mode=mode, initial_state=True, device=device)
            leaves, call = leaves_of(x)
            want, got = call(op, *leaves), call(compiled, *leaves)
            same(want, got)
            same(gradients(want, leaves), gradients(got, leaves))
        assert len(graphs) == 1


def test_compile_with_inductor(device):
    """The op among others, through the whole stack."""

    def layer(x, w, g):
        q, k, v = torch.nn.functional.silu(x @ w).unflatten(-1, (2, 48)).chunk(3, -1)
        return chunk_gsa(q, k, v, None, torch.nn.functional.logsigmoid(g) / 8, output_final_state=True)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T in (33, 70):
        generator = torch.Generator().manual_seed(T)
        leaves = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in ((2, T, 20), (20, 96), (2, T, 2, 8))]
        (o, state), (want, want_state) = compiled(*leaves), layer(*leaves)
        a, b = (o, *state), (want, *want_state)
        for s, t in (*zip(a, b), *zip(gradients(a, leaves), gradients(b, leaves))):
            assert testing.error(s, t) < 1e-5


@modes
def test_compile_step(mode, device):
    x = make_inputs(2, 3, 4, 2, 16, 16, 8, mode=mode, device=device, initial_state=True)
    compiled = torch.compile(gsa_step, fullgraph=True, backend="aot_eager")
    states = [tuple(t.clone() for t in x["initial_state"]) for _ in range(2)]
    for t in range(3):
        row = [None if x[name] is None else x[name][:, t] for name in "qkvsg"]
        same([gsa_step(*row, states[0]), *states[0]], [compiled(*row, states[1]), *states[1]])


@modes
@both
def test_compile_prefill(op, mode, device):
    x = make_inputs(lengths=[9, 1, 20], HQ=4, H=2, K=16, V=16, M=8, mode=mode, device=device)
    pool = make_inputs(5, 1, 4, 2, 16, 16, 8, mode=mode, device=device, initial_state=True)["initial_state"]
    where = torch.tensor([4, -1, 1], device=device)
    pools = [tuple(t.clone() for t in pool) for _ in range(2)]
    calls = op, torch.compile(op, fullgraph=True, backend="aot_eager")
    same(*([call(**x, initial_state=held, state_indices=where)[0], *held] for call, held in zip(calls, pools)))


@modes
@both
def test_export(op, mode, device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, gate):
            s, g = (gate, None) if mode == "abc" else (None, gate)
            o, final = op(q, k, v, s, g, output_final_state=True)
            return o, *final

    x = make_inputs(2, 40, 4, 2, 16, 16, 8, mode=mode, device=device)
    arguments = (x["q"], x["k"], x["v"], x["s"] if mode == "abc" else x["g"])
    T = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(Model(), arguments, dynamic_shapes=({1: T},) * 4)
    longer = [torch.cat([t, t], 1) for t in arguments]
    same(Model()(*longer), program.module()(*longer))


# ------------------------------------------------------------------------------------------------------------ checkpointing, autocast, hooks


@pytest.mark.parametrize("reentrant", [False, True])
@modes
@both
def test_activation_checkpointing(op, mode, reentrant, device):
    leaves, call = leaves_of(make_inputs(2, 70, 4, 2, 16, 16, 8, mode=mode, initial_state=True, device=device))
    want = call(op, *leaves)
    got = torch.utils.checkpoint.checkpoint(functools.partial(call, op), *leaves, use_reentrant=reentrant)
    same(want, got)
    torch.autograd.backward(got, [torch.ones_like(t) for t in got])
    same(torch.autograd.grad(want, leaves, [torch.ones_like(t) for t in want]), [t.grad for t in leaves])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@modes
def test_autocast(mode, dtype, device):
    """q, k and v are cast; s, g and the states keep their dtype; gradients come back in the dtype of what was given."""
    x = make_inputs(2, 40, 4, 2, 16, 16, 8, mode=mode, initial_state=True, device=device)
    leaves, call = leaves_of(x)
    for op in (chunk_gsa, fused_recurrent_gsa):
        by_hand = {**x, **{name: x[name].to(dtype) for name in "qkv"}}
        hand_leaves, hand_call = leaves_of(by_hand)
        want = hand_call(op, *hand_leaves)
        with torch.autocast(device.type, dtype):
            got = call(op, *leaves)
        assert got[0].dtype == dtype and got[1].dtype == torch.float32
        same(want, got)
        for leaf, a, b in zip(leaves, gradients(want, hand_leaves), gradients(got, leaves)):
            assert b.dtype == leaf.dtype == torch.float32 and torch.equal(a.float(), b)
    where = {"state_indices": torch.tensor([1, 0], device=device)}
    with torch.autocast(device.type, dtype):
        for op in (chunk_gsa, fused_recurrent_gsa):
            assert op(**{**x, "initial_state": tuple(t.clone() for t in x["initial_state"])}, **where)[0].dtype == dtype
    row = {name: None if x[name] is None else x[name][:, 0] for name in "qkvsg"}
    with torch.autocast(device.type, dtype):
        assert gsa_step(**row, state=tuple(t.clone() for t in x["initial_state"])).dtype == dtype
        mixed = {**x, "k": x["k"].to(dtype)}  # what projections and norms under autocast hand over
        assert chunk_gsa(**mixed)[0].dtype == dtype


def test_only_some_inputs_require_gradients(device):
    """Every subset of the inputs: gradients as with all of them, None for the rest."""
    x = make_inputs(1, 40, 2, 1, 8, 8, 4, mode="given", initial_state=True, device=device)
    for op in (chunk_gsa, fused_recurrent_gsa):
        leaves, call = leaves_of(x)
        want = gradients(call(op, *leaves), leaves)
        for chosen in ([0], [1], [4], [3], [5], [6], [2, 5]):
            some = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(leaves)]
            outputs = call(op, *some)
            generator = torch.Generator().manual_seed(3)
            cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
            used = [(t, c) for t, c in zip(outputs, cotangents) if t.requires_grad]
            got = torch.autograd.grad([t for t, _ in used], [some[i] for i in chosen], [c for _, c in used])
            same([want[i] for i in chosen], got)


@both
def test_only_some_outputs_are_used(op, device):
    """No cotangent for o, or for one of the final states."""
    x = make_inputs(1, 40, 2, 1, 8, 8, 4, mode="given", initial_state=True, device=device)
    leaves, call = leaves_of(x)
    for i in range(3):
        generator = torch.Generator().manual_seed(7)
        outputs = call(op, *leaves)
        cotangent = torch.randn(outputs[i].shape, generator=generator).to(outputs[i])
        zeros = [cotangent if j == i else torch.zeros_like(t) for j, t in enumerate(outputs)]
        got = torch.autograd.grad(outputs[i], leaves, cotangent, allow_unused=True, retain_graph=True)
        want = torch.autograd.grad(outputs, leaves, zeros)
        for a, b in zip(got, want):
            assert testing.error(torch.zeros_like(b) if a is None else a, b) < 1e-6


@both
def test_threads_of_the_cpu(op):
    """torch.set_num_threads is heard, and changes no bit."""
    x = make_inputs(3, 200, 8, 2, 32, 32, 16, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(testing.results(op, x))
    finally:
        torch.set_num_threads(before)
    for got in found[1:]:
        same(list(found[0].values()), list(got.values()))


def test_from_many_threads(device):
    """Forward and backward from several Python threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = [make_inputs(2, 70, 2, 1, 16, 16, 8, initial_state=True, device=device, seed=i) for i in range(8)]
    want = [testing.results(chunk_gsa, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(functools.partial(testing.results, chunk_gsa), inputs))
    for a, b in zip(want, got):
        same(list(a.values()), list(b.values()))


# ------------------------------------------------------------------------------------------------------------ CUDA

LAYOUTS = {"batch": {"B": 2, "T": 150}, "packed": {"lengths": [40, 0, 110]}}


@pytest.mark.gpu("CUDA graphs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@modes
@both
def test_cuda_graph(op, mode, dtype, layout, cuda):
    """Forward and backward captured once, replayed on new contents (new boundaries of packed sequences too): eager's bits."""
    options = {**LAYOUTS[layout], "HQ": 4, "H": 2, "K": 32, "V": 32, "M": 16, "mode": mode, "dtype": dtype, "initial_state": True, "device": cuda}
    x, other = make_inputs(**options), make_inputs(**{**options, "seed": 1, **({"lengths": [0, 25, 125]} if layout == "packed" else {})})
    leaves, call = leaves_of(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    cotangents = [torch.randn_like(t) for t in call(op, *leaves)]
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(call(op, *leaves), leaves, cotangents)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(op, *leaves)
        grads = torch.autograd.grad(outputs, leaves, cotangents)
    other_leaves, other_call = leaves_of(other)
    with torch.no_grad():
        for leaf, t in zip(leaves, other_leaves):
            leaf.copy_(t)
        if layout == "packed":
            x["cu_seqlens"].copy_(other["cu_seqlens"])
    graph.replay()
    torch.cuda.synchronize()
    want = other_call(op, *other_leaves)
    same(want, outputs)
    same(torch.autograd.grad(want, other_leaves, cotangents), grads)


@pytest.mark.gpu("CUDA graphs")
@modes
def test_cuda_graph_of_a_step(mode, cuda):
    x = make_inputs(4, 6, 4, 2, 32, 32, 16, mode=mode, device=cuda)
    pool = make_inputs(8, 1, 4, 2, 32, 32, 16, mode=mode, device=cuda, initial_state=True)["initial_state"]
    eager = tuple(t.clone() for t in pool)
    indices = torch.tensor([5, -1, 2, 7], device=cuda)
    row = {name: None if x[name] is None else x[name][:, 0].clone() for name in "qkvsg"}
    gsa_step(**row, state=tuple(t.clone() for t in pool), state_indices=indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gsa_step(**row, state=pool, state_indices=indices)
    for t, where in enumerate(([5, -1, 2, 7], [0, 1, 2, -1], [5, 4, 3, 2])):
        now = {name: None if x[name] is None else x[name][:, t] for name in "qkvsg"}
        for name, static in row.items():
            static is None or static.copy_(now[name])
        indices.copy_(torch.tensor(where))
        graph.replay()
        same([gsa_step(**now, state=eager, state_indices=torch.tensor(where, device=cuda)), *eager], [o, *pool])


@pytest.mark.gpu("CUDA graphs")
@modes
@both
def test_cuda_graph_of_prefill(op, mode, cuda):
    """Captured once, replayed with other lengths and other rows of the pool."""
    x = make_inputs(lengths=[40, 0, 110], HQ=4, H=2, K=32, V=32, M=16, mode=mode, device=cuda)
    pool = make_inputs(8, 1, 4, 2, 32, 32, 16, mode=mode, device=cuda, initial_state=True)["initial_state"]
    eager = tuple(t.clone() for t in pool)
    x["state_indices"] = torch.tensor([5, -1, 2], device=cuda)
    op(**x, initial_state=tuple(t.clone() for t in pool))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = op(**x, initial_state=pool)
    for ends, where in (([0, 40, 40, 150], [5, -1, 2]), ([0, 1, 149, 150], [0, 7, -1]), ([0, 0, 60, 150], [5, 2, 3])):
        x["cu_seqlens"].copy_(torch.tensor(ends))
        x["state_indices"].copy_(torch.tensor(where))
        graph.replay()
        same([op(**x, initial_state=eager)[0], *eager], [o, *pool])


@pytest.mark.gpu("synchronisation")
@pytest.mark.parametrize("layout", LAYOUTS)
@modes
def test_no_host_synchronisation(mode, layout, cuda):
    for dtype in (torch.float32, torch.bfloat16):
        x = make_inputs(**LAYOUTS[layout], HQ=4, H=2, K=64, V=64, M=32, mode=mode, dtype=dtype, initial_state="broadcast", device=cuda)
        leaves, call = leaves_of(x)
        rows = make_inputs(2, 1, 4, 2, 64, 64, 32, mode=mode, dtype=dtype, initial_state=True, device=cuda)
        row = {name: None if rows[name] is None else rows[name][:, 0] for name in "qkvsg"}
        indices = torch.tensor([1, 0], device=cuda)
        pool = tuple(t.expand(x["cu_seqlens"].numel() - 1 if layout == "packed" else 2, *t.shape[1:]).contiguous() for t in x["initial_state"])
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for op in (chunk_gsa, functools.partial(chunk_gsa, checkpoint_level=0), fused_recurrent_gsa):
                outputs = call(op, *leaves)
                torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
            gsa_step(**row, state=rows["initial_state"], state_indices=indices)
            for op in (chunk_gsa, fused_recurrent_gsa):
                op(**{**x, "initial_state": pool}, state_indices=torch.arange(pool[0].shape[0], device=cuda))
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu("streams")
def test_any_stream(cuda):
    """Work goes to the current stream: it is done while the default stream is still busy."""
    x = make_inputs(2, 500, 8, 8, 64, 64, 32, dtype=torch.bfloat16, device=cuda)
    want = testing.results(chunk_gsa, x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        testing.results(chunk_gsa, x)  # memory for this stream
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # about two seconds
    with torch.cuda.stream(side):
        got = testing.results(chunk_gsa, x)
        side.synchronize()
        assert not torch.cuda.default_stream().query()
        same(list(want.values()), list(got.values()))
    torch.cuda.synchronize()


@pytest.mark.gpu("devices")
def test_any_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = make_inputs(2, 70, 2, 1, 32, 32, 16, dtype=torch.bfloat16, device="cuda:1", initial_state=True)
    assert torch.cuda.current_device() == 0
    testing.check(chunk_gsa, x)
    testing.check(fused_recurrent_gsa, x)
    testing.check(testing.stepwise, x, gradients=False)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu("a switch of the GPU's")
def test_tf32_only_where_torch_allows_it(cuda):
    x = make_inputs(2, 150, 4, 4, 64, 64, 32, device=cuda)
    want = testing.results(testing.vectorised_gsa, x, double=True)
    assert not torch.backends.cuda.matmul.allow_tf32
    exact = testing.results(chunk_gsa, x)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        fast = testing.results(chunk_gsa, x)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    for name in want:
        assert testing.error(exact[name], want[name]) < 5e-6 and testing.error(fast[name], want[name]) < 3e-3, name


@pytest.mark.gpu("memory")
@pytest.mark.big
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_two_to_the_31_elements(dtype, cuda):
    """A hard reset near the end cuts the past off: the last tokens of the last heads must equal those of a short sequence."""
    if torch.cuda.get_device_properties(cuda).total_memory < 80e9:
        pytest.skip("needs 80 GB")
    T, H, D, M, tail = 262144 + 64, 66, 128, 16, 128
    torch.cuda.empty_cache()
    generator = torch.Generator(cuda).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=cuda, dtype=dtype)

    assert T * H * D > 2**31
    if dtype == torch.float32:  # forward only: all of backward would not fit
        q, k, v, g = normal(1, T, H, D), normal(1, T, H, D), normal(1, T, H, D), torch.nn.functional.logsigmoid(normal(1, T, H, M))
        g[:, -tail] = -torch.inf
        o, _ = chunk_gsa(q, k, v, None, g)
        want, _ = chunk_gsa(*(t[:, -tail:, -2:] for t in (q, k, v)), None, g[:, -tail:, -2:])
        assert testing.error(o[:, -tail:, -2:], want) < 1e-6
        return
    leaves = [normal(1, T, H, D), normal(1, T, H, D), normal(1, T, H, D), torch.nn.functional.logsigmoid(normal(1, T, H, M))]
    leaves[3][:, -tail] = -torch.inf
    short = [t[:, -tail:, -2:].contiguous().requires_grad_() for t in leaves]
    leaves = [t.requires_grad_() for t in leaves]
    o, _ = chunk_gsa(*leaves[:3], None, leaves[3])
    want, _ = chunk_gsa(*short[:3], None, short[3])
    assert testing.error(o[:, -tail:, -2:], want) < 5e-3
    cotangent = normal(*o.shape)
    long_grads = torch.autograd.grad(o, leaves, cotangent)
    short_grads = torch.autograd.grad(want, short, cotangent[:, -tail:, -2:])
    for a, b in zip(long_grads, short_grads):
        assert testing.error(a[:, -tail + 1 :, -2:], b[:, 1:]) < 2e-2
