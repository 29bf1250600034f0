"""benchmarks/, each at toy size: it runs, says what it found, and writes it down. Peers are left out."""

import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")

from gsa_ext import chunk_gsa, testing


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


@pytest.mark.parametrize("options", [(), ("--states",)])
def test_accuracy(options, device, run):
    rows, told, _ = run("accuracy", "--device", device.type, "--shapes", "1,4096,4,2,64,16", "2,4096,4,2,64,16", "--taus", "8", "0.1", "--tokens", "96",
                        "--no-peers", *options)
    assert [(row["B"], row["T"], row["tau"]) for row in rows] == [(1, 96, 8.0), (1, 96, 0.1)] and "2 of 2 rows, 0 results over" in told
    for row in rows:
        assert max(row["worst"].values()) < 7e-3 and ("dhk0" in row["worst"]) == ("hv" in row["worst"]) == bool(options)


def test_accuracy_says_what_is_over(run, monkeypatch):
    from benchmarks import accuracy

    monkeypatch.setattr(accuracy, "HALF", 1e-9)
    rows, told, _ = run("accuracy", "--device", "cpu", "--shapes", "1,64,2,2,16,8", "--taus", "0.1", status=1)
    assert rows[0]["over"] == ["dg (ours)"] and "OVER: dg (ours)" in told


def test_heads_repeated_for_the_peer(monkeypatch):
    """Repeated heads give the same results as groups, states and sums of gradients included."""
    from benchmarks import accuracy

    monkeypatch.setattr(accuracy, "fla", lambda: SimpleNamespace(chunk_gsa=chunk_gsa))
    x = testing.make_inputs(2, 40, 6, 2, 16, 16, 8, mode="given", dtype=torch.float32, initial_state=True)
    want, got = testing.results(chunk_gsa, x), testing.results(accuracy.repeated, x)
    assert set(want) == set(got)
    for name in want:
        assert testing.error(got[name], want[name]) < 1e-5, name


def test_lengths(run):
    rows, told, plots = run("lengths", "--device", "cpu", "--heads", "4,2", "2,2", "--dims", "16,8", "--lengths", "32", "64", "1024", "--turn", "0",
                            "--limit", "1e-3")
    assert [(row["T"], row["HQ"]) for row in rows] == [(T, HQ) for HQ in (4, 2) for T in (32, 64, 1024)] and plots
    for row in rows:
        assert set(row["ms"]) == ({"ours", "SDPA", "floor"} if row["T"] < 1024 else {"floor"}) and len(row["notes"]) == (0 if row["T"] < 1024 else 2)
    assert "ours not run" in told


def test_edges(run):
    rows, told, _ = run("edges", "--device", "cpu")
    assert [row["what"] for row in rows] == ["first call", "short", "short", "short", "packed", "packed", "slices"] and "both_quartiles" in told
    for row in rows[4:]:
        for name in ("forward", "both"):
            low, high = row[f"{name}_quartiles"]
            assert low <= row[f"{name}_ratio"] <= high
