"""decode_graph: tokens and logits are those without it, whatever the model, the mode of generation, and the order in which caches come and go."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from gsa_ext.hf import GSAConfig, GSAForCausalLM, convert, decode_graph
from gsa_ext.hf import graph as module

VOCAB = 61
CONVERTED = {"t2r": {}, "paper": {}, "liger": {}, "t2r, window": {"window": 5, "mix": "learned"}}
OWN = {"gsa": {}, "gsa, convolutions": {"use_short_conv": True, "conv_size": 3}}
every = pytest.mark.parametrize("name", [*CONVERTED, *OWN])


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=None))


def build(name, device):
    torch.manual_seed(0)
    if name in CONVERTED:
        model = convert(llama(), name.partition(",")[0], num_slots=8, **CONVERTED[name])
    else:
        model = GSAForCausalLM(GSAConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_heads=4, num_kv_heads=2, num_slots=8,
                                         initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=None, **OWN[name]))
    return model.to(device).eval()


def prompt(device, B=2, T=9, padding=0, seed=3):
    ids = torch.randint(1, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


@pytest.fixture
def counts(monkeypatch):
    """How many steps were recorded, and how many replayed."""
    found = {"recorded": 0, "replayed": 0}
    init, call = module._Step.__init__, module._Step.__call__

    def count(name, f):
        def counted(*args, **kwargs):
            found[name] += 1
            return f(*args, **kwargs)
        return counted

    monkeypatch.setattr(module._Step, "__init__", count("recorded", init))
    monkeypatch.setattr(module._Step, "__call__", count("replayed", call))
    return found


@every
def test_generate(name, device, counts):
    """Greedy, sampling, beams, padded prompts, several batch sizes, one after the other."""
    model = build(name, device)
    calls = [
        (prompt(device), {}), (prompt(device, padding=4), {}), (prompt(device), {"do_sample": True, "num_return_sequences": 2}), (prompt(device, B=1), {}),
        (prompt(device), {"num_beams": 3}), (prompt(device, T=1), {}), ({"input_ids": prompt(device)["input_ids"]}, {"repetition_penalty": 1.3}),
    ]

    def run():
        results = []
        for inputs, options in calls:
            torch.manual_seed(1)
            out = model.generate(**inputs, **options, max_new_tokens=7, output_logits=True, return_dict_in_generate=True)
            results.append((out.sequences, torch.stack(out.logits)))
        return results

    want = run()
    assert not counts["replayed"]
    with decode_graph(model):
        got = run()
    # batches of 1, 2, 4 and 6; where transformers makes up no mask for a call that came without, that is another kind of step
    assert 4 <= counts["recorded"] <= 5 and counts["replayed"] >= 6 * len(calls)
    for (tokens, logits), (other, others) in zip(want, got):
        assert torch.equal(tokens, other) and torch.equal(logits, others)
    assert "forward" not in vars(model)


@every
@torch.no_grad()
def test_caches_come_and_go(name, device, counts):
    """Two sequences decoded in turn, a fork of one of them, a reordered one, and a return to one of them after the graphs are gone."""
    model = build(name, device)

    def run():
        logits = []

        def step(cache, token):
            out = model(torch.tensor([[token], [token + 1]], device=device), past_key_values=cache)
            assert out.past_key_values is cache
            logits.append(out.logits)

        a, b = DynamicCache(), DynamicCache()
        model(**prompt(device), past_key_values=a)
        step(a, 5)
        model(**prompt(device, T=4, seed=4), past_key_values=b)
        step(b, 6)
        fork = copy.deepcopy(a)
        for token in (7, 8):
            for cache in (a, b, fork, a):
                step(cache, token)
        b.reorder_cache(torch.tensor([1, 0], device=device))
        step(b, 9)
        model(prompt(device, T=3, seed=5)["input_ids"], past_key_values=b)        # more of a prompt
        step(b, 10)
        step(a, 11)
        assert a.get_seq_length() == 9 + 1 + 4 + 1 and b.get_seq_length() == 4 + 1 + 2 + 1 + 3 + 1
        return logits, a, b

    want, a, b = run()
    with decode_graph(model):
        got, a2, b2 = run()
        assert counts == {"recorded": 1, "replayed": len(got)}
    assert all(map(torch.equal, want, got))
    for cache, other in ((a, a2), (b, b2)):
        token = torch.full((2, 1), 12, device=device)
        assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=other).logits)


def test_other_calls_run_as_without(device, counts):
    model = build("t2r", device)
    ids = prompt(device)["input_ids"]
    with decode_graph(model):
        assert model(ids, labels=ids).loss.requires_grad
        with torch.no_grad():
            cache = model(ids).past_key_values
            assert len(model(ids[:, :1], past_key_values=cache, output_hidden_states=True).hidden_states) == 3
            assert model(ids[:, :1]).logits.shape == (2, 1, VOCAB)
            with pytest.raises(ValueError, match="attention_mask"):
                model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 4, device=device))
    assert counts["replayed"] == 0
    with pytest.raises(KeyError), decode_graph(model):
        raise KeyError
    assert "forward" not in vars(model)


def test_refusals():
    for model in (llama(), build("t2r", "cpu").model, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="model: expected a causal LM with GSA layers"), decode_graph(model):
            pass
    for model in (convert(llama(), layers=[0]), GSAForCausalLM(GSAConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_heads=2,
                                                                         attn={"layers": [0], "num_heads": 2}))):
        with pytest.raises(ValueError, match="softmax layers"), decode_graph(model):
            pass


@pytest.mark.gpu("CUDA graphs")
def test_a_step_that_cannot_be_recorded(cuda):
    """A sentence instead of CUDA's, and the model still works."""
    model = build("t2r", cuda)
    model.model.layers[0].register_forward_pre_hook(lambda layer, args: (args[0].sum().item(), None)[1])
    want = model.generate(**prompt(cuda), max_new_tokens=4)
    with decode_graph(model), pytest.raises(RuntimeError, match="decode_graph.*cannot be recorded"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(**prompt(cuda), max_new_tokens=4)
    assert torch.equal(model.generate(**prompt(cuda), max_new_tokens=4), want)
    torch.randn(1, device=cuda)
