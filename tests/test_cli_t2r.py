"""The main job, at toy size: convert, finetune, kill, resume, report, generate."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gsa_ext.cli import main
from gsa_ext.cli._t2r_data import BadInput, Blocks, byte_tokenizer, python_sources, user_text

SMALL = ["--seq-len", "32", "--batch-size", "4", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model and text of the user's: a directory with model/ and data.jsonl."""
    place = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, bos_token_id=None, eos_token_id=None))
    model.save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    with open(place / "data.jsonl", "w") as f:
        for i in range(300):
            f.write(json.dumps({"body": f"line {i} of {i % 7} small naïve texts\n" * 3, "number": str(i)}) + "\n")
    return place


def arguments(own, output, *more):
    return ["t2r", "--model", str(own / "model"), "--data", str(own / "data.jsonl"), "--text-column", "body", "--output", str(output), "--steps", "24",
            "--lr", "1e-2", "--num-slots", "8", *SMALL, *more]


@pytest.fixture(scope="module")
def finished(own, tmp_path_factory):
    """A run on the user's model, from start to end on the CPU."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(own, output, "--device", "cpu")) == 0
    return output


def test_report(own, finished):
    report = json.loads((finished / "report.json").read_text())
    bits = report["bits_per_byte"]
    assert 7 < bits["teacher"] < 9 and bits["finetuned"] < bits["converted"] - 0.5 and 0.9 < report["bytes_per_token"] <= 1
    rows = report["generation"]
    assert len({row["gsa_bytes"] for row in rows}) == 1
    assert [row["softmax_bytes"] for row in rows] == [2 * 2 * 2 * 8 * 4 * row["context"] for row in rows]      # layers, k and v, heads, dim, bytes
    assert all(row["gsa_ms"] > 0 for row in rows[:2])
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = (finished / "report.md").read_text()
    assert f"{bits['finetuned']:.3f}" in text and "loss.png" in text
    assert str(own) not in text + json.dumps(report) and str(finished.parent) not in text + json.dumps(report)
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert type(model).__name__ == "GsaLlamaForCausalLM" and model.config.use_cache and len(model.config.gsa["layers"]) == 2


def test_killed_and_resumed(own, finished, tmp_path, capsys):
    """kill -9 in the middle of training; --resume ends with the very same weights and log."""
    output = tmp_path / "killed"
    code = "import sys; from gsa_ext.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments(own, output, "--device", "cpu")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not list(output.glob("finetune/checkpoint-*/complete")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    torn = output / "finetune" / "checkpoint-999"                        # one that was being written
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"\x00" * 99)

    assert main(["t2r", "--output", str(output), "--steps", "25", "--resume"]) == 2 and "--steps 24" in capsys.readouterr().err
    assert main(["t2r", "--output", str(output), "--resume"]) == 0
    assert not torn.exists()
    assert (output / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()
    ours, want = (json.loads((place / "report.json").read_text()) for place in (output, finished))
    assert ours["bits_per_byte"] == want["bits_per_byte"] and ours["sample"] == want["sample"]
    ours, want = ([(row["step"], row[key]) for row in run["history"]["converted"] for key in ("loss", "eval_loss") if key in row] for run in (ours, want))
    assert ours == want


def test_stages(own, device, tmp_path, monkeypatch, capsys):
    """transfer, lora, full from a YAML file; SIGTERM in the second one, then --resume to what would have come out."""
    pytest.importorskip("peft")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {own}/model\ndata: {own}/data.jsonl\ntext_column: body\nstages: [transfer, lora, full]\ntransfer-steps: 4\nsteps: 5\n"
                      f"num_slots: 8\nwindow: 4\nseq_len: 32\nbatch_size: 4\nmax_new_tokens: 8\nlr: 5e-3\ndevice: {device.type}\n")
    assert main(["t2r", "--config", str(config), "--output", str(tmp_path / "whole")]) == 0
    plan = capsys.readouterr().out
    assert "2 of 2 become GSA" in plan and "transfer    4 steps of 128 tokens" in plan and "beside a window of 4 tokens" in plan
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert [row["step"] for row in whole["history"]["converted"] if "loss" in row] == list(range(1, 11))
    transfer = [row["loss"] for row in whole["history"]["transfer"] if "loss" in row]
    assert len(transfer) == 4 and transfer[-1] < transfer[0]

    served = []
    real = Blocks.__getitem__

    def read(self, i):
        served.append(i)
        if (tmp_path / "cut" / "lora").is_dir() and "sent" not in served and list((tmp_path / "cut" / "lora").glob("checkpoint-*/complete")):
            served.append("sent")
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, i)

    monkeypatch.setattr(Blocks, "__getitem__", read)
    assert main(["t2r", "--config", str(config), "--output", str(tmp_path / "cut")]) == 130
    assert "saving a checkpoint" in capsys.readouterr().err and "sent" in served and not (tmp_path / "cut" / "finetune").exists()
    assert list((tmp_path / "cut" / "lora").glob("checkpoint-*/complete")) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main(["t2r", "--output", str(tmp_path / "cut"), "--resume"]) == 0
    cut = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert cut["bits_per_byte"] == (whole["bits_per_byte"] if device.type == "cpu" else pytest.approx(whole["bits_per_byte"], rel=1e-2))
    files = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("cut", "whole")]
    assert device.type == "cuda" or files[0] == files[1]

    for text, message in (("stages: [warmup]", "--stages"), ("step: 3", "no option step"), ("steps: many", "expected int"), ("steps", "expected options"),
                          ("steps: [", "cannot be read")):
        config.write_text(text)
        assert main(["t2r", "--config", str(config), "--output", str(tmp_path / "new")]) == 2 and message in capsys.readouterr().err
    assert main(["t2r", "--config", str(tmp_path / "none.yaml")]) == 2


@pytest.mark.parametrize("room", [50_000, 250_000], ids=["weights", "optimizer"])
def test_full_disk(own, finished, tmp_path, capsys, room):
    """No room for the weights, or for the optimizer's state after them: a sentence, and a run that goes on when there is room again."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        status = main(arguments(own, tmp_path / "run", "--device", "cpu"))
        unsaved = main(["convert", str(own / "model"), str(tmp_path / "converted")]) if room == 50_000 else 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    errors = capsys.readouterr().err
    assert status == unsaved == 1 and "--resume goes on" in errors and "Traceback" not in errors
    assert not list((tmp_path / "run").glob("finetune/checkpoint-*/complete"))
    assert main(["t2r", "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()


def test_convert_and_eval(own, device, tmp_path, capsys):
    model, output = str(own / "model"), str(tmp_path / "converted")
    assert main(["convert", model, output, "--preset", "liger", "--layers", "1", "--num-slots", "8", "--window", "8", "--mix", "learned"]) == 0
    assert "1 of 2 layers converted (liger), 4 new parameters" in capsys.readouterr().out
    saved = AutoModelForCausalLM.from_pretrained(output).config.gsa["layers"]
    assert saved.keys() == {"1"} and saved["1"]["window"] == 8 and saved["1"]["mix"] == "learned"

    numbers = tmp_path / "numbers.json"
    text = ["--data", str(own / "data.jsonl"), "--text-column", "body", "--seq-len", "100", "--examples", "6", "--device", device.type]
    assert main(["eval", output, "--against", model, *text, "--json", str(numbers)]) == 0
    shown, found = capsys.readouterr().out, json.loads(numbers.read_text())
    ours, original = found["models"][output], found["models"][model]
    assert "bits per byte" in shown and "the same 64 tokens later" in shown
    assert list(ours["perplexity"]) == ["0-15", "16-63", "64-98"] and list(ours["copy"]) == ["16", "64"]
    blocks = Blocks(user_text(str(own / "data.jsonl"), "body", byte_tokenizer(), 4 * 6 * 100)[0], 100).first(6)
    ids = torch.stack([blocks[i]["input_ids"] for i in range(6)])
    with torch.no_grad():
        loss = LlamaForCausalLM.from_pretrained(model)(ids, labels=ids).loss.item()
    assert abs(original["bits_per_byte"] * found["bytes_per_token"] - loss / 0.6931472) < 1e-3 and ours["bits_per_byte"] != original["bits_per_byte"]

    for given, message in ((["convert", model, output], "is there already"), (["convert", str(tmp_path / "none"), str(tmp_path / "x")], "no such directory"),
                           (["convert", model, str(tmp_path / "x"), "--mix", "half"], "--mix"),
                           (["convert", model, str(tmp_path / "x"), "--window", "0"], "window"),
                           (["convert", output, str(tmp_path / "x")], "GSA layer already"), (["eval", model, *text, "--seq-len", "9"], "--seq-len"),
                           (["eval", model, "--data", str(tmp_path / "none.txt")], "no such file"), (["eval", str(tmp_path), *text], "cannot be loaded")):
        assert main(given) == 2 and message in capsys.readouterr().err, given


def test_embedded_default(tmp_path, device, capsys):
    """No model, no data: the teacher is trained once, the second run finds it."""
    options = ["--cache-dir", str(tmp_path / "cache"), "--steps", "6", "--teacher-steps", "6", "--device", device.type, *SMALL]
    assert main(["t2r", "--output", str(tmp_path / "a"), *options]) == 0
    assert main(["t2r", "--output", str(tmp_path / "b"), *options]) == 0
    assert "in the cache" in capsys.readouterr().out
    one, two = (json.loads((tmp_path / x / "report.json").read_text()) for x in "ab")
    assert one["history"]["teacher"] == two["history"]["teacher"] and one["bits_per_byte"]["teacher"] == two["bits_per_byte"]["teacher"]
    assert len(list((tmp_path / "cache").iterdir())) == 1

    assert main(["generate", str(tmp_path / "a" / "model"), "--prompt", "def f(x):", "--max-new-tokens", "9", "--seed", "1", "--device", device.type]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("def f(x):") and "9 tokens" in first.err
    main(["generate", str(tmp_path / "a" / "model"), "--prompt", "def f(x):", "--max-new-tokens", "9", "--seed", "1", "--device", device.type])
    assert capsys.readouterr().out == first.out


def test_bad_arguments(own, finished, tmp_path, capsys):
    new = str(tmp_path / "new")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("ten years")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "broken.jsonl").write_text("{]")
    model, data = str(own / "model"), str(own / "data.jsonl")
    for given, message in (
        (["--model", model, "--output", new], "belong together"), (["--steps", "0", "--output", new], "--steps"), (["--lr", "-1", "--output", new], "--lr"),
        (["--seq-len", "1", "--output", new], "--seq-len"), (["--device", "tpu", "--output", new], "--device"),
        (["--device", "cuda:1", "--output", new], "CUDA_VISIBLE_DEVICES"),
        (["--output", str(finished)], "--resume"), (["--output", new, "--resume"], "no run"), (["--output", data], "is a file"),
        (["--output", str(tmp_path / "other"), "--overwrite"], "not deleting"), (["--layers", "one", "--output", new], "--layers"),
        (["--model", str(tmp_path / "none"), "--data", data, "--output", new], "no such directory"),
        (["--model", str(tmp_path / "other"), "--data", data, "--output", new], "cannot be loaded"),
        (["--model", model, "--data", str(tmp_path / "none.txt"), "--output", new], "no such file"),
        (["--model", model, "--data", str(tmp_path / "other" / "thesis.tex"), "--output", new], "unknown kind"),
        (["--model", model, "--data", str(tmp_path / "other"), "--output", new], "expected a directory with files"),
        (["--model", model, "--data", str(tmp_path / "empty.txt"), "--output", new], "no text"),
        (["--model", model, "--data", str(tmp_path / "short.txt"), "--output", new], "too few"),
        (["--model", model, "--data", str(tmp_path / "broken.jsonl"), "--output", new], "cannot be read"),
        (["--model", model, "--data", data, "--output", new], "which column"),
        (["--model", model, "--data", data, "--text-column", "title", "--output", new], "title"),
        (["--model", model, "--data", data, "--text-column", "body", "--preset", "rwkv", "--output", new, *SMALL], "preset"),
        (["--model", model, "--data", data, "--text-column", "body", "--layers", "7", "--output", new, *SMALL], "layers"),
        (["--model", model, "--data", data, "--text-column", "body", "--preset", "liger", "--stages", "transfer,full", "--output", new, *SMALL], "--stages"),
    ):
        status = main(["t2r", *given, *([] if "--steps" in given else ["--steps", "2"])])
        captured = capsys.readouterr()
        assert status == 2 and message in captured.err.splitlines()[-1] and "Traceback" not in captured.err, (given, captured.err)
        if os.path.isdir(new):
            import shutil
            shutil.rmtree(new)
    for given, message in ((["none"], "no such directory"), ([str(finished / "model"), "--max-new-tokens", "0"], "--max-new-tokens"),
                           ([str(finished)], "cannot be loaded"), ([str(finished / "model"), "--temperature", "-1"], "--temperature")):
        assert main(["generate", *given, "--prompt", "x"]) == 2
        assert message in capsys.readouterr().err
    assert main(["generate", str(finished / "model"), "--prompt", ""]) == 2


def test_tokenizer_is_bytes(tmp_path):
    from transformers import AutoTokenizer
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def f(x):\n\treturn  x\r\n", "naïve ☃ 𝔊", " leading", "", "".join(map(chr, range(300)))):
        assert tokenizer(text)["input_ids"] == list(text.encode()) and tokenizer.decode(list(text.encode())) == text


def test_data(own, tmp_path):
    train, held = python_sources()
    assert len(train) > 20 * len(held) > 1e6 and train.dtype == "uint8"
    again, _ = python_sources()
    assert (train == again).all()
    blocks = Blocks(held, 100)
    assert len(blocks) == len(held) // 100 and len(blocks.first(7)) == 7 and blocks[3]["labels"].tolist() == held[300:400].tolist()
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    tokens, bytes_per_token = user_text(str(tmp_path / "a.txt"), None, byte_tokenizer(), 100)
    assert bytes(tokens.tolist()) == b"one\n\ntwo" and bytes_per_token == 1
    (tmp_path / "b.md").write_text("three")
    assert len(user_text(str(tmp_path), None, byte_tokenizer(), 100)[0]) == 13
    import datasets
    datasets.Dataset.from_dict({"text": ["four", "", "five"], "other": ["x", "y", "z"]}).to_parquet(tmp_path / "c.parquet")
    assert len(user_text(str(tmp_path / "c.parquet"), None, byte_tokenizer(), 100)[0]) == 8
    with pytest.raises(BadInput, match="one kind"):
        user_text(str(tmp_path), None, byte_tokenizer(), 100)
