"""The CPU's threads: where sequences and heads are fewer, one sequence is cut along time. Truth, bits and limits are those of a sequence in one piece."""

import pytest
import torch

from gsa_ext import chunk_gsa, fused_recurrent_gsa, testing
from gsa_ext.testing import check, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ONE = {"HQ": 1, "K": 64, "V": 48, "M": 32, "gate": 300.0}  # one sequence, one head; gates that let a state live through many tokens


@pytest.fixture(params=[2, 5])
def threads(request):
    """More threads than heads and sequences, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def differ(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_one_head_is_cut(threads):
    """Otherwise the other tests here would see nothing: the sums are taken in another order than in one piece."""
    x = make_inputs(T=1200, **ONE, initial_state=True)
    cut = testing.results(chunk_gsa, x)
    torch.set_num_threads(1)
    assert {"o", "hk", "hv", "dq", "dk", "dv", "dg", "dhk0", "dhv0"} <= differ(cut, testing.results(chunk_gsa, x))


@pytest.mark.parametrize("mode", ["coupled", "given", "abc"])
@pytest.mark.parametrize("dtype", TYPES)
def test_modes(dtype, mode, threads):
    """Grouped heads, initial and final states with gradients, a ragged end."""
    check(chunk_gsa, make_inputs(T=803, HQ=2, H=1, K=40, V=72, M=20, mode=mode, gate=300.0, dtype=TYPES[dtype], initial_state=True))


@pytest.mark.parametrize("T", [128, 129, 192, 193, 500, 769, 2000])
def test_lengths(T, threads):
    for dtype in (torch.float64, torch.bfloat16):
        check(chunk_gsa, make_inputs(T=T, **ONE, mode="given", dtype=dtype))


@pytest.mark.parametrize("gate", ["zero", 8.0, 0.1, "mixed", "-40", "-inf"])
def test_gates(gate, threads):
    for dtype in (torch.float64, torch.bfloat16):
        check(chunk_gsa, make_inputs(T=700, **{**ONE, "gate": gate}, dtype=dtype, initial_state=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True, "broadcast"])
@pytest.mark.parametrize("lengths", [[0, 700, 0, 3, 40], [17, 800, 0, 600]], ids=["one long", "two long"])
def test_packed(lengths, state, reverse, threads):
    """Long sequences are cut, their short and empty neighbours are not; the backward of the recurrent form is cut too."""
    x = make_inputs(lengths=lengths, HQ=2, H=1, K=64, V=64, M=48, mode="given", gate=300.0, dtype=torch.float64, initial_state=state)
    check(fused_recurrent_gsa, {**x, "reverse": True}) if reverse else check(chunk_gsa, x)


def test_wide(threads):
    """A segment of the backward pass is two tiles here."""
    for dtype in (torch.float64, torch.bfloat16):
        check(chunk_gsa, make_inputs(T=300, HQ=1, K=256, V=300, M=128, mode="given", gate=300.0, dtype=dtype, initial_state=True))


@pytest.mark.parametrize("op", [chunk_gsa, fused_recurrent_gsa], ids=["chunk", "recurrent"])
def test_repeatable_bit_for_bit(op, threads):
    """Whoever takes which piece."""
    for options in ({"T": 1500}, {"lengths": [900, 20, 0, 800]}):
        x = make_inputs(**options, **ONE, dtype=torch.bfloat16, initial_state=True)
        want = testing.results(op, x)
        assert not any(differ(want, testing.results(op, x)) for _ in range(3))


def test_untouched_slots_keep_every_bit(threads):
    x = make_inputs(T=1200, **ONE, mode="given", initial_state=True)
    x["g"][..., ::2] = 0
    x["s"][..., ::2] = 0
    _, (hk, hv) = chunk_gsa(**x, output_final_state=True)
    assert torch.equal(hk[..., ::2], x["initial_state"][0][..., ::2]) and torch.equal(hv[:, :, ::2], x["initial_state"][1][:, :, ::2])


@pytest.mark.parametrize("name", ["q", "k", "v", "s", "g"])
def test_nan_reaches_nothing_before_it(name, threads):
    """And nothing of a neighbour that is cut as well."""
    x = make_inputs(lengths=[1000, 1000], **ONE, mode="given", dtype=torch.bfloat16, initial_state=True)
    clean = testing.results(chunk_gsa, x)
    bad = x[name].clone()
    bad[0, 600, 0, 3] = torch.nan
    got = testing.results(chunk_gsa, {**x, name: bad})
    assert torch.equal(got["o"][:, : 600 - 128], clean["o"][:, : 600 - 128]) and got["o"][:, 600].isnan().any()
    for key in clean:
        a, b = ((t[1:] if t.shape[0] == 2 else t[:, 1000:]) for t in (clean[key], got[key]))
        assert torch.equal(a, b), key
