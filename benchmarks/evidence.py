"""Does a converted model get back what its teacher had? Arms at one token budget, on the Python sources of this machine.

    python -m benchmarks.evidence FOLDER --seconds 85      # goes on where the last call stopped; as often as it says that runs are left
    python -m benchmarks.evidence FOLDER --workers 6       # six runs at a time, in processes of their own, spread over the GPUs that there are
    python -m benchmarks.evidence FOLDER --report          # evidence.md, .png and .json of what is there

A byte-level Llama (d 384, 8 layers, 6/2 heads) is trained once. Every arm starts from it ("scratch" from nothing) and is trained on as many tokens, in the
same order for the same seed: with seed 0 at learning rates a factor of about three apart, three of them and then further ones until the best has a worse one
on either side; then with the other seeds at the best, one seed of all arms before the next of any. FOLDER gets one JSON file for each run, when the run is
done. A difference between two arms is a finding only where their means over the seeds differ by more than two standard errors.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from benchmarks.__main__ import commit

BUCKETS = "perplexity"


@dataclass(frozen=True)
class Size:
    hidden: int = 384
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    length: int = 1024
    batch: int = 32
    teacher_tokens: int = 100_000_000
    tokens: int = 10_000_000
    held_out: int = 256                                                  # blocks
    teacher_lr: float = 2e-3


TINY = Size(hidden=64, layers=2, heads=4, kv_heads=2, length=128, batch=4, teacher_tokens=40_000, tokens=8_000, held_out=8)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)                 # learning rates
LRS = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Arm:
    """``convert`` options (None: not converted), and how it is trained. ``lrs``: where the search for the best learning rate starts on the ladder."""

    options: dict[str, Any] | None
    lrs: tuple[float, ...] = LRS
    transfer: float = 0.0                                                # share of the tokens that go to attention transfer
    lora: bool = False
    scratch: bool = False


# liger with 64 slots: at a head dimension of 64 its own 128 are each of the 64 twice, which is the same function
ARMS = {
    "teacher goes on": Arm(None, (1e-4, 3e-4, 1e-3)),
    "t2r": Arm({"preset": "t2r"}),
    "paper": Arm({"preset": "paper"}),
    "liger": Arm({"preset": "liger", "num_slots": 64}),
    "t2r, window 64": Arm({"preset": "t2r", "window": 64, "mix": "learned"}),
    "window 64 alone": Arm({"preset": "liger", "num_slots": 64, "mix": 1.0}),
    "t2r, transfer first": Arm({"preset": "t2r"}, transfer=0.2),
    "t2r, LoRA": Arm({"preset": "t2r"}, (1e-3, 3e-3, 1e-2), lora=True),
    "t2r from scratch": Arm({"preset": "t2r"}, (1e-3, 3e-3, 1e-2), scratch=True),
    "t2r, 128 slots": Arm({"preset": "t2r", "num_slots": 128}),
}
Job = tuple[str, float, int]                                             # arm, learning rate, seed
TEACHER: Job = ("the teacher", 0.0, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run that would end later (default: do them all)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help=f"of each arm (default: {Size.tokens:,})")
    parser.add_argument("--teacher-tokens", type=int, help=f"default: {Size.teacher_tokens:,}")
    parser.add_argument("--tiny", action="store_true", help="a model and budgets of a few seconds, to see that it runs")
    parser.add_argument("--workers", type=int, default=1, help="processes; with CUDA they share all GPUs (default: 1, this process)")
    parser.add_argument("--patience", type=float, default=math.inf, help="seconds after which a worker that is busy with one run is stopped (default: never)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        return report(args.folder)
    end = time.monotonic() + args.seconds
    size = TINY if args.tiny else Size()
    size = Size(**{**asdict(size), **{name: getattr(args, name) for name in ("tokens", "teacher_tokens") if getattr(args, name)}})
    (args.folder / "runs").mkdir(parents=True, exist_ok=True)
    places = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if args.device == "cuda" else [args.device]
    crew: list[Any] = [Here(args.folder, size, places[0])]
    if args.workers > 1:
        crew = [Process(args.folder, size, places[i % len(places)], args.workers) for i in range(args.workers)]
    try:
        left = oversee(crew, args.folder, args.arms, args.seeds, end, args.patience)
    finally:
        for worker in crew:
            worker.stop()
    print(left or "all runs are there")
    return 0


# ---------------------------------------------------------------------------------------------------------------------- who does it


class Here:
    """A worker that is this process."""

    def __init__(self, folder: Path, size: Size, place: str) -> None:
        self.folder, self.size, self.place, self.device = folder, size, place, torch.device(place)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.text = Text(size, self.device)
        self.result: Any = None
        transformers.utils.logging.disable_progress_bar()

    def start(self, job: Job, end: float) -> None:
        """Does ``job``; the result is the line to print, or the exception."""
        start = time.monotonic()
        try:
            if job == TEACHER:
                self.result = teach(self.folder / "teacher", self.size, self.text, self.device, end)
            else:
                row = run(self.folder, *job, self.size, self.text, self.device)
                self.result = (f"{row['arm']:<22} lr {row['lr']:.0e} seed {row['seed']}  bits per byte {row['curve'][0][1]:.3f} -> {row['curve'][-1][1]:.4f}  "
                               f"{row['tokens_per_second'] / 1e3:,.0f} K tokens/s, {time.monotonic() - start:.1f} s")
        except Exception as error:                                       # one run that fails must not take the others with it
            self.result = RuntimeError(f"{job} failed: {error}\n{traceback.format_exc(limit=-6)}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def finish(self) -> Any:
        return self.result

    def stop(self) -> None:
        pass


class Process:
    """A worker that is a process of its own."""

    def __init__(self, folder: Path, size: Size, place: str, workers: int) -> None:
        self.given = folder, size, place, workers
        context = multiprocessing.get_context("spawn")
        self.place, (self.pipe, other) = place, context.Pipe()
        threads = max(1, torch.get_num_threads() // workers)
        self.process = context.Process(target=attend, args=(other, folder, size, place, threads), daemon=True)
        self.process.start()
        other.close()

    def start(self, job: Job, end: float) -> None:
        self.pipe.send((job, end))

    def finish(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            return RuntimeError(f"a worker on {self.place} is gone (exit code {self.process.exitcode})")

    def stop(self, wait: float = 5) -> None:
        self.pipe.close()
        if not wait:
            os.kill(self.process.pid, signal.SIGABRT)                    # and so it says where it is
        self.process.join(wait or 2)
        self.process.kill()


def attend(pipe: Any, folder: Path, size: Size, place: str, threads: int) -> None:
    faulthandler.enable()
    torch.set_num_threads(threads)
    worker = Here(folder, size, place)
    try:
        while True:
            worker.start(*pipe.recv())
            pipe.send(worker.finish())
    except (EOFError, OSError, KeyboardInterrupt):                       # nobody waits any more
        pass


def oversee(crew: list[Any], folder: Path, arms: list[str], seeds: int, end: float, patience: float) -> str:
    """Hands out the jobs until none is left or time is short; returns what is left, in words. While the teacher is trained, the workers of other GPUs
    do what needs no teacher. A worker that takes longer than ``patience`` for a run is replaced."""
    busy: dict[Any, tuple[Job, float]] = {}
    failed: set[Job] = set()
    took: dict[str, float] = {}
    while True:
        taught = (folder / "teacher" / "history.json").exists()
        todo = [] if TEACHER in failed else pending(folder, arms, seeds, {job for job, _ in busy.values()} | failed)
        if not taught:
            where = next((worker.place for worker, (job, _) in busy.items() if job == TEACHER), None)
            todo = [TEACHER] if where is None and TEACHER not in failed else [job for job in todo if ARMS[job[0]].scratch]
        waiting = 0
        for worker in crew:
            if worker in busy or not todo or (not taught and todo[0] != TEACHER and worker.place == where):
                continue
            job, now = todo[0], time.monotonic()
            if job != TEACHER and now + 1.1 * took.get(job[0], max(took.values(), default=0.0)) > end:
                waiting = len(todo)
                break
            busy[worker] = job, now
            worker.start(job, end)
            todo = todo[1:]
            if isinstance(worker, Here) or job == TEACHER:
                break
        if not busy:
            lost = f"{len(failed)} runs failed; " if failed else ""
            return f"{lost}{waiting} or more runs are left: call again" if waiting else lost if failed else ""
        pipes = {worker.pipe: worker for worker in busy if isinstance(worker, Process)}
        ready = [pipes[pipe] for pipe in multiprocessing.connection.wait(list(pipes), 2.0)] if pipes else list(busy)      # type: ignore[index]
        for worker in [w for w, (job, start) in busy.items() if w not in ready and job != TEACHER and time.monotonic() - start > patience]:
            print(f"{busy[worker][0]} took longer than {patience} s: stopped", flush=True)
            failed.add(busy.pop(worker)[0])
            worker.stop(0)
            crew[crew.index(worker)] = Process(*worker.given)
        for worker in ready:
            (job, start), result = busy.pop(worker), worker.finish()
            if isinstance(result, Exception):
                print(f"{result}", flush=True)
                failed.add(job)
                if isinstance(worker, Process) and not worker.process.is_alive():
                    crew.remove(worker)
                continue
            print(f"{result}", flush=True)
            if job == TEACHER and not (folder / "teacher" / "history.json").exists():
                return "the teacher is not done: call again"
            if job != TEACHER:
                took[job[0]] = time.monotonic() - start


# ---------------------------------------------------------------------------------------------------------------------- what there is to do


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def final(row: dict[str, Any]) -> float:
    """Bits per byte at the end; infinite where training failed."""
    value = row["curve"][-1][1]
    return value if math.isfinite(value) else math.inf


def pending(folder: Path, arms: list[str], seeds: int, taken: Collection[Job] = ()) -> list[Job]:
    """(arm, learning rate, seed) of the runs to come and not ``taken``: searches for learning rates before further seeds."""
    done = {(row["arm"], row["lr"], row["seed"]): final(row) for row in rows(folder)}
    sweeps, more = [], []
    for arm in arms:
        missing = [lr for lr in ARMS[arm].lrs if (arm, lr, 0) not in done]
        if not missing:
            swept = {lr: done[arm, lr, 0] for lr in LADDER if (arm, lr, 0) in done}
            best = min(swept, key=lambda lr, swept=swept: swept[lr])     # type: ignore[misc]
            at = LADDER.index(best)
            missing = [lr for lr in LADDER[max(0, at - 1):at + 2] if lr not in swept]
        if missing:
            sweeps += [(arm, lr, 0) for lr in missing]
        else:
            more += [(arm, best, seed) for seed in range(1, seeds) if (arm, best, seed) not in done]
    return [job for job in (*sweeps, *sorted(more, key=lambda job: job[2])) if job not in taken]


# ---------------------------------------------------------------------------------------------------------------------- training


class Text:
    """The corpus on the device: batches for a seed, and the held-out blocks."""

    def __init__(self, size: Size, device: torch.device) -> None:
        from gsa_ext.cli import _t2r_data as data

        train, held = data.python_sources()
        self.train = torch.from_numpy(data.Blocks(train, size.length).tokens.copy()).to(device)
        self.held = data.Blocks(held, size.length).first(size.held_out)
        self.sizes = {"training bytes": len(train), "held-out bytes": len(held), "of which read": self.held.tokens.size}
        self.size, self.device = size, device

    def order(self, seed: int, steps: int) -> torch.Tensor:
        """``[steps, batch]``: which blocks; every block once before any comes again."""
        generator, need = torch.Generator().manual_seed(1000 + seed), steps * self.size.batch
        rounds = [torch.randperm(len(self.train), generator=generator) for _ in range(-(-need // len(self.train)))]
        return torch.cat(rounds)[:need].view(steps, -1).to(self.device)

    def bits(self, model: Any) -> float:
        from gsa_ext.cli._t2r_report import nats_per_token

        was = model.training
        value = nats_per_token(model, self.held, 64, "held-out") / math.log(2)
        model.train(was)
        return value


class Trainer:
    """AdamW with warm-up and cosine decay; on a GPU the whole step is one CUDA graph."""

    def __init__(self, model: Any, loss_of: Any, parameters: list[Any], lr: float, order: torch.Tensor, text: Text, steps_in_all: int) -> None:
        self.model, self.loss_of, self.parameters, self.lr, self.order, self.text = model, loss_of, parameters, lr, order, text
        self.cuda, self.step, self.steps = text.device.type == "cuda", 0, steps_in_all
        self.rate = torch.zeros((), device=text.device)
        self.ids = text.train[order[0]].long()
        options: dict[str, Any] = {"capturable": True, "fused": True} if self.cuda else {}
        self.optimizer = torch.optim.AdamW(parameters, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.01, **options)
        self.graph: Any = None
        if self.cuda:
            try:
                self._capture()
            except RuntimeError as error:                                # slower, and the same
                print(f"no CUDA graph: {error}", flush=True)
                self.graph = None
                self.optimizer.zero_grad()

    def _once(self) -> None:
        with torch.autocast("cuda", torch.bfloat16) if self.cuda else nullcontext():
            self.loss = self.loss_of(self.model, self.ids)
        self.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):                                           # at learning rate 0
                self._once()
                self.optimizer.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        self.loss = None                                                 # and with it the autograd graph of that stream
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._once()
        self.graph = graph

    def go(self, until: int) -> None:
        while self.step < until:
            warm = max(1, self.steps // 20)
            part = min(1.0, (self.step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * self.step / self.steps))
            self.rate.fill_(self.lr * part)
            self.ids.copy_(self.text.train[self.order[self.step]])
            if self.graph is None:
                self._once()
                self.optimizer.zero_grad()
            else:
                self.graph.replay()
            self.step += 1


def language(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def llama(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=size.hidden, intermediate_size=8 * size.hidden // 3 // 32 * 32, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None))


def lean(model: Any) -> Any:
    """Norms in one kernel each, which under autocast give the projections bf16 at once, as they would make it of fp32 themselves."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Norm(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
            return y.bfloat16() if torch.is_autocast_enabled(x.device.type) else y

    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = Norm
    return model


def teach(folder: Path, size: Size, text: Text, device: torch.device, end: float) -> str:
    """Trains the teacher, or goes on with it; says how far it is. Its weights are stored, and used, in bf16; history.json is there when it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    began, partial = time.perf_counter(), folder / "partial.pt"
    torch.manual_seed(0)
    model, steps = lean(llama(size)).to(device), size.teacher_tokens // (size.batch * size.length)
    saved = torch.load(partial, map_location=device) if partial.exists() else None
    if saved:
        model.load_state_dict(saved["model"])
    trainer = Trainer(model.train(), language, list(model.parameters()), size.teacher_lr, text.order(-1, steps), text, steps)
    curve = []
    if saved:
        trainer.step, curve = saved["step"], saved["curve"]
        for p, state in zip(trainer.parameters, saved["optimizer"]):
            for name, value in state.items():
                if trainer.cuda:                                         # the graph knows these tensors
                    trainer.optimizer.state[p][name].copy_(value)
                else:
                    trainer.optimizer.state[p][name] = value
    every = max(1, steps // 20)
    while trainer.step < steps:
        trainer.go(min(steps, trainer.step + every))
        curve.append((trainer.step * size.batch * size.length, text.bits(model)))
        if time.monotonic() > end:
            break
    line = f"teacher: {trainer.step} of {steps} steps, {curve[-1][1]:.4f} bits per byte, {time.perf_counter() - began:.1f} s"
    if trainer.step < steps:
        torch.save({"model": model.state_dict(), "optimizer": [dict(trainer.optimizer.state[p]) for p in trainer.parameters], "step": trainer.step,
                    "curve": curve}, partial)
        return line
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="12MB")
    (folder / "history.json").write_text(json.dumps({"curve": curve, "size": asdict(size), "commit": commit(), "corpus": text.sizes}) + "\n")
    partial.unlink(missing_ok=True)
    return line


def run(folder: Path, name: str, lr: float, seed: int, size: Size, text: Text, device: torch.device) -> dict[str, Any]:
    """One arm at one learning rate and seed, to its end."""
    from transformers import AutoModelForCausalLM

    import gsa_ext.hf
    from gsa_ext.cli.eval import measure
    from gsa_ext.hf.train import lora_config, new_parameters, train_only, transfer_loss

    arm = ARMS[name]
    torch.manual_seed(seed)
    model = llama(size) if arm.scratch else AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    if arm.options is not None:
        gsa_ext.hf.convert(model, **arm.options)
    lean(model).to(device)
    per_step = size.batch * size.length
    steps = size.tokens // per_step
    order, curve, began, busy = text.order(seed, steps), [(0, text.bits(model))], time.perf_counter(), 0.0
    first = round(arm.transfer * steps)
    stages = [(first, lambda m, ids: transfer_loss(m, relative=True, input_ids=ids), True)] if first else []
    stages.append((steps - first, language, False))
    done = 0
    marks = sorted({max(1, round(steps * share)) for share in (0.1, 0.2, 0.5, 1.0)})
    for count, loss_of, transfer in stages:
        trained = model
        if transfer:
            parameters = train_only(model, new_parameters(model))
        elif arm.lora:
            from peft import get_peft_model

            trained = get_peft_model(model, lora_config(model))
            parameters = [p for p in trained.parameters() if p.requires_grad]
        else:
            parameters = train_only(model)
        trainer = Trainer(trained.train(), loss_of, parameters, 1e-3 if transfer else lr, order[done:done + count], text, count)
        for mark in sorted({*(m - done for m in marks if done < m <= done + count), count}):
            clock = time.perf_counter()
            trainer.go(mark)
            if device.type == "cuda":
                torch.cuda.synchronize()
            busy += time.perf_counter() - clock
            if done + mark in marks:
                curve.append(((done + mark) * per_step, text.bits(trained)))
        done += count
        del trainer
        model = trained.merge_and_unload() if arm.lora and not transfer else trained
    model.eval()
    with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
        final = measure(model, text.held.first(128), 64, 1.0)
    row = {"arm": name, "lr": lr, "seed": seed, "curve": curve, "final": final, "tokens_per_second": steps * per_step / busy,
           "seconds": time.perf_counter() - began, "parameters": sum(p.numel() for p in model.parameters()), "size": asdict(size), "commit": commit(),
           "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}
    path = folder / "runs" / f"{name.replace(',', '').replace(' ', '-')}-lr{lr:g}-seed{seed}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row) + "\n")
    part.replace(path)
    return row


# ---------------------------------------------------------------------------------------------------------------------- telling


def summary(folder: Path) -> dict[str, dict[str, Any]]:
    """By arm: the learning rate that was best with seed 0, and over the seeds at it the means and standard errors."""
    found: dict[str, dict[str, Any]] = {}
    everything = rows(folder)
    for name in ARMS:
        swept = [row for row in everything if row["arm"] == name and row["seed"] == 0]
        if not swept:
            continue
        lr = min(swept, key=final)["lr"]
        seeds = sorted((row for row in everything if row["arm"] == name and row["lr"] == lr), key=lambda row: row["seed"])

        def over(values: list[float]) -> tuple[float, float | None]:
            return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

        distances = seeds[0]["final"]["copy"]
        found[name] = {
            "lr": lr, "swept": {row["lr"]: row["curve"][-1][1] for row in swept}, "seeds": len(seeds),
            "curve": [(point[0], *over([row["curve"][i][1] for row in seeds])) for i, point in enumerate(seeds[0]["curve"])],
            "positions": {span: over([math.log2(row["final"][BUCKETS][span]) for row in seeds]) for span in seeds[0]["final"][BUCKETS]},
            "copy": {distance: over([row["final"]["copy"][distance] for row in seeds]) for distance in distances},
        }
    return found


def figure(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def report(folder: Path) -> int:
    found = summary(folder)
    if not found:
        print(f"no runs in {folder}")
        return 1
    one = next(iter(rows(folder)))
    size = one["size"]
    spans = list(next(iter(found.values()))["positions"])
    distances = list(next(iter(found.values()))["copy"])
    lines = [f"Teacher: {size['teacher_tokens'] / 1e6:g} M tokens. Arms: {size['tokens'] / 1e6:g} M tokens each, T = {size['length']}, batch {size['batch']}; "
             f"{one['device']}, torch {one['torch']}. Held-out bits per byte, mean ± standard error over the seeds.", "",
             "| arm | learning rate | seeds | " + " | ".join(f"after {tokens / 1e6:.3g} M" for tokens, *_ in next(iter(found.values()))["curve"]) + " |"]
    lines.append("|---" * lines[-1].count(" | ") + "|---|")
    for name, arm in found.items():
        lines.append(f"| {name} | {arm['lr']:g} | {arm['seeds']} | " + " | ".join(figure(*rest) for _, *rest in arm["curve"]) + " |")
    rates = sorted({lr for arm in found.values() for lr in arm["swept"]})
    lines += ["", "Final bits per byte of seed 0 by learning rate:", "", "| arm | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
              "|---" * (1 + len(rates)) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{arm['swept'][lr]:.3f}" if lr in arm["swept"] else "" for lr in rates) + " |" for name, arm in found.items()]
    lines += ["", "By position in the context, and on a passage that comes again after so many tokens (bits per byte):", "",
              "| arm | " + " | ".join(spans) + " | " + " | ".join(f"copy over {d}" for d in distances) + " |"]
    lines.append("|---" * (1 + len(spans) + len(distances)) + "|")
    for name, arm in found.items():
        lines.append(f"| {name} | " + " | ".join(figure(*x) for x in (*arm["positions"].values(), *arm["copy"].values())) + " |")
    lines += ["", "Differences of more than two standard errors (final bits per byte):", ""]
    finals = {name: arm["curve"][-1][1:] for name, arm in found.items()}
    for a, (mean_a, error_a) in finals.items():
        for b, (mean_b, error_b) in finals.items():
            if error_a is not None and error_b is not None and mean_b - mean_a > 2 * math.hypot(error_a, error_b):
                lines.append(f"* {a} is better than {b} by {mean_b - mean_a:.3f}")
    (folder / "evidence.md").write_text("\n".join(lines) + "\n")
    about = {name: one[name] for name in ("size", "commit", "device", "torch")}
    kept = [{name: value for name, value in row.items() if name not in about} for row in rows(folder)]
    history = json.loads((folder / "teacher" / "history.json").read_text())
    about["corpus"] = history.get("corpus")
    (folder / "evidence.json").write_text("\n".join(["{" + json.dumps(about)[1:-1] + ",", f'"teacher": {json.dumps(history["curve"])},', '"rows": [',
                                                     ",\n".join(map(json.dumps, kept)), "]}"]) + "\n")
    print("\n".join(lines))
    plot(found, folder / "evidence.png")
    return 0


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(1, 3, figsize=(17, 4.8))
    floor = found.get("teacher goes on", next(iter(found.values())))
    spans, distances = list(floor["positions"]), list(floor["copy"])
    for i, (name, arm) in enumerate(found.items()):
        look = {"label": name, "color": f"C{i}" if i < 10 else "black", "marker": "o", "markersize": 3, "capsize": 2}
        points = [(tokens / 1e6, mean, error or 0.0) for tokens, mean, error in arm["curve"]]
        axes[0].errorbar(*zip(*points), **look)
        values = [arm["positions"][span] for span in spans]
        axes[1].errorbar(spans, [mean - floor["positions"][span][0] for span, (mean, _) in zip(spans, values)], [error or 0.0 for _, error in values], **look)
        values = [arm["copy"][distance] for distance in distances]
        axes[2].errorbar(distances, [mean for mean, _ in values], [error or 0.0 for _, error in values], **look)
    finals = sorted(arm["curve"][-1][1] for arm in found.values())
    usual = finals[3 * (len(finals) - 1) // 4] - finals[0]               # arms far behind the others leave the picture
    axes[0].set_ylim(finals[0] - 0.05, finals[0] + 3 * usual + 0.1)
    axes[1].set_ylim(-0.5 * usual - 0.02, 2 * usual + 0.02)
    for axis, title, below in zip(axes, ("held-out bits per byte", "bits per byte above the teacher that goes on", "bits per byte of a passage met again"),
                                  ("million tokens", "position in the context", "tokens after which it comes again")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(below)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    canvas.tight_layout()
    canvas.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
