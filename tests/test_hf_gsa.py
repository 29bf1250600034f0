"""GSAConfig, GSAModel, GSAForCausalLM: the mathematics, written out again with loops, and loading by the names that are on the hub."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from gsa_ext.hf import GSAConfig, GSAForCausalLM, cache_bytes
from gsa_ext.reference import naive_gsa

VOCAB, T = 61, 21
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "num_slots": 6, "vocab_size": VOCAB, "intermediate_size": 40, "initializer_range": 0.2,
         "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "num_slots": None, "gate_logit_normalizer": 16},
    "no-affine": {"elementwise_affine": False, "exapnd_k": 0.5, "exapnd_v": 2},
    "tied": {"tie_word_embeddings": True, "norm_eps": 1e-2},
    "short-conv": {"use_short_conv": True, "conv_size": 3, "num_kv_heads": 2},
    "relu": {"feature_map": "relu"},
    "t2r": {"feature_map": "t2r", "intermediate_size": None, "hidden_ratio": 2},
    "hybrid": {"attn": {"layers": [1], "num_heads": 2, "num_kv_heads": 1, "qkv_bias": True, "rope_theta": 500.0}},
    "window": {"attn": [{"layers": [0], "num_heads": 4, "window_size": 5}]},
}
every = pytest.mark.parametrize("name", MODELS)


def build(name, device="cpu"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GSAConfig(**{**SMALL, **MODELS[name]})).eval().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(device="cpu", B=2, length=T, seed=3):
    return torch.randint(1, VOCAB, (B, length), generator=torch.Generator().manual_seed(seed)).to(device)


def close(a, b, tolerance=1e-4):
    error = (a - b).square().mean().sqrt() / b.square().mean().sqrt()
    assert error < tolerance, f"relative error {error:.1e}"


def board(config, weights, ids):
    """The model as one would write it down, in fp64, from the parameters' names."""
    w = {name: x.double() for name, x in weights.items()}

    def norm(x, name, eps):
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return x * w[name] if name in w else x

    def conv(x, name):
        kernel = w[name][:, 0]
        return F.silu(sum(kernel[:, -1 - d] * F.pad(x, (0, 0, d, 0))[:, :x.shape[1]] for d in range(kernel.shape[1])))

    x = w["model.embeddings.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        y = norm(x, at + "attn_norm.weight", config.norm_eps)
        q, k, v = (F.linear(y, w[at + f"attn.{n}_proj.weight"], w.get(at + f"attn.{n}_proj.bias")) for n in "qkv")
        softmax = next((a for a in (config.attn if isinstance(config.attn, list) else [config.attn]) if a and i in a["layers"]), None)
        if softmax is None:
            if config.use_short_conv:
                q, k, v = (conv(z, at + f"attn.{n}_conv1d.weight") for n, z in zip("qkv", (q, k, v)))
            heads, kv = config.num_heads, config.num_kv_heads or config.num_heads
            q, k, v = q.unflatten(-1, (heads, -1)), k.unflatten(-1, (kv, -1)), F.silu(v.unflatten(-1, (kv, -1)))
            if config.feature_map == "t2r":
                q, k = (z @ w[at + "attn.feature_map.layer.weight"].T for z in (q, k))
            phi = F.silu if config.feature_map == "swish" else F.relu
            g = F.logsigmoid(F.linear(y, w[at + "attn.f_proj.weight"]).unflatten(-1, (kv, -1))) / config.gate_logit_normalizer
            o = naive_gsa(phi(q), phi(k), v, None, g, scale=1.0)[0]
            y = F.linear(norm(F.silu(o.double().flatten(-2)), at + "attn.g_norm.weight", 1e-5), w[at + "attn.o_proj.weight"])
        else:
            heads, kv = softmax["num_heads"], softmax.get("num_kv_heads") or softmax["num_heads"]
            d = config.hidden_size // heads
            q, k, v = q.unflatten(-1, (heads, d)), k.unflatten(-1, (kv, d)).repeat_interleave(heads // kv, 2), v.unflatten(-1, (kv, d)).repeat_interleave(
                heads // kv, 2)
            t = torch.arange(ids.shape[1], dtype=torch.float64)
            turn = torch.polar(torch.ones(1, dtype=torch.float64), t[:, None, None] * softmax.get("rope_theta", 10000.0) ** (-torch.arange(0, d, 2) / d))
            q, k = (torch.view_as_real(torch.complex(*z.chunk(2, -1)) * turn).movedim(-1, -2).flatten(-2) for z in (q, k))
            age = t[:, None] - t
            hidden = (age < 0) | (age >= (softmax.get("window_size") or 1000))
            p = (torch.einsum("bihd,bjhd->bhij", q, k) * d ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            y = F.linear(torch.einsum("bhij,bjhd->bihd", p, v).flatten(-2), w[at + "attn.o_proj.weight"])
        x = x + y
        y = norm(x, at + "mlp_norm.weight", config.norm_eps)
        gate, up, down = (w[at + f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
    return F.linear(norm(x, "model.norm.weight", config.norm_eps), w["model.embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"])


@every
def test_logits(name, device):
    model, ids = build(name, device), tokens(device)
    with torch.no_grad():
        close(model(ids).logits, board(model.config, {name: x.cpu() for name, x in model.state_dict().items()}, ids.cpu()).float().to(device))


@every
def test_inference(name, device):
    """Token by token, in chunks, padded, packed, with beams: always the logits of the parallel form."""
    model, ids = build(name, device), tokens(device)
    pad, one = torch.zeros_like(ids[:, :4]), torch.ones_like(ids)
    with torch.no_grad():
        want, sizes = model(ids, use_cache=False).logits, set()
        for cuts in ([*range(T + 1)], [0, 2, 9, 10, T]):
            cache = DynamicCache(config=model.config) if len(cuts) > 9 else None
            parts = []
            for a, b in zip(cuts, cuts[1:]):
                out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
                sizes.add(cache_bytes(cache))
            close(torch.cat(parts, 1), want)
            assert cache.get_seq_length() == T
        assert len(sizes) == 1 or name == "hybrid"
        close(model(torch.cat([pad, ids], 1), attention_mask=torch.cat([pad, one], 1)).logits[:, 4:], want)
        close(model(torch.cat([ids, pad], 1), attention_mask=torch.cat([one, pad], 1)).logits[:, :-4], want)
        cache = model(torch.cat([pad, ids[:, :9]], 1), attention_mask=torch.cat([pad, one[:, :9]], 1), use_cache=True).past_key_values
        close(model(ids[:, 9:], attention_mask=torch.cat([pad, one], 1), past_key_values=cache).logits, want[:, 9:])
        cu = torch.tensor([0, 8, 9, T], device=device)
        apart = torch.cat([model(ids[:1, a:b]).logits for a, b in zip(cu, cu[1:])], 1)
        positions = torch.cat([torch.arange(b - a, device=device) for a, b in zip(cu, cu[1:])])[None]
        for given in ({"cu_seqlens": cu}, {"cu_seq_lens_q": cu.int()}, {"position_ids": positions}):
            close(model(ids[:1], **given).logits, apart)
    for how in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        results = []
        for cached in (True, False):
            torch.manual_seed(0)
            results.append(model.generate(ids[:, :9], max_new_tokens=5, use_cache=cached, **how))
        assert torch.equal(*results)


@every
def test_save_load_and_train(name, device, tmp_path):
    model, ids = build(name, device), tokens(device)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    again.to(device)
    assert type(again) is GSAForCausalLM and not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(AutoModel.from_pretrained(tmp_path).to(device)(ids).last_hidden_state, model.model(ids).last_hidden_state)
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3
    assert copy.deepcopy(model)(ids).logits.equal(model(ids).logits)

    model.train()
    grads = []
    for setting in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.zero_grad()
        if setting:
            model.gradient_checkpointing_enable(setting)
        model(ids, labels=ids, use_cache=bool(setting)).loss.backward()      # checkpointing layers are given no cache
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for key, want in grads[0].items():
        assert want.isfinite().all() and want.abs().max() > 0, key
        for other in grads[1:]:
            torch.testing.assert_close(other[key], want, rtol=1e-4, atol=1e-7)


def test_hub_checkpoint(tmp_path):
    """A configuration as older versions of the peer wrote it: misspelt, some keys unknown today, some of today's missing; one tensor in bf16."""
    model, ids = build("no-affine"), tokens()
    config = {"architectures": ["GSAForCausalLM"], "model_type": "gsa", "attn": None, "bos_token_id": 1, "clamp_max": None, "clamp_min": None, "conv_size": 4,
              "elementwise_affine": False, "eos_token_id": 2, "exapnd_k": 0.5, "exapnd_v": 2, "feature_map": "swish", "fuse_cross_entropy": True,
              "fuse_norm": True, "gate_logit_normalizer": 8, "hidden_act": "swish", "hidden_ratio": 4, "hidden_size": 32, "initializer_range": 0.02,
              "intermediate_size": 40, "max_position_embeddings": 2048, "norm_eps": 1e-6, "norm_first": False, "num_heads": 4, "num_hidden_layers": 2,
              "num_kv_heads": None, "num_slots": 6, "share_conv_kernel": True, "tie_word_embeddings": False, "torch_dtype": "float32",
              "transformers_version": "4.40.2", "use_cache": True, "use_norm": True, "use_output_gate": False, "use_short_conv": False, "vocab_size": VOCAB}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and again.config.expand_v == 2 and again.config.norm_first is False
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).mlp_size == 40 and GSAConfig(hidden_size=2048).mlp_size == 5632
    assert GSAConfig(exapnd_v=3, expand_v=2).expand_v == 2


def test_refusals():
    for given, error, match in (
        ({"attnres_block_size": 4}, NotImplementedError, "attnres"), ({"hidden_act": "powlu"}, NotImplementedError, "hidden_act"),
        ({"attn": {"layers": [9], "num_heads": 2}}, ValueError, "attn"), ({"attn": {"num_heads": 2}}, ValueError, "attn"),
    ):
        with pytest.raises(error, match=match):
            GSAConfig(**{**SMALL, **given})
    model, ids = build("plain"), tokens()
    with pytest.raises(ValueError, match="feature_map"):
        GSAForCausalLM(GSAConfig(**SMALL | {"feature_map": "elu"}))
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], max_new_tokens=5, prompt_lookup_num_tokens=3)
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[1, 2, 3], [4, 5]])
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, T, T))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    from gsa_ext.hf import convert
    with pytest.raises(ValueError, match="already"):
        convert(model)


def relative(a, b):
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


@pytest.mark.parametrize("folder", sorted((Path(__file__).parent / "data" / "gsa").glob("*/data.safetensors")), ids=lambda p: p.parent.name)
def test_peer(folder, device):
    """flash-linear-attention's logits of its own models (tests/data/make_gsa_fixtures.py), in parallel and token by token."""
    data = {name: x.to(device) for name, x in load_file(folder).items()}
    model, report = AutoModelForCausalLM.from_pretrained(folder.parent, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model, want = model.to(device).eval(), data["logits"]
    with torch.no_grad():
        assert relative(model(data["ids"]).logits, want) < 2e-3
        cache, parts = DynamicCache(), []
        for part in data["ids"][:, :9].split(1, 1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
        assert relative(torch.cat(parts, 1), want[:, :9]) < 2e-3
