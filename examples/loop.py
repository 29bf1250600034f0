"""A model becomes a GSA model in a plain training loop: attention transfer first, then all weights.

    python examples/loop.py MODEL TEXT OUTPUT            # a directory or hub id; a text file; a directory
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsa_ext.hf
from gsa_ext.hf.train import new_parameters, train_only, transfer_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("output")
parser.add_argument("--steps", type=int, default=500, help="of each of the two stages")
parser.add_argument("--seq-len", type=int, default=1024)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--lr", type=float, default=1e-4)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
ids = torch.tensor(tokenizer(Path(args.text).read_text(), verbose=False)["input_ids"])
blocks = ids[: len(ids) // args.seq_len * args.seq_len].view(-1, args.seq_len)

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)      # weights in fp32, products in bf16
gsa_ext.hf.convert(model)


def train(parameters, loss_of, lr):
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=args.steps, pct_start=0.1)
    for step in range(args.steps):
        batch = blocks[torch.randint(len(blocks), (args.batch_size,))].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, args.steps // 20) == 0 or step == args.steps - 1:
            print(f"step {step:5}  loss {loss.item():.4f}", flush=True)


model.train()
print("Each layer learns what its softmax attention does (the new parameters alone):")
train(train_only(model, new_parameters(model)), lambda batch: transfer_loss(model, relative=True, input_ids=batch), 10 * args.lr)
print("All weights learn the text:")
train(train_only(model), lambda batch: model(batch, labels=batch).loss, args.lr)

model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
prompt = blocks[:1, : args.seq_len // 2].to(device)
print(tokenizer.decode(model.eval().generate(prompt, max_new_tokens=50, do_sample=False)[0, prompt.shape[1]:]))
