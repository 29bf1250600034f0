"""The kernels for Hopper, as walks through whole sequences or segments of them, in parts, and in parts for few heads: by itself a call is one, by its heads."""

import itertools

import pytest
import torch

from gsa_ext import chunk_gsa, testing
from gsa_ext.testing import check, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned", "hopper")

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["hopper", "segments", "parts", "few"])
def hopper(request, capability, monkeypatch):
    if capability != (9, 0):
        pytest.skip("not a Hopper GPU")
    monkeypatch.setenv("GSA_KERNELS", request.param)


once = pytest.mark.parametrize("hopper", ["parts"], indirect=True)
wide = pytest.mark.parametrize("hopper", ["parts", "hopper"], indirect=True)
in_parts = pytest.mark.parametrize("hopper", ["parts", "few"], indirect=True)


@once
def test_the_environment_decides(cuda, kernels_of, monkeypatch):
    """Few heads go in parts, or forward in segments; many walk; GSA_KERNELS overrules it."""
    few, many = make_inputs(1, 200, 2, dtype=BF16, device=cuda), make_inputs(4, 200, 33, dtype=BF16, device=cuda)
    long, row = make_inputs(1, 2048, 32, dtype=BF16, device=cuda), make_inputs(lengths=[1024], dtype=BF16, device=cuda)
    packed = make_inputs(lengths=[600, 600], dtype=BF16, device=cuda)
    ways = {
        "segments": {"join_kernel", "forward_kernel", "keys_kernel"},
        "few": {"products_kernel", "pass_kernel", "output_kernel", "keys_kernel"},
        "parts": {"scan_kernel", "output_kernel", "keys_kernel"},
        "hopper": {"forward_kernel", "walk_kernel", "fused_kernel"},
        "portable": {"chunk_output", "backward_keys"},
    }

    def way(x):
        names = kernels_of(lambda: testing.results(chunk_gsa, x))
        return next(way for way, needed in ways.items() if all(any(kernel in name for name in names) for kernel in needed))

    for name in ways:
        monkeypatch.setenv("GSA_KERNELS", name)
        assert way(few) == way(many) == name
    monkeypatch.delenv("GSA_KERNELS")
    assert [way(x) for x in (few, packed, row, long, many)] == ["parts", "parts", "few", "segments", "hopper"]


@pytest.mark.parametrize("gate", ["zero", 8.0, 1.0, 0.1, "mixed", "-40", "-inf", "shut"])
@pytest.mark.parametrize("mode", ["coupled", "given"])
@pytest.mark.parametrize("dtype,D,M", [(BF16, 64, 32), (BF16, 128, 32), (FP16, 64, 32), (BF16, 128, 104)])
def test_gates(dtype, D, M, mode, gate, cuda):
    check(chunk_gsa, make_inputs(1, 150, 2, 1, D, D, M, mode=mode, gate=gate, dtype=dtype, device=cuda, initial_state=True))


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("kernels,D,M", [("hopper", 128, 64), ("", 128, 64), ("", 128, 128), ("", 256, 64), ("hopper", 256, 64)])
def test_small_cotangents_beside_strong_gates(kernels, D, M, r, cuda, monkeypatch):
    """A mean's cotangents are as small as 2^-30: nothing that they are multiplied with may push them below what a number of 16 bits can hold."""
    monkeypatch.setenv("GSA_KERNELS", kernels)
    x = make_inputs(2, 200, 2 * r, 2, D, D, M, gate="shut", mode="given", dtype=BF16, device=cuda)
    leaves = {name: x[name].requires_grad_() for name in "qkvsg"}
    o = chunk_gsa(**x)[0]
    cotangent = torch.randn_like(o)
    large = torch.autograd.grad(o, leaves.values(), cotangent, retain_graph=True)
    small = torch.autograd.grad(o, leaves.values(), cotangent * 2.0**-30)
    for name, a, b in zip(leaves, large, small):
        off = (b.double() * 2.0**30 - a.double()).norm() / a.double().norm()
        assert off < 1e-4, f"d{name} {off:.1e}"


@pytest.mark.parametrize("D", [128, 256])
def test_gates_that_are_nearly_resets(D, cuda):
    """1 - exp(g) is 1 in fp32, and yet dg is not 0: next to nothing is left of the states, and all of dg is what that would change."""
    x = make_inputs(1, 150, 2, 1, D, D, 32, mode="given", dtype=BF16, device=cuda, initial_state=True)
    x["g"].fill_(-20)
    check(chunk_gsa, x)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("M", [8, 40, 64, 72, 128])
def test_lengths_and_slots(T, M, cuda):
    check(chunk_gsa, make_inputs(2, T, 2, 2, 64, 64, M, mode="given", dtype=BF16, device=cuda, initial_state=True))


@pytest.mark.parametrize("hopper", ["segments"], indirect=True)
@pytest.mark.parametrize("slots", ["alike", "one that stays", "one that is lost"])
@pytest.mark.parametrize("gate", [8.0, 1.0])
@pytest.mark.parametrize("r,dtype,gate_dtype", [(1, BF16, BF16), (1, FP16, torch.float32), (2, BF16, BF16)])
def test_segments_begin_with_what_is_left(r, dtype, gate_dtype, gate, slots, cuda):
    """What the gates leave nothing of before a segment begins, or after it ends, is not looked at; one slot of a head decides for all of it. A head with a
    chunk of several windows goes another way, its neighbours do not."""
    x = make_inputs(1, 1000, 2 * r, 2, 64, 64, 16, gate=gate, mode="given", dtype=dtype, gate_dtype=gate_dtype, device=cuda, initial_state=True)
    if slots == "one that stays":
        x["g"][:, :, 0, 5] = 0.0
    if slots == "one that is lost":
        x["g"][:, ::90, 1, 3] = -torch.inf
    check(chunk_gsa, x)


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("mode", ["coupled", "given", "abc"])
@pytest.mark.parametrize("state", [False, True, "broadcast"])
def test_packed(state, mode, r, cuda):
    lengths = [0, 1, 40, 0, 0, 64, 17, 130, 0]
    check(chunk_gsa, make_inputs(lengths=lengths, HQ=2 * r, H=2, K=128, V=128, M=16, mode=mode, gate=1.0, dtype=BF16, device=cuda, initial_state=state))


@pytest.mark.parametrize("tau", testing.PEER)
@pytest.mark.parametrize("dtype,M", [(BF16, 64), (FP16, 64), (BF16, 128)])
def test_figures_of_the_best_published_kernels(dtype, M, tau, cuda):
    x = make_inputs(1, 512, 2, 2, 128, 128, M, gate=tau, mode="given", dtype=dtype, device=cuda)
    x["s"] = -torch.expm1(x["g"].float()).to(x["s"])
    check(chunk_gsa, x, allowed=testing.PEER[tau])


def test_wide_gates_beside_narrow_inputs(cuda):
    for mode in ("coupled", "given", "abc"):
        check(chunk_gsa, make_inputs(1, 70, 2, 1, 64, 64, 16, mode=mode, dtype=BF16, gate_dtype=torch.float32, initial_state=True, device=cuda))


@pytest.mark.parametrize("D,M,r", [(128, 64, 1), (128, 64, 3), (128, 128, 2), (64, 40, 1), (512, 64, 1), (512, 64, 3)])
def test_same_bits_again_and_at_any_checkpoint_level(D, M, r, cuda):
    one = {"B": 2, "T": 200}
    for gate, sizes in ((8.0, one), (0.1, one), ("mixed", one), ("mixed", {"lengths": [70, 0, 64, 130]})):
        x = make_inputs(**sizes, HQ=2 * r, H=2, K=D, V=D, M=M, gate=gate, dtype=BF16, device=cuda, initial_state=True)
        runs = [testing.results(lambda **y: chunk_gsa(**y, checkpoint_level=level), x) for level in (2, 2, 1, 0)]  # noqa: B023
        for name, other in itertools.product(runs[0], runs[1:]):
            assert torch.equal(runs[0][name], other[name]), name


@in_parts
def test_gates_are_kept_as_they_are(cuda):
    """Backward, even of chunks whose gates it has to take apart, leaves what forward kept: it may come again."""
    x = make_inputs(2, 200, 4, 2, 64, 64, 40, gate="mixed", mode="given", dtype=BF16, device=cuda)
    o, _, _, kept = torch.ops.gsa.chunk(x["q"], x["k"], x["v"], x["s"], x["g"], None, None, None, None, False, 0)
    before = kept.clone()
    grads = [torch.ops.gsa.chunk_backward(o, None, None, x["q"], x["k"], x["v"], x["s"], x["g"], None, None, None, None, kept, False, False) for _ in range(2)]
    assert torch.equal(kept.view(torch.int16), before.view(torch.int16)) and kept[2 * (200 // 64 + 2):].ne(0).any()
    for one, again in zip(*grads):
        assert torch.equal(one, again)


@once
def test_opcheck_of_kept_gates(cuda):
    for sizes in ({"B": 2, "T": 70}, {"lengths": [5, 0, 66]}):
        x = make_inputs(**sizes, HQ=2, H=2, K=64, V=64, M=16, mode="given", gate="mixed", dtype=BF16, device=cuda)
        arguments = x["q"], x["k"], x["v"], x["s"], x["g"], 0.3, None, None, x.get("cu_seqlens"), False, 0
        torch.library.opcheck(torch.ops.gsa.chunk.default, arguments)


@in_parts
@pytest.mark.parametrize("mode", ["coupled", "given"])
@pytest.mark.parametrize("gate", [8.0, 0.1, "-inf"])
@pytest.mark.parametrize("dtype,D,M,r", [(BF16, 64, 48, 1), (BF16, 128, 48, 1), (BF16, 64, 48, 3), (BF16, 128, 48, 4), (FP16, 128, 48, 2), (BF16, 128, 128, 4),
                                         (FP16, 64, 112, 2)])
def test_groups_of_heads(dtype, D, M, r, gate, mode, cuda):
    check(chunk_gsa, make_inputs(4, 150, 2 * r, 2, D, D, M, mode=mode, gate=gate, dtype=dtype, device=cuda, initial_state=True))


@once
@pytest.mark.parametrize("D,M,r", [(64, 16, 4), (128, 16, 1), (128, 16, 3), (128, 72, 3)])
def test_a_block_for_all_heads_of_a_group(D, M, r, cuda):
    """Where there are chunks enough for the GPU, a block has the query heads of its group one after the other."""
    x = make_inputs(91, 70, 4 * r, 4, D, D, M, mode="given", dtype=BF16, device=cuda, initial_state="broadcast")
    x["g"][1, 66:, 3] *= 200
    check(chunk_gsa, x)


@in_parts
@pytest.mark.parametrize("mode", ["coupled", "given"])
@pytest.mark.parametrize("dtype,D,M,r", [(BF16, 128, 64, 2), (BF16, 64, 128, 3), (FP16, 128, 128, 1), (FP16, 64, 24, 2), (BF16, 256, 64, 2)])
def test_packed_with_resets(dtype, D, M, r, mode, cuda):
    """Chunks of several windows, short ones among them, beside chunks of one; a reset at the first token of a sequence, of a chunk, at the last one."""
    lengths = [0, 1, 40, 0, 64, 17, 200, 0]
    x = make_inputs(lengths=lengths, HQ=2 * r, H=2, K=D, V=D, M=M, mode=mode, dtype=dtype, device=cuda, initial_state=True)
    x["g"][:, 5:30, 0, ::2] *= 300
    x["g"][:, [0, 1, 104, 121, 122, 186, 321], 0, : M // 2] = -torch.inf
    x["g"][:, 230:240, 1] = -torch.inf
    check(chunk_gsa, x)


@in_parts
@pytest.mark.parametrize("gate", [8.0, "-inf"])
@pytest.mark.parametrize("D,M", [(64, 64), (128, 128), (256, 64)])
def test_nan_in_a_gate(D, M, gate, cuda):
    """In what follows it in its sequence and head, and in nothing else."""
    x = make_inputs(lengths=[140, 60], HQ=4, H=2, K=D, V=D, M=M, gate=gate, mode="given", dtype=BF16, device=cuda)
    y = {**x, "g": x["g"].clone()}
    y["g"][0, 75, 0, 5] = torch.nan
    want, got = testing.results(chunk_gsa, x), testing.results(chunk_gsa, y)
    a, b = want["o"][0], got["o"][0]
    assert torch.equal(a[:64], b[:64]) and torch.equal(a[:, 2:], b[:, 2:]) and b[75:140, :2].isnan().all()
    assert (a[64:75].float() - b[64:75].float()).norm() < 0.02 * a[64:75].float().norm()
    for name in ("o", "dq", "dk", "dv", "ds", "dg"):
        assert torch.equal(want[name][:, 140:], got[name][:, 140:]), name


@pytest.mark.parametrize("hopper", ["few"], indirect=True)
@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("dtype,D,M,r", [(BF16, 128, 64, 4), (BF16, 64, 24, 1), (FP16, 128, 40, 2), (FP16, 64, 64, 3), (BF16, 128, 128, 2)])
def test_more_chunks_than_are_on_their_way(dtype, D, M, r, strong, cuda):
    """Sequences that are over before the ring of chunks is full, just then and later; with strong gates a few chunks of several windows among the others."""
    lengths = [0, 1600, 1, 1024, 0, 1025, 256, 250, 0]
    x = make_inputs(lengths=lengths, HQ=2 * r, H=2, K=D, V=D, M=M, mode="given", dtype=dtype, device=cuda, initial_state=True)
    if strong:
        x["g"][:, 300:330, 0] = -torch.inf
        x["g"][:, 2000:2200, 1, ::3] *= 200
    check(chunk_gsa, x)


@pytest.mark.parametrize("hopper", ["few"], indirect=True)
@pytest.mark.parametrize("gate", [2.0, 8.0, "shut", "-inf"])
@pytest.mark.parametrize("dtype,D,M,r", [(BF16, 128, 64, 4), (FP16, 64, 24, 1), (BF16, 128, 128, 2)])
def test_parts_of_a_sequence(dtype, D, M, r, gate, cuda, monkeypatch):
    """Three of at most six chunks, beside each other: heads that forget within half of one are scanned as one part would be; others, one of which never forgets
    a slot, element by element."""
    x = make_inputs(2, 1000, 2 * r, 2, D, D, M, mode="given", gate=gate, dtype=dtype, device=cuda, initial_state=True)
    x["g"][1, :, 0, 5] = 0
    check(chunk_gsa, x)
    few = chunk_gsa(**x, output_final_state=True)[1]
    monkeypatch.setenv("GSA_KERNELS", "parts")
    for a, b in zip(few, chunk_gsa(**x, output_final_state=True)[1]):
        if gate == 2.0:
            assert torch.equal(a[0], b[0]) and torch.equal(a[1, 1], b[1, 1]) and not torch.equal(a[1, 0], b[1, 0])
        elif gate == 8.0:
            assert not torch.equal(a[0], b[0])


@pytest.mark.parametrize("hopper", ["few"], indirect=True)
@pytest.mark.parametrize("gate", [2.0, 8.0, "-inf"])
def test_parts_of_wide_heads(gate, cuda):
    """Backward; the first part's blocks have all of a head that does not forget."""
    x = make_inputs(2, 1000, 4, 2, 256, 256, 40, mode="given", gate=gate, dtype=BF16, device=cuda, initial_state=True)
    x["g"][1, :, 0, 5] = 0
    check(chunk_gsa, x)


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("D,M", [(64, 64), (128, 64), (128, 128)])
def test_strong_gates_in_one_head_of_one_sequence(D, M, r, cuda):
    """Only that head's chunks are made token by token, whichever slots it is for; half of the sequences at a time."""
    x = make_inputs(4, 130, 16 * r, 16, D, D, M, mode="given", dtype=BF16, device=cuda, initial_state=True)
    x["g"][1, 70:, 3, -9:] *= 200
    x["g"][0, 80:, 5, :9] *= 200
    check(chunk_gsa, x)


@once
def test_wide_heads_walk_backward_only(cuda, kernels_of, monkeypatch):
    """With sequences and heads enough; else, and forward, they go in parts."""
    x = make_inputs(8, 64, 17, K=256, V=256, dtype=BF16, device=cuda)
    few = make_inputs(1, 64, 2, K=256, V=256, dtype=BF16, device=cuda)
    parts = ("scan_kernel", "wide_scores_kernel", "wide_values_kernel", "wide_queries_kernel")

    def walks(x):
        names = kernels_of(lambda: testing.results(chunk_gsa, x))
        assert all(any(kernel in name for name in names) for kernel in parts)
        walk, keys = (any(kernel in name for name in names) for kernel in ("wide_walk_kernel", "wide_keys_kernel"))
        assert walk != keys
        return walk

    for way, expected in {"": True, "hopper": True, "parts": False, "few": False}.items():
        monkeypatch.setenv("GSA_KERNELS", way)
        assert walks(x) == expected and walks(few) == (way == "hopper"), way


@wide
@pytest.mark.parametrize("gate", ["zero", 8.0, 1.0, 0.1, "mixed", "-40", "-inf", "shut"])
@pytest.mark.parametrize("mode", ["coupled", "given"])
@pytest.mark.parametrize("dtype,D,M,r", [(BF16, 256, 64, 1), (BF16, 512, 64, 1), (BF16, 512, 48, 2), (FP16, 256, 48, 2), (FP16, 512, 64, 3)])
def test_wide_heads(dtype, D, M, r, mode, gate, cuda):
    check(chunk_gsa, make_inputs(2, 150, 2 * r, 2, D, D, M, mode=mode, gate=gate, dtype=dtype, device=cuda, initial_state=True))


@wide
@pytest.mark.parametrize("T", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("D,M", [(256, 8), (256, 40), (512, 24), (512, 64)])
def test_lengths_and_slots_of_wide_heads(T, D, M, cuda):
    check(chunk_gsa, make_inputs(2, T, 2, 2, D, D, M, mode="given", dtype=BF16, device=cuda, initial_state=True))


@wide
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("mode", ["coupled", "given", "abc"])
@pytest.mark.parametrize("state", [False, True, "broadcast"])
def test_packed_wide_heads(state, mode, r, cuda):
    lengths = [0, 1, 40, 0, 0, 64, 17, 130, 0]
    check(chunk_gsa, make_inputs(lengths=lengths, HQ=2 * r, H=2, K=256, V=256, M=16, mode=mode, gate=1.0, dtype=BF16, device=cuda, initial_state=state))


@wide
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("D", [256, 512])
def test_wide_heads_with_chunks_of_several_windows_among_others(D, r, cuda):
    x = make_inputs(4, 200, 16 * r, 16, D, D, 64, mode="given", dtype=BF16, device=cuda, initial_state=True)
    x["g"][1, 70:, 3] *= 200
    x["g"][2, 100:130, 5] = -torch.inf
    check(chunk_gsa, x)


def test_slices_of_a_fused_projection(cuda):
    """q, k, v as slices of one tensor give the bits of tensors of their own; a cotangent at an odd address too."""
    x = make_inputs(2, 100, 2, 2, 64, 64, 32, dtype=BF16, device=cuda)
    fused = torch.cat([x[name] for name in "qkv"], -1)
    views = dict(zip("qkv", fused.split(64, -1), strict=True))
    assert torch.equal(chunk_gsa(**x)[0], chunk_gsa(**{**x, **views})[0])
    q = x["q"].clone().requires_grad_()
    o, _ = chunk_gsa(**{**x, "q": q})
    cotangent = torch.randn(o.numel() + 1, device=cuda, dtype=BF16)
    (odd,) = torch.autograd.grad(o, q, cotangent[1:].view_as(o), retain_graph=True)
    (even,) = torch.autograd.grad(o, q, cotangent[1:].clone().view_as(o))
    assert torch.equal(odd, even)


def test_expanded_inputs_and_cotangents(cuda):
    """Tensor maps have no dimension without a stride: such an input goes to the portable kernels, a cotangent is copied."""
    x = make_inputs(2, 100, 2, 2, 64, 64, 32, dtype=BF16, device=cuda)
    check(chunk_gsa, {**x, "k": x["k"][:1, :, :1].expand(x["k"].shape)})
    q = x["q"].clone().requires_grad_()
    o, _ = chunk_gsa(**{**x, "q": q})
    cotangent = torch.randn(2, 1, 1, 64, device=cuda, dtype=BF16).expand(o.shape)
    (expanded,) = torch.autograd.grad(o, q, cotangent, retain_graph=True)
    (own,) = torch.autograd.grad(o, q, cotangent.contiguous())
    assert torch.equal(expanded, own)


def test_nothing_leaks_between_packed_sequences(cuda):
    x = make_inputs(lengths=[70, 50, 80], HQ=2, H=2, K=64, V=64, M=16, dtype=BF16, device=cuda)
    want = chunk_gsa(**x)[0]
    for name in "qkv":
        y = {**x, name: x[name].clone()}
        y[name][:, 75:90] = float("nan")
        o = chunk_gsa(**y)[0]
        assert torch.equal(o[:, :70], want[:, :70]) and torch.equal(o[:, 120:], want[:, 120:]) and o[:, 75:90].isnan().any()


@once
@pytest.mark.parametrize("M", [64, 128])
def test_same_bits_under_load(M, cuda):
    """More blocks than the GPU has room for, each with the tiles of several query heads in the same place: nothing is overwritten while it is read."""
    x = make_inputs(4, 512, 32, 8, 128, 128, M, mode="given", dtype=BF16, device=cuda)
    leaves = {name: x[name].requires_grad_() for name in "qkvsg"}
    o = chunk_gsa(**x)[0]
    cotangent = torch.randn_like(o)
    first = torch.autograd.grad(o, leaves.values(), cotangent, retain_graph=True)
    for _ in range(30):
        again = torch.autograd.grad(o, leaves.values(), cotangent, retain_graph=True)
        for name, a, b in zip(leaves, first, again):
            assert torch.equal(a, b), f"d{name}: {a.ne(b).sum()} numbers differ"


def check_pool(x, N, padding, times=3):
    """Sequences that start from rows of a pool and leave their states there: bits as without a pool, again and again; no other row is touched.

    Padding may hold anything.
    """
    device, P = x["q"].device, N + 10
    (B, T, HQ, K), (H, V) = x["q"].shape, x["v"].shape[2:]
    mode, M = ("abc", x["s"].shape[-1]) if x["g"] is None else ("coupled", x["g"].shape[-1])
    states = make_inputs(P, 1, HQ, H, K, V, M, mode=mode, dtype=BF16, device=device, initial_state=True)["initial_state"]
    where = torch.randperm(P, device=device)[:N]
    where[padding] = -1
    live = where >= 0
    lengths = x["cu_seqlens"].diff() if "cu_seqlens" in x else torch.full((N,), T, device=device)
    tokens = torch.repeat_interleave(live, lengths).view(B, T)
    for name in "qkvsg":
        if x[name] is not None:
            x[name][~tokens] = torch.nan
    for dtype in (torch.float32, BF16):
        held = tuple(t.to(dtype) for t in states)
        want, final = chunk_gsa(**x, initial_state=tuple(t.float()[where.clamp(min=0)] for t in held), output_final_state=True)
        reached = torch.zeros(P, dtype=torch.bool, device=device).index_fill(0, where[live], True)
        for _ in range(times):
            pool = tuple(t.clone() for t in held)
            o, _ = chunk_gsa(**x, initial_state=pool, state_indices=where)
            assert torch.equal(o[tokens], want[tokens]) and o[~tokens].eq(0).all()
            for new, old, expected in zip(pool, held, final):
                assert torch.equal(new[where[live]], expected[live].to(dtype)) and torch.equal(new[~reached], old[~reached])


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("mode", ["coupled", "abc"])
def test_pool(mode, r, cuda):
    check_pool(make_inputs(lengths=[70, 9, 1, 130, 64] * 8, HQ=8 * r, H=8, K=64, V=64, M=64, mode=mode, dtype=BF16, device=cuda), 40, [1, 7])


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("gate", [8.0, "cut"])
def test_pool_of_rows(gate, D, r, cuda):
    """Blocks of a group, and of segments, start from the state that one of them leaves. cut: some segments have chunks of several windows."""
    x = make_inputs(6, 500, 8 * r, 8, D, D, 64, gate=8.0, dtype=BF16, device=cuda)
    if gate == "cut":
        for n, head, first in ((0, 1, 10), (2, 3, 200), (3, 7, 450), (5, 0, 0), (5, 0, 499)):
            x["g"][n, first : first + 40, head] *= 400
    check_pool(x, 6, [4])


@pytest.mark.parametrize("hopper", ["few"], indirect=True)
@pytest.mark.parametrize("D,M,r", [(64, 64, 1), (128, 128, 2)])
def test_pool_of_parts(D, M, r, cuda):
    """The first part of a sequence starts from the state that the last one leaves; one head never forgets."""
    x = make_inputs(3, 700, 2 * r, 2, D, D, M, gate=1.0, dtype=BF16, device=cuda)
    x["g"][2, :, 0, 5] = 0
    check_pool(x, 3, [1])


@wide
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("D,shape", [(256, {"lengths": [70, 9, 1, 130, 64]}), (512, {"B": 5, "T": 140})])
def test_pool_of_wide_heads(D, shape, r, cuda):
    check_pool(make_inputs(**shape, HQ=2 * r, H=2, K=D, V=D, M=64, dtype=BF16, device=cuda), 5, [1])
