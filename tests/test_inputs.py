"""What a layer does before the op and after it, in one pass each: torch.ops.gsa.rotate, log_gate, mix and silu_norm, against torch's own operations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from gsa_ext.layer import RMSNorm, log_gate, silu_norm
from gsa_ext.testing import error

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=["fp64", "fp32", "bf16", "fp16"])


def turned(x, cos, sin):
    """In 16 bits x cos is rounded, the product with sin is not."""
    n, wide = cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x[..., : n // 2].to(wide), x[..., n // 2 : n].to(wide)
    first = (x[..., :n] * cos[:, :, None]).to(wide)
    return torch.cat([(first + torch.cat([-x2, x1], -1) * sin[:, :, None].to(wide)).to(x.dtype), x[..., n:]], -1)


@pytest.mark.parametrize("B,T,HQ,H,D,n,batch", [
    (2, 5, 6, 3, 64, 64, 1), (2, 5, 3, 3, 80, 32, 2), (1, 7, 4, 2, 20, 6, 1), (3, 70, 32, 8, 128, 128, 3), (1, 3, 2, 1, 512, 512, 1), (1, 3, 2, 1, 512, 2, 1),
    (1, 3, 5, 1, 8, 8, 1), (2, 0, 2, 2, 8, 8, 1), (1, 3, 2, 0, 8, 8, 1)])
@dtypes
def test_rotate(dtype, B, T, HQ, H, D, n, batch, device):
    """Slices of a fused projection, a part of the head, angles for all rows or for each; to the bit in 16 bits. Its gradient is the way back."""
    torch.manual_seed(0)
    inputs = torch.randn(B, T, HQ + 2 * H, D, device=device).to(dtype).split([HQ, H, H], dim=2)[:2]
    angle = torch.randn(batch, T, n, device=device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    leaves, cotangents = [x.clone().requires_grad_() for x in inputs], [torch.randn_like(x) for x in inputs]
    got = torch.ops.gsa.rotate(*inputs, cos, sin)
    back = torch.autograd.grad(torch.ops.gsa.rotate(*leaves, cos, sin), leaves, cotangents)
    want = [turned(x, cos, sin) for x in inputs] + [turned(x, cos, -sin.roll(n // 2, -1)) for x in cotangents]
    for a, b in zip((*got, *back), want):
        assert a.dtype == dtype and (torch.equal(a, b) if dtype.itemsize == 2 else torch.allclose(a, b, rtol=1e-6, atol=1e-6))


@dtypes
def test_rotate_is_the_formula(dtype, device):
    """To the bit the passes that it stands for, for inputs and angles at addresses that are no multiple of 16 bytes too; of one output alone as well."""
    torch.manual_seed(0)
    for odd in (0, 1):
        q, k = (torch.randn(2 * 5 * H * 16 + odd, device=device).to(dtype)[odd:].view(2, 5, H, 16) for H in (4, 2))
        cos, sin = (torch.randn(5 * 16 + odd, device=device).to(dtype)[odd:].view(1, 5, 16) for _ in range(2))
        for x, got in zip((q, k), torch.ops.gsa.rotate(q, k, cos, sin)):
            want = x * cos[:, :, None]
            want[..., :8].addcmul_(x[..., 8:], sin[:, :, None, :8], value=-1)
            want[..., 8:].addcmul_(x[..., :8], sin[:, :, None, 8:])
            same = dtype != torch.float32 or device.type == "cpu"        # there torch's addcmul rounds once
            assert torch.equal(got, want) if same else torch.allclose(got, want, rtol=1e-6, atol=1e-6)
        leaf = q.clone().requires_grad_()
        alone = torch.autograd.grad(torch.ops.gsa.rotate(leaf, k, cos, sin)[0], leaf, q)[0]
        assert torch.equal(alone, torch.ops.gsa.rotate(q, k, cos, sin, True)[0])


@pytest.mark.parametrize("normalizer", [1.0, 8.0])
@pytest.mark.parametrize("count", [64, 7])
@dtypes
def test_log_gate(dtype, count, normalizer, device):
    torch.manual_seed(0)
    f = (8 * torch.randn(3, 5, count, device=device)).to(dtype)
    f[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    got, wide = log_gate(f, normalizer), torch.float64 if dtype == torch.float64 else torch.float32
    want = F.logsigmoid(f.to(wide)) / normalizer
    assert got.dtype == wide and torch.allclose(got, want, rtol=1e-6, atol=1e-30, equal_nan=True)
    f[0, 0, :4] = 1
    leaf, cotangent = f.clone().requires_grad_(), torch.randn_like(want)
    (df,) = torch.autograd.grad(log_gate(leaf, normalizer), leaf, cotangent)
    assert df.dtype == dtype and error(df, cotangent.double() / normalizer * torch.sigmoid(-f.double())) < {8: 1e-12, 4: 1e-6, 2: 3e-3}[dtype.itemsize]


@pytest.mark.parametrize("lowest,masked", [(-3.7, False), (None, True), (-3.7, True)])
@pytest.mark.parametrize("count", [64, 7])
@dtypes
def test_log_gate_floor_and_padding(dtype, count, lowest, masked, device):
    """Both are what clamp and masked_fill make of it, to the bit; no gradient below the floor or at padding, whatever is there."""
    torch.manual_seed(0)
    f = (8 * torch.randn(3, 5, 2, count, device=device)).to(dtype)
    f[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, -3.7, -0.0])
    mask = torch.rand(3, 5, device=device) > 0.4 if masked else None
    assert mask is None or (not mask.all() and mask.any())
    leaf, other = f.clone().requires_grad_(), f.clone().requires_grad_()
    got = log_gate(leaf, 2.0, lowest, mask)
    want = log_gate(other if lowest is None else other.clamp(min=lowest), 2.0)
    want = want if mask is None else want.masked_fill(~mask[:, :, None, None], 0.0)
    cotangent = torch.randn_like(want)
    if lowest is not None:
        cotangent[f == torch.tensor(lowest, dtype=dtype, device=device)] = 0     # of a logit at the floor itself torch 2.15's clamp makes nothing, 2.11's all
    for a, b in ((got, want), (torch.autograd.grad(got, leaf, cotangent)[0], torch.autograd.grad(want, other, cotangent)[0])):
        assert a.dtype == b.dtype and torch.equal(a, b)
    if mask is not None:
        f[~mask], cotangent[~mask] = torch.nan, torch.nan
        leaf = f.requires_grad_()
        got = log_gate(leaf, 2.0, lowest, mask)
        (df,) = torch.autograd.grad(got, leaf, cotangent)
        assert (got[~mask] == 0).all() and (df[~mask] == 0).all() and not df.isnan().any()
    bare = log_gate(torch.full((1, 1, 4), torch.nan, device=device, dtype=dtype), 2.0, lowest)
    assert bare.isnan().all()


@pytest.mark.parametrize("options", [(), (-1.0, None), (None, True), (-1.0, True)])
def test_log_gate_compiled(options, device):
    """What a compiler is shown is the op."""
    torch.manual_seed(0)
    f, mask = 3 * torch.randn(2, 4, 3, 5, device=device), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]], device=device).bool()
    options = tuple(mask if x is True else x for x in options)
    compiled = torch.compile(lambda f: log_gate(f, 2.0, *options), fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, lambda f: log_gate(f, 2.0, *options), lambda f: torch.ops.gsa.log_gate(f, 2.0, *options)):
        leaf = f.clone().requires_grad_()
        g = call(leaf)
        found.append((g, torch.autograd.grad(g.square().sum(), leaf)[0]))
    for g, df in found[:2]:
        assert torch.allclose(g, found[2][0], rtol=1e-6) and torch.allclose(df, found[2][1], rtol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 37, 4, 16), (1, 3, 5, 20), (70, 3, 128), (2, 0, 2, 8), (33, 2, 7)])
@dtypes
def test_mix(dtype, sizes, device):
    """Forward and backward against the formula in fp64: slabs of tokens whole and in part, heads that are no multiple of 16 bytes, starts that are none."""
    torch.manual_seed(0)
    for odd in (0, 1):
        a, b, cotangent = (torch.randn(math.prod(sizes) + odd, device=device).to(dtype)[odd:].view(sizes) for _ in range(3))
        share = torch.rand(sizes[-2], device=device).to(dtype)
        share[0], share[1] = 0, 1
        leaves, exact = ([x.detach().to(wide).requires_grad_() for x in (a, b, share)] for wide in (dtype, torch.float64))
        leaves[:2] = (x.requires_grad_() for x in (a, b))
        got = torch.ops.gsa.mix(*leaves)
        want = exact[0] + exact[2][:, None] * (exact[1] - exact[0])
        grads, wanted = torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, exact, cotangent.double())
        assert torch.equal(got[..., 0, :], a[..., 0, :]) and torch.equal(got[..., 1, :], b[..., 1, :])
        for x, y in zip((got, *grads), (want, *wanted)):
            assert x.dtype == dtype and error(x, y, 1.0) < {8: 1e-12, 4: 1e-6, 2: 3e-3 if dtype == torch.bfloat16 else 1e-3}[dtype.itemsize]
        again = torch.autograd.grad(torch.ops.gsa.mix(*leaves), leaves, cotangent)
        assert all(torch.equal(x, y) for x, y in zip(grads, again))


def test_mix_of_slices(device):
    """Inputs and cotangents in any layout; a cotangent that is one number for all."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 2, 8, device=device).unbind(3)
    share = torch.rand(8, device=device)[::2]
    leaves, other = ([x.detach().clone().requires_grad_() for x in (a, b, share)] for _ in range(2))
    strided = leaves[0].transpose(0, 1).contiguous().transpose(0, 1), leaves[1], leaves[2]
    grads = torch.autograd.grad(torch.ops.gsa.mix(*strided).sum(), leaves)
    wanted = torch.autograd.grad(torch.lerp(other[0], other[1], other[2][:, None]).sum(), other)
    assert torch.allclose(torch.ops.gsa.mix(a, b, share), torch.lerp(a, b, share[:, None]), atol=1e-6)
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(grads, wanted))


def normed(o, weight, eps):
    return F.rms_norm(F.silu(o), o.shape[-1:], weight, eps)


@pytest.mark.parametrize("sizes", [
    (2, 37, 64), (1, 1, 4096), (70, 2048), (600, 8), (3, 5, 24), (3, 5120), (3, 8192), (2, 8200), (2, 16400), (3, 7), (50, 3), (2, 4097), (40,), (2, 0, 8)],
    ids=str)
@dtypes
def test_silu_norm(dtype, sizes, device):
    """Forward and backward against the formula in fp64: a row in registers, in one vector a thread and in more, and rows too wide for that; widths that are
    no multiple of 16 bytes, starts that are none; with a weight and without. The same bits every time, whether anything is kept for backward or not."""
    torch.manual_seed(0)
    allowed = {8: 1e-12, 4: 1e-6, 2: 3e-3 if dtype == torch.bfloat16 else 1e-3}[dtype.itemsize]
    for odd, weighted in ((0, True), (1, True), (0, False)):
        o, cotangent = (2 * torch.randn(math.prod(sizes) + odd, device=device) for _ in range(2))
        o, cotangent = (x.to(dtype)[odd:].view(sizes) for x in (o, cotangent))
        weight = (1 + torch.randn(sizes[-1], device=device)).to(dtype)
        inputs = [o, weight] if weighted else [o]
        leaves, exact = ([x.detach().to(wide).requires_grad_() for x in inputs] for wide in (dtype, torch.float64))
        leaves[0] = o.requires_grad_()
        rest = () if weighted else (None,)
        got, want = torch.ops.gsa.silu_norm(*leaves, *rest, 1e-5), normed(*exact, *rest, 1e-5)
        grads, wanted = torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, exact, cotangent.double())
        for x, y in zip((got, *grads), (want, *wanted)):
            assert x.dtype == dtype and x.shape == y.shape and error(x, y, 1e-9) < allowed
        again = torch.autograd.grad(torch.ops.gsa.silu_norm(*leaves, *rest, 1e-5), leaves, cotangent)
        assert all(torch.equal(x, y) for x, y in zip(grads, again))
        with torch.no_grad():
            assert torch.equal(torch.ops.gsa.silu_norm(*leaves, *rest, 1e-5), got)
        if weighted:
            alone = torch.autograd.grad(torch.ops.gsa.silu_norm(*leaves, 1e-5), leaves[0], cotangent)[0]
            fixed = torch.autograd.grad(torch.ops.gsa.silu_norm(leaves[0].detach(), leaves[1], 1e-5), leaves[1], cotangent)[0]
            assert torch.equal(alone, grads[0]) and torch.equal(fixed, grads[1])


@pytest.mark.parametrize("rows", [1, 3, 64, 700, 5000])
def test_silu_norm_of_rows(rows, device):
    """A few rows for each block and many; every row counts once, whatever the others are."""
    torch.manual_seed(0)
    o, d, weight = (torch.randn(*size, device=device).bfloat16() for size in ((rows, 1024), (rows, 1024), (1024,)))
    leaves = o.requires_grad_(), weight.requires_grad_()
    got = torch.ops.gsa.silu_norm(*leaves, 1e-5)
    d_o, d_weight = torch.autograd.grad(got, leaves, d)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = torch.autograd.grad(normed(*exact, 1e-5), exact, d.double())
    assert all(error(x, y) < 3e-3 for x, y in zip((d_o, d_weight), wanted))
    for row in (0, rows // 2, rows - 1):
        leaf = o[row:row + 1].detach().requires_grad_()
        one = torch.ops.gsa.silu_norm(leaf, weight, 1e-5)
        assert torch.equal(one[0], got[row]) and torch.equal(torch.autograd.grad(one, leaf, d[row:row + 1])[0][0], d_o[row])


@dtypes
def test_silu_norm_of_what_is_strange(dtype, device):
    """eps as torch has it; rows of zeros; values at both ends; other layouts; a cotangent that is one number for all; other rows do not feel a NaN."""
    torch.manual_seed(0)
    small = torch.full((2, 16), 1e-4, device=device).to(dtype)
    for eps in (None, 0.0, 1e-3):
        want = normed(small, None, eps)
        assert torch.allclose(torch.ops.gsa.silu_norm(small, None, eps), want, rtol={8: 1e-12, 4: 1e-6, 2: 8e-3}[dtype.itemsize])
    assert (torch.ops.gsa.silu_norm(torch.zeros_like(small), None, 1e-5) == 0).all()
    x = torch.randn(6, 16, device=device).to(dtype)
    x[0, :4] = torch.tensor([100.0, -100.0, 88.5, -88.5])
    x[1, 2], x[2, 2], x[3, 2] = torch.nan, torch.inf, -torch.inf
    leaf = x.clone().requires_grad_()
    y = torch.ops.gsa.silu_norm(leaf, None, 1e-5)
    (d,) = torch.autograd.grad(y[[0, 4, 5]].sum(), leaf)
    assert error(y[[0, 4, 5]], normed(x[[0, 4, 5]].double(), None, 1e-5)) < 4e-3 and d[[0, 4, 5]].isfinite().all()
    assert all(row.isnan().any() for row in y[1:4])
    strided, weight = torch.randn(8, 3, 5, device=device).to(dtype).permute(1, 2, 0), torch.rand(16, device=device).to(dtype)[::2]
    leaves, other = ([x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (strided, weight)] for _ in range(2))
    grads = torch.autograd.grad(torch.ops.gsa.silu_norm(*leaves, 1e-5).sum(), leaves)
    other = [x.detach().double().requires_grad_() for x in other]
    wanted = torch.autograd.grad(normed(*other, 1e-5).sum(), other)
    assert not leaves[0].is_contiguous() and all(error(x, y) < 4e-3 for x, y in zip(grads, wanted))


def test_norm_of_a_layer(device):
    """One pass where the norm is the layer's own; where it is anything else, that is called. Autocast changes nothing that is in 16 bits already."""
    torch.manual_seed(0)
    norm, o = RMSNorm(48, 1e-3).to(device), torch.randn(2, 5, 48, device=device)
    torch.nn.init.normal_(norm.weight)
    calls = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def run(norm, o):
        calls.clear()
        with Mode():
            y = silu_norm(o, norm)
        want = norm(F.silu(o))
        assert y.dtype == want.dtype and error(y, want, 1e-9) < (1e-6 if o.dtype == torch.float32 else 6e-3)
        return any("silu_norm" in name for name in calls)

    assert run(norm, o) and run(RMSNorm(48, elementwise_affine=False), o) and not run(norm, o.bfloat16()) and run(norm.bfloat16(), o.bfloat16())
    with torch.autocast(device.type, torch.bfloat16):
        assert run(norm, o.bfloat16()) and not run(norm, o) and not run(norm.float(), o.bfloat16()) and run(norm, o)
    class Other(RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not run(Other(48).to(device), o) and not run(torch.nn.Identity(), o)
    handle = norm.register_forward_hook(lambda module, args, y: 3 * y)
    assert not run(norm, o)
    handle.remove()
    assert run(norm, o)


def test_silu_norm_compiled(device):
    """What a compiler is shown is the op."""
    torch.manual_seed(0)
    norm, o = RMSNorm(24).to(device), torch.randn(3, 24, device=device)
    found = []
    for call in (torch.compile(silu_norm, fullgraph=True, backend="aot_eager"), silu_norm,
                 torch.compile(lambda o, norm: torch.ops.gsa.silu_norm(o, norm.weight, norm.eps), fullgraph=True, backend="aot_eager")):
        leaf = o.clone().requires_grad_()
        y = call(leaf, norm)
        found.append((y, *torch.autograd.grad(y.square().sum(), (leaf, norm.weight))))
    for other in (found[0], found[2]):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found[1], other))


def test_torch_knows_them(device):
    x, cos = torch.randn(2, 3, 2, 8, device=device), torch.randn(1, 3, 4, device=device)
    opcheck(torch.ops.gsa.rotate.default, (x.requires_grad_(), x.detach()[:, :, :1].clone().requires_grad_(), cos, cos + 1))
    mask = torch.tensor([[True, False, True], [True, True, False]], device=device)
    for options in ((), (-0.5,), (None, mask), (-0.5, mask)):
        opcheck(torch.ops.gsa.log_gate.default, (torch.randn(2, 3, 4, device=device).bfloat16().requires_grad_(), 8.0, *options))
    opcheck(torch.ops.gsa.mix.default, tuple(torch.rand(size, device=device).requires_grad_() for size in ((2, 3, 4, 8), (2, 3, 4, 8), (4,))))
    for dtype, weight in ((torch.float32, torch.ones(24, device=device, requires_grad=True)), (torch.bfloat16, None), (torch.float64, None)):
        opcheck(torch.ops.gsa.silu_norm.default, (torch.randn(2, 3, 24, device=device, dtype=dtype, requires_grad=True), weight, 1e-5))
        opcheck(torch.ops.gsa.silu_norm.default, (torch.randn(2, 24, device=device, dtype=dtype),))
    y = torch.randn(1, 2, 1, 4, device=device, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(1, 2, 4, device=device, dtype=torch.float64)
    z = torch.randn(1, 2, 3, 4, device=device, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda y, z: torch.ops.gsa.rotate(y, z, angle.cos(), angle.sin()), (y, z))
    for options in ((), (-0.2, torch.tensor([[True, False]], device=device))):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda y: torch.ops.gsa.log_gate(y, 2.0, *options), y)  # noqa: B023
    mixed = tuple(torch.rand(size, device=device, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 2), (2, 3, 2), (3,)))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(torch.ops.gsa.mix, mixed)
        for size in ((2, 3, 4), (4,)):
            o, weight = (torch.randn(x, device=device, dtype=torch.float64, requires_grad=True) for x in (size, (4,)))
            assert check(lambda o, weight: torch.ops.gsa.silu_norm(o, weight, 1e-2), (o, weight))
            assert check(lambda o: torch.ops.gsa.silu_norm(o, None, 1e-2), o)


def test_bad_input(device):
    x, cos = torch.randn(2, 3, 2, 8, device=device), torch.randn(1, 3, 4, device=device)
    for bad in ((x[0], x, cos, cos), (x, x[:, :2], cos, cos), (x, x[..., :6], cos, cos), (x, x, cos[:, :2], cos), (x, x, cos[..., :3], cos[..., :3]),
                (x, x, cos, cos[..., :2]), (x, x, cos[0], cos[0])):
        with pytest.raises(ValueError, match="expected"):
            torch.ops.gsa.rotate(*bad)
    with pytest.raises(TypeError, match="floating point"):
        torch.ops.gsa.rotate(x, x, cos.long(), cos.long())
    with pytest.raises(TypeError, match="floating point"):
        torch.ops.gsa.log_gate(x.long(), 8.0)
    with pytest.raises(ValueError, match="positive"):
        torch.ops.gsa.log_gate(x, 0.0)
    with pytest.raises(ValueError, match="mask: expected shape"):
        torch.ops.gsa.log_gate(x, 8.0, None, torch.ones(2, 4, device=device, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask: expected bool"):
        torch.ops.gsa.log_gate(x, 8.0, None, torch.ones(2, 3, device=device))
    for bad, match in (((x[0, 0, 0], x[0, 0, 0], x[0, 0, 0]), "a: expected shape"), ((x, x[:1], x[0, 0, :, 0]), "b: expected a's shape"),
                       ((x, x, x[0, 0, 0]), "share: expected shape"), ((x, x, x[0, 0]), "share: expected shape")):
        with pytest.raises(ValueError, match=match):
            torch.ops.gsa.mix(*bad)
    for bad in ((x.long(), x.long(), x[0, 0, :, 0].long()), (x, x.double(), x[0, 0, :, 0]), (x, x, x[0, 0, :, 0].double())):
        with pytest.raises(TypeError, match="expected"):
            torch.ops.gsa.mix(*bad)
    o = x[0, 0]
    for bad, match in (((o.sum(),), "o: expected shape"), ((o, o[0, :7]), "weight: expected shape"), ((o, o), "weight: expected shape"),
                       ((o, o[0], -1.0), "eps: expected")):
        with pytest.raises(ValueError, match=match):
            torch.ops.gsa.silu_norm(*bad)
    for bad, match in (((o.long(),), "o: expected a floating point dtype"), ((o, o[0].double()), "weight: expected o's dtype")):
        with pytest.raises(TypeError, match=match):
            torch.ops.gsa.silu_norm(*bad)
    with pytest.raises(RuntimeError, match="move them to one device"):
        torch.ops.gsa.silu_norm(o, o[0].to("meta"))
