"""Converted models: what generate, the Trainer and from_pretrained ask of them."""

import copy
import json
import logging
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import gsa_ext.hf
from gsa_ext.hf import PRESETS, GSAAttention, GSAConfig, GSAForCausalLM, cache_bytes, convert
from gsa_ext.hf._versions import CACHE
from gsa_ext.reference import naive_gsa

CASES = [("t2r", "all"), ("paper", "all"), ("t2r", [0, 2]), ("paper", [1]), ("liger", "all"), ("liger", [1]), ("t2r-window", "all")]
VOCAB, T = 89, 29


def llama(device="cpu"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config).eval().to(device)


def converted(preset, layers, device="cpu", **options):
    model = llama(device)
    torch.manual_seed(1)
    assert convert(model, preset, layers, **{"num_slots": 12, **({"window": 5} if PRESETS[preset]["window"] else {}), **options}) is model
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GSAAttention) and module.f_proj is not None:
                module.f_proj.weight.normal_(0, 0.5)                   # gates that depend on the data
    return model


def tokens(device, B=2, length=T, seed=3):
    return torch.randint(1, VOCAB, (B, length), generator=torch.Generator().manual_seed(seed)).to(device)


def close(a, b, tolerance=1e-4):
    error = (a - b).square().mean().sqrt() / b.square().mean().sqrt()
    assert error < tolerance, f"relative error {error:.1e}"


def test_attention_is_the_recurrence(device):
    """The swapped layer, written out once more with the naive loop."""
    for preset, layers in CASES[:2]:
        model = converted(preset, layers, device)
        layer = model.model.layers[1].self_attn
        x = torch.randn(2, T, 32, device=device)
        rotary = model.model.rotary_emb(x, torch.arange(T, device=device)[None])
        with torch.no_grad():
            layer.f_proj.weight.mul_(4)
            q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
            if preset == "t2r":
                from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
                q, k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2) if layer.settings["rope"] == "keep" else (q, k)
                g = torch.nn.functional.logsigmoid(layer.f_proj(x)) / layer.settings["gate_logit_normalizer"]
                assert (g < -3.7).any() and layer.settings["gate_floor"] == -3.7
                g = g.clamp(min=-3.7)
            else:
                q, k, v = (torch.nn.functional.silu(y) for y in (q, k, v))
                g = torch.nn.functional.logsigmoid(layer.f_proj(x)) / 8
            o = naive_gsa(q, k, v, None, g.unflatten(-1, (2, 12)), scale=layer.settings["scale"])[0].flatten(-2)
            if preset == "paper":
                assert layer.settings["scale"] == 1.0 and layer.f_proj.bias is None
                o = torch.nn.functional.rms_norm(torch.nn.functional.silu(o), (32,), layer.g_norm.weight, 1e-5)
            close(layer(x, position_embeddings=rotary)[0], layer.o_proj(o))


@pytest.mark.parametrize("slots", [8, 12, 3, 16])
def test_liger_is_the_recurrence_and_a_window(slots, device):
    """Once more with loops: raw q, k, v and gates from the keys, beside softmax attention to rotated keys of the last five tokens."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = converted("liger", "all", device, num_slots=slots, mix="learned" if slots == 3 else 0.5)
    layer = model.model.layers[1].self_attn
    x = torch.randn(2, T, 32, device=device)
    rotary = model.model.rotary_emb(x, torch.arange(T, device=device)[None])
    with torch.no_grad():
        if slots == 3:
            layer.window_mix.weight.normal_()
        q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        mean = torch.stack([k[..., m * 8 // slots:-(-(m + 1) * 8 // slots)].mean(-1) for m in range(slots)], -1)
        o = naive_gsa(q, k, v, None, torch.nn.functional.logsigmoid(mean) / 16, scale=1.0)[0]
        q, k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2)
        k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        beside = torch.empty_like(o)
        for t in range(T):
            p = torch.einsum("bhd,bjhd->bhj", q[:, t], k[:, max(0, t - 4):t + 1]).mul(8 ** -0.5).softmax(-1)
            beside[:, t] = torch.einsum("bhj,bjhd->bhd", p, v[:, max(0, t - 4):t + 1])
        share = layer.window_mix.weight.sigmoid()[:, None] if slots == 3 else 0.5
        close(layer(x, position_embeddings=rotary)[0], layer.o_proj((share * beside + (1 - share) * o).flatten(-2)))


def test_window_forgets(device):
    """With the window alone (mix 1) nothing older than the layers' windows together reaches the logits; a pad is not a token of the window."""
    model, ids = converted("liger", "all", device, mix=1.0), tokens(device)
    other = ids.clone()
    other[:, :T - 13] = 1
    with torch.no_grad():
        want = model(ids).logits
        assert (model(other).logits[:, -1] - want[:, -1]).abs().max() < 1e-5 < (model(other).logits[:, -2] - want[:, -2]).abs().max()
        holes = torch.cat([ids[:, :9], torch.zeros_like(ids[:, :4]), ids[:, 9:]], 1)
        mask, positions = (holes > 0).long(), torch.cat([torch.arange(9), torch.zeros(4, dtype=torch.long), torch.arange(9, T)]).to(device)
        got = model(holes, attention_mask=mask, position_ids=positions.expand(2, -1)).logits
        close(torch.cat([got[:, :9], got[:, 13:]], 1), want)
        cache = model(holes[:, :12], attention_mask=mask[:, :12], use_cache=True, position_ids=positions[None, :12].expand(2, -1)).past_key_values
        parts = [model(holes[:, t:t + 1], attention_mask=mask[:, :t + 1], past_key_values=cache, position_ids=positions[None, t:t + 1].expand(2, -1)).logits
                 for t in range(12, T + 4)]
        close(torch.cat(parts[1:], 1), want[:, 9:])


@pytest.mark.parametrize("options", [{"preset": "t2r", "window": 3, "mix": "learned"}, {"preset": "t2r", "window": 40, "mix": 0.25, "gate": "key"},
                                     {"preset": "liger", "gate": "proj", "rope": "keep", "window": 1}, {"preset": "paper", "gate": "key"}])
def test_options(options, device, tmp_path):
    """Hybrids inside a layer, and gates by another preset's means, in training, decoding and on disk."""
    model, ids = llama(device), tokens(device)
    torch.manual_seed(2)
    convert(model, num_slots=6, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GSAAttention) and module.window_mix is not None:
                assert (module.window_mix.weight == 0).all()
                module.window_mix.weight.normal_()
        want, cache, parts = model(ids).logits, DynamicCache(), []
        for a, b in ((0, 1), (1, 2), (2, 13), (13, T)):
            parts.append(model(ids[:, a:b], past_key_values=cache).logits)
        close(torch.cat(parts, 1), want)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_first_half_lives():
    """The gates of the t2r preset start nearly open or shut, and the slots with half-lives spaced evenly on a log scale."""
    model = llama()
    convert(model, "t2r", num_slots=5)
    layer = model.model.layers[0].self_attn
    low, high = layer.settings["half_lives"]
    kept = torch.special.ndtr(layer.f_proj.bias.double() / layer.settings["gate_spread"])         # chance that a slot survives a token
    half_lives = (math.log(0.5) / kept.log()).view(2, 5)                 # of the two key/value heads
    want = low * (high / low) ** torch.linspace(0, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(half_lives, want.expand(2, 5), rtol=1e-3, atol=0)
    logits = layer.f_proj(model.model.layers[0].input_layernorm(torch.randn(4000, 32))) - layer.f_proj.bias
    assert 0.7 < logits.std() / layer.settings["gate_spread"] < 1.4


def test_t2r_starts_near_softmax():
    """With a slot for (almost) every token the converted layer is nearly the softmax attention."""
    model, ids = llama(), tokens("cpu", length=6)
    want = model(ids).logits
    errors = []
    for preset, slots in (("t2r", 64), ("t2r", 4), ("paper", 64)):
        other = llama()
        torch.manual_seed(0)
        errors.append((convert(other, preset, num_slots=slots)(ids).logits - want).square().mean().sqrt().item())
    assert errors == sorted(errors), errors


@pytest.mark.parametrize("preset, layers", CASES)
def test_parallel_equals_steps_equals_chunks(preset, layers, device):
    model, ids = converted(preset, layers, device), tokens(device)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        for cuts in ([*range(T + 1)], [0, 7, 8, 9, 20, T]):
            for cache in (None, DynamicCache(), DynamicCache(config=model.config)):
                parts = []
                for a, b in zip(cuts, cuts[1:]):
                    out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    parts.append(out.logits)
                close(torch.cat(parts, 1), want)
                assert cache.get_seq_length() == T and not cache.is_compileable
                if len(cuts) > 9:
                    break
        hidden = model(ids, output_hidden_states=True).hidden_states
        assert len(hidden) == 4


@pytest.mark.parametrize("preset, layers", CASES)
def test_padding(preset, layers, device):
    model, ids = converted(preset, layers, device), tokens(device)
    pad, one = torch.zeros(2, 6, dtype=torch.long, device=device), torch.ones_like(ids)
    with torch.no_grad():
        want = model(ids).logits
        close(model(torch.cat([pad, ids], 1), attention_mask=torch.cat([pad, one], 1)).logits[:, 6:], want)
        close(model(torch.cat([ids, pad], 1), attention_mask=torch.cat([one, pad], 1)).logits[:, :-6], want)
        short = torch.cat([ids[1:, :11], torch.zeros(1, T - 11, dtype=torch.long, device=device)], 1)
        both = model(torch.cat([ids[:1], short]), attention_mask=torch.cat([one[:1], (short > 0).long()])).logits
        close(both[:1], want[:1])
        close(both[1:, :11], want[1:, :11])
        plain = model.generate(ids, max_new_tokens=9, do_sample=False)
        padded = model.generate(torch.cat([pad, ids], 1), attention_mask=torch.cat([pad, one], 1), max_new_tokens=9, do_sample=False)
    assert torch.equal(padded[:, 6:], plain)


@pytest.mark.parametrize("preset, layers", CASES)
def test_packing(preset, layers, device):
    model, ids = converted(preset, layers, device), tokens(device, B=1)
    bounds = [0, 8, 9, T]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:])])[None].to(device)
    number = torch.tensor([[0] * 8 + [1] + [2] * (T - 9)], dtype=torch.int32, device=device)
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    with torch.no_grad():
        want = torch.cat([model(ids[:, a:b]).logits for a, b in zip(bounds, bounds[1:])], 1)
        for given in ({"position_ids": positions}, {"seq_idx": number}, {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 20, "max_length_k": 20},
                      {"position_ids": positions, "attention_mask": torch.ones_like(ids)}):
            close(model(ids, **given).logits, want)
        for given in ({"position_ids": positions.expand(2, -1)}, {"seq_idx": number.expand(2, -1)}, {"cu_seq_lens_q": cu}):
            with pytest.raises(ValueError, match="batch size 1"):
                model(ids.expand(2, -1), **given)
        with pytest.raises(ValueError, match="packed"):
            model(ids, position_ids=positions, use_cache=True)


@pytest.mark.parametrize("preset, layers", CASES)
def test_generate(preset, layers, device):
    model, ids = converted(preset, layers, device), tokens(device)
    for how in ({"do_sample": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(model.generate(ids, max_new_tokens=10, use_cache=use_cache, **how))
        assert torch.equal(*results), how
    assert model.generate(ids[:, :1], max_new_tokens=3, do_sample=False).shape == (2, 4)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], max_new_tokens=5, assistant_model=llama(device))
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], max_new_tokens=5, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="static"):
        model.generate(ids, max_new_tokens=5, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[1, 2, 3], [4, 5]])
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=7), model.generate(ids, max_new_tokens=4, do_sample=False))


def test_cache(device):
    model, ids = converted("t2r", "all", device), tokens(device)
    sizes = set()
    with torch.no_grad():
        for length in (1, 5, T):
            cache = model(ids[:, :length], use_cache=True).past_key_values
            sizes.add(cache_bytes(cache))
        assert sizes == {3 * 2 * 2 * 12 * (8 + 8) * 4}                 # layers, rows, kv heads, slots, keys and values, bytes
        assert cache.get_max_length() == -1 and cache.get_mask_sizes(1, 0) == (T + 1, 0)
        follow = tokens(device, length=3, seed=4)
        want = model(follow, past_key_values=copy.deepcopy(cache)).logits
        other = copy.deepcopy(cache)
        other.batch_repeat_interleave(2)
        other.reorder_cache(torch.tensor([2, 3, 0, 1]))
        close(model(follow.flip(0).repeat_interleave(2, 0), past_key_values=other).logits, want.flip(0).repeat_interleave(2, 0))
        other = copy.deepcopy(cache)
        other.batch_select_indices(torch.tensor([1]))
        close(model(follow[1:], past_key_values=other).logits, want[1:])
        cache.reset()
        assert cache.get_seq_length() == 0
        close(model(ids, past_key_values=cache).logits, model(ids).logits)
    with pytest.raises(NotImplementedError, match="cropped"):
        cache.crop(-1)
    for layers in ("all", [1]):
        model = converted("t2r", layers, device)
        with pytest.raises(ValueError, match="Static"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    filled = llama(device)(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="already holds"):
        model(ids, past_key_values=filled)
    for mask in (torch.ones(2, 1, T, T), torch.ones(2, T - 1)):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=mask.to(device))


@pytest.mark.filterwarnings("error:.past_key_values. is deprecated")
@torch.no_grad()
def test_names_of_the_cache(device, monkeypatch):
    """As ``past_key_values``, whatever transformers is there, and as that calls it, which is what gsa_ext calls it when it calls transformers."""
    gsa = GSAForCausalLM(GSAConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    ids = tokens(device)
    logged = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda logger, message, *args: logged.append(message))
    for model in (converted("t2r", [1], device), converted("t2r-window", "all", device), gsa.eval().to(device)):
        for called, name in ((model, CACHE), (model.model, CACHE), (model.model, "past_key_values")):
            cache = DynamicCache(config=model.config)
            for part in (ids[:, :9], ids[:, 9:]):
                out = called(part, **{name: cache})
                assert out[CACHE] is cache
            close(out[0], called(ids, use_cache=False)[0][:, 9:])
        cache = DynamicCache(config=model.config)
        want = model.generate(ids, max_new_tokens=4, do_sample=False)
        got = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **{CACHE: cache})
        assert torch.equal(got.sequences, want) and got[CACHE] is cache and cache.get_seq_length() == T + 3
    assert not [message for message in logged if "past_key_values" in message]
    assert got.past_key_values is cache


@pytest.mark.parametrize("preset, layers", CASES)
def test_state_in_a_file(preset, layers, device, tmp_path):
    """A prompt is read once; windows go into the file as well."""
    from gsa_ext.state import load_state, save_state

    model, ids, follow = converted(preset, layers, device), tokens(device), tokens(device, length=3, seed=4)
    with torch.no_grad():
        cache = model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        save_state(cache, tmp_path / "state")
        want = model(follow, past_key_values=cache).logits
        again = load_state(tmp_path / "state", device, DynamicCache(), gsa_ext.hf.GSACacheLayer)
        assert torch.equal(model(follow, past_key_values=again).logits, want) and again.get_seq_length() == T + 3
        if (preset, layers) == ("liger", "all"):
            with pytest.raises(TypeError, match="kind=gsa_ext.hf.GSACacheLayer"):
                model(follow, past_key_values=load_state(tmp_path / "state", device, DynamicCache()))


@pytest.mark.parametrize("preset, layers", CASES)
def test_save_and_load(preset, layers, device, tmp_path):
    model, ids = converted(preset, layers, device), tokens(device)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and isinstance(again, LlamaForCausalLM) and not report["missing_keys"] and not report["unexpected_keys"]
    state, want = again.state_dict(), model.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[name], want[name].cpu()) for name in want)
    with torch.no_grad():
        assert torch.equal(again.to(device).eval()(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gsa_llama" and config["architectures"] == ["GsaLlamaForCausalLM"] and config["gsa"] == model.config.gsa
    assert AutoConfig.from_pretrained(tmp_path).gsa == model.config.gsa
    base = AutoModel.from_pretrained(tmp_path).to(device).eval()
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_loads_without_import(tmp_path):
    """A tool that never imports gsa_ext loads saved models with trust_remote_code=True, and saves them again just so."""
    config = gsa_ext.hf.GSAConfig(hidden_size=32, num_hidden_layers=1, num_slots=6, vocab_size=VOCAB, intermediate_size=40)
    models = {"converted": converted("liger", [0, 2]), "gsa": gsa_ext.hf.GSAForCausalLM(config).eval()}
    script = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert "gsa_ext" not in sys.modules
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type.startswith("gsa")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save(model(torch.arange(1, 20)[None]).logits.detach(), folder + ".pt")
    model.save_pretrained(folder + "-again")
    AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)
"""
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *models], check=True, env=environment, cwd=tmp_path)
    for name, model in models.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), model(torch.arange(1, 20)[None]).logits)
        first, second = ({p.name: p.read_text() for p in (tmp_path / folder).iterdir() if p.suffix in (".py", ".json")} for folder in (name, name + "-again"))
        assert first == second and "modeling_gsa_ext.py" in first


def test_missing_gate_is_initialised(tmp_path):
    """A checkpoint without f_proj gets a fresh one as convert makes it, not transformers' own idea."""
    model = llama()
    convert(model, "t2r", num_slots=12)
    state = {name: x for name, x in model.state_dict().items() if "layers.1.self_attn.f_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    gate, want = again.model.layers[1].self_attn.f_proj, model.model.layers[1].self_attn.f_proj
    torch.testing.assert_close(gate.bias, want.bias)
    assert gate.weight.std() > 0 and torch.equal(again.model.layers[0].self_attn.f_proj.weight, model.model.layers[0].self_attn.f_proj.weight)
    fresh = type(model)(model.config)
    torch.testing.assert_close(fresh.model.layers[1].self_attn.f_proj.bias, want.bias)


def test_training(device):
    """Default arguments give the gradients of the model without a cache; gradient checkpointing gives the same ones."""
    ids = tokens(device)
    for preset, layers in CASES:
        model = converted(preset, layers, device).train()
        grads = []
        for setting in ("plain", "no cache", "reentrant", "not reentrant"):
            model.zero_grad()
            if "reentrant" in setting:
                model.gradient_checkpointing_enable({"use_reentrant": setting == "reentrant"})
            model(ids, labels=ids, **({"use_cache": False} if setting == "no cache" else {})).loss.backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name, want in grads[1].items():
            assert want.isfinite().all() and want.abs().max() > 0, name
            for other in (grads[0], grads[2], grads[3]):
                close(other[name], want, 1e-5)
        model.eval()                                                   # a cache that is made along the way does no harm
        model.zero_grad()
        model(ids, labels=ids, use_cache=True).loss.backward()
        for name, p in model.named_parameters():
            close(p.grad, grads[1][name], 1e-5)


def test_conversion_in_place(device):
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    one, two = LlamaForCausalLM(config).eval().to(device), LlamaForCausalLM(config).eval().to(device)
    ids, before = tokens(device), two(tokens(device)).logits
    weights = dict(one.named_parameters())
    convert(one, "t2r", [-1], num_slots=7)
    assert not hasattr(config, "gsa") and type(two) is LlamaForCausalLM and torch.equal(two(ids).logits, before)
    assert type(two.config) is LlamaConfig and one.model.config is one.config and isinstance(one.config, LlamaConfig)
    after = dict(one.named_parameters())
    assert all(after[name] is p for name, p in weights.items())
    assert after.keys() - weights.keys() == {"model.layers.2.self_attn.f_proj.weight", "model.layers.2.self_attn.f_proj.bias"}
    assert one.config.gsa["layers"].keys() == {"2"} and json.loads(json.dumps(one.config.gsa)) == one.config.gsa
    gate = after["model.layers.2.self_attn.f_proj.weight"]
    convert(one, "paper", [0], num_slots=9)                              # further layers of a hybrid
    assert one.config.gsa["layers"].keys() == {"0", "2"} and dict(one.named_parameters())["model.layers.2.self_attn.f_proj.weight"] is gate
    assert type(one.model.layers[1].self_attn).__name__ == "LlamaAttention"
    assert one(ids, use_cache=True).logits.isfinite().all()


def test_refusals():
    model = llama()
    for arguments, error, match in (
        ({"preset": "rwkv"}, ValueError, "preset"), ({"preset": None}, ValueError, "preset"), ({"layers": "some"}, ValueError, "layers"),
        ({"layers": [3]}, ValueError, "layers"), ({"layers": []}, ValueError, "layers"),
        ({"layers": [0, -3]}, ValueError, "layers"), ({"layers": [1.0]}, TypeError, "layers"),
        ({"num_slots": 0}, ValueError, "num_slots"), ({"num_slots": "many"}, TypeError, "num_slots"), ({"rope": "yes"}, ValueError, "rope"),
        ({"scale": -1.0}, ValueError, "scale"), ({"scale": "big"}, TypeError, "scale"),
        ({"gate": "none"}, ValueError, "gate"), ({"gate": 3}, TypeError, "gate"), ({"slots": 3}, TypeError, "slots"),
        ({"preset": "paper", "window": 64}, ValueError, "window"), ({"window": 0}, ValueError, "window"), ({"window": 4.0}, TypeError, "window"),
        ({"preset": "t2r", "mix": 0.5}, ValueError, "mix"),
        ({"window": 4, "mix": 0.0}, ValueError, "mix"), ({"preset": "liger", "mix": "half"}, TypeError, "mix"),
    ):
        before = {name: id(p) for name, p in model.named_parameters()}
        with pytest.raises(error, match=match):
            convert(model, **arguments)
        assert type(model) is LlamaForCausalLM and not hasattr(model.config, "gsa") and {name: id(p) for name, p in model.named_parameters()} == before
    with pytest.raises(TypeError, match="model"):
        convert(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        convert(model.model)
    from transformers import GPT2Config, GPT2LMHeadModel
    with pytest.raises(ValueError, match="gpt2"):
        convert(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=5)))
    from transformers import BertConfig, BertForMaskedLM, BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 5, "intermediate_size": 8}
    with pytest.raises(ValueError, match="ALiBi"):
        convert(BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=5)))
    with pytest.raises(ValueError, match="encoder"):
        convert(BertForMaskedLM(BertConfig(**small)))
    with pytest.raises(ValueError, match="softcapping=None"):
        convert(Gemma2ForCausalLM(Gemma2Config(**small, num_key_value_heads=1, head_dim=8)))
    convert(model, layers=[1])
    with pytest.raises(ValueError, match="layer 1 is a GSA layer already"):
        convert(model)
    assert model.config.gsa["layers"].keys() == {"1"} and type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_failing_conversion_leaves_the_model(monkeypatch):
    model, ids = llama(), tokens("cpu")
    before, config = model(ids).logits, model.config
    monkeypatch.setattr(gsa_ext.hf.attention.GateProjection, "reset_parameters", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(model)
    assert type(model) is LlamaForCausalLM and model.config is config and torch.equal(model(ids).logits, before)


def test_meta_and_dtypes(device):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
    convert(model)
    assert model.model.layers[0].self_attn.f_proj.weight.is_meta
    half = llama(device).to(torch.bfloat16)
    convert(half, num_slots=8)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and {p.device.type for p in half.parameters()} == {device.type}
    out = half(tokens(device), use_cache=True)
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all() and out.past_key_values.layers[0].slots[0].dtype == torch.float32


class Int8Linear(torch.nn.Module):
    """What quantisation libraries put in a Linear's place: a weight of integers, a scale beside it."""

    def __init__(self, linear):
        super().__init__()
        self.scale = torch.nn.Buffer(linear.weight.detach().float().abs().amax(1, keepdim=True) / 127)
        self.weight = torch.nn.Parameter((linear.weight.detach().float() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, (self.weight * self.scale).to(x.dtype))


def test_quantised_linear():
    model, ids = llama().to(torch.bfloat16), tokens("cpu")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    kept = model.model.layers[0].self_attn.q_proj
    convert(model, num_slots=8)
    layer = model.model.layers[0].self_attn
    assert layer.q_proj is kept and layer.f_proj.weight.dtype == torch.bfloat16
    model.train()(ids, labels=ids).loss.backward()
    assert layer.f_proj.weight.grad.isfinite().all()
    assert model.eval().generate(ids, max_new_tokens=3, do_sample=False).shape == (2, T + 3)


def test_tied_embeddings(tmp_path):
    config = llama().config
    config.tie_word_embeddings = True
    model, ids = LlamaForCausalLM(config).eval(), tokens("cpu")
    convert(model, num_slots=8)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight and torch.equal(again(ids).logits, model(ids).logits)


def test_pickle_and_copy():
    import pickle
    model, ids = converted("t2r", "all"), tokens("cpu")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["layer", "t2r", "paper", "liger", "t2r-window"])
def test_no_full_size_copies(name, device):
    """Between the projections and the op nothing as large as the hidden states is copied, forward or backward; but by a window on the CPU, in blocks."""
    from benchmarks.layer import Copies, build

    shape, dtype = (2, 32, 64, 4, 2, 16), torch.float32 if device.type == "cpu" else torch.bfloat16
    layer, forward = build(name, shape, dtype, device)
    x = torch.randn(2, 32, 64, device=device, dtype=dtype, requires_grad=True)
    with Copies(x) as copies:
        x.clone()
        x[:, 1:].clone()
        torch.empty_like(x).view(torch.complex128).copy_(x.detach().view(torch.complex128))      # an eighth of the elements, or a quarter
    assert copies.found == {"clone": 1, "copy_": 1}
    with Copies(x) as copies:
        torch.autograd.grad(forward(x), [x, *layer.parameters()], torch.ones_like(x))
    assert bool(copies.found) == (name in ("liger", "t2r-window") and device.type == "cpu")


def test_rotation(device):
    """The rotation in fewer passes is transformers' own, forward and backward, of a part of the head, in mixed dtypes; other rotations are left alone."""
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

    from gsa_ext.hf.rotary import is_half_rotation, rotate_halves

    assert is_half_rotation(halves) and not is_half_rotation(interleaved) and not is_half_rotation(torch.add)
    for dtype, angles, n in ((torch.float64, torch.float64, 8), (torch.float32, torch.float32, 6), (torch.bfloat16, torch.bfloat16, 8),
                             (torch.bfloat16, torch.float32, 8)):
        q, k = (torch.randn(2, 5, H, 8, device=device).to(dtype).requires_grad_() for H in (3, 1))
        cos, sin = (torch.randn(1, 5, n, device=device).to(angles) for _ in range(2))
        family = halves(q[..., :n], k[..., :n], cos, sin, unsqueeze_dim=2)
        got, want = rotate_halves(q, k, cos, sin), [torch.cat([y.to(dtype), x[..., n:]], -1) for x, y in zip((q, k), family)]
        assert all(x.dtype == dtype for x in got)
        cotangents = [torch.randn_like(x) for x in want]
        for a, b in zip((*got, *torch.autograd.grad(got, (q, k), cotangents)), (*want, *torch.autograd.grad(want, (q, k), cotangents))):
            close(a.double(), b.double(), {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype])
