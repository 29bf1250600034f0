"""What layers have beside the slots: a window over a whole sequence, and one token (torch.ops.gsa.conv_step and window_step) against such forms."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from gsa_ext.hf import window as implementation
from gsa_ext.hf.window import WindowState, window_attention, window_step
from gsa_ext.layer import Rotary, ShortConv
from gsa_ext.testing import error

ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", ALLOWED, ids=["fp32", "bf16", "fp16"])


@pytest.mark.parametrize("width,bias", [(4, False), (3, True), (1, True)])
@dtypes
def test_conv_step(dtype, width, bias, device):
    """Token after token is the convolution; padding leaves the history as it was, bit for bit."""
    torch.manual_seed(0)
    conv = ShortConv(37, width, bias, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(3, 9, 37, device=device, dtype=dtype)
    history = x.new_zeros(3, width - 1, 37)
    got = torch.stack([conv.step(x[:, t:t + 1], history)[:, 0] for t in range(9)], 1)
    assert error(got, conv.double()(x.double())) < ALLOWED[dtype]
    assert torch.equal(history, x[:, 9 - width + 1:])
    before, mask = history.clone(), torch.tensor([True, False, True], device=device)
    conv.to(dtype).step(torch.where(mask[:, None, None], x[:, :1], torch.nan), history, mask[:, None])
    assert torch.equal(history[1], before[1]) and torch.equal(history[::2], torch.cat([before, x[:, :1]], 1)[::2, 1:])


def turned(x, cos, sin):
    n = cos.shape[-1]
    x1, x2 = x[..., :n // 2], x[..., n // 2:n]
    return torch.cat([x[..., :n] * cos[:, :, None] + torch.cat([-x2, x1], -1) * sin[:, :, None], x[..., n:]], -1)


# window, HQ, H, K, V, components rotated
WINDOWS = [(64, 8, 2, 64, 64, 64), (5, 3, 3, 12, 20, 8), (1, 4, 1, 16, 16, 0), (100, 6, 2, 33, 40, 0)]


@pytest.mark.parametrize("window,HQ,H,K,V,rotary", WINDOWS)
@dtypes
def test_window_step(dtype, window, HQ, H, K, V, rotary, device):
    """Goes on from what a prompt left, in place, as the form over a sequence does; also from nothing, and with rows that are padding now and then."""
    torch.manual_seed(0)
    B, T, prompt = 3, 80, 10
    q, k, v = (torch.randn(B, T, h, d, device=device).to(dtype) for h, d in ((HQ, K), (H, K), (H, V)))
    cos, sin = (f(torch.randn(1, T, rotary, device=device)).to(dtype) for f in (torch.cos, torch.sin))
    qr, kr = (turned(x, cos, sin) if rotary else x for x in (q, k))
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    mask[1, 15:20] = mask[2, prompt] = False
    want, end = window_attention(qr.double(), kr.double(), v.double(), window, 0.3, mask, keep=True)
    past = window_attention(*(x[:, :prompt] for x in (qr, kr, v)), window, 0.3, keep=True)[1]
    held = [id(x) for x in past]
    for t in range(prompt, T):
        at = slice(t, t + 1)
        rotation = Rotary(cos[:, at], sin[:, at], lambda q, k: (q, k)) if rotary else None
        token = q[:, at], k[:, at], v[:, at].masked_fill(~mask[:, at, None, None], torch.nan)
        o, past = window_step(*token, window, 0.3, mask[:, at], past, rotation)
        assert error(o[mask[:, t]], want[mask[:, t], t][:, None]) < 3 * ALLOWED[dtype] and o[~mask[:, t]].eq(0).all()
    assert [id(x) for x in past] == held and torch.equal(past.filled, end.filled)
    for n in range(B):
        there = window - 1 - int(past.filled[n])
        assert all(error(a[n, there:], b[n, there:]) < 3 * ALLOWED[dtype] for a, b in zip(past[:2], end[:2]) if a[n, there:].numel())
    o, past = window_step(q[:, :1], k[:, :1], v[:, :1], window, 0.3)
    assert error(o, v[:, :1].repeat_interleave(HQ // H, 2)) < ALLOWED[dtype] and past.filled.eq(min(1, window - 1)).all()


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def windowed(q, k, v, window, scale, mask=None, past=None, cu_seqlens=None):
    """Softmax over the pairs that may see each other: all T^2 of them, and those with a past."""
    (B, T, HQ, _), H, back, device = q.shape, k.shape[2], window - 1, q.device
    place = (torch.ones(B, T, device=device, dtype=torch.bool) if mask is None else mask).cumsum(1)[:, :, None]         # among those that are no padding
    see = (place >= place.mT) & (place - place.mT < window)
    if mask is not None:
        see = see & mask[:, None]
    if cu_seqlens is not None:
        number = torch.searchsorted(cu_seqlens[1:], torch.arange(T, device=device), right=True)
        see = see & (number[:, None] == number)
    if past is not None:
        held = torch.arange(-back, 0, device=device) + 1                 # the last of them is in the place before the first
        earlier = (place - held < window) & (held > -past.filled[:, None, None])
        k, v, see = torch.cat([past.keys.to(k), k], 1), torch.cat([past.values.to(v), v], 1), torch.cat([earlier, see], 2)
    k, v = (x.repeat_interleave(HQ // H, 2) for x in (k, v))
    logits = (scale * torch.einsum("bthd,bshd->bhts", q, k)).masked_fill(~see[:, None], -1e30)
    return torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v)


def window_inputs(kind, T, window, HQ, H, D, dtype, device):
    """q, k, v (slices of one tensor), and the keyword arguments."""
    torch.manual_seed(0)
    B, back = 1 if kind == "packed" else 3, window - 1
    qkv = torch.randn(B, T, HQ + 2 * H, D, device=device).to(dtype)
    options = {}
    if "mask" in kind:
        options["mask"] = torch.rand(B, T, device=device) > 0.3
        options["mask"][0] = True
    if "past" in kind:
        keys, values = torch.randn(2, B, back, H, D, device=device).to(dtype)
        options["past"] = WindowState(keys, values, torch.tensor([back, back // 2, 0], device=device))
    if kind == "packed":
        options["cu_seqlens"] = torch.tensor([0, T // 3, T // 3, T // 2, T], device=device)
    return *qkv.split([HQ, H, H], 2), options


# T, window, HQ, H, D: whole blocks and parts of one, fewer tokens than the window, nothing but the token itself, dimensions that FlashAttention does not take
WINDOWED = [(40, 8, 4, 2, 16), (37, 8, 4, 2, 16), (5, 8, 3, 3, 6), (40, 8, 3, 3, 6), (9, 1, 4, 1, 8), (200, 64, 8, 2, 128), (7, 64, 4, 4, 72),
            (150, 33, 2, 1, 256)]
KINDS = ["plain", "mask", "past", "mask and past", "packed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T,window,HQ,H,D", WINDOWED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["fp64", "bf16", "fp16"])
def test_window_attention(dtype, T, window, HQ, H, D, kind, device):
    """Forward and backward against softmax over all pairs in fp64; in 16 bits on the GPU one kernel wherever it takes the sizes."""
    *qkv, options = window_inputs(kind, T, window, HQ, H, D, dtype, device)
    mask = options.get("mask")
    leaves, exact = [x.requires_grad_() for x in qkv], [x.detach().double().requires_grad_() for x in qkv]
    cotangent = torch.randn(*qkv[0].shape, device=device).to(dtype)
    if mask is not None:
        cotangent[~mask] = 0
    with Operators() as operators:
        o = window_attention(*leaves, window, D ** -0.5, **options)[0]
    assert operators.names.count("torch_attn._varlen_attn") == (device.type == "cuda" and dtype.itemsize == 2 and D % 8 == 0)
    want = windowed(*exact, window, D ** -0.5, **options)
    assert o.dtype == dtype and o.isfinite().all()
    allowed = {torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    keep, terms = cotangent != 0, float(cotangent.double().norm())       # with a window of 1 the gradients of q and k vanish
    got = [o * keep, *torch.autograd.grad(o, leaves, cotangent)]
    for name, a, b in zip("oqkv", got, [want * keep, *torch.autograd.grad(want, exact, cotangent.double())]):
        assert error(a, b, terms) < allowed, name


@pytest.mark.parametrize("kind,dynamic", [*((kind, False) for kind in KINDS), ("plain", True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_window_compiled(dtype, kind, dynamic, device):
    """In one graph, the same."""
    *qkv, options = window_inputs(kind, 40, 8, 4, 2, 16, dtype, device)
    leaves, cotangent = [x.requires_grad_() for x in qkv], torch.randn(*qkv[0].shape, device=device).to(dtype)
    if "mask" in options:
        cotangent[~options["mask"]] = 0

    def call(*x):
        return window_attention(*x, 8, 0.25, **options)[0]

    torch._dynamo.reset()
    found = []
    for f in (torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager"), call):
        o = f(*leaves)
        found.append([o * (cotangent != 0), *torch.autograd.grad(o, leaves, cotangent)])
    assert all(error(a, b) < (1e-12 if dtype == torch.float64 else 1e-2) for a, b in zip(*found))


@pytest.mark.parametrize("kind", ["plain", "past", "packed"])
@pytest.mark.parametrize("T,window,HQ,H,D", WINDOWED)
def test_window_as_sequences(T, window, HQ, H, D, kind, device):
    """The sequences that FlashAttention is given, put through what its documentation says of lengths and windows, are the window."""
    *qkv, options = window_inputs(kind, T, window, HQ, H, D, torch.float64, device)
    past, cu = options.get("past"), options.get("cu_seqlens")
    q, k, v = qkv
    if past is not None:
        k, v = torch.cat([past.keys, k], 1), torch.cat([past.values, v], 1)
    cu_q, cu_k = implementation._flash_lengths(q, k, None if past is None else past.filled, cu)
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k) and cu_q[-1] == q.shape[0] * T and cu_k[-1] == q.shape[0] * k.shape[1]
    rows, outputs = [implementation._flash_rows(x) for x in (q, k, v)], []
    for n in range(len(cu_q) - 1):
        qs, ks, vs = (x[c[n]:c[n + 1]] for x, c in zip(rows, (cu_q, cu_k, cu_k)))
        ks, vs = (x.repeat_interleave(HQ // H, 1) for x in (ks, vs))
        last = torch.arange(len(qs), device=device)[:, None] + len(ks) - len(qs)             # the key that a query sees last: the end is at the end
        j = torch.arange(len(ks), device=device)
        logits = torch.einsum("thd,shd->hts", qs, ks).mul(0.3).masked_fill((j > last) | (j < last - (window - 1)), -torch.inf)
        outputs.append(torch.einsum("hts,shd->thd", logits.softmax(-1), vs))
    assert error(torch.cat(outputs).view_as(q), windowed(*qkv, window, 0.3, **options)) < 1e-12


def test_window_reads_in_place():
    """As much of FlashAttention's way as can be walked without a GPU, with tensors that have no memory: of slices no copy is made, of vectors that cannot be
    read 16 bytes at a time one."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):      # no other: later versions of torch would ask the GPU about those
        qkv = torch.empty(3, 40, 9, 16, device="cuda", dtype=torch.bfloat16)
        with Operators() as operators:
            o = implementation._flash(*qkv[:, :, 1:].split([4, 2, 2], 2), 8, 0.25, None, None)
        assert o.shape == (3, 40, 4, 16) and o.dtype == torch.bfloat16 and o.is_cuda
        assert operators.names.count("torch_attn._varlen_attn") == 1
        assert {name for name in operators.names if name.startswith("aten.")} == {"aten.slice", "aten.split_with_sizes", "aten.view", "aten.arange"}
        odd = torch.empty(3, 40, 2, 20, device="cuda", dtype=torch.bfloat16)
        for x, copied in ((odd[..., :16], True), (odd.view(3, 40, 1, 40)[..., 4:20], True), (odd.view(3, 40, 1, 40)[..., 8:24], False)):
            with Operators() as operators:
                assert implementation._flash_rows(x).shape[1:] == (x.shape[2], 16)
            assert ("aten.clone" in operators.names) == copied


@pytest.mark.parametrize("kind", ["plain", "mask", "past", "mask and past"])
@pytest.mark.parametrize("T,window", [(5, 4), (4, 4), (2, 6), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_window_keeps(dtype, T, window, kind, device):
    """The last tokens and no padding, bit for bit; a layer that goes on from there sees what it would have seen."""
    q, k, v, options = window_inputs(kind, T + 7, window, 4, 2, 16, dtype, device)
    mask, past = options.pop("mask", None), options.get("past")
    first, then = ([x[:, at] if x is not None else None for x in (q, k, v, mask)] for at in (slice(T), slice(T, None)))
    o, state = window_attention(*first[:3], window, 0.3, first[3], keep=True, **options)
    for n in range(3):
        there = torch.ones(T, dtype=torch.bool, device=device) if mask is None else mask[n, :T]
        filled = 0 if past is None else int(past.filled[n])
        assert state.filled[n] == min(filled + int(there.sum()), window - 1)
        for held, old, x in ((state.keys, past and past.keys, k), (state.values, past and past.values, v)):
            tokens = torch.cat([x[n, :0] if past is None else old[n, window - 1 - filled:], x[n, :T][there]])
            assert held.is_contiguous() and torch.equal(held[n, window - 1 - int(state.filled[n]):], tokens[max(0, len(tokens) - window + 1):])
    assert not any(x.requires_grad for x in state)
    both = torch.cat([o, window_attention(*then[:3], window, 0.3, then[3], state)[0]], 1)
    want = windowed(*(x.double() for x in (q, k, v)), window, 0.3, mask, **options)
    tokens = slice(None) if mask is None else mask
    assert error(both[tokens], want[tokens]) < ALLOWED[dtype]


@pytest.mark.gpu("FlashAttention")
def test_window_where_flash_is_off(cuda):
    """What switches FlashAttention off in torch switches it off here; and deterministic algorithms make its backward so."""
    q, k, v, _ = window_inputs("plain", 300, 64, 8, 2, 64, torch.bfloat16, cuda)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH), Operators() as operators:
        window_attention(*leaves, 64, 0.125)
    assert "torch_attn._varlen_attn" not in operators.names
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(window_attention(*leaves, 64, 0.125)[0], leaves, torch.ones_like(q)) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


def test_window_larger_than_a_block(device):
    """More keys than shared memory holds scores for: the same, put together from other operations."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 8, 16, device=device), torch.randn(1, 1, 1, 16, device=device), torch.randn(1, 1, 1, 16, device=device)
    W = 6000
    past = WindowState(torch.randn(1, W - 1, 1, 16, device=device), torch.randn(1, W - 1, 1, 16, device=device), torch.full((1,), W - 1, device=device))
    want, end = window_attention(q, k, v, W, 0.3, past=past, keep=True)
    o, past = window_step(q, k, v, W, 0.3, past=past)
    assert error(o, want) < 1e-5 and all(map(torch.equal, past, end))


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, device):
    mask = torch.tensor([True, False], device=device) if masked else None
    x, history, weight, bias = (torch.randn(*size, device=device) for size in ((2, 7), (2, 2, 7), (7, 1, 3), (7,)))
    opcheck(torch.ops.gsa.conv_step, (x, history, weight, bias, mask))
    q, k, v, keys, values = (torch.randn(*size, device=device) for size in ((2, 4, 8), (2, 2, 8), (2, 2, 6), (2, 5, 2, 8), (2, 5, 2, 6)))
    cos = torch.randn(1, 4, device=device)
    opcheck(torch.ops.gsa.window_step, (q, k, v, keys, values, torch.tensor([5, 2], device=device), 0.3, mask, cos, cos))


def test_bad_input(device):
    x, history, weight = (torch.randn(*size, device=device) for size in ((2, 7), (2, 2, 7), (7, 1, 3)))
    conv = torch.ops.gsa.conv_step
    for change, exception, message in (
        ((x, history[:, :1], weight), ValueError, r"history: expected shape \[B, W - 1, D\] = \[2, 2, 7\], given \[2, 1, 7\]"),
        ((x.half(), history, weight), TypeError, "history: expected dtype Half"), ((x, history.mT.contiguous().mT, weight), ValueError, "history.*contiguous"),
        ((x, history, weight[0]), ValueError, "weight"), ((x.clone().requires_grad_(), history, weight), RuntimeError, "conv_step.*no_grad"),
    ):  # fmt: skip
        with pytest.raises(exception, match=message):
            conv(*change)
    good = [torch.randn(*size, device=device) for size in ((2, 4, 8), (2, 2, 8), (2, 2, 6), (2, 5, 2, 8), (2, 5, 2, 6))]
    filled = torch.zeros(2, dtype=torch.int64, device=device)
    for place, wrong, exception, message in (
        (0, good[0][:, :3], ValueError, "q has 3 heads and k has 2: query heads must be a multiple"),
        (0, good[0].clone().requires_grad_(), RuntimeError, "window_step.*no_grad"), (2, good[2].double(), TypeError, "v: expected dtype Float"),
        (4, good[4][:, :4], ValueError, r"values: expected shape \[B, window - 1, H, V\]"),
    ):  # fmt: skip
        args = [wrong if i == place else x for i, x in enumerate(good)]
        with pytest.raises(exception, match=message):
            torch.ops.gsa.window_step(*args, filled, 0.3)
    with pytest.raises(TypeError, match="filled: expected dtype int64"):
        torch.ops.gsa.window_step(*good, filled.int(), 0.3)
