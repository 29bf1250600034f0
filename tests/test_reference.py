"""The references themselves: the loop against its definition, the vectorised form against the loop."""

import itertools

import pytest
import torch

from gsa_ext import testing
from gsa_ext.reference import naive_gsa


def small(**options):
    return testing.make_inputs(**{"B": 1, "T": 5, "HQ": 2, "H": 1, "K": 3, "V": 4, "M": 3, "dtype": torch.float64, **options})


@pytest.mark.parametrize("mode", ["coupled", "given", "abc"])
def test_gradcheck(mode):
    x = small(mode=mode, gate=1.0, initial_state=True)
    names = [name for name in ("q", "k", "v", "s", "g") if x[name] is not None]
    leaves = [t.requires_grad_() for t in (*(x[name] for name in names), *x["initial_state"])]

    def op(*leaves):
        o, final = naive_gsa(**{**x, **dict(zip(names, leaves)), "initial_state": leaves[len(names) :], "output_final_state": True})
        return o, *final

    assert torch.autograd.gradcheck(op, leaves)


def test_by_hand():
    """Two slots, two tokens, K = V = 1, worked out with a pencil."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]))
    a = torch.tensor([[0.5, 1.0], [0.25, 0.5]], dtype=torch.float64).view(1, 2, 1, 2)
    o, (hk, hv) = naive_gsa(q, k, v, None, a.log(), 1.0, output_final_state=True)
    hk1, hv1 = torch.tensor([1.5, 0.0]), torch.tensor([2.5, 0.0])  # s = 1 - a = (0.5, 0)
    hk2, hv2 = torch.tensor([1.5 * 0.25 + 3.0, 2.0]), torch.tensor([2.5 * 0.25 + 4.5, 3.0])  # s = (0.75, 0.5)
    want = torch.stack([(1 * hk1).softmax(-1) @ hv1, (2 * hk2).softmax(-1) @ hv2]).double()
    assert torch.allclose(o.flatten(), want) and torch.allclose(hk.flatten(), hk2.double()) and torch.allclose(hv.flatten(), hv2.double())


def test_abc_is_a_softmax_over_time():
    """z_t = logcumsumexp(e): each slot holds the average of the keys so far under softmax(e) over time."""
    x = small(mode="abc", T=6, HQ=1)
    _, (hk, _, z) = naive_gsa(**x, output_final_state=True)
    e, k = x["s"][0, :, 0], x["k"][0, :, 0]
    assert torch.allclose(hk[0, 0], k.T @ e.softmax(0)) and torch.allclose(z[0, 0], e.logsumexp(0))


def test_grouped_heads_are_repeated_heads():
    x = small(T=7, HQ=6, H=2, B=2)
    wide = {name: t.repeat_interleave(3, 2) if name in "kvsg" and t is not None else t for name, t in x.items()}
    assert torch.allclose(naive_gsa(**x)[0], naive_gsa(**wide)[0])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "options", [{"B": 2, "T": 37}, {"lengths": [0, 5, 33, 0, 17]}, {"B": 3, "T": 18, "initial_state": "broadcast"}, {"T": 0, "initial_state": True}], ids=str
)
@pytest.mark.parametrize("mode,gate", [*itertools.product(["coupled", "given"], [8.0, 0.1, "mixed", "-40", "-inf", "zero"]), ("abc", 8.0)])
def test_vectorised(mode, gate, options, reverse):
    x = {**small(HQ=4, H=2, K=6, V=5, M=7, mode=mode, gate=gate, **options), "reverse": reverse}
    want, got = (testing.results(op, x, double=True) for op in (naive_gsa, testing.vectorised_gsa))
    assert set(want) == set(got)
    for name in want:
        assert testing.error(got[name], want[name]) < 1e-11, name


def test_comparison_can_fail():
    """What every other test stands on: a wrong result is seen, and so are a wrong gradient and a NaN."""

    def wrong(**x):
        o, final = naive_gsa(**x)
        return o * (1 + 1e-6), final

    def wrong_gradient(**x):
        return naive_gsa(**{**x, "v": x["v"] + 1e-6 * (x["v"] - x["v"].detach())})

    def nan(**x):
        o, final = naive_gsa(**x)
        return o.masked_fill(o == o.max(), torch.nan), final

    x = small(T=20)
    testing.check(naive_gsa, x)
    for op, name in ((wrong, "o"), (wrong_gradient, "dv"), (nan, "o")):
        with pytest.raises(AssertionError, match=rf"\b{name}  error .* OFF BY"):
            testing.check(op, x)
