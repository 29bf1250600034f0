"""Saved states: what comes back is what went in, and generation goes on from it, as often as wanted."""

import pickle

import pytest
import torch

pytest.importorskip("safetensors")

from gsa_ext.layer import GatedSlotAttention, SlotCache, SlotState
from gsa_ext.state import load_metadata, load_state, save_state


def layers(device, **options):
    torch.manual_seed(0)
    make = dict(hidden_size=32, num_heads=4, num_kv_heads=2, num_slots=12, device=device, **options)
    return [GatedSlotAttention(layer_idx=i, **make) for i in range(2)]


def run(stack, x, cache):
    with torch.no_grad():
        for layer in stack:
            x = layer(x, past_key_values=cache)[0]
    return x


def normal(device, *shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def same(a, b):
    assert len(a.layers) == len(b.layers) and a.get_seq_length() == b.get_seq_length()
    for x, y in zip(a.layers, b.layers):
        x, y = x.tensors(), y.tensors()
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) and x[name].dtype == y[name].dtype for name in x)


@pytest.mark.parametrize("options", [{}, {"use_short_conv": True}], ids=["plain", "conv"])
def test_round_trip(options, device, tmp_path):
    stack, cache, path = layers(device, **options), SlotCache(), tmp_path / "prompt.safetensors"
    run(stack, normal(device, 1, 21, 32), cache)
    save_state(cache, path, {"prompt": "twenty-one tokens"})
    loaded = load_state(path, device)
    same(cache, loaded)
    assert loaded.get_seq_length() == 21 and load_metadata(path) == {"prompt": "twenty-one tokens"}
    follow = normal(device, 1, 1, 32, seed=2)
    assert torch.equal(run(stack, follow, cache), run(stack, follow, loaded))
    same(cache, loaded)


def test_one_prompt_many_continuations(device, tmp_path):
    stack, cache = layers(device, use_short_conv=True), SlotCache()
    run(stack, normal(device, 1, 21, 32), cache)
    save_state(cache, tmp_path / "a")
    many, follow = load_state(tmp_path / "a", device), normal(device, 3, 1, 32, seed=2)
    many.batch_repeat_interleave(3)
    together = run(stack, follow, many)
    for b in range(3):
        assert torch.allclose(together[b : b + 1], run(stack, follow[b : b + 1], load_state(tmp_path / "a", device)), atol=1e-5)


def test_empty(tmp_path):
    cache = SlotCache()
    cache.layers.append(SlotState())
    save_state(cache, tmp_path / "a")
    assert load_state(tmp_path / "a").layers[0].slots is None


def test_hybrid_model(tmp_path):
    """Slots in one layer, keys and values in the others."""
    transformers = pytest.importorskip("transformers")
    from gsa_ext.hf import convert
    from gsa_ext.hf.cache import GSACacheLayer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=89, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    model = convert(transformers.LlamaForCausalLM(config).eval(), "paper", [1], num_slots=12)
    tokens = torch.randint(1, 89, (2, 30))
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
        save_state(cache, tmp_path / "a")
        loaded = load_state(tmp_path / "a", cache=transformers.DynamicCache(), kind=GSACacheLayer)
        assert loaded.get_seq_length() == 20
        a, b = (model(tokens[:, 20:], past_key_values=c).logits for c in (cache, loaded))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="keys and values.*SlotCache.*DynamicCache"):
        load_state(tmp_path / "a")


def test_bad_files_and_caches(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "pickle").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_state(tmp_path / "pickle")
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected a file of gsa_ext.state.save_state"):
        load_state(tmp_path / "other")
    with pytest.raises(TypeError, match="cache.*dict"):
        save_state({}, tmp_path / "a")

    stack, cache = layers("cpu"), SlotCache()
    run(stack, normal("cpu", 1, 3, 32), cache)
    save_state(cache, tmp_path / "a")
    with pytest.raises(ValueError, match="holds tokens already"):
        load_state(tmp_path / "a", cache=cache)

    class More(SlotState):
        @property
        def nbytes(self):
            return super().nbytes + 4

    cache.layers[0] = More()
    with pytest.raises(TypeError, match=r"layer 0 \(More\) holds more than its tensors"):
        save_state(cache, tmp_path / "b")
