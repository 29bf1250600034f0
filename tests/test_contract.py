"""What the ops promise beyond numbers: bad input, NaN, empty and extreme input, bits that do not change, memory that is not shared."""

import functools

import pytest
import torch

import gsa_ext
from gsa_ext import chunk_gsa, fused_recurrent_gsa, gsa_step, testing
from gsa_ext.testing import make_inputs, stepwise

pytestmark = pytest.mark.usefixtures("poisoned")

both = pytest.mark.parametrize("op", [chunk_gsa, fused_recurrent_gsa], ids=["chunk", "recurrent"])
modes = pytest.mark.parametrize("mode", ["coupled", "given", "abc"])


@pytest.fixture
def checking():
    gsa_ext.set_checks(True)
    yield
    gsa_ext.set_checks(False)


# ------------------------------------------------------------------------------------------------------------ bad input


def cast(name, dtype):
    return lambda x: {**x, name: x[name].to(dtype)}


def resized(name, *shape):
    return lambda x: {**x, name: x[name].new_zeros(shape)}


def lengths(*values, dtype=torch.int32):
    def change(x):
        one = {name: t[:1] if isinstance(t, torch.Tensor) else t for name, t in x.items()}
        return {**one, "cu_seqlens": torch.tensor(values, dtype=dtype, device=x["q"].device)}

    return change


def states(*shapes, dtype=torch.float32):
    return lambda x: {**x, "initial_state": tuple(torch.zeros(shape, dtype=dtype, device=x["q"].device) for shape in shapes)}


# B 2, T 6, HQ 4, H 2, K 8, V 12, M 5
BAD = {
    "rank of q": (resized("q", 2, 6, 8), ValueError, r"\bq\b.*\[B, T, HQ, K\].*\[2, 6, 8\]"),
    "rank of k": (resized("k", 2, 6, 2, 8, 1), ValueError, r"\bk\b.*\[B, T, H, K\].*\[2, 6, 2, 8, 1\]"),
    "rank of v": (resized("v", 6, 12), ValueError, r"\bv\b.*\[B, T, H, V\].*\[6, 12\]"),
    "rank of g": (resized("g", 2, 6, 2), ValueError, r"\bg\b.*\[B, T, H, M\].*\[2, 6, 2\]"),
    "rank of s": (resized("s", 2, 6, 2), ValueError, r"\bs\b.*\[B, T, H, M\].*\[2, 6, 2\]"),
    "k's batch": (resized("k", 3, 6, 2, 8), ValueError, r"\bk\b.*\[B, T, H, K\].*\[3, 6, 2, 8\]"),
    "k's length": (resized("k", 2, 7, 2, 8), ValueError, r"\bk\b.*\[B, T, H, K\].*\[2, 7, 2, 8\]"),
    "k's dimension": (resized("k", 2, 6, 2, 9), ValueError, r"\bk\b.*\[B, T, H, K\].*\[2, 6, 2, 9\]"),
    "v's length": (resized("v", 2, 5, 2, 12), ValueError, r"\bv\b.*\[B, T, H, V\].*\[2, 5, 2, 12\]"),
    "v's heads": (resized("v", 2, 6, 1, 12), ValueError, r"\bv\b.*\[B, T, H, V\].*\[2, 6, 1, 12\]"),
    "g's heads": (resized("g", 2, 6, 4, 5), ValueError, r"\bg\b.*\[B, T, H, M\].*\[2, 6, 4, 5\]"),
    "s's slots": (resized("s", 2, 6, 2, 6), ValueError, r"\b[sg]\b.*\[B, T, H, M\]"),
    "query heads": (resized("q", 2, 6, 3, 8), ValueError, r"\bq\b.*3 heads.*2.*multiple"),
    "no head dimension": (lambda x: resized("q", 2, 6, 4, 0)(resized("k", 2, 6, 2, 0)(x)), ValueError, r"\bk\b.*K.*at least 1"),
    "no value dimension": (resized("v", 2, 6, 2, 0), ValueError, r"\bv\b.*V.*at least 1"),
    "no slots": (lambda x: resized("g", 2, 6, 2, 0)(resized("s", 2, 6, 2, 0)(x)), ValueError, r"\bg\b.*M.*at least 1"),
    "integer q": (cast("q", torch.int32), TypeError, r"\bq\b.*float32.*[Ii]nt"),
    "complex q": (cast("q", torch.complex64), TypeError, r"\bq\b.*float32.*[Cc]omplex"),
    "8-bit q": (cast("q", torch.float8_e4m3fn), TypeError, r"\bq\b.*float32.*(?i:float8)"),
    "mixed k": (cast("k", torch.bfloat16), TypeError, r"\bk\b.*(?i:float.*bfloat16)"),
    "mixed v": (cast("v", torch.float16), TypeError, r"\bv\b.*(?i:float.*half)"),
    "g of another dtype": (cast("g", torch.bfloat16), TypeError, r"\bg\b.*(?i:float.*bfloat16)"),
    "s of another dtype": (cast("s", torch.float64), TypeError, r"\bs\b.*(?i:float.*double)"),
    "neither s nor g": (lambda x: {**x, "s": None, "g": None}, ValueError, r"\bs and g\b.*None"),
    "packed with a batch": (lambda x: {**lengths(0, 6)(x), **{n: x[n] for n in "qkvsg"}}, ValueError, r"cu_seqlens.*B = 2"),
    "rank of cu_seqlens": (lambda x: {**(y := lengths(0, 6)(x)), "cu_seqlens": y["cu_seqlens"][None]}, ValueError, r"cu_seqlens.*\[N \+ 1\].*\[1, 2\]"),
    "empty cu_seqlens": (lengths(), ValueError, r"cu_seqlens.*\[N \+ 1\].*\[0\]"),
    "dtype of cu_seqlens": (lengths(0.0, 6.0, dtype=torch.float32), TypeError, r"cu_seqlens.*int32.*(?i:float)"),
    "number of packed states": (lambda x: lengths(0, 2, 4, 6)(states((2, 2, 8, 5), (2, 2, 5, 12))(x)), ValueError, r"initial_state.*3"),
    "number of states": (states((3, 2, 8, 5), (3, 2, 5, 12)), ValueError, r"initial_state Hk.*2.*\[3, 2, 8, 5\]"),
    "shape of Hk": (states((2, 2, 5, 8), (2, 2, 5, 12)), ValueError, r"initial_state Hk.*\[N, H, K, M\].*\[2, 2, 5, 8\]"),
    "shape of Hv": (states((2, 2, 8, 5), (2, 2, 12, 5)), ValueError, r"initial_state Hv.*\[N, H, M, V\].*\[2, 2, 12, 5\]"),
    "dtype of the state": (states((2, 2, 8, 5), (2, 2, 5, 12), dtype=torch.bfloat16), TypeError, r"initial_state Hk.*(?i:float.*bfloat16)"),
    "one state": (states((2, 2, 8, 5)), ValueError, r"initial_state.*\(Hk, Hv\).*1"),
    "a state that is no tuple": (lambda x: {**x, "initial_state": x["q"]}, TypeError, r"initial_state.*tuple.*Tensor"),
    "ABC without z": (lambda x: {**states((2, 2, 8, 5), (2, 2, 5, 12))(x), "g": None}, ValueError, r"initial_state.*\(Hk, Hv, z\)"),
    "shape of z": (lambda x: {**states((2, 2, 8, 5), (2, 2, 5, 12), (2, 5, 2))(x), "g": None}, ValueError, r"initial_state z.*\[N, H, M\].*\[2, 5, 2\]"),
}
CONTENTS = {
    "not from 0": (1, 3, 6),
    "not to T": (0, 3, 5),
    "beyond T": (0, 3, 7),
    "decreasing": (0, 4, 2, 6),
    "negative": (0, -2, 6),
}


def good(device, **options):
    return make_inputs(2, 6, 4, 2, 8, 12, 5, mode="given", device=device, **options)


@pytest.mark.parametrize("what", BAD)
@both
def test_bad_input(op, what, device):
    change, exception, message = BAD[what]
    with pytest.raises(exception, match=message):
        op(**change(good(device)))


@pytest.mark.parametrize("what", CONTENTS)
@both
def test_bad_lengths(op, what, device, request):
    """On the CPU always an error; on the GPU with checking switched on, and without it no access outside the tensors."""
    x = lengths(*CONTENTS[what])(good(device))
    if device.type == "cuda":
        leaves = {**x, **{name: x[name].requires_grad_() for name in "qkvsg"}}
        o, final = op(**leaves, output_final_state=True)
        torch.autograd.grad((o, *final), [leaves[name] for name in "qkvsg"], (o, *final))
        torch.cuda.synchronize()
        request.getfixturevalue("checking")
    with pytest.raises(ValueError, match=r"cu_seqlens.*T = 6.*given"):
        op(**x)


def test_bad_lengths_on_the_host(device):
    with pytest.raises(ValueError, match="cu_seqlens_cpu.*T = 6"):
        chunk_gsa(**lengths(0, 6)(good(device)), cu_seqlens_cpu=torch.tensor([0, 5]))


def test_bad_options(device):
    for level in (-1, 3):
        with pytest.raises(ValueError, match=f"checkpoint_level.*{level}"):
            chunk_gsa(**good(device), checkpoint_level=level)
    for size in (0, 48):
        with pytest.raises(ValueError, match=f"chunk_size.*{size}"):
            chunk_gsa(**good(device), chunk_size=size)
    assert chunk_gsa(**good(device), chunk_size=64, cu_seqlens_cpu=None)[0].shape == (2, 6, 4, 12)


STEP = {
    "rank of q": (resized("q", 2, 1, 4, 8), ValueError, r"\bq\b.*\[B, HQ, K\].*\[2, 1, 4, 8\]"),
    "k's heads": (resized("k", 2, 3, 8), ValueError, r"\b[kv]\b.*\[B, H, [KV]\]"),
    "v's batch": (resized("v", 3, 2, 12), ValueError, r"\bv\b.*\[B, H, V\].*\[3, 2, 12\]"),
    "g's heads": (resized("g", 2, 4, 5), ValueError, r"\bg\b.*\[B, H, M\].*\[2, 4, 5\]"),
    "query heads": (resized("q", 2, 3, 8), ValueError, r"\bq\b.*3 heads.*multiple"),
    "integer q": (cast("q", torch.int64), TypeError, r"\bq\b.*(?i:long)"),
    "mixed v": (cast("v", torch.bfloat16), TypeError, r"\bv\b.*(?i:bfloat16)"),
    "neither s nor g": (lambda x: {**x, "s": None, "g": None}, ValueError, r"s and g|state"),
    "no state": (lambda x: {**x, "state": None}, ValueError, r"state.*\(Hk, Hv\)"),
    "state of another length": (lambda x: {**x, "state": tuple(t[:1].clone() for t in x["state"])}, ValueError, r"state.*P = B = 2.*1"),
    "shape of Hk": (lambda x: {**x, "state": (x["state"][0].mT.contiguous(), x["state"][1])}, ValueError, r"state Hk.*\[P, H, K, M\].*\[2, 2, 5, 8\]"),
    "strided state": (lambda x: {**x, "state": (x["state"][0].mT.contiguous().mT, x["state"][1])}, ValueError, r"state.*contiguous"),
    "fp16 state": (lambda x: {**x, "state": tuple(t.half() for t in x["state"])}, TypeError, r"state Hk.*(?i:half)"),
    "bf16 state of fp32 inputs": (lambda x: {**x, "state": tuple(t.bfloat16() for t in x["state"])}, TypeError, r"state Hk.*(?i:bfloat16)"),
    "ABC without z": (lambda x: {**x, "g": None}, ValueError, r"state.*z"),
    "gradient of an input": (lambda x: {**x, "q": x["q"].requires_grad_()}, RuntimeError, r"fused_recurrent_gsa"),
    "gradient of the state": (lambda x: {**x, "state": (x["state"][0].requires_grad_(), x["state"][1])}, RuntimeError, r"fused_recurrent_gsa"),
    "dtype of state_indices": (lambda x: {**x, "state_indices": x["q"][:, 0, 0]}, TypeError, r"state_indices.*int32.*(?i:float)"),
    "shape of state_indices": (lambda x: {**x, "state_indices": torch.arange(3, device=x["q"].device)}, ValueError, r"state_indices.*\[B\].*\[3\]"),
}


def good_step(device):
    x = good(device, initial_state=True)
    return {**{name: x[name][:, 0].contiguous() for name in "qkvsg"}, "state": x["initial_state"]}


def test_bad_step_of_a_layer(device):
    x = good_step(device)
    row = x["q"], x["k"], x["v"], None, x["g"], *x["state"], None, None, None
    for mask, error, message in ((torch.ones(2), TypeError, r"mask.*bool.*(?i:float)"), (torch.ones(3).bool(), ValueError, r"mask.*\[B\].*\[3\]")):
        with pytest.raises(error, match=message):
            torch.ops.gsa.step(*row, mask.to(device))
    for normalizer in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="gate_normalizer.*positive"):
            torch.ops.gsa.step(*row, None, normalizer)
    six = x["q"][:, 0, :6]
    for cos, sin, error, message in (
        (six, None, ValueError, "cos, sin.*both"), (six[0], six, ValueError, r"cos.*\[B or 1, rotary\].*\[6\]"), (six, six[:, :5], ValueError, "sin.*even"),
        (six, six[:, :4], ValueError, r"sin.*\[2, 4\]"), (six, six.double(), TypeError, "sin.*q's dtype"), (x["v"][:, 0], six, ValueError, "cos.*K = 8"),
    ):
        with pytest.raises(error, match=message):
            torch.ops.gsa.step(*row, cos=cos, sin=sin)


@pytest.mark.parametrize("what", STEP)
def test_bad_step(what, device):
    change, exception, message = STEP[what]
    with pytest.raises(exception, match=message):
        gsa_step(**change(good_step(device)))


@pytest.mark.parametrize("indices,message", [([0, 2], "0 .. 1.*2 at position 1"), ([-2, 0], "-2 at position 0"), ([1, 1], "1 is given twice")], ids=str)
def test_bad_indices(indices, message, device, request):
    x = {**good_step(device), "state_indices": torch.tensor(indices, device=device)}
    if device.type == "cuda":
        if indices != [1, 1]:  # out of range on the GPU, unchecked: a padding row
            assert gsa_step(**x)[indices.index(0) ^ 1].eq(0).all()
        request.getfixturevalue("checking")
    before = [t.clone() for t in x["state"]]
    with pytest.raises(ValueError, match=f"state_indices.*{message}"):
        gsa_step(**x)
    assert all(map(torch.equal, before, x["state"]))


PREFILL = {
    "no pool": (lambda x: {**x, "initial_state": None}, ValueError, r"initial_state.*pool.*None"),
    "ABC without z": (lambda x: {**x, "g": None}, ValueError, r"initial_state.*\(Hk, Hv, z\)"),
    "shape of Hk": (states((3, 2, 5, 8), (3, 2, 5, 12)), ValueError, r"initial_state Hk.*\[P, H, K, M\].*\[3, 2, 5, 8\]"),
    "rows of Hv": (states((3, 2, 8, 5), (4, 2, 5, 12)), ValueError, r"initial_state Hv.*\[P, H, M, V\].*\[4, 2, 5, 12\]"),
    "bf16 pool": (states((3, 2, 8, 5), (3, 2, 5, 12), dtype=torch.bfloat16), TypeError, r"initial_state Hk.*(?i:float.*bfloat16)"),
    "strided pool": (lambda x: {**x, "initial_state": tuple(t.mT.contiguous().mT for t in x["initial_state"])}, ValueError, r"initial_state.*contiguous"),
    "gradient of an input": (lambda x: {**x, "k": x["k"].requires_grad_()}, RuntimeError, r"state_indices.*no_grad"),
    "gradient of the pool": (lambda x: {**x, "initial_state": tuple(t.requires_grad_() for t in x["initial_state"])}, RuntimeError, r"state_indices.*no_grad"),
    "dtype of state_indices": (lambda x: {**x, "state_indices": x["q"][:, 0, 0, 0]}, TypeError, r"state_indices.*int32.*(?i:float)"),
    "shape of state_indices": (lambda x: {**x, "state_indices": torch.arange(3, device=x["q"].device)}, ValueError, r"state_indices.*\[N\].*\[3\]"),
    "number of packed sequences": (lambda x: {**lengths(0, 1, 4, 6)(x), "state_indices": x["state_indices"]}, ValueError, r"state_indices.*\[3\].*\[2\]"),
    "out of range": (lambda x: {**x, "state_indices": x["state_indices"] + 2}, ValueError, r"state_indices.*0 .. 2.*3 at position"),
    "twice": (lambda x: {**x, "state_indices": x["state_indices"] * 0}, ValueError, r"state_indices.*0 is given twice"),
}


def good_prefill(device):
    x = good(device, initial_state=True)
    return {**x, "initial_state": tuple(torch.cat([t, t[:1]]) for t in x["initial_state"]), "state_indices": torch.tensor([1, 0], device=device)}


@pytest.mark.parametrize("what", PREFILL)
@both
def test_bad_prefill(op, what, device, checking):
    change, exception, message = PREFILL[what]
    x = change(good_prefill(device))
    before = None if x["initial_state"] is None else [t.detach().clone() for t in x["initial_state"]]
    with pytest.raises(exception, match=message):
        op(**x)
    assert before is None or all(map(torch.equal, before, x["initial_state"]))


@pytest.mark.gpu("the checks of the CPU refuse that")
@both
def test_prefill_out_of_range_is_padding_on_the_gpu(op, cuda):
    x = good_prefill(cuda)
    before = [t.clone() for t in x["initial_state"]]
    x["state_indices"] = torch.tensor([2**40, -7], device=cuda)
    assert op(**x)[0].eq(0).all() and all(map(torch.equal, before, x["initial_state"]))


@both
def test_prefill_of_nothing(op, device):
    x = good_prefill(device)
    before = [t.clone() for t in x["initial_state"]]
    empty = {name: x[name][:, :0] for name in "qkvsg"}
    o, final = op(**{**x, **empty}, output_final_state=True)
    assert o.shape == (2, 0, 4, 12) and final is x["initial_state"] and all(map(torch.equal, before, final))
    none = {name: x[name][:0] for name in "qkvsg"}
    assert op(**{**x, **none, "state_indices": x["state_indices"][:0]})[0].shape == (0, 6, 4, 12)


def test_step_under_no_grad_takes_parameters(device):
    x = good_step(device)
    x["q"].requires_grad_()
    with torch.no_grad():
        assert gsa_step(**x).shape == (2, 4, 12)


@pytest.mark.gpu("the checks are those of the CPU")
def test_limits_of_the_cuda_kernels(cuda):
    for name, sizes in (("k", {"K": 513}), ("v", {"V": 513}), ("g", {"M": 257})):
        x = make_inputs(1, 3, 1, **{"K": 8, "V": 8, "M": 8, **sizes}, device=cuda)
        with pytest.raises(ValueError, match=rf"\b{name}\b.*<= (512|256)"):
            chunk_gsa(**x)
        testing.check(chunk_gsa, {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in x.items()})


@pytest.mark.gpu("fp64 goes to the CPU's kernels")
def test_fp64_on_cuda(cuda):
    with pytest.raises(TypeError, match=r"\bq\b.*float64.*CPU"):
        chunk_gsa(**good(cuda, dtype=torch.float64))


@pytest.mark.gpu("devices")
@pytest.mark.parametrize("name", ["k", "v", "s", "g", "cu_seqlens", "initial_state"])
def test_two_devices(name, cuda):
    x = lengths(0, 6)(good(cuda))
    if name == "initial_state":
        x = states((1, 2, 8, 5), (1, 2, 5, 12))(x)
        x[name] = tuple(t.cpu() for t in x[name])
    else:
        x[name] = x[name].cpu()
    with pytest.raises(RuntimeError, match=rf"{name}\b.*cpu.*cuda"):
        chunk_gsa(**x)


@both
def test_second_derivative(op, device):
    x = good(device)
    leaves = [x[name].requires_grad_() for name in "qkvsg"]
    first = torch.autograd.grad(op(**x)[0].sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gsa_ext\.reference"):
        sum(t.sum() for t in first).backward()


def test_second_derivative_of_abc(device):
    x = make_inputs(1, 6, 1, 1, 8, 8, 5, mode="abc", device=device)
    x["s"].requires_grad_()
    (first,) = torch.autograd.grad(chunk_gsa(**x)[0].sum(), x["s"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"gsa_ext\.reference"):
        first.sum().backward()


# ------------------------------------------------------------------------------------------------------------ NaN


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "s", "g"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@both
def test_nan_stays_where_it_is(op, packed, name, value, device):
    """Other sequences, other head groups and earlier tokens (chunked form: 128 and more before) keep every bit, forward and backward."""
    if name == "g" and value == -torch.inf:
        value = torch.nan  # -inf is a gate like any other
    bounds, at, head = ((0, 210, 420, 630) if packed else None), 150, 1
    sizes = {"lengths": [210] * 3} if packed else {"B": 3, "T": 210}
    x = make_inputs(**sizes, HQ=4, H=2, K=16, V=16, M=16, mode="given", device=device, dtype=torch.bfloat16, initial_state=True)
    clean = testing.results(op, x)
    bad = x[name].clone()
    bad[(0, 210 + at) if packed else (1, at)][2 * head if name == "q" else head] = value
    got = testing.results(op, {**x, name: bad})

    def sequences(t, n):  # [t, heads, dim] of sequence n
        return t[0, bounds[n] : bounds[n + 1]] if packed else t[n]

    for key in clean:
        pair = clean[key], got[key]
        for n in range(3):
            if key in ("o", "dq", "dk", "dv", "ds", "dg"):
                a, b = (sequences(t, n) for t in pair)
                heads = a.shape[1] // 2
                touched = slice(head * heads, (head + 1) * heads)
                untouched = slice(0, head * heads)
                assert torch.equal(a[:, untouched], b[:, untouched]), (key, n)
                if n != 1:
                    assert torch.equal(a, b), (key, n)
                elif key == "o":
                    start = at if op is fused_recurrent_gsa else at - 128
                    assert torch.equal(a[:start, touched], b[:start, touched]), (key, n)
                    assert not b[at, touched].isfinite().all()
            else:
                a, b = (t[n] for t in pair)
                assert torch.equal(a[0], b[0]) and (n == 1 or torch.equal(a, b)), (key, n)


def test_nan_in_a_step_stays_in_its_row_and_head(device):
    x = good_step(device)
    clean = (gsa_step(**{**x, "state": (a := tuple(t.clone() for t in x["state"]))}), *a)
    x["k"][1, 1] = torch.nan
    got = (gsa_step(**x), *x["state"])
    for before, after in zip(clean, got):
        assert torch.equal(before[0], after[0]) and torch.equal(before[1, : before.shape[1] // 2], after[1, : before.shape[1] // 2])
    assert got[0][1, 2:].isnan().all()


# ------------------------------------------------------------------------------------------------------------ the empty and the extreme


@modes
@both
def test_no_tokens(op, mode, device):
    """The final state is the initial one (zero, or z = -inf), in memory of its own; gradients pass through."""
    for T, options in ((0, {}), (0, {"lengths": [0, 0]}), (0, {"lengths": []})):
        for state in (False, True, "broadcast"):
            x = make_inputs(**({"B": 2, "T": T} if not options else options), HQ=2, H=1, K=8, V=12, M=5, mode=mode, initial_state=state, device=device)
            n = 2 if options.get("lengths") != [] else 0
            o, final = op(**x, output_final_state=True)
            assert o.shape == (2 if not options else 1, 0, 2, 12) and final[0].shape == (n, 1, 8, 5) and final[1].shape == (n, 1, 5, 12)
            for i, t in enumerate(final):
                want = x["initial_state"][i].expand_as(t) if state and n else torch.full_like(t, -torch.inf if i == 2 else 0.0)
                assert torch.equal(t, want)
                assert not state or t.numel() == 0 or t.data_ptr() != x["initial_state"][i].data_ptr()
            if n:
                testing.check(op, x)


@both
def test_no_rows(op, device):
    x = make_inputs(0, 6, 4, 2, 8, 12, 5, device=device)
    leaves = [x[name].requires_grad_() for name in "qkvg"]
    o, final = op(**x, output_final_state=True)
    assert o.shape == (0, 6, 4, 12) and final[0].shape == (0, 2, 8, 5) and final[1].shape == (0, 2, 5, 12)
    for leaf, grad in zip(leaves, torch.autograd.grad(o.sum() + final[0].sum(), leaves)):
        assert grad.shape == leaf.shape


def test_no_rows_step(device):
    x = good_step(device)
    empty = {name: t[:0] for name, t in x.items() if name != "state"}
    before = [t.clone() for t in x["state"]]
    assert gsa_step(**empty, state=x["state"], state_indices=torch.zeros(0, dtype=torch.int64, device=device)).shape == (0, 4, 12)
    assert all(map(torch.equal, before, x["state"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [chunk_gsa, fused_recurrent_gsa, stepwise], ids=["chunk", "recurrent", "step"])
def test_reset_at_every_token(op, dtype, device):
    """g = -inf everywhere, coupled: every slot holds the token itself, so o = v."""
    x = make_inputs(1, 70, 2, 1, 16, 16, 16, dtype=dtype, initial_state=True, device=device)
    x["g"] = torch.full_like(x["g"], -torch.inf)
    o, (hk, hv) = op(**x, output_final_state=True)
    assert testing.error(o, x["v"].repeat_interleave(2, 2)) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert torch.equal(hk[0, 0], x["k"][0, -1, 0].float()[:, None].expand(16, 16)) and torch.equal(hv[0, 0], x["v"][0, -1, 0].float().expand(16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [chunk_gsa, fused_recurrent_gsa, stepwise], ids=["chunk", "recurrent", "step"])
def test_untouched_slots_keep_every_bit(op, dtype, device):
    """g = 0 and s = 0: a layer that routes each token to a few of the slots, and padding, rely on it."""
    x = make_inputs(2, 150, 2, 1, 32, 32, 16, mode="given", dtype=dtype, gate=1.0, initial_state=True, device=device)
    still = torch.arange(16, device=device) % 3 == 1
    x["g"][..., still], x["s"][..., still] = 0.0, 0.0
    x["g"][0], x["s"][0] = 0.0, 0.0
    _, (hk, hv) = op(**x, output_final_state=True)
    hk0, hv0 = x["initial_state"]
    assert torch.equal(hk[..., still], hk0[..., still]) and torch.equal(hv[:, :, still], hv0[:, :, still])
    assert torch.equal(hk[0], hk0[0]) and torch.equal(hv[0], hv0[0]) and not torch.equal(hk[1], hk0[1])


@pytest.mark.parametrize("op", [chunk_gsa, fused_recurrent_gsa, stepwise], ids=["chunk", "recurrent", "step"])
def test_abc_silent_slots(op, device):
    """e = -inf writes nothing and leaves the slot as it is, also while its z is still -inf."""
    x = make_inputs(2, 70, 2, 1, 16, 16, 16, mode="abc", device=device)
    x["s"][..., 3] = -torch.inf
    x["s"][:, :20, :, 5] = -torch.inf
    x["s"][:, ::2, :, 7] = -torch.inf
    testing.check(op, x, gradients=op is not stepwise)
    _, (hk, hv, z) = op(**x, output_final_state=True)
    assert hk[..., 3].eq(0).all() and hv[:, :, 3].eq(0).all() and z[..., 3].eq(-torch.inf).all()
    x["initial_state"] = tuple(t.clone() for t in (torch.randn_like(hk), torch.randn_like(hv), z))
    _, (hk1, _, z1) = op(**x, output_final_state=True)
    assert torch.equal(hk1[..., 3], x["initial_state"][0][..., 3]) and z1[..., 3].eq(-torch.inf).all()
    testing.check(op, x, gradients=op is not stepwise)


@both
def test_abc_large_logits(op, device):
    x = make_inputs(1, 70, 2, 1, 16, 16, 16, mode="abc", device=device)
    x["s"] = x["s"] * 50 + 1e4
    testing.check(op, x)


# ------------------------------------------------------------------------------------------------------------ bits and memory


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "tf32"])
def test_checkpoint_level_changes_no_bit(dtype, mode, device, request):
    if dtype == "tf32":
        request.getfixturevalue("tf32")
        dtype = torch.float32
    for options in ({"B": 2, "T": 150}, {"lengths": [3, 0, 130, 64]}):
        x = make_inputs(**options, HQ=4, H=2, K=32, V=48, M=16, mode=mode, dtype=dtype, initial_state=True, device=device)
        want, *others = (testing.results(functools.partial(chunk_gsa, checkpoint_level=level), x) for level in (2, 1, 0))
        for got in others:
            for name in want:
                assert torch.equal(got[name], want[name]), name


def test_saved_memory(device):
    """Level 2 saves nothing but its inputs; levels 0 and 1 save the states at chunk boundaries, none per token. (Gates for Hopper: test_torch.py.)"""
    x = make_inputs(1, 1024, 2, 2, 32, 32, 32, dtype=torch.bfloat16, device=device)
    x = {name: t.requires_grad_() if isinstance(t, torch.Tensor) else t for name, t in x.items()}
    for level, most in ((2, 0), (1, 1024 * 2 * 64 * 32 * 2 / 16), (0, 1024 * 2 * 64 * 32 * 2 / 16)):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t):
            chunk_gsa(**x, checkpoint_level=level)
        inputs = {t.data_ptr() for t in x.values() if isinstance(t, torch.Tensor)}
        extra = sum(t.nbytes for pointer, t in saved.items() if pointer not in inputs and t.numel())
        assert extra <= most, (level, extra)


@modes
@both
def test_repeatable_bit_for_bit(op, mode, device):
    for dtype in (torch.float32, torch.bfloat16):
        x = make_inputs(3, 200, 8, 2, 64, 64, 32, mode=mode, dtype=dtype, initial_state="broadcast", device=device)
        want, *others = (testing.results(op, x) for _ in range(3))
        for got in others:
            for name in want:
                assert torch.equal(got[name], want[name]), name


@both
@modes
def test_inputs_are_not_written_and_outputs_own_their_memory(op, mode, device):
    for T in (0, 40):
        x = make_inputs(2, T, 4, 2, 16, 16, 16, mode=mode, initial_state=True, device=device)
        tensors = [t for t in (*(x[n] for n in "qkvsg"), *x["initial_state"]) if t is not None]
        before = [t.clone() for t in tensors]
        found = testing.results(op, x)
        assert all(map(torch.equal, tensors, before))
        storages = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        for name, t in found.items():
            assert t.numel() == 0 or t.untyped_storage().data_ptr() not in storages, name


@both
def test_grouped_heads_store_nothing_twice(op, device):
    """k, v, s and g of a group are shared: their gradients are the sums over the group, the states exist once."""
    x = make_inputs(1, 40, 8, 2, 16, 16, 16, mode="given", device=device)
    found = testing.results(op, x)
    assert found["hk"].shape == (1, 2, 16, 16) and found["dk"].shape == (1, 40, 2, 16) and found["dg"].shape == (1, 40, 2, 16)
