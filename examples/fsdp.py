"""A model becomes a GSA model on several GPUs (or, to try it, CPU processes): convert first, then FSDP2.

    torchrun --nproc-per-node 8 examples/fsdp.py MODEL TEXT OUTPUT      # a directory or hub id; a text file; a directory
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsa_ext.hf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("output")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--seq-len", type=int, default=1024)
parser.add_argument("--batch-size", type=int, default=4, help="on each rank")
parser.add_argument("--lr", type=float, default=1e-4)
args = parser.parse_args()

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
mesh = torch.distributed.init_device_mesh(device.type, (dist.get_world_size(),))

tokenizer = AutoTokenizer.from_pretrained(args.model)
ids = torch.tensor(tokenizer(Path(args.text).read_text(), verbose=False)["input_ids"])
blocks = ids[: len(ids) // args.seq_len * args.seq_len].view(-1, args.seq_len)

torch.manual_seed(0)                                     # the new gates start alike on all ranks
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
gsa_ext.hf.convert(model)
model.gradient_checkpointing_enable({"use_reentrant": False})
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if cuda else MixedPrecisionPolicy()
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)

optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
choose = torch.Generator().manual_seed(1 + rank)         # other text on every rank
model.train()
for step in range(args.steps):
    batch = blocks[torch.randint(len(blocks), (args.batch_size,), generator=choose)].to(device)
    loss = model(batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % max(1, args.steps // 20) == 0 or step == args.steps - 1:
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step:5}  loss {mean.item() / dist.get_world_size():.4f}", flush=True)

state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))      # whole, on rank 0
if rank == 0:
    model.save_pretrained(args.output, state_dict=state)
    tokenizer.save_pretrained(args.output)
dist.barrier()
dist.destroy_process_group()
