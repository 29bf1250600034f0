"""GatedSlotAttention against its own formula, with padding, packing, and token by token."""

import pytest
import torch
import torch.nn.functional as F

from gsa_ext import GatedSlotAttention
from gsa_ext.layer import SlotCache, linears
from gsa_ext.reference import naive_gsa

PLAIN = {"hidden_size": 32, "num_heads": 4, "layer_idx": 0}
VARIANTS = {
    "plain": PLAIN,
    "gqa": {**PLAIN, "num_kv_heads": 2, "num_slots": 12},
    "relu": {**PLAIN, "feature_map": "relu", "elementwise_affine": False, "gate_logit_normalizer": 1},
    "t2r": {**PLAIN, "feature_map": "t2r", "scale": None},
    "wide": {**PLAIN, "expand_k": 0.5, "expand_v": 2.0, "num_kv_heads": 1},
    "conv": {**PLAIN, "num_kv_heads": 2, "use_short_conv": True, "conv_size": 4, "conv_bias": True},
}


def build(name, device, dtype=torch.float32):
    torch.manual_seed(1)
    layer = GatedSlotAttention(**VARIANTS[name]).to(device, dtype)
    if layer.g_norm.weight is not None:
        torch.nn.init.normal_(layer.g_norm.weight, 1, 0.1)
    return layer


def inputs(device, B=2, T=37, dtype=torch.float32):
    return torch.randn(B, T, 32, generator=torch.Generator().manual_seed(2)).to(device, dtype)


def formula(layer, x):
    """The layer as the paper writes it, around the recurrence."""
    def short(conv, y):
        if not layer.use_short_conv:
            return y
        back = conv.kernel_size[0] - 1
        return F.silu(F.conv1d(F.pad(y.mT, (back, 0)), conv.weight, conv.bias, groups=y.shape[-1]).mT)

    def heads(y, d):
        return y.unflatten(-1, (-1, d))

    convs = (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d) if layer.use_short_conv else (None,) * 3
    q, k, v = (short(c, p(x)) for c, p in zip(convs, (layer.q_proj, layer.k_proj, layer.v_proj)))
    q, k = (layer.feature_map(heads(y, layer.head_k_dim)) for y in (q, k))
    g = F.logsigmoid(heads(layer.f_proj(x), layer.num_slots)) / layer.gate_logit_normalizer
    o, _ = naive_gsa(q, k, F.silu(heads(v, layer.head_v_dim)), 1 - g.exp(), g, scale=layer.scale)
    o = F.silu(o.flatten(-2))
    return layer.o_proj(F.rms_norm(o, o.shape[-1:], layer.g_norm.weight, 1e-5))


def close(a, b, tolerance=1e-4):
    error = (a - b).square().mean().sqrt() / b.square().mean().sqrt()
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", VARIANTS)
def test_formula_and_gradients(name, device):
    layer, x = build(name, device), inputs(device)
    results = []
    for f in (lambda y: layer(y)[0], lambda y: formula(layer, y)):
        y = x.clone().requires_grad_()
        out = f(y)
        grads = torch.autograd.grad(out.square().sum(), [y, *layer.parameters()])
        results.append([out, *grads])
    for ours, want in zip(*results):
        close(ours, want)


def test_linears(device):
    """Several linear maps of one input: values and gradients of calling each, no pass that only adds; hooks, frozen weights and other modules as ever."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, device=device, requires_grad=True)
    maps = [torch.nn.Linear(12, n, bias=n < 9, device=device) for n in (16, 8, 4)]
    maps[1].weight.requires_grad_(False)
    leaves = [x, *(p for m in maps for p in m.parameters() if p.requires_grad)]

    def results(call, modules=maps):
        out = call(modules)
        return [*out, *torch.autograd.grad(sum(y.square().sum() for y in out), leaves)]

    class Adds(torch.utils._python_dispatch.TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func.overloadpacket.__name__ in ("add", "add_")
            return func(*args, **(kwargs or {}))

    want = results(lambda modules: [m(x) for m in modules])
    out = linears(x, *maps)
    cotangents = [2 * y.detach() for y in out]
    with Adds() as adds:
        torch.autograd.grad(out, leaves, cotangents)
    assert adds.found == 0
    for a, b in zip(results(lambda modules: linears(x, *modules)), want):
        torch.testing.assert_close(a, b)
    with torch.autocast(device.type, torch.bfloat16):
        separate, together = (results(call) for call in (lambda modules: [m(x) for m in modules], lambda modules: linears(x, *modules)))
    for a, b in zip(together, separate):
        assert a.dtype == b.dtype
        close(a, b, 1e-2)
    for a, b in zip(together[:3], separate[:3]):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    called = []
    maps[2].register_forward_hook(lambda *args: called.append(1))
    for a, b in zip(results(lambda modules: linears(x, *modules)), want):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert called
    assert linears(x, torch.nn.Identity())[0] is x


@pytest.mark.parametrize("name", VARIANTS)
def test_any_split_equals_parallel(name, device):
    layer, x = build(name, device), inputs(device)
    with torch.no_grad():
        want = layer(x)[0]
        for cuts in ([*range(38)], [0, 5, 6, 7, 20, 37], [0, 1, 37]):
            cache = SlotCache()
            parts = [layer(x[:, a:b], past_key_values=cache)[0] for a, b in zip(cuts, cuts[1:])]
            close(torch.cat(parts, 1), want)
            assert cache.get_seq_length() == 37
    y, none, cache = layer(x, use_cache=True)                           # with gradients the cache carries none
    assert none is None and not any(t.requires_grad for t in cache.layers[0].slots)
    layer(x[:, :1], past_key_values=cache)[0].sum().backward()


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_is_exact(name, device):
    layer, x = build(name, device), inputs(device)
    lengths, T = [37, 20], x.shape[1]
    with torch.no_grad():
        alone = [layer(x[b:b + 1, :n], use_cache=True) for b, n in enumerate(lengths)]
        follow = inputs(device, T=6)
        for side in ("left", "right", "scattered"):
            gen = torch.Generator().manual_seed(0)
            batch, mask = torch.randn(2, T + 9, 32, generator=gen).to(device), torch.zeros(2, T + 9, dtype=torch.long, device=device)
            places = []
            for b, n in enumerate(lengths):
                anywhere = torch.randperm(T + 9, generator=gen)[:n].sort()[0]
                where = {"left": torch.arange(T + 9 - n, T + 9), "right": torch.arange(n), "scattered": anywhere}[side].to(device)
                batch[b, where], mask[b, where] = x[b, :n], 1
                places.append(where)
            y, _, cache = layer(batch, attention_mask=mask, use_cache=True)
            grown = torch.cat([mask, torch.ones(2, 6, dtype=torch.long, device=device)], 1)
            after = [layer(follow[:, t:t + 1], attention_mask=grown[:, :T + 9 + t + 1], past_key_values=cache)[0] for t in range(6)]
            for b, (want, _, single) in enumerate(alone):
                close(y[b, places[b]], want[0])
                close(torch.cat(after, 1)[b], layer(follow[b:b + 1], past_key_values=single)[0][0])
                single.reset()
                layer(x[b:b + 1, :lengths[b]], past_key_values=single)


def test_padding_leaves_the_state_bit_for_bit(device):
    layer, x = build("gqa", device), inputs(device)
    with torch.no_grad():
        _, _, cache = layer(x, use_cache=True)
        before = [t.clone() for t in cache.layers[0].slots]
        layer(x[:, :1], attention_mask=torch.zeros(2, 1, dtype=torch.long, device=device), past_key_values=cache)
        layer(x[:, :9], attention_mask=torch.zeros(2, 9, dtype=torch.long, device=device), past_key_values=cache)
    for a, b in zip(before, cache.layers[0].slots):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gqa", "conv"])
def test_packed_equals_separate(name, device):
    layer, x = build(name, device), inputs(device, B=1)
    bounds = [0, 2, 2, 15, 16, 37]
    cu = torch.tensor(bounds, device=device)
    with torch.no_grad():
        want = torch.cat([layer(x[:, a:b])[0] for a, b in zip(bounds, bounds[1:]) if b > a], 1)
        y, _, cache = layer(x, cu_seqlens=cu, use_cache=True)
        close(y, want)
        last = layer(x[:, 16:], use_cache=True)[2]
        close(layer(x[:, :1], past_key_values=cache)[0], layer(x[:, :1], past_key_values=last)[0])


def test_memory_is_constant_and_fp32(device):
    layer = build("conv", device).to(torch.bfloat16)
    with torch.no_grad():
        sizes = set()
        cache = SlotCache()
        for T in (1, 9, 1, 40):
            y = layer(inputs(device, T=T, dtype=torch.bfloat16), past_key_values=cache)[0]
            sizes.add(cache.layers[0].nbytes)
    assert len(sizes) == 1 and y.dtype == torch.bfloat16 and cache.layers[0].slots[0].dtype == torch.float32


def test_gate_in_fp32(device):
    """Slow slots keep their write strength though the model is in bf16 (1 - exp(g) would be 0 there)."""
    layer = build("plain", device).to(torch.bfloat16)
    with torch.no_grad():
        layer.f_proj.weight.zero_()
        layer.f_proj.weight[:, 0] = 8.0
        x = inputs(device, dtype=torch.bfloat16)
        x[:, :, 0] = 1.0
        _, _, cache = layer(x, use_cache=True)
    assert cache.layers[0].slots[1].abs().max() > 0


def test_bad_input(device):
    for wrong in ({"num_heads": 4, "num_kv_heads": 3}, {"hidden_size": 30, "num_heads": 4}, {"feature_map": "elu"},
                  {"num_slots": 0}, {"expand_v": 0.01}, {"gate_logit_normalizer": 0}):
        with pytest.raises(ValueError, match="|".join(wrong)):
            GatedSlotAttention(**wrong)
    with pytest.raises(TypeError):
        GatedSlotAttention(window=64)
    layer, x = build("plain", device), inputs(device)
    for mask in (torch.ones(2, 36), torch.ones(2, 1, 37, 37), torch.ones(3, 37)):
        with pytest.raises(ValueError, match="attention_mask"):
            layer(x, attention_mask=mask.to(device))
    layer.layer_idx = None
    with pytest.raises(ValueError, match="layer_idx"):
        layer(x, use_cache=True)
    with pytest.raises(TypeError, match="past_key_values"):
        layer(x, past_key_values=((x, x),))
    _, _, cache = build("plain", device)(x[:1], use_cache=True)
    with pytest.raises(ValueError, match="packed"):
        build("plain", device)(x[:1], past_key_values=cache, cu_seqlens=torch.tensor([0, 37], device=device))
    with pytest.raises(NotImplementedError, match="crop"):
        cache.layers[0].crop(-1)
