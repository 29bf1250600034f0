"""Every family of ``gsa_ext.hf.FAMILIES``, with every preset: a tiny random model of each."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import gsa_ext.hf
from gsa_ext.hf import FAMILIES, PRESETS, GSAAttention, cache_bytes, convert

VOCAB, T = 67, 17
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
# what makes the family itself: odd head dimensions, part of the head rotated, layers without rotation, windows of its own, multipliers, experts
OWN = {
    "mistral": [{"head_dim": 12, "sliding_window": 5}],
    "mixtral": [{"num_local_experts": 3, "sliding_window": None}],
    "qwen2": [{"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}],
    "qwen3": [{"head_dim": 12}],
    "qwen3_moe": [{"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}],
    "gemma2": [{"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0}],
    "gemma3_text": [{"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20, "layer_types": ["sliding_attention", "full_attention"]}],
    "phi3": [{"partial_rotary_factor": 0.5}],
    "granite": [{"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0}],
    "gpt_neox": [{"rotary_pct": 0.5}, {"use_parallel_residual": False}],
    "stablelm": [{"partial_rotary_factor": 0.5, "qk_layernorm": True}, {"use_parallel_residual": True, "use_qkv_bias": True}],
    "cohere": [{"use_qk_norm": True}, {}],
    "cohere2": [{"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}],
    "smollm3": [{"no_rope_layers": [1, 0]}],
    "cwm": [{"bos_token_id": 1, "eos_token_id": 2, "head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}],
    "exaone4": [{"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}],
    "ernie4_5_moe": [{"moe_num_experts": 3, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1}],
    "flex_olmo": [{"num_experts": 3, "num_experts_per_tok": 2}],
    "gemma": [{"head_dim": 12}],
    "glm": [{"head_dim": 8, "partial_rotary_factor": 0.5}],
    "glm4": [{"head_dim": 8, "partial_rotary_factor": 0.5}],
    "glm4_moe": [{"head_dim": 8, "n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
                  "use_qk_norm": True}],
    "granitemoe": [{"num_local_experts": 3, "attention_multiplier": 0.3}],
    "helium": [{"head_dim": 8}],
    "ministral": [{"head_dim": 12, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}],
    "nemotron": [{"partial_rotary_factor": 0.5}],
    "olmo": [{"clip_qkv": 0.5}],
    "olmo3": [{"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}],
    "olmoe": [{"num_experts": 3, "num_experts_per_tok": 2, "clip_qkv": 0.5}],
    "phi": [{"partial_rotary_factor": 0.5, "qk_layernorm": True}],
    "phimoe": [{"num_local_experts": 3}],
    "qwen2_moe": [{"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}],
    "seed_oss": [{"head_dim": 12, "residual_dropout": 0.0}],
    "starcoder2": [{"sliding_window": 5}],
    "vaultgemma": [{"head_dim": 12, "sliding_window": 5, "attn_logit_softcapping": None, "layer_types": ["sliding_attention", "full_attention"]}],
}
MODELS = [(name, own) for name in FAMILIES for own in OWN.get(name, [{}])]
IDS = [name + "".join(f"-{k}" for k in own) if len(OWN.get(name, ())) > 1 else name for name, own in MODELS]
families = pytest.mark.parametrize("name, own", MODELS, ids=IDS)
FIRST = list(FAMILIES)[:16]                                             # the others differ little from them
PAIRS = [(name, own, preset) for name, own in MODELS for preset in PRESETS if name in FIRST]
LESS = [(name, own) for name, own in MODELS if name not in FIRST]


def build(name, own, device="cpu"):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**SMALL, **own})
    return AutoModelForCausalLM.from_config(config).eval().to(device)


def tokens(device="cpu", B=2, length=T, seed=3):
    return torch.randint(1, VOCAB, (B, length), generator=torch.Generator().manual_seed(seed)).to(device)


def converted(name, own, preset, layers="all", device="cpu", **options):
    model = build(name, own, device)
    torch.manual_seed(1)
    convert(model, preset, layers, **{"num_slots": 7, **({"window": 4} if PRESETS[preset]["window"] else {}), **options})
    return model


def close(a, b, tolerance=1e-4):
    error = (a - b).square().mean().sqrt() / b.square().mean().sqrt()
    assert error < tolerance, f"relative error {error:.1e}"


@families
def test_softmax_is_the_original(name, own, device):
    """The adapter's projections, norms, rotation and scale make the family's own attention: what transfer aims at, and the window is a part of."""
    model, ids = build(name, own, device), tokens(device, B=1)
    family, layers = FAMILIES[name], gsa_ext.hf.families.attention_layers(model, FAMILIES[name])
    seen = {}
    for i, layer in enumerate(layers):
        getattr(layer, family.attention).register_forward_hook(
            lambda module, args, kwargs, out, i=i: seen.__setitem__(i, (args, kwargs, out[0])), with_kwargs=True)
    weights = {id(p): p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        model(ids, use_cache=False)
    convert(model, num_slots=7)
    assert weights.items() <= {id(p): p.data_ptr() for p in model.parameters()}.items()
    for i, layer in enumerate(layers):
        args, kwargs, want = seen[i]
        hidden = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad():
            got = getattr(layer, family.attention).softmax_output(hidden, kwargs["position_embeddings"])
        close(got, want, 1e-5)


def check_inference(model, ids, chunks):
    """Parallel, in chunks, token by token; padding; packing. Returns the logits."""
    pad, one = torch.zeros_like(ids[:, :3]), torch.ones_like(ids)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        sizes = set()
        for cuts in chunks:
            cache, parts = DynamicCache(config=model.config), []
            for a, b in zip(cuts, cuts[1:]):
                parts.append(model(ids[:, a:b], past_key_values=cache, use_cache=True).logits)
                sizes.add(cache_bytes(cache))
            close(torch.cat(parts, 1), want)
        assert len(sizes) == 1
        close(model(torch.cat([pad, ids], 1), attention_mask=torch.cat([pad, one], 1)).logits[:, 3:], want)
        close(model(torch.cat([ids, pad], 1), attention_mask=torch.cat([one, pad], 1)).logits[:, :-3], want)
        cu = torch.tensor([0, 8, 9, T], dtype=torch.int32, device=ids.device)
        apart = torch.cat([model(ids[:1, a:b]).logits for a, b in zip(cu, cu[1:])], 1)
        close(model(ids[:1], cu_seq_lens_q=cu, cu_seq_lens_k=cu, use_cache=False).logits, apart)
    return want


def error(a, b):
    return ((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt()).item()


@pytest.mark.parametrize("name, preset", [("llama", "t2r"), ("mistral", "paper"), ("qwen3", "liger"), ("gemma3_text", "t2r"), ("phi3", "liger"),
                                          ("olmo2", "paper"), ("granite", "t2r"), ("gpt_neox", "liger"), ("smollm3", "paper")])
def test_bf16(name, preset, device):
    """Weights, activations and windows in bf16, states in fp32: every form is as near to fp32 with the same weights as bf16 lets it be."""
    model, ids = converted(name, OWN.get(name, [{}])[0], preset, device=device).to(torch.bfloat16), tokens(device, length=64)
    exact = copy.deepcopy(model).float()
    pad, one = torch.zeros_like(ids[:, :3]), torch.ones_like(ids)
    with torch.no_grad():
        want, plain = exact(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        assert plain.dtype == torch.bfloat16
        forms = {"parallel": plain, "padded": model(torch.cat([pad, ids], 1), attention_mask=torch.cat([pad, one], 1)).logits[:, 3:]}
        for form, cuts in (("steps", range(65)), ("chunks", (0, 2, 9, 10, 64))):
            cache, parts = DynamicCache(config=model.config), []
            for a, b in zip(cuts, cuts[1:]):
                parts.append(model(ids[:, a:b], past_key_values=cache, use_cache=True).logits)
            forms[form] = torch.cat(parts, 1)
        errors = {form: error(logits, want) for form, logits in forms.items()}
        assert max(errors.values()) < 0.05, errors
        assert model.generate(ids[:, :9], max_new_tokens=4, do_sample=False).shape == (2, 13)
    model.train()(ids, labels=ids).loss.backward()
    exact.train()(ids, labels=ids).loss.backward()
    grads = [torch.cat([p.grad.float().flatten() for p in m.parameters()]) for m in (model, exact)]
    assert error(*grads) < 0.2


@pytest.mark.parametrize("name, own, preset", PAIRS, ids=[f"{name}-{preset}" for name, _, preset in PAIRS])
def test_family(name, own, preset, device, tmp_path):
    """And beams; saving; gradients, with gradient checkpointing the same."""
    model, ids = converted(name, own, preset, device=device), tokens(device)
    want = check_inference(model, ids, ([*range(T + 1)], [0, 2, 9, 10, T]))
    beams = [model.generate(ids[:, :9], max_new_tokens=4, num_beams=2, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)

    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.to(device)(ids, use_cache=False).logits, want)

    model.train()
    grads = []
    for setting in (None, {"use_reentrant": False}, {"use_reentrant": True})[:2 if preset == "paper" else 3]:
        model.zero_grad()
        if setting:
            model.gradient_checkpointing_enable(setting)
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert {name for name, p in model.named_parameters() if "experts" not in name} <= grads[0].keys()
    for name, want in grads[0].items():
        assert want.isfinite().all(), name
        for other in grads[1:]:
            torch.testing.assert_close(other[name], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", *(name for name, family in FAMILIES.items() if not family.keywords)])
def test_checkpointing_of_two_calls(name, device):
    """Both forward, then both backward: a layer that runs again has the padding of its own call."""
    model, ids = converted(name, OWN.get(name, [{}])[0], "t2r", device=device).train(), tokens(device)
    masks = [(torch.arange(T, device=device) >= first).long().expand(2, -1) for first in (6, 0)]
    grads = []
    for setting in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.zero_grad()
        if setting:
            model.gradient_checkpointing_enable(setting)
        sum(model(ids, attention_mask=mask, labels=ids).loss for mask in masks).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for key, want in grads[0].items():
        for other in grads[1:]:
            torch.testing.assert_close(other[key], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, own", LESS, ids=[name for name, _ in LESS])
def test_further_family(name, own, device):
    check_inference(converted(name, own, "liger", device=device), tokens(device), ([0, 2, 9, 10, T],))


@pytest.mark.parametrize("name, own", [pair for pair in MODELS if pair[0] in FIRST or "layer_types" in pair[1]],
                         ids=[i for i, (name, own) in zip(IDS, MODELS) if name in FIRST or "layer_types" in own])
def test_hybrid(name, own, device):
    """Some layers softmax, with the masks, windows and caches that are theirs; the rest of the configuration as it was."""
    model, ids = converted(name, own, "t2r", [1], device), tokens(device)
    plain = build(name, own)
    before, after = plain.config.to_dict(), model.config.to_dict()
    assert {key: value for key, value in after.items() if key not in ("gsa", "model_type", "architectures")} == {
        key: value for key, value in before.items() if key not in ("model_type", "architectures")}
    pad, one = torch.zeros_like(ids[:, :3]), torch.ones_like(ids)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        cache, parts = None, []
        for a, b in zip([0, 2, 9, 10], [2, 9, 10, T]):
            out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        close(torch.cat(parts, 1), want)
        padded = {"attention_mask": torch.cat([pad, one], 1), "position_ids": torch.arange(-3, T, device=device).clamp(min=0).expand(2, -1)}
        close(model(torch.cat([pad, ids], 1), **padded).logits[:, 3:], want)
        positions = torch.cat([torch.arange(9), torch.arange(T - 9)])[None].to(device)
        apart = torch.cat([model(ids[:1, :9]).logits, model(ids[:1, 9:]).logits], 1)
        close(model(ids[:1], position_ids=positions, use_cache=False).logits, apart)
    assert copy.deepcopy(model)(ids).logits.equal(model(ids).logits)
    kinds = [type(getattr(layer, FAMILIES[name].attention)) for layer in gsa_ext.hf.families.attention_layers(model, FAMILIES[name])]
    assert kinds[1] is GSAAttention and kinds[0] is not GSAAttention


@pytest.mark.parametrize("name, own", [pair for pair in MODELS if pair[0] in FIRST], ids=[i for i, (name, own) in zip(IDS, MODELS) if name in FIRST])
def test_lora(name, own):
    """Adapters on the projections, under the family's own names, and the gate beside them: merged, the same model."""
    peft = pytest.importorskip("peft")
    from gsa_ext.hf.train import lora_config
    model, ids = converted(name, own, "paper"), tokens()
    adapted = peft.get_peft_model(model, lora_config(model, r=2, init_lora_weights=False)).eval()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("f_proj" in name for name in trained) and any("g_norm" in name for name in trained) and any("lora_A" in name for name in trained)
    with torch.no_grad():
        want = adapted(input_ids=ids).logits
        close(adapted.merge_and_unload()(ids).logits, want)
