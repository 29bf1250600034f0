"""Every op, mode, shape and gate against the recurrence in fp64: outputs, final states and all gradients."""

import functools

import pytest
import torch

from gsa_ext import chunk_gsa, fused_recurrent_gsa, gsa_step, testing
from gsa_ext.testing import check, make_inputs, stepwise

pytestmark = pytest.mark.usefixtures("poisoned")

OPS = {"chunk": chunk_gsa, "recurrent": fused_recurrent_gsa, "step": stepwise}
TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ["coupled", "given", "abc"]
ops = pytest.mark.parametrize("op", OPS)
modes = pytest.mark.parametrize("mode", MODES)
types = pytest.mark.parametrize("dtype", TYPES)


def run(op, dtype, device, **options):
    if dtype == "fp64" and device.type == "cuda":
        pytest.skip("fp64 is computed on the CPU only")
    x = make_inputs(dtype=TYPES[dtype], device=device, **options)
    check(fused_recurrent_gsa, {**x, "reverse": True}) if op == "reversed" else check(OPS[op], x, gradients=op != "step")


@types
@modes
@ops
def test_modes(op, mode, dtype, device):
    """All there is at once: grouped heads, initial and final states with gradients, ragged end, hard gates."""
    run(op, dtype, device, B=2, T=37, HQ=4, H=2, K=24, V=40, M=20, mode=mode, gate="mixed", initial_state=True)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 127])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@ops
def test_lengths(op, dtype, T, device):
    run(op, dtype, device, T=T, HQ=2, H=1, K=16, V=16, M=16, mode="given")


@pytest.mark.parametrize("op,dtype", [("chunk", "fp64"), ("chunk", "fp32"), ("chunk", "bf16"), ("recurrent", "fp64"), ("recurrent", "fp32"), ("step", "fp32")])
def test_long(op, dtype, device):
    run(op, dtype, device, T=1023, HQ=2, H=1, K=16, V=16, M=16, mode="given")


# Every K, V and M of the list, alone in its neighbourhood and with the others; the corners last.
DIMENSIONS = [
    (16, 16, 1), (16, 60, 16), (60, 16, 32), (64, 64, 64), (64, 100, 48), (100, 64, 100), (128, 128, 64), (128, 256, 32), (256, 128, 128), (100, 100, 256),
    (256, 256, 64), (512, 64, 48), (60, 512, 100), (512, 512, 64), (512, 512, 256),
]  # fmt: skip


@pytest.mark.parametrize("K,V,M", DIMENSIONS)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_dimensions(dtype, K, V, M, device):
    run("chunk", dtype, device, T=70, HQ=2, H=1, K=K, V=V, M=M, mode="given", initial_state=True)


@pytest.mark.parametrize("K,V,M", [(16, 60, 1), (60, 16, 32), (100, 64, 100), (128, 128, 64), (512, 512, 256)])
@pytest.mark.parametrize("op", ["recurrent", "step"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dimensions_by_token(dtype, op, K, V, M, device):
    run(op, dtype, device, T=19, HQ=2, H=1, K=K, V=V, M=M, mode="given", initial_state=True)


@pytest.mark.parametrize("r", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@ops
def test_grouped_heads(op, dtype, r, device):
    run(op, dtype, device, B=2, T=33, HQ=2 * r, H=2, K=32, V=32, M=16, mode="coupled")


@pytest.mark.parametrize("gate", ["zero", 8.0, 1.0, 0.1, "mixed", "-40", "-inf"])
@pytest.mark.parametrize("mode", ["coupled", "given"])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_gates(dtype, mode, gate, device):
    run("chunk", dtype, device, T=150, HQ=1, K=32, V=32, M=32, mode=mode, gate=gate, initial_state=True)


@pytest.mark.parametrize("gate", ["zero", 0.1, "mixed", "-40", "-inf"])
@pytest.mark.parametrize("op", ["recurrent", "step"])
def test_gates_by_token(op, gate, device):
    run(op, "fp32", device, T=40, HQ=1, K=32, V=32, M=32, mode="coupled", gate=gate, initial_state=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True, "broadcast"])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@modes
def test_packed(mode, dtype, state, reverse, device):
    """Sequences of all lengths, empty ones first, last and in between."""
    options = {"lengths": [0, 1, 40, 0, 0, 64, 17, 70, 0], "HQ": 2, "H": 1, "K": 16, "V": 32, "M": 16, "mode": mode, "gate": 1.0, "initial_state": state}
    run("reversed" if reverse else "chunk", dtype, device, **options)


@pytest.mark.parametrize("reverse", [False, True])
@modes
def test_recurrent_packed_and_broadcast(mode, reverse, device):
    x = make_inputs(lengths=[3, 0, 20, 1], HQ=2, K=16, V=16, M=16, mode=mode, initial_state="broadcast", device=device)
    check(fused_recurrent_gsa, {**x, "cu_seqlens": x["cu_seqlens"].long(), "reverse": reverse})
    check(fused_recurrent_gsa, {**make_inputs(3, 20, 2, 1, 16, 16, 16, mode=mode, initial_state="broadcast", device=device), "reverse": reverse})


def test_broadcast_state(device):
    for dtype in (torch.float32, torch.bfloat16):
        check(chunk_gsa, make_inputs(3, 70, 2, 1, 32, 32, 16, dtype=dtype, initial_state="broadcast", device=device))


TF32 = dict.fromkeys(("o", "hk", "hv", "dq", "dk", "dv", "ds", "dg", "dhk0", "dhv0"), 3e-3)
TF32_INPUTS = [
    {"B": 2, "T": 150, "HQ": 4, "H": 2, "K": 32, "V": 48, "M": 20, "initial_state": True},
    {"lengths": [0, 1, 40, 0, 64, 17, 130, 0], "HQ": 2, "H": 1, "K": 16, "V": 32, "M": 16, "initial_state": "broadcast"},
    {"T": 70, "HQ": 2, "H": 1, "K": 60, "V": 100, "M": 100, "gate": 1.0},
    {"T": 70, "HQ": 2, "H": 1, "K": 100, "V": 64, "M": 256},
    *({"T": 150, "HQ": 1, "K": 128, "V": 128, "M": 64, "gate": x, "initial_state": True} for x in ("zero", 8.0, 1.0, 0.1, "mixed", "-40", "-inf", "shut")),
]


@pytest.mark.parametrize("options", TF32_INPUTS, ids=str)
@pytest.mark.parametrize("mode", ["coupled", "given"])
def test_tf32(mode, options, tf32, device, request):
    """On a GPU products of fp32 inputs are in TF32 where that is allowed; elsewhere nothing changes."""
    x = make_inputs(**options, mode=mode, device=device)
    check(chunk_gsa, x, allowed=None if request.node.callspec.params["device"] == "cpu" else TF32)


@pytest.mark.parametrize("tau", testing.PEER)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_figures_of_the_best_published_kernels(dtype, tau, device):
    """K = V = 128, 512 tokens: at or under what flash-linear-attention's kernels reach, output by output."""
    x = make_inputs(1, 512, 2, 2, 128, 128, 64, gate=tau, mode="given", dtype=TYPES[dtype], device=device)
    x["s"] = -torch.expm1(x["g"].float()).to(x["s"])
    check(chunk_gsa, x, allowed=testing.PEER[tau])


def test_wide_gates_beside_narrow_inputs(device):
    """s and g may be fp32 beside 16-bit q, k, v: their gradients come in fp32."""
    for mode in ("coupled", "given", "abc"):
        x = make_inputs(1, 70, 2, 1, 32, 32, 16, mode=mode, dtype=torch.bfloat16, gate_dtype=torch.float32, initial_state=True, device=device)
        check(chunk_gsa, x)
        check(fused_recurrent_gsa, x)
        check(stepwise, x, gradients=False)


@modes
def test_split_anywhere_and_hand_over(mode, device):
    """Chunked, recurrent and step forms take over from one another at any token; gradients flow through the hand-over."""
    for dtype, cuts in ((torch.float32, (0, 63, 64, 90) if mode == "given" else (63,)), (torch.bfloat16, (37,))):
        x = make_inputs(2, 90, 2, 1, 32, 16, 16, mode=mode, gate=1.0, dtype=dtype, initial_state=True, device=device)
        for cut in cuts:
            for first, second in ((chunk_gsa, chunk_gsa), (chunk_gsa, fused_recurrent_gsa), (fused_recurrent_gsa, chunk_gsa), (chunk_gsa, stepwise)):

                def split(q, k, v, s, g, scale, initial_state, output_final_state, cut=cut, first=first, second=second):
                    halves = [{n: None if t is None else t[:, a:b] for n, t in zip("qkvsg", (q, k, v, s, g))} for a, b in ((0, cut), (cut, None))]
                    o1, state = first(**halves[0], scale=scale, initial_state=initial_state, output_final_state=True)
                    o2, state = second(**halves[1], scale=scale, initial_state=state, output_final_state=True)
                    return torch.cat([o1, o2], 1), state

                if dtype == torch.float32 and cut not in (0, 63) and first is not second:
                    continue
                check(split, x, gradients=second is not stepwise)


# ------------------------------------------------------------------------------------------------------------ views


def noncontiguous(x, how):
    def make(t):
        if t is None:
            return None
        if how == "heads first":  # [B, H, T, D] in memory
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if how == "slice":  # every other token and a part of a wider last dimension
            wide = t.new_full((t.shape[0], 2 * t.shape[1], t.shape[2], t.shape[3] + 3), torch.nan)
            wide[:, ::2, :, 2:-1] = t
            return wide[:, ::2, :, 2:-1]
        if how == "last dimension strided":
            return t.transpose(1, 3).contiguous().transpose(1, 3)
        if how == "expanded":  # one row of the batch and one head for all
            return t[:1, :, :1].expand(t.shape)
        raise ValueError(how)

    return {name: make(t) if name in "qkvsg" else t for name, t in x.items()}


@pytest.mark.parametrize("how", ["heads first", "slice", "last dimension strided", "expanded"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@ops
def test_views(op, dtype, how, device):
    x = noncontiguous(make_inputs(2, 40, 4, 2, 32, 24, 16, mode="given", dtype=TYPES[dtype], device=device), how)
    assert not x["k"].is_contiguous()
    check(OPS[op], x, gradients=op != "step")


def test_views_change_no_bit(device):
    x = make_inputs(2, 70, 4, 2, 32, 32, 16, mode="given", dtype=torch.bfloat16, device=device)
    for how in ("heads first", "slice"):
        for op in (chunk_gsa, fused_recurrent_gsa):
            a, b = testing.results(op, x), testing.results(op, noncontiguous(x, how))
            for name in a:
                assert torch.equal(a[name], b[name]), name


def test_cotangents_may_be_views(device):
    x = make_inputs(1, 40, 2, 1, 16, 16, 16, device=device)
    leaves = [x[name].requires_grad_() for name in "qkvg"]
    o, _ = chunk_gsa(**x)
    cotangent = torch.randn(16, 2, 40, 1, device=device).permute(3, 2, 1, 0)
    ones = torch.ones((), device=device).expand(o.shape)
    for c in (cotangent, ones):
        a = torch.autograd.grad(o, leaves, c, retain_graph=True)
        b = torch.autograd.grad(o, leaves, c.contiguous(), retain_graph=True)
        assert all(map(torch.equal, a, b))


# ------------------------------------------------------------------------------------------------------------ prefill into a pool

POOL = 9


def pooled(x, where, index=torch.int64, seed=5):
    """Arguments for a pool of POOL rows, of which sequence n has row where[n], and the pool as it was."""
    (_, _, H, K), V, M = x["k"].shape, x["v"].shape[-1], (x["s"] if x["g"] is None else x["g"]).shape[-1]
    mode = "abc" if x["g"] is None else "coupled"
    pool = make_inputs(POOL, 1, H, H, K, V, M, mode=mode, dtype=x["q"].dtype, device=x["q"].device, initial_state=True, seed=seed)["initial_state"]
    x = {**x, "initial_state": pool, "state_indices": torch.tensor(where, dtype=index, device=x["q"].device)}
    return x, tuple(t.clone() for t in pool)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@modes
@pytest.mark.parametrize("op", [chunk_gsa, fused_recurrent_gsa, functools.partial(fused_recurrent_gsa, reverse=True)], ids=["chunk", "recurrent", "reverse"])
def test_prefill_pool(op, mode, dtype, index, device):
    """The bits of the form without a pool, packed and in rows; padding may hold NaN, gives 0 and has no state; other rows of the pool keep their bits."""
    sizes = {"HQ": 4, "H": 2, "K": 32, "V": 48, "M": 16, "mode": mode, "dtype": dtype, "gate": 1.0, "device": device}
    lengths = [40, 1, 0, 300, 7, 0, 64]
    packed, rows = make_inputs(lengths=lengths, **sizes), make_inputs(5, 70, **sizes)
    ends = packed["cu_seqlens"].tolist()
    for x, where in ((packed, [6, -1, 0, 3, 8, -1, -1]), (rows, [8, -1, 0, 3, -1])):
        of = (lambda n: (0, slice(ends[n], ends[n + 1]))) if x is packed else (lambda n: (n, slice(None)))
        live, padding = ([n for n, row in enumerate(where) if (row >= 0) == there] for there in (True, False))
        kept = {name: None if x[name] is None else x[name][live] if x is rows else torch.cat([x[name][of(n)] for n in live])[None] for name in "qkvsg"}
        if x is packed:
            kept["cu_seqlens"] = torch.tensor([0, *(lengths[n] for n in live)], device=device).cumsum(0)
        x, before = pooled(x, where, index)
        for n in padding:
            for name in "qkvsg":
                if x[name] is not None:
                    x[name][of(n)] = torch.nan
        used = [where[n] for n in live]
        others = [row for row in range(POOL) if row not in used]
        o, final = op(**x, output_final_state=True)
        want, want_final = op(**kept, initial_state=tuple(t[used] for t in before), output_final_state=True)
        assert final is x["initial_state"]
        assert torch.equal(torch.cat([o[of(n)] for n in live]), want.flatten(0, 1))
        assert all(o[of(n)].eq(0).all() for n in padding)
        for new, old, expected in zip(final, before, want_final):
            assert torch.equal(new[used], expected) and torch.equal(new[others], old[others])
        assert op(**x)[1] is None


@pytest.mark.parametrize("K,V,M", [(32, 48, 16), (33, 17, 7)])
@modes
@pytest.mark.parametrize("op", [chunk_gsa, fused_recurrent_gsa], ids=["chunk", "recurrent"])
def test_prefill_pool_of_bf16(op, mode, K, V, M, device):
    """The bits of starting from its rows in fp32, whose final states are rounded once; gsa_step goes on from there. Other rows keep their bits."""
    sizes = {"HQ": 4, "H": 2, "K": K, "V": V, "M": M, "mode": mode, "gate": 1.0, "device": device}
    where = [6, -1, 0, 3, 8]
    live = [6, 0, 3, 8]
    for dtype in (torch.bfloat16, torch.float16):
        x, pool = pooled(make_inputs(lengths=[40, 3, 1, 130, 0], dtype=dtype, **sizes), where, torch.int32)
        pool = tuple(t.bfloat16() for t in pool)
        wide = tuple(t.float() for t in pool)
        want, want_final = op(**{**x, "initial_state": wide}, output_final_state=True)
        held = tuple(t.clone() for t in pool)
        o, final = op(**{**x, "initial_state": held}, output_final_state=True)
        assert final is held and torch.equal(o, want)
        others = [row for row in range(POOL) if row not in live]
        for new, old, expected in zip(held, pool, want_final):
            assert new.dtype == torch.bfloat16 and torch.equal(new[live], expected[live].bfloat16()) and torch.equal(new[others], old[others])
    row = {name: None if x[name] is None else x[name][0, :5] for name in "qkvsg"}
    assert gsa_step(**row, state=held, state_indices=x["state_indices"])[0].isfinite().all()


@modes
def test_pool_order_changes_no_bit(mode, device):
    """Where in the pool a sequence lives, and in which order the sequences come, does not matter; a pool of one row is no broadcast."""
    lengths = [40, 1, 130, 64]
    x = make_inputs(lengths=lengths, HQ=4, H=2, K=32, V=48, M=16, mode=mode, device=device, dtype=torch.bfloat16)
    parts = [{name: None if x[name] is None else x[name].split(lengths, 1)[n] for name in "qkvsg"} for n in range(4)]
    found = []
    for order, where in (([0, 1, 2, 3], [0, 1, 2, 3]), ([2, 0, 3, 1], [0, 1, 2, 3]), ([0, 1, 2, 3], [7, 2, 5, 0])):
        shuffled = {name: None if x[name] is None else torch.cat([parts[n][name] for n in order], 1) for name in "qkvsg"}
        cu = torch.tensor([0, *(lengths[n] for n in order)], device=device).cumsum(0)
        y, pool = pooled(shuffled, [where[n] for n in order])
        for t, source in zip(y["initial_state"], pool):
            t[where] = source[:4]
        o, final = chunk_gsa(**y, cu_seqlens=cu, output_final_state=True)
        pieces = dict(zip(order, o.split([lengths[n] for n in order], 1)))
        found.append([*(pieces[n] for n in range(4)), *(t[where] for t in final)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    one = {**parts[2], "initial_state": tuple(t[2:3].clone() for t in pool), "state_indices": torch.zeros(1, dtype=torch.int32, device=device)}
    assert torch.equal(chunk_gsa(**one)[0], found[0][2])


@pytest.mark.parametrize("op", [chunk_gsa, fused_recurrent_gsa], ids=["chunk", "recurrent"])
@modes
def test_chunked_prefill_and_decode_share_a_pool(op, mode, device):
    """A prompt in three calls, each in one batch with tokens of others, then steps on the same pool: the sequence in one piece."""
    T = 100
    x = make_inputs(2, T, 4, 2, 32, 48, 16, mode=mode, device=device)
    want, want_final = op(**x, output_final_state=True)
    pool = tuple(t.new_full((POOL, *t.shape[1:]), -torch.inf if i == 2 else 0.0) for i, t in enumerate(want_final))
    o = torch.zeros_like(want)
    for a, b in ((slice(0, 40), slice(0, 1)), (slice(40, 41), slice(1, 2)), (slice(41, 98), slice(2, 98))):
        batch = {name: None if x[name] is None else torch.cat([x[name][:1, a], x[name][1:, b]], 1) for name in "qkvsg"}
        cu = torch.tensor([0, a.stop - a.start, batch["q"].shape[1]], device=device)
        part, _ = op(**batch, initial_state=pool, cu_seqlens=cu, state_indices=torch.tensor([4, 2], device=device))
        o[:1, a], o[1:, b] = part[:, : a.stop - a.start], part[:, a.stop - a.start :]
    for t in range(98, T):
        row = {name: None if x[name] is None else x[name][:, t] for name in "qkvsg"}
        o[:, t] = gsa_step(**row, state=pool, state_indices=torch.tensor([4, 2], device=device))
    assert testing.error(o, want) < 1e-5
    for got, end in zip(pool, want_final):
        assert testing.error(got[[4, 2]], end) < 1e-5


# ------------------------------------------------------------------------------------------------------------ step


def one_token(device, dtype=torch.float32, mode="coupled", B=4, P=7, **options):
    x = make_inputs(B, 1, 4, 2, 32, 48, 16, mode=mode, dtype=dtype, device=device, gate=1.0, **options)
    row = {name: None if x[name] is None else x[name][:, 0] for name in "qkvsg"}
    pool = make_inputs(P, 1, 4, 2, 32, 48, 16, mode=mode, dtype=dtype, device=device, initial_state=True, seed=5)["initial_state"]
    return row, pool


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@modes
def test_step_pool(mode, index, device):
    """Each row finds its state in the pool; padding rows may hold NaN, give 0 and change nothing; other rows of the pool keep their bits."""
    row, pool = one_token(device, mode=mode, B=5)
    where = [6, -1, 0, 3, -1]
    for t in row.values():
        if t is not None:
            t[[1, 4]] = torch.nan
    before = [t.clone() for t in pool]
    o = gsa_step(**row, state=pool, state_indices=torch.tensor(where, dtype=index, device=device))
    assert torch.equal(o[[1, 4]], torch.zeros_like(o[[1, 4]]))
    live = [0, 2, 3]
    alone = tuple(t[[where[i] for i in live]] for t in before)
    want = gsa_step(**{name: None if t is None else t[live] for name, t in row.items()}, state=alone)
    assert torch.equal(o[live], want)
    for got, old, new in zip(pool, before, alone):
        assert torch.equal(got[[6, 0, 3]], new) and torch.equal(got[[1, 2, 4, 5]], old[[1, 2, 4, 5]])


@modes
def test_step_with_bf16_state(mode, device):
    """The state is rounded to bf16 after the step, the output is computed before: one step from the same state differs by that rounding alone."""
    row, pool = one_token(device, torch.bfloat16, mode, B=7)
    narrow = tuple(t.bfloat16() for t in pool)
    wide = tuple(t.float() for t in narrow)
    o, want = gsa_step(**row, state=narrow), gsa_step(**row, state=wide)
    assert testing.error(o, want) < 4e-3
    for got, exact in zip(narrow, wide):
        assert got.dtype == torch.bfloat16 and testing.error(got, exact) < 3e-3


def test_step_bf16_inputs_fp32_state_over_a_sequence(device):
    check(stepwise, make_inputs(2, 60, 4, 2, 64, 64, 32, dtype=torch.bfloat16, gate=1.0, device=device), gradients=False)


# Sizes that take other ways through the CUDA kernel: one block and several per head, slices of unequal rows, more heads than go through together,
# rows that are not a multiple of 16 bytes.
STEPS = [
    (3, 3, 128, 128, 64), (14, 2, 512, 512, 64), (8, 2, 128, 128, 128), (5, 1, 300, 260, 100), (9, 1, 512, 512, 256), (3, 1, 33, 511, 255), (7, 1, 17, 33, 7),
]  # fmt: skip


@pytest.mark.parametrize("HQ,H,K,V,M", STEPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@modes
def test_step_sizes(mode, dtype, HQ, H, K, V, M, device):
    run("step", dtype, device, B=2, T=5, HQ=HQ, H=H, K=K, V=V, M=M, mode=mode, gate=1.0, initial_state=True)


@pytest.mark.parametrize("HQ", [1, 2])
def test_step_of_many_rows(HQ, device):
    """More rows than a grid has in one of its lesser dimensions."""
    B, some = 66_000, [0, 65_534, 65_535, 65_536, 65_999]
    x = make_inputs(B, 1, HQ, 1, 4, 8, 4, dtype=torch.bfloat16, device=device, initial_state=True)
    row = {name: None if x[name] is None else x[name][:, 0] for name in "qkvsg"}
    few = {name: None if t is None else t[some] for name, t in row.items()}
    state, alone = x["initial_state"], tuple(t[some] for t in x["initial_state"])
    assert torch.equal(gsa_step(**row, state=state)[some], gsa_step(**few, state=alone))
    assert all(torch.equal(t[some], part) for t, part in zip(state, alone))


@pytest.mark.parametrize("HQ,H,K,V,M", STEPS)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_step_depends_on_nothing_else(state, HQ, H, K, V, M, device):
    """Called again, alone, with other neighbours, elsewhere in a pool, at another address: the same bits. Also of states in bf16, where every head
    of a group reads the state before it is rounded."""
    x = make_inputs(5, 1, HQ, H, K, V, M, dtype=torch.bfloat16, device=device, initial_state=True)
    row = {name: None if x[name] is None else x[name][:, 0] for name in "qkvsg"}
    first = tuple(t.to(state) for t in x["initial_state"])
    want = tuple(t.clone() for t in first)
    o = gsa_step(**row, state=want)
    again = tuple(t.clone() for t in first)
    assert torch.equal(gsa_step(**row, state=again), o) and all(map(torch.equal, again, want))
    for rows, where in (([0, 1, 2, 3, 4], [7, 2, 5, 0, 1]), ([3], [4]), ([4, 1], [8, 0])):
        pool = tuple(t.new_zeros(9 * t[0].numel() + 1)[1:].view(9, *t.shape[1:]) for t in first)      # an address that is no multiple of 16
        aligned = tuple(t.new_zeros(9, *t.shape[1:]) for t in first)
        for held in (pool, aligned):
            for t, source in zip(held, first):
                t[where] = source[rows]
            part = {name: None if t is None else t[rows] for name, t in row.items()}
            got = gsa_step(**part, state=held, state_indices=torch.tensor(where, device=device))
            if held is aligned:
                assert torch.equal(got, o[rows]) and all(torch.equal(t[where], w[rows]) for t, w in zip(held, want))
            else:
                assert testing.error(got, o[rows]) < 1e-2 and all(testing.error(t[where], w[rows]) < 1e-2 for t, w in zip(held, want))
    for i in range(HQ):                                                                               # every head as if it were alone
        h = i // (HQ // H)
        alone = {name: None if t is None else t[:, i : i + 1] if name == "q" else t[:, h : h + 1] for name, t in row.items()}
        single = tuple(t[:, h : h + 1].clone(memory_format=torch.contiguous_format) for t in first)
        assert testing.error(gsa_step(**alone, state=single), o[:, i : i + 1]) < 4e-3 and all(torch.equal(a, b[:, h : h + 1]) for a, b in zip(single, want))


@pytest.mark.parametrize("silu_qk,silu_v", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("M,rotary", [(16, 0), (13, 32), (16, 12)])
def test_step_of_a_layer(dtype, M, rotary, silu_qk, silu_v, device):
    """Rotation, silu, log gate and padding inside the step (torch.ops.gsa.step): what the same outside gives. Padding may hold NaN."""
    if dtype == "fp64" and device.type == "cuda":
        pytest.skip("fp64 is computed on the CPU only")
    x = make_inputs(5, 1, 8, 2, 32, 48, M, dtype=TYPES[dtype], device=device, initial_state=True)
    q, k, v, logits = (x[name][:, 0] for name in "qkvg")
    logits = logits.sign() * logits.abs() * 40 + 3                          # to both sides of 0, and far
    wide = torch.float64 if dtype == "fp64" else torch.float32
    state, other = (tuple(t.clone() for t in x["initial_state"]) for _ in range(2))
    g = torch.nn.functional.logsigmoid(logits.to(wide)) / 5
    silu = torch.nn.functional.silu
    g = g.to(TYPES[dtype]) if dtype == "fp64" else g

    angle = torch.arange(5, device=device)[:, None] * 0.3 + torch.arange(rotary, device=device)
    cos, sin = (f(angle[:1] if rotary == 12 else angle).to(TYPES[dtype]) for f in (torch.cos, torch.sin))

    def prepared(x):
        a, b = x[..., :rotary].chunk(2, -1)
        turned = x[..., :rotary] * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]
        x = torch.cat([turned, x[..., rotary:]], -1)
        return silu(x) if silu_qk else x

    want = gsa_step(prepared(q), prepared(k), silu(v) if silu_v else v, None, g, state, 0.7)
    mask = torch.tensor([True, False, True, True, False], device=device)
    for t in (q, k, v, logits):
        t[~mask] = torch.nan
    turn = {"cos": cos, "sin": sin} if rotary else {}
    got = torch.ops.gsa.step(q, k, v, None, logits, *other, None, 0.7, None, mask, 5.0, **turn, silu_qk=silu_qk, silu_v=silu_v)
    bound = {"fp64": 1e-14, "fp32": 2e-6}.get(dtype, 2e-3)
    assert testing.error(got[mask], want[mask]) < bound and got[~mask].eq(0).all()
    for new, expected, old in zip(other, state, x["initial_state"]):
        assert testing.error(new[mask], expected[mask]) < bound and torch.equal(new[~mask], old[~mask])


def test_step_stays_with_the_parallel_form(device):
    """2 000 tokens one by one, and at once: the same outputs and states."""
    x = make_inputs(1, 2000, 4, 2, 16, 16, 16, gate=8.0, device=device)
    (o, state), (want, final) = (op(**x, output_final_state=True) for op in (stepwise, chunk_gsa))
    assert testing.error(o[:, -100:], want[:, -100:]) < 1e-5 and testing.error(o, want) < 1e-5
    for a, b in zip(state, final):
        assert testing.error(a, b) < 1e-5
