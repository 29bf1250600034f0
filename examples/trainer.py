"""A model becomes a GSA model with the Trainer of transformers: nothing in it is special.

    python examples/trainer.py MODEL TEXT OUTPUT         # a directory or hub id; a text file; a directory
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import gsa_ext.hf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("output")
parser.add_argument("--preset", default="t2r-window", choices=gsa_ext.hf.PRESETS)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--seq-len", type=int, default=1024)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--lr", type=float, default=1e-4)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
ids = torch.tensor(tokenizer(Path(args.text).read_text(), verbose=False)["input_ids"])
rows = [{"input_ids": block, "labels": block} for block in ids[: len(ids) // args.seq_len * args.seq_len].view(-1, args.seq_len)]
held_out = max(1, len(rows) // 50)

model = gsa_ext.hf.convert(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), args.preset)

trainer = Trainer(
    model=model, train_dataset=rows[:-held_out], eval_dataset=rows[-held_out:], data_collator=default_data_collator, processing_class=tokenizer,
    args=TrainingArguments(
        output_dir=f"{args.output}/checkpoints", max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=args.lr,
        lr_scheduler_type="cosine", warmup_steps=args.steps // 20, bf16=torch.cuda.is_available(), gradient_checkpointing=True,
        logging_steps=max(1, args.steps // 20), save_steps=max(1, args.steps // 4), save_total_limit=2, report_to="none"))
print("held-out, before:", trainer.evaluate()["eval_loss"])
trainer.train()
print("held-out, after:", trainer.evaluate()["eval_loss"])
trainer.save_model(args.output)
