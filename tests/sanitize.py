"""Every CUDA kernel at small shapes, for compute-sanitizer (a few minutes each)::

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py

Results are compared with fp64 as well: a kernel that does nothing would be clean. initcheck and synccheck work the same way.
"""

import itertools
import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # every tensor its own allocation: overruns are seen

import torch

from gsa_ext import chunk_gsa, fused_recurrent_gsa, testing
from gsa_ext.testing import make_inputs, stepwise

SIZES = [  # T, HQ, H, K, V, M
    (70, 2, 1, 32, 32, 16),
    (67, 2, 2, 60, 100, 48),
    (65, 4, 1, 128, 128, 64),
    (40, 1, 1, 64, 64, 128),
    (33, 1, 1, 256, 64, 100),
    (20, 1, 1, 512, 512, 256),
]


def cases():
    for dtype, (T, HQ, H, K, V, M) in itertools.product((torch.float32, torch.bfloat16, torch.float16), SIZES):
        for mode, gate in (("given", 8.0), ("coupled", "mixed")):
            yield chunk_gsa, make_inputs(2, T, HQ, H, K, V, M, mode=mode, gate=gate, dtype=dtype, initial_state=True, device="cuda")
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), ("given", "coupled", "abc")):
        small = {"HQ": 2, "H": 1, "K": 20, "V": 36, "M": 10, "mode": mode, "dtype": dtype, "device": "cuda"}
        for op, state in itertools.product((chunk_gsa, fused_recurrent_gsa), (False, True, "broadcast")):
            yield op, make_inputs(lengths=[0, 1, 40, 0, 17, 64, 0], initial_state=state, **small)
            yield op, make_inputs(2, 19, initial_state=state, gate="mixed", **small)
        yield fused_recurrent_gsa, {**make_inputs(lengths=[3, 0, 20], initial_state=True, **small), "reverse": True}
        yield stepwise, make_inputs(2, 3, initial_state=True, **small)
        yield stepwise, make_inputs(1, 2, 8, 1, 512, 512, 256, mode=mode, dtype=dtype, device="cuda")


def main() -> int:
    wrong = 0
    for op, x in cases():
        rows = testing.compare(op, x, gradients=op is not stepwise)
        bad = [row for row in rows if not row.ok]
        wrong += bool(bad)
        print(f"{op.__name__} {tuple(x['q'].shape)} V {x['v'].shape[-1]} {str(x['q'].dtype)[6:]}: {'ok' if not bad else '; '.join(map(str, bad))}", flush=True)
    for contents in ((0, 3, 10**9), (5, -7, 2**31 - 1), (0, 4, 2)):  # no access outside the tensors, whatever cu_seqlens says
        x = make_inputs(lengths=[3, 3], K=20, V=36, M=10, device="cuda")
        x["cu_seqlens"] = torch.tensor(contents, dtype=torch.int32, device="cuda")
        for op in (chunk_gsa, fused_recurrent_gsa):
            testing.results(op, x)
    torch.cuda.synchronize()
    print(f"{wrong} cases off")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
