"""Training converted models: attention transfer, distillation, LoRA, mixed precision, torch.compile, and two processes."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from gsa_ext.hf import PRESETS, GSAAttention, GSAConfig, GSAForCausalLM, convert
from gsa_ext.hf._versions import CACHE
from gsa_ext.hf.train import (
    AttentionTransfer,
    logit_kl,
    lora_config,
    new_parameters,
    softmax_attention,
    train_only,
    transfer_loss,
    transfer_losses,
)

VOCAB, T = 89, 29


def llama(device="cpu", **options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, **options})).eval().to(device)


def converted(preset="t2r", layers="all", device="cpu", **options):
    model = llama(device)
    torch.manual_seed(1)
    return convert(model, preset, layers, **{"num_slots": 12, **({"window": 5} if PRESETS[preset]["window"] else {}), **options})


def tokens(device="cpu", B=2, length=T, seed=3):
    return torch.randint(1, VOCAB, (B, length), generator=torch.Generator().manual_seed(seed)).to(device)


def close(a, b, tolerance=1e-5):
    error = (a - b).square().mean().sqrt() / b.square().mean().sqrt()
    assert error < tolerance, f"relative error {error:.1e}"


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset, layers", [("t2r", "all"), ("paper", [0, 2]), ("liger", [1]), ("t2r-window", "all")])
def test_transfer(preset, layers, device):
    """The losses are those of layers fed by the original model, and reach the new parameters alone."""
    original, ids = llama(device), tokens(device)
    options = {"mix": "learned"} if preset == "liger" else {}
    model = converted(preset, layers, device, **options)
    new = new_parameters(model)
    assert new.keys() == dict(model.named_parameters()).keys() - dict(original.named_parameters()).keys()
    with softmax_attention(model), torch.no_grad():
        close(model(ids, use_cache=False).logits, original(ids).logits)
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids, use_cache=True)

    seen = {}
    for i, layer in enumerate(original.model.layers):
        layer.self_attn.register_forward_hook(lambda m, a, kwargs, out, i=i: seen.__setitem__(i, (kwargs, out[0])), with_kwargs=True)
    original(ids)
    want = [(layer.self_attn(**{**seen[i][0], CACHE: None})[0] - seen[i][1]).square().mean()
            for i, layer in enumerate(model.model.layers) if isinstance(layer.self_attn, GSAAttention)]
    chosen = train_only(model, new)
    assert {id(p) for p in chosen} == {id(p) for p in new.values()}
    losses = transfer_losses(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(torch.stack(losses), torch.stack(want))
    torch.stack(losses).mean().backward()
    grads = gradients(model)
    assert grads.keys() == new.keys() and all(g.isfinite().all() and g.abs().max() > 0 for g in grads.values())

    pad, one = torch.zeros_like(ids[:, :4]), torch.ones_like(ids)
    padded = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([pad, one], 1)}
    torch.testing.assert_close(transfer_loss(model, **padded), torch.stack(want).mean(), rtol=1e-4, atol=0)
    for reentrant in (True, False):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        AttentionTransfer(model)(input_ids=ids)["loss"].backward()
        for name, want_grad in grads.items():
            close(model.get_parameter(name).grad, want_grad)
    with torch.no_grad():
        assert not transfer_loss(model, input_ids=ids).requires_grad


def test_transfer_learns(device):
    """A few steps of it bring the model nearer to the original, which everything that is not new still is."""
    original, model, ids = llama(device), converted("paper", device=device, num_slots=24), tokens(device, B=4)
    optimizer = torch.optim.AdamW(train_only(model, new_parameters(model)), lr=3e-2)
    first = transfer_loss(model, relative=True, input_ids=ids).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = transfer_loss(model, relative=True, input_ids=ids)
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * first
    kept = dict(model.named_parameters())
    assert all(torch.equal(p, kept[name]) for name, p in original.named_parameters())
    assert all(p.requires_grad for p in train_only(model)) and len(train_only(model)) == len(kept)


def test_logit_kl():
    a, b = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    want = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(logit_kl(a, b), want.mean())
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(logit_kl(a, b, mask), want[mask.bool()].mean())
    soft = F.kl_div((a / 2).log_softmax(-1), (b / 2).log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(logit_kl(a, b, temperature=2.0), 4 * soft.mean())
    assert logit_kl(a, a.detach()).abs() < 1e-6
    logit_kl(a, b).backward()
    torch.testing.assert_close(a.grad, (a.softmax(-1) - b.softmax(-1)).detach() / 10)
    for wrong in ({"teacher_logits": b[:1]}, {"teacher_logits": b, "temperature": 0}):
        with pytest.raises(ValueError, match="teacher_logits|temperature"):
            logit_kl(a, **wrong)
    with pytest.raises(ValueError, match="convert"):
        new_parameters(llama())


def test_lora(device, tmp_path):
    """PEFT with the gate in modules_to_save: trains, saves, loads, merges to the same model; without its adapters the original is inside."""
    peft = pytest.importorskip("peft")
    for preset in ("t2r-window", "paper", "liger"):
        original, ids = llama(device), tokens(device)
        base = converted(preset, device=device)
        model = peft.get_peft_model(copy.deepcopy(base), lora_config(base, r=4))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert any("lora_A" in name for name in trained) and any("f_proj" in name for name in trained) == (preset != "liger")
        model.eval()
        with torch.no_grad():
            want = model(input_ids=ids).logits
            with model.disable_adapter(), softmax_attention(model):
                close(model(input_ids=ids, use_cache=False).logits, original(ids).logits)
            model.save_pretrained(tmp_path / preset)
            again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / preset).eval()
            close(again(input_ids=ids).logits, want)
            merged = model.merge_and_unload()
            assert type(merged) is type(base)
            close(merged(ids).logits, want, 1e-4)
            assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    """Mixed precision: fp32 weights, 16-bit products. The gradients are those of fp32 up to 16-bit rounding, which t2r's steep gates make the most of."""
    for preset, options in (("t2r", {}), ("paper", {}), ("liger", {"mix": "learned"})):
        model, ids, grads = converted(preset, device=device, **options), tokens(device), []
        model.train()
        for enabled in (False, True):
            model.zero_grad()
            with torch.autocast(device.type, dtype, enabled=enabled):
                model(ids, labels=ids).loss.backward()
            grads.append(gradients(model))
        assert {g.dtype for g in grads[1].values()} == {torch.float32}
        close(*(torch.cat([g.flatten() for g in each.values()]) for each in (grads[1], grads[0])), 0.2 if dtype == torch.bfloat16 else 0.03)


@pytest.mark.parametrize("kind", ["hybrid", "gsa"])
def test_compile(kind, device):
    """The whole model in one graph, forward and backward, padded and packed."""
    if kind == "gsa":
        torch.manual_seed(0)
        model = GSAForCausalLM(GSAConfig(hidden_size=32, num_hidden_layers=1, num_heads=4, num_kv_heads=2, num_slots=8, vocab_size=VOCAB, intermediate_size=40,
                                         initializer_range=0.2, use_short_conv=True, pad_token_id=0, eos_token_id=None, bos_token_id=None)).to(device)
    else:
        model = convert(llama(device, num_hidden_layers=2), "t2r", [1], num_slots=12, window=5, mix="learned")
    torch._dynamo.reset()
    backend = "aot_eager" if device.type == "cpu" else "inductor"
    compiled, ids = torch.compile(model.train(), fullgraph=True, backend=backend, dynamic=False), tokens(device)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    cu = torch.tensor([0, 8, 9, T], dtype=torch.int32, device=device)
    packed = {"input_ids": ids[:1], "labels": ids[:1], "cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    for given in ({"input_ids": ids, "labels": ids, "attention_mask": mask}, packed):
        grads = []
        for m in (model, compiled):
            model.zero_grad()
            m(**given).loss.backward()
            grads.append(gradients(model))
        for name, want in grads[0].items():
            close(grads[1][name], want, 1e-4)
    if kind == "gsa" and device.type == "cpu":                           # on the GPU what follows is a failed assertion, after which CUDA is of no use
        with torch.no_grad():
            close(compiled(ids[:1], position_ids=torch.arange(T)[None], use_cache=False).logits, model(ids[:1], use_cache=False).logits, 1e-4)
            with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
                compiled(ids[:1], position_ids=torch.cat([torch.arange(8), torch.arange(T - 8)])[None], use_cache=False)


def test_trainer_and_accelerate(device, tmp_path):
    """The same steps by transformers' Trainer, by accelerate and by a plain loop."""
    accelerate, transformers = pytest.importorskip("accelerate"), pytest.importorskip("transformers")
    ids, results, cpu = tokens(B=6), [], device.type == "cpu"
    model = converted()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.0,
        adam_epsilon=1e-2, max_grad_norm=0.0, use_cpu=cpu, report_to="none", save_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True)
    arguments._n_gpu = min(arguments.n_gpu, 1)                           # not torch's DataParallel
    rows = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    results.append(model)
    for accelerator in (accelerate.Accelerator(cpu=cpu), None):
        model = converted().to(device).train()                           # as the first: new weights are drawn where the model is
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-2)      # or rounding decides where gradients are nearly 0
        loader = torch.utils.data.DataLoader(rows, batch_size=2)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader) if accelerator else (model, optimizer, loader)
        for batch in loader:
            loss = wrapped(**{name: x.to(device) for name, x in batch.items()}).loss
            accelerator.backward(loss) if accelerator else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model)
    for other in results[:2]:
        for (name, a), b in zip(other.named_parameters(), results[2].parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def rank_main(rank, folder, backend):
    """Two processes with half of the batch each against one with all of it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    mesh = torch.distributed.init_device_mesh(device.type, (2,))
    ids = tokens(device, B=4)
    mine = ids[2 * rank:2 * rank + 2]

    def steps(model, part, forward=lambda model, part: model(part, labels=part).loss):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            forward(model, part).backward()
            optimizer.step()
            optimizer.zero_grad()

    def full(p):
        return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()

    for preset, layers in (("t2r-window", "all"), ("liger", [0, 2])):
        single = converted(preset, layers, device).train()
        steps(single, ids)
        shards = converted(preset, layers, device).train()
        for layer in shards.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(shards, mesh=mesh)
        with pytest.raises(ValueError, match="shard"):
            convert(shards, layers=[1])
        steps(shards, mine)
        replicas = converted(preset, layers, device).train()
        steps(DistributedDataParallel(replicas), mine)
        for (name, want), a, b in zip(single.named_parameters(), shards.parameters(), replicas.parameters()):
            torch.testing.assert_close(full(a), want.detach(), rtol=1e-4, atol=1e-5, msg=f"FSDP2, {name}")
            torch.testing.assert_close(b.detach(), want.detach(), rtol=1e-4, atol=1e-5, msg=f"DDP, {name}")
    with pytest.raises(NotImplementedError, match="sharded"):
        transfer_loss(shards, input_ids=mine)

    single, replicas = converted("paper", device=device), converted("paper", device=device)
    for model in (single, replicas):
        train_only(model, new_parameters(model))
    steps(single, ids, lambda model, part: transfer_loss(model, input_ids=part))
    steps(DistributedDataParallel(AttentionTransfer(replicas)), mine, lambda model, part: model(input_ids=part)["loss"])
    for (name, want), b in zip(single.named_parameters(), replicas.parameters()):
        torch.testing.assert_close(b.detach(), want.detach(), rtol=1e-4, atol=1e-6, msg=f"transfer, {name}")
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_processes(backend, tmp_path):
    """DDP and FSDP2 (``fully_shard``) on two ranks give the weights of one process."""
    if not torch.distributed.is_available() or not getattr(torch.distributed, f"is_{backend}_available")():
        pytest.skip(f"no {backend}")
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path), backend), nprocs=2)
