"""``gsa-ext t2r``: a Transformer becomes a Gated Slot Attention model. Convert, finetune, compare, generate.

Without arguments it needs nothing but this machine: a small byte-level Llama is trained on the Python sources found here (once; it is cached), converted,
and trained on. With ``--model`` and ``--data`` it does the same to a model and text of the user's.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsa_ext.cli._t2r_data import Blocks

CONFIG = "run.json"                     # in the output directory: the settings of the run, written first
COMPLETE = "complete"                   # in a checkpoint: written last, so that one that was cut short is not taken for a checkpoint
NEEDS = ("transformers", "tokenizers", "accelerate", "datasets", "matplotlib")


@dataclass(frozen=True)
class Settings:
    """One run. ``model`` and ``data`` None: the embedded default."""

    model: str | None = None
    data: str | None = None
    text_column: str | None = None
    preset: str = "t2r-window"
    layers: str = "all"
    num_slots: int | None = None
    gate: str | None = None
    rope: str | None = None
    window: int | None = None
    stages: str = "full"
    transfer_steps: int = 100
    steps: int = 250
    teacher_steps: int = 500
    seq_len: int = 256
    batch_size: int = 16
    lr: float = 1e-3
    seed: int = 0
    device: str = "auto"
    prompt: str | None = None
    max_new_tokens: int = 160
    cache_dir: str | None = None
    output: str = "gsa-t2r"


OWN_MODEL: dict[str, Any] = {"steps": 1000, "seq_len": 1024, "batch_size": 4, "lr": 1e-4}           # other defaults with --model
KINDS: dict[str, Any] = dict.fromkeys(
    ("num_slots", "window", "transfer_steps", "steps", "teacher_steps", "seq_len", "batch_size", "seed", "max_new_tokens"), int) | {"lr": float}
STAGES = ("transfer", "lora", "full")
TEACHER_LR = 3e-3
EVAL_BLOCKS = 96
HELP = {
    "model": "a causal language model: directory or hub id (default: a small one, trained here once)",
    "data": "text to train on: file or directory (.txt, .md, .py, .jsonl, .json, .parquet) or hub id of a data set",
    "text_column": "column of the data that holds the text (default: text)",
    "preset": "how to convert: t2r-window, t2r, paper or liger",
    "layers": "layers to convert: all, or indices such as 0,1,3",
    "num_slots": "memory slots per key/value head (default: the preset's)",
    "gate": "proj, a new projection, or key, the keys themselves (default: the preset's)",
    "rope": "keep or drop the rotary position embedding (default: the preset's)",
    "window": "tokens of a softmax window beside the slots (default: the preset's)",
    "stages": "what to train, in this order, of transfer (the new parameters, towards each layer's softmax attention), lora, full; such as transfer,lora",
    "transfer_steps": "optimizer steps of the stage transfer",
    "steps": "optimizer steps of each of the stages lora and full",
    "teacher_steps": "optimizer steps of the embedded teacher",
    "seq_len": "tokens per training example",
    "batch_size": "training examples per step",
    "lr": "peak learning rate of the finetuning",
    "seed": "of everything random",
    "device": "auto, cpu or cuda (one GPU: choose it with CUDA_VISIBLE_DEVICES)",
    "prompt": "what the sample continues (default: held-out text)",
    "max_new_tokens": "length of the sample",
    "cache_dir": "where the embedded teacher is kept (default: $GSA_CACHE, else ~/.cache/gsa_ext)",
    "output": "directory for checkpoints, the model and the report",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("t2r", help="turn a Transformer into a GSA model: convert, finetune, compare, generate", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        own = f"; with --model: {OWN_MODEL[field.name]}" if field.name in OWN_MODEL else ""
        default = "" if field.default is None else f" (default: {field.default}{own})"
        parser.add_argument("--" + field.name.replace("_", "-"), dest=field.name, type=KINDS.get(field.name, str), help=HELP[field.name] + default)
    parser.add_argument("--config", metavar="FILE", help="a YAML file of these options, such as num_slots: 64; options given here count more")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, from its last checkpoint, to the result it would have had")
    parser.add_argument("--overwrite", action="store_true", help="delete what is in --output first")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 2 with a message on stderr when something given cannot be used."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gsa-ext t2r: error: needs {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    from gsa_ext.cli._t2r_data import BadInput, storage_failure

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main_thread else None
    try:
        settings = _settings(args)
        _run(settings, args.resume)
        return 0
    except BadInput as error:
        print(f"gsa-ext t2r: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        failure = storage_failure(error)
        if failure is None:
            raise
        print(f"\ngsa-ext t2r: error: {failure}. What was finished is kept; --resume goes on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngsa-ext t2r: interrupted. --resume goes on from the last checkpoint.", file=sys.stderr)
        return 130
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _settings(args: argparse.Namespace) -> Settings:
    """The settings of this run: defaults, what was given, and with --resume what the run was started with."""
    from gsa_ext.cli._t2r_data import BadInput

    given = _from_file(args.config) if args.config else {}
    given |= {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    defaults = Settings(**(OWN_MODEL if "model" in given else {}))
    settings = replace(defaults, **given)
    output = Path(settings.output)
    config = output / CONFIG
    if output.exists() and not output.is_dir():
        raise BadInput(f"--output {output}: is a file")
    if args.resume:
        if args.overwrite:
            raise BadInput("--resume and --overwrite exclude each other")
        try:
            before = Settings(**json.loads(config.read_text()))
        except FileNotFoundError:
            raise BadInput(f"--resume: no run in {output}") from None
        except (ValueError, TypeError):
            raise BadInput(f"--resume: {config} cannot be read; start again with --overwrite") from None
        for name, value in given.items():
            if name not in ("output", "device", "cache_dir") and value != getattr(before, name):
                raise BadInput(f"--resume: the run was started with {_flag(name)} {getattr(before, name)}, now given {value}")
        return replace(before, **{name: given[name] for name in ("output", "device", "cache_dir") if name in given})

    if (settings.model is None) != (settings.data is None):
        raise BadInput("--model and --data belong together: give both, or neither for the embedded default")
    stages = settings.stages.split(",")
    if any(stage not in STAGES for stage in stages) or len(set(stages)) < len(stages):
        raise BadInput(f"--stages: expected some of {', '.join(STAGES)}, each once, with commas between, given {settings.stages!r}")
    if "lora" in stages and importlib.util.find_spec("peft") is None:
        raise BadInput("--stages lora: needs peft: pip install peft")
    for name in ("transfer_steps", "steps", "teacher_steps", "batch_size", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise BadInput(f"{_flag(name)}: expected at least 1, given {getattr(settings, name)}")
    if settings.seq_len < 2:
        raise BadInput(f"--seq-len: expected at least 2, given {settings.seq_len}")
    if not 0 < settings.lr < math.inf:
        raise BadInput(f"--lr: expected a positive number, given {settings.lr}")
    if output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise BadInput(f"--output {output}: not empty; --resume goes on with the run there, --overwrite starts again, or give another directory")
    if args.overwrite and output.is_dir():
        if any(output.iterdir()) and not config.exists():
            raise BadInput(f"--overwrite: {output} holds something that is not a run of this command; not deleting it")
        shutil.rmtree(output)
    return settings


def _from_file(name: str) -> dict[str, Any]:
    """The options in a YAML file."""
    import yaml  # transformers needs it, too

    from gsa_ext.cli._t2r_data import BadInput, _first_line

    try:
        found = yaml.safe_load(Path(name).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"--config {name}: cannot be read: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise BadInput(f"--config {name}: expected options, one to a line, such as steps: 100")
    known = {field.name for field in fields(Settings)}
    given = {}
    for key, value in found.items():
        option = str(key).replace("-", "_")
        if option not in known:
            raise BadInput(f"--config {name}: there is no option {key}")
        try:
            given[option] = KINDS.get(option, str)(",".join(map(str, value)) if isinstance(value, list) else value)
        except (TypeError, ValueError):
            raise BadInput(f"--config {name}: {key}: expected {KINDS[option].__name__}, given {value!r}") from None
    return given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _run(settings: Settings, resume: bool) -> None:
    import torch
    import transformers

    import gsa_ext.hf
    from gsa_ext.cli import _t2r_data as data
    from gsa_ext.cli import _t2r_report as report
    from gsa_ext.hf.train import lora_config, new_parameters, train_only

    transformers.utils.logging.disable_progress_bar()                    # of loading and saving; training has its own
    transformers.logging.set_verbosity_error()
    started, seconds = time.perf_counter(), {}
    device = _device(settings.device)
    layers = _layers(settings.layers)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    if not (output / CONFIG).exists():
        _write(output / CONFIG, json.dumps(asdict(settings), indent=2) + "\n")

    # 1. the teacher and its text
    history: dict[str, list[dict[str, Any]]] = {"teacher": [], "transfer": [], "converted": []}
    if settings.model is None:
        print("Reading the Python sources of this machine ...", flush=True)
        train_tokens, held_tokens = data.python_sources()
        bytes_per_token = 1.0
        tokenizer = data.byte_tokenizer()
        train, held = data.Blocks(train_tokens, settings.seq_len), data.Blocks(held_tokens, settings.seq_len)
        what = "A small byte-level Llama, trained here on Python sources"
        teacher = _embedded_teacher(settings, train, held.first(EVAL_BLOCKS), tokenizer, device, output, resume)
        history["teacher"] = json.loads((teacher / "history.json").read_text())
    else:
        teacher = Path(settings.model)
        what = f"`{settings.model}`" if not teacher.exists() else "A model given by path"
        tokenizer = _pretrained("AutoTokenizer", settings.model)
        assert settings.data is not None
        wanted = (settings.steps * settings.batch_size + 2 * EVAL_BLOCKS) * settings.seq_len
        tokens, bytes_per_token = data.user_text(settings.data, settings.text_column, tokenizer, wanted)
        blocks = len(tokens) // settings.seq_len
        hold = min(EVAL_BLOCKS, blocks // 10)
        if hold < 1:
            raise data.BadInput(f"--data {settings.data}: {len(tokens)} tokens are too few; at least 10 * --seq-len = {10 * settings.seq_len} are needed")
        train, held = data.Blocks(tokens[:-hold * settings.seq_len], settings.seq_len), data.Blocks(tokens[-hold * settings.seq_len:], settings.seq_len)
    held = held.first(EVAL_BLOCKS)
    seconds["teacher"] = time.perf_counter() - started

    def load() -> Any:
        return _pretrained("AutoModelForCausalLM", str(teacher), dtype=torch.float32).to(device)

    def bits(model: Any, desc: str) -> float:
        return report.nats_per_token(model, held, settings.batch_size, desc) / math.log(2) / bytes_per_token

    # 2. what the teacher can do
    model = load()
    clock = time.perf_counter()
    prompt = settings.prompt or tokenizer.decode(held.tokens[len(held) // 2][:64].tolist())
    contexts = [settings.seq_len, 4 * settings.seq_len] + ([16 * settings.seq_len] if settings.model is None else [])
    measured = {"teacher": bits(model, "teacher, held-out")}
    samples = {"prompt": prompt, "teacher": report.sample(model, tokenizer, prompt, settings.max_new_tokens, settings.seed)}
    softmax_cost = report.decode_cost(model, contexts)
    seconds["measuring"] = time.perf_counter() - clock
    print(f"Teacher: {measured['teacher']:.3f} bits per byte on held-out text", flush=True)

    # 3. conversion
    transformers.set_seed(settings.seed)
    try:
        gsa_ext.hf.convert(model, settings.preset, layers, num_slots=settings.num_slots, gate=settings.gate, rope=settings.rope, window=settings.window)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise data.BadInput(str(error)) from error
    new = new_parameters(model)
    stages = settings.stages.split(",")
    if "transfer" in stages and not new:
        raise data.BadInput(f"--stages {settings.stages}: preset {settings.preset} adds no parameters that transfer could train; leave transfer out")
    _print_plan(model, settings, stages, new)
    measured["converted"] = bits(model, "converted, held-out")
    print(f"Converted ({settings.preset}): {measured['converted']:.3f} bits per byte before any training", flush=True)

    # 4. training, stage by stage
    clock = time.perf_counter()
    for stage in stages:
        if stage == "transfer":
            train_only(model, new)
            history["transfer"] = _train(
                model, train, held, tokenizer, settings, output / "transfer", settings.transfer_steps, settings.lr, device, resume, transfer=True)
            train_only(model)
            continue
        done = settings.steps if history["converted"] else 0
        if stage == "lora":
            from peft import get_peft_model

            adapted = get_peft_model(model, lora_config(model))
            log = _train(adapted, train, held, tokenizer, settings, output / "lora", settings.steps, settings.lr, device, resume)
            model = adapted.merge_and_unload()
            train_only(model)
        else:
            log = _train(model, train, held, tokenizer, settings, output / "finetune", settings.steps, settings.lr, device, resume)
        history["converted"] += [{**row, "step": row["step"] + done} for row in log]
    seconds["finetuning"] = time.perf_counter() - clock
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    measured["finetuned"] = bits(model, "finetuned, held-out")
    gap = measured["finetuned"] - measured["teacher"]
    print(f"Converted and finetuned: {measured['finetuned']:.3f} bits per byte; gap to the teacher {gap:+.3f}", flush=True)

    # 5. report
    clock = time.perf_counter()
    samples["finetuned"] = report.sample(model, tokenizer, prompt, settings.max_new_tokens, settings.seed)
    gsa_cost = report.decode_cost(model, contexts)
    seconds["measuring"] += time.perf_counter() - clock
    seconds["total"] = time.perf_counter() - started
    converted = model.config.gsa["layers"]
    report.write(output, {
        "model": {"what": what, "parameters": model.num_parameters(), "layers": model.config.num_hidden_layers, "converted_layers": len(converted),
                  "num_slots": next(iter(converted.values()))["num_slots"]},
        "bits_per_byte": measured, "bytes_per_token": bytes_per_token,
        "tokens": {"finetune": (settings.steps * sum(stage != "transfer" for stage in stages) + settings.transfer_steps * ("transfer" in stages))
                   * settings.batch_size * settings.seq_len,
                   "teacher": 0 if settings.model else settings.teacher_steps * settings.batch_size * settings.seq_len},
        "generation": report.generation_rows(softmax_cost, gsa_cost, [64 * settings.seq_len, 256 * settings.seq_len]),
        "sample": samples, "history": history, "seconds": seconds, "environment": report.environment(device),
        "settings": {name: value for name, value in asdict(settings).items() if name not in ("output", "cache_dir", "model", "data")},
    })
    print(f"\nAfter the prompt {prompt[-40:]!r} the finetuned model writes:\n{samples['finetuned']}\n")
    print(f"Report: {output / 'report.md'}   Model: {output / 'model'}   ({seconds['total']:.0f} s)")
    print(f"Go on:  gsa-ext generate {output / 'model'} --prompt 'def '")


def _device(name: str) -> Any:
    import torch

    from gsa_ext.cli._t2r_data import BadInput

    if name not in ("auto", "cpu", "cuda"):
        raise BadInput(f"--device: expected auto, cpu or cuda, given {name!r}; choose a GPU with CUDA_VISIBLE_DEVICES")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _layers(text: str) -> str | list[int]:
    from gsa_ext.cli._t2r_data import BadInput

    if text == "all":
        return text
    try:
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise BadInput(f"--layers: expected all, or indices such as 0,1,3, given {text!r}") from None


def _pretrained(auto: str, name: str, **kwargs: Any) -> Any:
    import transformers

    from gsa_ext.cli._t2r_data import BadInput, _first_line

    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise BadInput(f"--model {name}: no such directory")
    try:
        return getattr(transformers, auto).from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"--model {name}: cannot be loaded: {_first_line(error)}") from error


def _embedded_teacher(settings: Settings, train: Blocks, held: Blocks, tokenizer: Any, device: Any, output: Path, resume: bool) -> Path:
    """The directory of the small Llama, trained here unless the cache has it: its tokenizer and history.json are beside it."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    recipe = [config.to_json_string(use_diff=True), settings.teacher_steps, settings.batch_size, settings.seq_len, TEACHER_LR, settings.seed, device.type,
              torch.__version__, hashlib.sha256(train.tokens.tobytes()).hexdigest()]
    cache = Path(settings.cache_dir or os.environ.get("GSA_CACHE") or Path.home() / ".cache" / "gsa_ext")
    place = cache / f"teacher-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}"
    if (place / "history.json").exists():
        print("The teacher is in the cache.", flush=True)
        return place
    print(f"Training the teacher ({settings.teacher_steps} steps; once, then it is cached) ...", flush=True)
    transformers.set_seed(settings.seed)
    model = transformers.LlamaForCausalLM(config).to(device)
    history = _train(model, train, held, tokenizer, settings, output / "teacher", settings.teacher_steps, TEACHER_LR, device, resume)
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / f"{place.name}.{os.getpid()}"                         # appears under its name only when it is whole
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    (made / "history.json").write_text(json.dumps(history))
    try:
        made.rename(place)
    except OSError:                                                      # another run was faster
        shutil.rmtree(made)
    return place


def _print_plan(model: Any, settings: Settings, stages: list[str], new: dict[str, Any]) -> None:
    """What is going to be trained, and what it takes."""
    layers = model.config.gsa["layers"]
    one = next(iter(layers.values()))
    beside = "" if one["window"] is None else f", beside a window of {one['window']} tokens"
    total, fresh = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in new.values())
    print(f"Plan:\n  layers      {len(layers)} of {model.config.num_hidden_layers} become GSA: preset {settings.preset}, {one['num_slots']} slots, "
          f"gate {one['gate']}, rope {one['rope']}{beside}\n  parameters  {total:,}, {fresh:,} of them new")
    tokens = settings.batch_size * settings.seq_len
    for stage in stages:
        steps = settings.transfer_steps if stage == "transfer" else settings.steps
        trained = {"transfer": f"{fresh:,} parameters", "lora": f"adapters on q, k, v and {fresh:,} parameters", "full": f"{total:,} parameters"}[stage]
        print(f"  {stage:<11} {steps:,} steps of {tokens:,} tokens, training {trained}")
    trained_most = total if "full" in stages else fresh
    print(f"  memory      at least {(4 * total + 12 * trained_most) / 2 ** 20:,.0f} MiB (fp32 weights; gradients and two AdamW moments of what is trained) "
          "and the activations of a batch", flush=True)


class _Stop:
    """SIGINT and SIGTERM while training: the step is ended, and saved. A second one stops at once."""

    signal = 0

    def __enter__(self) -> _Stop:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print("\ngsa-ext t2r: saving a checkpoint, then stopping (once more: stop at once) ...", file=sys.stderr, flush=True)

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _train(
    model: Any, train: Blocks, held: Blocks, tokenizer: Any, settings: Settings, folder: Path, steps: int, lr: float, device: Any, resume: bool,
    transfer: bool = False,
) -> list[dict[str, Any]]:
    """Trains with the Trainer of transformers, in ``folder``; returns its log. With ``resume``, from the last whole checkpoint, to the same result.
    With ``transfer``, towards the softmax attention of each layer instead of the text."""
    import torch
    import transformers

    from gsa_ext.hf.train import transfer_loss

    stop = _Stop()

    class Trainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            if not transfer:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = transfer_loss(model, relative=True, **inputs)
            return (loss, {}) if return_outputs else loss

    class MarkComplete(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stop.signal:
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    class Bar(transformers.ProgressCallback):
        """The progress bar with the losses in it, instead of lines of numbers between."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            shown.update({name: f"{float(logs[key]):.3f}" for key, name in (("loss", "loss"), ("eval_loss", "held-out")) if key in (logs or {})})
            if self.training_bar is not None:
                rate = self.training_bar.format_dict["rate"]
                if rate:
                    shown["tokens/s"] = f"{rate * settings.batch_size * settings.seq_len:,.0f}"
                self.training_bar.set_postfix(shown)

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            """No second bar for the held-out text."""

    shown: dict[str, str] = {}

    every = max(1, steps // 30)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=settings.batch_size, per_device_eval_batch_size=settings.batch_size,
        learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), weight_decay=0.01, adam_beta2=0.95, max_grad_norm=1.0,
        logging_steps=every, logging_first_step=True, eval_strategy="steps", eval_steps=6 * every, save_steps=3 * every, save_total_limit=2,
        prediction_loss_only=True, disable_tqdm=False, label_names=["labels"],
        bf16=device.type == "cuda", use_cpu=device.type == "cpu", seed=settings.seed, report_to="none", remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda")
    if arguments.n_gpu > 1:                                              # several GPUs are for torchrun, not for threads
        arguments._n_gpu = 1
    trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held, processing_class=tokenizer,
                      data_collator=transformers.default_data_collator, callbacks=[MarkComplete()])
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.add_callback(Bar)
    with stop:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if resume else None)
    if stop.signal:
        raise KeyboardInterrupt
    model.config.use_cache = True                                        # the Trainer switches it off
    return trainer.state.log_history


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; deletes those that were not."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            whole.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path)
    return str(max(whole)[1]) if whole else None


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
