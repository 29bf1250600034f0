"""examples/, each run on a tiny model; the comparison of arms in benchmarks/evidence.py."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gsa_ext.hf.train import gsa_layers

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = ["--seq-len", "32", "--batch-size", "4", "--lr", "3e-3"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny Llama that reads bytes, and a text."""
    from gsa_ext.cli._t2r_data import byte_tokenizer

    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 bos_token_id=None, eos_token_id=None)).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the slots of a head keep what was read, and forget it by and by. " * 40)
    return [str(folder / "model"), str(folder / "text.txt")]


def check(folder, inputs):
    """The saved model is a converted one, and knows the text better than the model it came from."""
    ids = torch.tensor([list(Path(inputs[1]).read_bytes()[:128])])
    model, original = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder, inputs[0]))
    assert len(gsa_layers(model)) == 2
    with torch.no_grad():
        before, after = (m(ids, labels=ids).loss.item() for m in (original, model))
    assert after < before - 0.05, (before, after)


@pytest.mark.parametrize("name", ["loop", "trainer", "lora"])
def test_example(name, inputs, device, tmp_path, monkeypatch, capsys):
    if name == "lora":
        pytest.importorskip("peft")
    if name == "trainer":
        pytest.importorskip("accelerate")
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    output = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", [name, *inputs, output, "--steps", "16", *SIZES])
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    check(output, inputs)
    assert re.search(r"loss|held-out", capsys.readouterr().out)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_fsdp(backend, inputs, tmp_path):
    """Two processes by torchrun, on CPUs or on two GPUs."""
    if not torch.distributed.is_available() or not getattr(torch.distributed, f"is_{backend}_available")():
        pytest.skip(f"no {backend}")
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    output = str(tmp_path / "out")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path])}
    if backend == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / "fsdp.py"),
                          *inputs, output, "--steps", "12", *SIZES], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert len(losses) == 12 and losses[-1] < losses[0]
    check(output, inputs)


def test_evidence(device, tmp_path, monkeypatch, capsys):
    """The comparison of arms, at toy size: stopped and gone on with, each run once, and told."""
    from benchmarks import evidence
    from gsa_ext.cli import _t2r_data

    train, held = _t2r_data.python_sources()
    monkeypatch.setattr(_t2r_data, "python_sources", lambda: (train[:60_000], held[:3_000]))
    def call(*options):
        monkeypatch.setattr(sys, "argv", ["evidence", str(tmp_path), *options])
        assert evidence.main() == 0
        return capsys.readouterr().out

    tiny = ["--tiny", "--device", device.type, "--teacher-tokens", "2600", "--tokens", "3100", "--seeds", "2", "--arms", "t2r", "t2r, transfer first"]
    assert "call again" in call(*tiny, "--seconds", "0")                 # the teacher is begun
    assert (tmp_path / "teacher" / "partial.pt").exists()
    while "call again" in call(*tiny, "--seconds", "1"):
        pass
    runs = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    for arm in ("t2r", "t2r-transfer-first"):                            # the best learning rate has a worse one on either side, and a second seed
        swept = [lr for lr in evidence.LADDER if f"{arm}-lr{lr:g}-seed0.json" in runs]
        at = [lr for lr in swept if f"{arm}-lr{lr:g}-seed1.json" in runs]
        assert len(swept) >= 3 and len(at) == 1 and (at[0] not in (swept[0], swept[-1]) or at[0] in (evidence.LADDER[0], evidence.LADDER[-1]))
    assert "all runs are there" in call(*tiny) and runs == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    next((tmp_path / "runs").glob("t2r-lr*-seed1.json")).unlink()
    again = call(*tiny, "--workers", "2")                                # in processes of their own, which read the whole corpus
    assert "all runs are there" in again and len(list((tmp_path / "runs").glob("*.json"))) == len(runs)
    told = call("--report")
    assert "t2r, transfer first" in told and "±" in told and (tmp_path / "evidence.png").stat().st_size > 1000
