"""One token of what layers have beside the slots (torch.ops.gsa.conv_step and window_step), against the forms over a whole sequence."""

import pytest
import torch
from torch.library import opcheck

pytest.importorskip("transformers")

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
    conv.to(dtype).step(torch.where(mask[:, None, None], x[:, :1], torch.nan), history, mask)
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
