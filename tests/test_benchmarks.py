"""benchmarks/, each at toy size: it runs, says what it found, and writes it down. Peers are left out."""

import importlib
import json
import math
import sys

import pytest
import torch

pytest.importorskip("matplotlib")

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(name, *options, status=0):
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path), *options])
        assert importlib.import_module(f"benchmarks.{name}").main() == status
        rows = json.loads(max(tmp_path.glob("*.json")).read_text())["rows"]
        return rows, capsys.readouterr().out, list(tmp_path.glob("*.png"))

    yield run
    torch.backends.cuda.matmul.allow_tf32 = False


def test_table(device, run):
    rows, told, plots = run("__main__", "--device", device.type, "--shapes", "1,128,4,2,64,16", "--dtypes", "float32", "--tf32", "--no-peers", "--turn", "0")
    assert [row["what"] for row in rows] == ["forward", "forward+backward"] and plots and "floor" in told
    for row in rows:
        assert row["correct"] and row["ms"]["ours"] > 0 and set(row["errors"]["ours"]) >= {"o", "dq", "dk", "dv", "dg"}
    if device.type == "cuda":
        gradients = 128 * (4 * 64 + 2 * 2 * 64 + 2 * 16) * 4 / 2**20
        assert rows[0]["peak_MiB"] == rows[0]["peak_MiB_beyond_gradients"]
        assert math.isclose(rows[1]["peak_MiB"]["ours"] - rows[1]["peak_MiB_beyond_gradients"]["ours"], gradients)
