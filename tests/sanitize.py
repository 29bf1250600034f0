"""Every kernel at small shapes, under a sanitizer (a few minutes each). Those of CUDA::

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py cuda
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py cuda

and those of the CPU, compiled with AddressSanitizer and UndefinedBehaviorSanitizer, once for each instruction set::

    .ci/sanitize

After the device may stand which of PARTS to run, as in `python tests/sanitize.py cuda hopper tf32`, and --quick: all of it in two minutes, three tools beside
each other on one GPU (racecheck takes longer: 2/5 among the names runs the second of every five cases). The comparison with fp64 takes most of the time under
a sanitizer; then only o is looked at, whether it is there.

Results are compared with fp64 as well: a kernel that does nothing would be clean. On the CPU, where everything around the kernels is slow under
the sanitizers, only roughly: accuracy is what the tests are for. initcheck and synccheck work the same way.
"""

import itertools
import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # every tensor its own allocation: overruns are seen

import torch

from gsa_ext import chunk_gsa, fused_recurrent_gsa, gsa_step, testing
from gsa_ext.testing import make_inputs, stepwise

SIZES = [  # T, HQ, H, K, V, M
    (70, 2, 1, 32, 32, 16),
    (67, 2, 2, 60, 100, 48),
    (65, 4, 1, 128, 128, 64),
    (40, 1, 1, 64, 64, 128),
    (33, 1, 1, 256, 64, 100),
    (20, 1, 1, 512, 512, 256),
]


# Those that the kernels for Hopper take: as walks where they can be, in parts, and in parts for few heads.
HOPPER = [(130, 2, 1, 128, 128, 64), (70, 2, 2, 64, 64, 24), (70, 3, 1, 64, 64, 40), (65, 1, 1, 128, 128, 64), (70, 2, 1, 128, 128, 104),
          (70, 2, 2, 64, 64, 128), (70, 2, 1, 256, 256, 40), (70, 1, 1, 512, 512, 64)]

RESULTS = ("o", "hk", "hv", "z", "dq", "dk", "dv", "ds", "dg", "dhk0", "dhv0", "dz0")
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def keeping(*args, **x):
    return chunk_gsa(*args, **x, checkpoint_level=0)


def of_all_sizes(device):
    host = device == "cpu"
    for dtype, (T, HQ, H, K, V, M) in itertools.product((FP32, BF16, FP16), SIZES):
        for mode, gate in (("given", 8.0), ("coupled", "mixed")):
            yield chunk_gsa, make_inputs(2, T, HQ, H, K, V, M, mode=mode, gate=gate, dtype=dtype, initial_state=True, device=device)
    for dtype, mode in itertools.product((FP32, BF16, *((FP16, FP64) if host else ())), ("given", "coupled", "abc")):
        small = {"HQ": 2, "H": 1, "K": 20, "V": 36, "M": 10, "mode": mode, "dtype": dtype, "device": device}
        for op, state in itertools.product((chunk_gsa, fused_recurrent_gsa), (False, True, "broadcast")):
            yield op, make_inputs(lengths=[0, 1, 40, 0, 17, 64, 0], initial_state=state, **small)
            yield op, make_inputs(2, 19, initial_state=state, gate="mixed", **small)
        yield fused_recurrent_gsa, {**make_inputs(lengths=[3, 0, 20], initial_state=True, **small), "reverse": True}
        yield stepwise, make_inputs(2, 3, initial_state=True, **small)
        yield stepwise, make_inputs(1, 2, 8, 1, 512, 512, 256, mode=mode, dtype=dtype, device=device)
    if host:
        yield from of_the_cpu()


def tf32(device):
    """fp32 inputs on the tensor cores."""
    torch.backends.cuda.matmul.allow_tf32 = True
    for (T, HQ, H, K, V, M), (mode, gate) in itertools.product(SIZES, (("given", 8.0), ("coupled", "mixed"))):
        yield chunk_gsa, make_inputs(2, T, HQ, H, K, V, M, mode=mode, gate=gate, dtype=FP32, initial_state=True, device=device)
    torch.backends.cuda.matmul.allow_tf32 = False


def hopper(device):
    for kernels, dtype, gate, (T, HQ, H, K, V, M) in itertools.product(("hopper", "segments", "parts", "few"), (BF16, FP16), (8.0, "mixed"), HOPPER):
        os.environ["GSA_KERNELS"] = kernels  # read at every call
        yield chunk_gsa, make_inputs(2, T, HQ, H, K, V, M, mode="given", gate=gate, dtype=dtype, initial_state=True, device=device)
        yield chunk_gsa, make_inputs(lengths=[0, 1, T, 0, 17], HQ=HQ, H=H, K=K, V=V, M=M, gate=gate, dtype=dtype, device=device)
    for gate in (8.0, "mixed"):  # few heads: more chunks than are on their way at a time
        yield chunk_gsa, make_inputs(1, 1400, 2, 1, 64, 64, 24, gate=gate, dtype=BF16, initial_state=True, device=device)
    for kernels, gate, (D, M) in itertools.product(("hopper", "segments", "parts"), (8.0, "mixed"), ((128, 64), (64, 24))):
        os.environ["GSA_KERNELS"] = kernels
        yield keeping, make_inputs(2, 200, 2, 2, D, D, M, mode="given", gate=gate, dtype=BF16, initial_state=True, device=device)
    del os.environ["GSA_KERNELS"]


def of_the_cpu():
    """Remainders of a vector, groups of 1 to 11 heads, sequences that are cut along time."""
    for K, V, M in ((1, 17, 3), (3, 1, 5), (15, 16, 31), (33, 63, 17)):
        for dtype, HQ in ((FP64, 1), (FP32, 7), (BF16, 11)):
            x = make_inputs(1, 35, HQ, 1, K, V, M, mode="given", dtype=dtype, initial_state=True)
            yield from ((chunk_gsa, x), (fused_recurrent_gsa, x), (stepwise, x))
    for dtype, mode in ((FP64, "given"), (FP64, "coupled"), (BF16, "abc")):
        options = {"HQ": 2, "H": 1, "K": 20, "V": 36, "M": 10, "gate": 300.0, "mode": mode, "dtype": dtype, "initial_state": True}
        yield chunk_gsa, make_inputs(1, 1003, **options)
        yield chunk_gsa, make_inputs(lengths=[0, 1003, 5, 900, 0], **options)
    yield fused_recurrent_gsa, {**make_inputs(lengths=[0, 1003, 5], **{**options, "dtype": FP64}), "reverse": True}
    yield chunk_gsa, make_inputs(1, 300, 2, 1, 256, 200, 128, gate=300.0, dtype=FP64, initial_state=True)


def pools(device):
    """Steps and prompts on a pool of states: rows that are there, that are padding, and (on the GPU, unchecked) that do not exist."""
    for dtype, state_dtype, mode in itertools.product((FP32, BF16), (FP32, BF16), ("given", "coupled", "abc")):
        if dtype == FP32 and state_dtype == BF16:
            continue
        x = make_inputs(5, 1, 4, 2, 20, 36, 10, mode=mode, dtype=dtype, device=device)
        row = {name: None if x[name] is None else x[name][:, 0] for name in "qkvsg"}
        pool = make_inputs(7, 1, 4, 2, 20, 36, 10, mode=mode, dtype=dtype, device=device, initial_state=True)["initial_state"]
        for index in (torch.int32, torch.int64):
            where = torch.tensor([6, -1, 0, 3, -1 if device == "cpu" else 99], dtype=index, device=device)
            o = gsa_step(**row, state=tuple(t.to(state_dtype) for t in pool), state_indices=where)
            assert o[[1, 4]].eq(0).all() and o[[0, 2, 3]].isfinite().all()
            if mode == "coupled":
                mask = torch.tensor([True, True, False, True, True], device=device)
                hk, hv = (t.to(state_dtype) for t in pool)
                turn = row["q"][:, 0, :12], row["q"][:, 1, :12]
                o = torch.ops.gsa.step(row["q"], row["k"], row["v"], None, row["g"], hk, hv, None, None, where, mask, 8.0, *turn, True, True)
                assert o[[1, 2, 4]].eq(0).all() and o[[0, 3]].isfinite().all()
    ways = ("portable", "hopper", "segments", "parts", "few")
    for dtype, mode, op, kernels in itertools.product((FP32, BF16), ("given", "coupled", "abc"), (chunk_gsa, fused_recurrent_gsa), ways):
        os.environ["GSA_KERNELS"] = kernels
        K, V, M = (20, 36, 10) if kernels == "portable" else (64, 64, 16)
        small = {"HQ": 4, "H": 2, "K": K, "V": V, "M": M, "mode": mode, "dtype": dtype, "device": device}
        pool = make_inputs(7, 1, **small, initial_state=True)["initial_state"]
        where = torch.tensor([6, -1, 0, 3, -1 if device == "cpu" else 99], device=device)
        for x in (make_inputs(5, 33 if kernels == "portable" else 200, **small), make_inputs(lengths=[70, 3, 0, 1, 9], **small)):
            assert op(**x, initial_state=pool, state_indices=where)[0].isfinite().all()
            if dtype == BF16:
                assert op(**x, initial_state=tuple(t.bfloat16() for t in pool), state_indices=where)[0].isfinite().all()
        del os.environ["GSA_KERNELS"]


def beside(device):
    """What some layers have beside the slots: a token of a short convolution and of a window."""
    for dtype, masked in itertools.product((FP32, BF16, FP16), (False, True)):
        def normal(*size, dtype=dtype):
            return torch.randn(*size, device=device).to(dtype)

        mask = torch.tensor([True, False, True], device=device) if masked else None
        assert torch.ops.gsa.conv_step(normal(3, 300), normal(3, 3, 300), normal(300, 1, 4), normal(300), mask).isfinite().all()
        for window, HQ, H, K, V, rotary in ((64, 8, 2, 64, 64, 64), (5, 3, 3, 12, 20, 8), (1, 4, 1, 16, 16, 0), (100, 6, 2, 33, 40, 0)):
            states = normal(3, window - 1, H, K), normal(3, window - 1, H, V), torch.tensor([0, 2, 10**6], device=device)
            turn = (normal(1, rotary), normal(1, rotary)) if rotary else (None, None)
            for _ in range(2):
                assert torch.ops.gsa.window_step(normal(3, HQ, K), normal(3, H, K), normal(3, H, V), *states, 0.3, mask, *turn).isfinite().all()


def lengths_that_are_wrong(device):
    """No access outside the tensors, whatever cu_seqlens says."""
    for contents in ((0, 3, 10**9), (5, -7, 2**31 - 1), (0, 4, 2)):
        x = make_inputs(lengths=[3, 3], K=20, V=36, M=10, device=device)
        x["cu_seqlens"] = torch.tensor(contents, dtype=torch.int32, device=device)
        for op in (chunk_gsa, fused_recurrent_gsa):
            testing.results(op, x)
    torch.cuda.synchronize()


def ran(cases, device) -> int:
    """Under the sanitizer alone; an assertion ends it."""
    for number, (op, x) in enumerate(cases, 1):
        o = testing.results(op, x, gradients=op is not stepwise)["o"]
        assert o.isfinite().all() and (o.numel() == 0 or o.ne(0).any())
        if number % 5 == 0:
            print(f"{number} cases", flush=True)
    return 0


def compared(cases, device) -> int:
    wrong = 0
    for op, x in cases:
        dtype = x["q"].dtype
        loose = device == "cpu" or (dtype == FP32 and torch.backends.cuda.matmul.allow_tf32)
        rough = dict.fromkeys(RESULTS, {FP64: 1e-10, FP32: 1e-4 if device == "cpu" else 3e-3}.get(dtype, 0.1)) if loose else None
        rows = testing.compare(op, x, gradients=op is not stepwise, allowed=rough)
        bad = [row for row in rows if not row.ok]
        wrong += bool(bad)
        print(f"{op.__name__} {tuple(x['q'].shape)} V {x['v'].shape[-1]} {str(dtype)[6:]}: {'ok' if not bad else '; '.join(map(str, bad))}", flush=True)
    return wrong


PARTS = {"sizes": of_all_sizes, "tf32": tf32, "hopper": hopper, "pools": pools, "beside": beside, "lengths": lengths_that_are_wrong}
OF_CUDA = ("tf32", "hopper", "lengths")


def main() -> int:
    quick = "--quick" in sys.argv
    device, *names = [x for x in sys.argv[1:] if x != "--quick"] or ["cuda"]
    share = next((x for x in names if "/" in x), "1/1")
    first, step = map(int, share.split("/"))
    names = [x for x in names if x != share]
    torch.set_num_threads(max(2, torch.get_num_threads()))
    wrong = 0
    for name in names or [name for name in PARTS if device == "cuda" or name not in OF_CUDA]:
        cases = PARTS[name](device)
        if cases is not None:
            cases = itertools.islice(cases, first - 1, None, step)
            wrong += (ran if quick else compared)(cases, device)
        print(f"{name}: done", flush=True)
    print(f"{wrong} cases off")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
