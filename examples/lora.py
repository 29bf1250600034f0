"""A model becomes a GSA model with PEFT: low-rank adapters on q, k and v, the gate in full. The original's logits are inside, and teach.

    python examples/lora.py MODEL TEXT OUTPUT            # a directory or hub id; a text file; a directory
"""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsa_ext.hf
from gsa_ext.hf.train import logit_kl, lora_config, softmax_attention

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("output")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--seq-len", type=int, default=1024)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--kl", type=float, default=0.5, help="weight of the divergence from the original's logits")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
ids = torch.tensor(tokenizer(Path(args.text).read_text(), verbose=False)["input_ids"])
blocks = ids[: len(ids) // args.seq_len * args.seq_len].view(-1, args.seq_len)

base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
gsa_ext.hf.convert(base)
model = get_peft_model(base, lora_config(base, r=8, lora_alpha=8))
model.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
for step in range(args.steps):
    batch = blocks[torch.randint(len(blocks), (args.batch_size,))].to(device)
    with torch.no_grad(), model.disable_adapter(), softmax_attention(model):
        teacher = model(input_ids=batch, use_cache=False).logits
    out = model(input_ids=batch, labels=batch)
    loss = out.loss + args.kl * logit_kl(out.logits, teacher)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % max(1, args.steps // 20) == 0 or step == args.steps - 1:
        print(f"step {step:5}  loss {loss.item():.4f}  next token {out.loss.item():.4f}", flush=True)

merged = model.merge_and_unload()                        # a converted model without adapters
merged.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
