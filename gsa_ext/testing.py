"""Checks any shape, gate and dtype against the recurrence in fp64: outputs and all gradients.

The package's own tests and ``gsa-ext verify`` use it; so may yours::

    from gsa_ext import chunk_gsa, testing

    def test_my_shape():
        x = testing.make_inputs(B=2, T=300, HQ=8, H=2, K=64, V=64, M=32, gate=8.0, dtype=torch.bfloat16, device="cuda")
        testing.check(chunk_gsa, x)

An error is a relative RMS, ``|a - b| / |b|`` over a whole tensor. What is allowed comes from data (:func:`tolerances`), not from a table of constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gsa_ext.ops import State, fused_recurrent_gsa, gsa_step
from gsa_ext.reference import abc_gate, naive_gsa

Inputs = dict[str, Any]
Op = Callable[..., tuple[Tensor, "State | None"]]

#: Error of the best published 16-bit kernels (flash-linear-attention 0.6.0, bf16, H200, 512 tokens, K = V = 128, M = 64, scale K^-1/2), by the gate's tau.
PEER = {
    8.0: {"o": 2.3e-3, "dq": 2.8e-3, "dk": 2.8e-3, "dv": 1.7e-3, "ds": 2.6e-3, "dg": 3.0e-3},
    1.0: {"o": 2.3e-3, "dq": 2.8e-3, "dk": 2.8e-3, "dv": 1.7e-3, "ds": 2.6e-3, "dg": 8.4e-3},
    0.1: {"o": 2.3e-3, "dq": 3.3e-3, "dk": 3.3e-3, "dv": 1.7e-3, "ds": 2.6e-3, "dg": 1.4e-2},
}


def make_inputs(
    B: int = 1,
    T: int = 64,
    HQ: int = 2,
    H: int | None = None,
    K: int = 64,
    V: int = 64,
    M: int = 32,
    *,
    mode: str = "coupled",
    gate: float | str = 8.0,
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    lengths: Sequence[int] | None = None,
    initial_state: bool | str = False,
    scale: float | None = None,
    seed: int = 0,
) -> Inputs:
    """Random arguments for :func:`gsa_ext.chunk_gsa` and its siblings, as a dict: ``chunk_gsa(**make_inputs(...))``.

    Args:
        B, T, HQ, H, K, V, M: sizes; H None means HQ.
        mode: "coupled" (s None), "given" (s near 1 - exp(g), but not equal to it), "abc" (g None, s raw slot logits).
        gate: a number tau gives ``logsigmoid(N(0, 1)) / tau``; "zero", "-40" and "-inf" set half of the gates to that (all of them would make
            all slots equal), the rest is tau = 8; "mixed" is tau = 1 with a tenth of the gates 0 and a tenth -inf; "shut" is nearly 0 or -3.7, from slot to
            slot the one more often and then the other, as in a model that was just converted.
        dtype: of q, k, v, and of s and g unless gate_dtype is given.
        device: where the tensors go; the values do not depend on it.
        lengths: packed sequences; B must be 1, T becomes their sum.
        initial_state: True for one state per sequence, "broadcast" for one for all of them.
        scale: passed on.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    H = HQ if H is None else H
    T = T if lengths is None else sum(lengths)
    N = B if lengths is None else len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def put(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(device)

    q, k, v, raw = normal(B, T, HQ, K), normal(B, T, H, K), normal(B, T, H, V), normal(B, T, H, M)
    g = F.logsigmoid(raw) / ({"mixed": 1.0}.get(gate, 8.0) if isinstance(gate, str) else gate)
    draw = torch.rand(raw.shape, generator=generator, dtype=torch.float64)
    if gate == "shut":
        g = F.logsigmoid(9 * raw + torch.linspace(4, 20, M, dtype=torch.float64)).clamp(min=-3.7)
    elif gate == "mixed":
        g = g.masked_fill(draw < 0.1, 0.0).masked_fill(draw > 0.9, -torch.inf)
    elif isinstance(gate, str):
        g = g.masked_fill(draw < 0.5, {"zero": 0.0, "-40": -40.0, "-inf": -torch.inf}[gate])
    s = raw if mode == "abc" else -torch.expm1(g) * (0.5 + torch.rand(raw.shape, generator=generator, dtype=torch.float64))
    gate_dtype = gate_dtype or dtype
    x: Inputs = {
        "q": put(q, dtype),
        "k": put(k, dtype),
        "v": put(v, dtype),
        "s": None if mode == "coupled" else put(s, gate_dtype),
        "g": None if mode == "abc" else put(g, gate_dtype),
        "scale": scale,
    }
    if initial_state:
        n = 1 if initial_state == "broadcast" else N
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        states = [normal(n, H, K, M), normal(n, H, M, V)] + ([normal(n, H, M)] if mode == "abc" else [])
        x["initial_state"] = tuple(put(state, state_dtype) for state in states)
    if lengths is not None:
        x["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    return x


def stepwise(q, k, v, s=None, g=None, scale=None, initial_state=None, output_final_state=False) -> tuple[Tensor, State | None]:
    """A sequence through :func:`gsa_ext.gsa_step`, one token at a time: arguments and results as ``chunk_gsa``'s, without gradients."""
    B, T, H, K = k.shape
    M, V = (s if g is None else g).shape[-1], v.shape[-1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        zero = (q.new_zeros(B, H, K, M, dtype=wide), q.new_zeros(B, H, M, V, dtype=wide), q.new_full((B, H, M), -torch.inf, dtype=wide))
        state = zero if g is None else zero[:2]
    else:
        state = tuple(x.expand(B, *x.shape[1:]).clone(memory_format=torch.contiguous_format) for x in initial_state)
    o = [gsa_step(q[:, t], k[:, t], v[:, t], None if s is None else s[:, t], None if g is None else g[:, t], state, scale) for t in range(T)]
    return torch.stack(o, 1) if o else q.new_zeros(B, 0, q.shape[2], V), state if output_final_state else None


class _Rounded(torch.autograd.Function):
    """x as an operand of a 16-bit matrix product: rounded on the way in, its gradient left alone."""

    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _RoundedGradient(torch.autograd.Function):
    """x as the result of a 16-bit matrix product: left alone, its gradient, an operand of the products of backward, rounded."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


def vectorised_gsa(
    q, k, v, s=None, g=None, scale=None, initial_state=None, output_final_state=False, reverse=False, cu_seqlens=None, operands: torch.dtype | None = None
) -> tuple[Tensor, State | None]:
    """:func:`gsa_ext.reference.naive_gsa` in fp64 by chunks of 16 tokens, differentiable: the same truth, many times faster.

    With `operands` a 16-bit dtype, the operands of every matrix product, forward and backward, are rounded to it: what a tensor-core kernel with
    wide accumulation cannot avoid.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = []
        for n, (lo, hi) in enumerate(zip(bounds, bounds[1:])):
            state = None if initial_state is None else tuple(x[n : n + 1] if x.shape[0] > 1 else x for x in initial_state)
            tokens = {name: None if x is None else x[:, lo:hi] for name, x in {"q": q, "k": k, "v": v, "s": s, "g": g}.items()}
            parts.append(vectorised_gsa(**tokens, scale=scale, initial_state=state, output_final_state=True, reverse=reverse, operands=operands))
        finals = tuple(torch.cat(x) for x in zip(*(p[1] for p in parts)))
        return torch.cat([p[0] for p in parts], 1), finals if output_final_state else None

    def mm(equation: str, a: Tensor, b: Tensor) -> Tensor:
        if operands is None:
            return torch.einsum(equation, a, b)
        return _RoundedGradient.apply(torch.einsum(equation, _Rounded.apply(a, operands), _Rounded.apply(b, operands)), operands)

    B, T, HQ, K = q.shape
    H, V, C = v.shape[2], v.shape[3], 16
    M = (s if g is None else g).shape[-1]
    scale = K**-0.5 if scale is None else scale
    states = [] if initial_state is None else [x.double().expand(B, *x.shape[1:]) for x in initial_state]
    Hk, Hv = states[:2] if states else (q.new_zeros(B, H, K, M, dtype=torch.float64), q.new_zeros(B, H, M, V, dtype=torch.float64))
    q, k, v, s, g = (None if x is None else x.double().flip(1) if reverse else x.double() for x in (q, k, v, s, g))
    z = None
    if g is None:
        z, gates = states[2] if states else q.new_full((B, H, M), -torch.inf), []
        for t in range(T):
            z, gt, st = abc_gate(z, s[:, t], bool(states))
            gates.append((gt, st))
        g, s = (torch.stack(x, 1) for x in zip(*gates)) if gates else (s, s)
    if s is None:
        s = -torch.expm1(g)

    n = -(-T // C)
    # [B, H, n, C, dim], padded with tokens that change nothing; -1000 is -inf for exp in fp64, but -1000 - -1000 is 0
    q, k, v, s, g = (F.pad(x, (0, 0, 0, 0, 0, n * C - T)).unflatten(1, (n, C)).movedim(3, 1) for x in (q, k, v, s, g.clamp_min(-1000)))
    q = q.unflatten(1, (H, HQ // H))  # [B, H, r, n, C, K]
    G = g.cumsum(3)
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    W = s[:, :, :, None] * (G[:, :, :, :, None] - G[:, :, :, None]).masked_fill(~causal[..., None], -torch.inf).exp()  # [B, H, n, i, j, M]
    last = s * (G[:, :, :, -1:] - G).exp()
    Uk, Uv, decay = mm("bhnjk,bhnjm->bhnkm", k, last), mm("bhnjm,bhnjv->bhnmv", last, v), G[:, :, :, -1].exp()
    before = []
    for c in range(n):
        before.append((Hk, Hv))
        Hk, Hv = Hk * decay[:, :, c, None, :] + Uk[:, :, c], Hv * decay[:, :, c, :, None] + Uv[:, :, c]
    if n:
        Hk0, Hv0 = (torch.stack(x, 2) for x in zip(*before))
        A1 = mm("bhrnik,bhnjk->bhrnij", q, k) * causal
        logits = scale * (mm("bhrnik,bhnkm->bhrnim", q, Hk0) * G.exp()[:, :, None] + mm("bhrnij,bhnijm->bhrnim", A1, W))
        p = logits.softmax(-1)
        A2 = mm("bhrnim,bhnijm->bhrnij", p, W)
        o = mm("bhrnij,bhnjv->bhrniv", A2, v) + mm("bhrnim,bhnmv->bhrniv", p * G.exp()[:, :, None], Hv0)
        o = o.flatten(1, 2).movedim(1, 3).flatten(1, 2)[:, :T]
    else:
        o = q.new_zeros(B, 0, HQ, V)
    final = (Hk, Hv) if z is None else (Hk, Hv, z)
    return o.flip(1) if reverse else o, final if output_final_state else None


def results(
    op: Op, x: Inputs, *, gradients: bool = True, double: bool = False, seed: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Outputs o, hk, hv (and z), and with `gradients` the gradient of every tensor argument (dq, ..., dhk0, ...) for one fixed random cotangent.

    `double` runs `op` on the same values in fp64 on `device`.
    """
    names = [name for name in ("q", "k", "v", "s", "g") if x.get(name) is not None]
    state = x.get("initial_state") or ()
    leaves = dict(zip([*names, "hk0", "hv0", "z0"], [*(x[name] for name in names), *state]))
    if double:
        leaves = {name: t.detach().double().to(device) for name, t in leaves.items()}
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in leaves.items()}
    arguments = {**x, **{name: leaves[name] for name in names}}
    if state:
        arguments["initial_state"] = tuple(leaves[name] for name in ("hk0", "hv0", "z0") if name in leaves)
    if double and x.get("cu_seqlens") is not None:
        arguments["cu_seqlens"] = x["cu_seqlens"].to(device)
    with torch.set_grad_enabled(gradients):
        o, final = op(**arguments, output_final_state=True)
    out = dict(zip(("o", "hk", "hv", "z"), (o, *(final or ()))))
    found = {name: t.detach() for name, t in out.items()}
    if gradients:
        generator = torch.Generator().manual_seed(seed)
        used, cotangents = [], []
        for name, t in out.items():
            dtype = x["q"].dtype if name == "o" or x["q"].dtype == torch.float64 else torch.float32
            cotangent = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)  # the same values for op and truth
            if name == "z":
                cotangent = cotangent.masked_fill(~t.detach().isfinite().cpu(), 0.0)
            if t.requires_grad:
                used.append(t)
                cotangents.append(cotangent.to(t))
        grads = torch.autograd.grad(used, list(leaves.values()), cotangents, allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads):
            found["d" + name] = torch.zeros_like(leaf) if grad is None else grad
    return found


def error(got: Tensor, want: Tensor, terms: float = 0.0) -> float:
    """Relative RMS of `got` against `want`, over the positions where `want` is finite; elsewhere they must be equal, or the error is inf.

    `terms` is the norm of what `want` is a sum of; where the sum vanishes altogether, the error is relative to that.
    """
    want = want.detach().double()
    got = got.detach().double().to(want.device)
    if got.shape != want.shape:
        raise AssertionError(f"expected shape {tuple(want.shape)}, given {tuple(got.shape)}")
    finite = want.isfinite()
    if not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    norm = want[finite].norm().item()
    norm = norm if norm > 1e-12 * terms else terms
    difference = (got[finite] - want[finite]).norm().item()
    return difference / norm if norm > 0 else difference


def _terms(name: str, x: Inputs, truth: dict[str, Tensor]) -> float:
    """Norm of the terms s * ds that cancel in dg (altogether in the first token of a sequence without initial state); over the slots they sum to
    k . dk + v . dv."""
    if name != "dg":
        return 0.0
    sums = [(x[leaf].double().cpu() * truth["d" + leaf]).sum(-1).norm().item() for leaf in "kv"]
    return sum(sums) / x["g"].shape[-1] ** 0.5


def tolerances(op: Op, x: Inputs, truth: dict[str, Tensor], gradients: bool = True) -> dict[str, float]:
    """The error allowed for each result of :func:`results`, from data:

    * fp64: 1e-10.
    * fp32, and 16-bit inputs to the ops that compute in fp32 (``fused_recurrent_gsa``, ``gsa_step``): three times the error of
      :func:`gsa_ext.reference.naive_gsa` on the same inputs, at least 4 eps of fp32.
    * 16-bit inputs to ``chunk_gsa`` and to functions unknown here: the error of the same chunked arithmetic in plain PyTorch with the operands of
      its matrix products rounded to bf16 (:func:`vectorised_gsa`), times 1.5; times 4 for dg, whose running sum cancels in truth and does not in
      rounding.
    """
    dtype = x["q"].dtype
    if dtype == torch.float64:
        return dict.fromkeys(truth, 1e-10)
    chunked = dtype != torch.float32 and getattr(op, "func", op) not in (fused_recurrent_gsa, stepwise, naive_gsa)
    if not chunked:
        host = {name: t.cpu() if isinstance(t, Tensor) else tuple(s.cpu() for s in t) if isinstance(t, tuple) else t for name, t in x.items()}
        naive = results(naive_gsa, host, gradients=gradients)
        return {name: max(3 * error(naive[name], want, _terms(name, x, truth)), 4 * torch.finfo(torch.float32).eps) for name, want in truth.items()}

    def rounded(**arguments: Any) -> tuple[Tensor, State | None]:
        return vectorised_gsa(**arguments, operands=torch.bfloat16)

    emulated = results(rounded, x, gradients=gradients, double=True)
    allowed = {}
    for name, want in truth.items():
        leaf = x["q"] if name == "o" else x.get(name[1:])
        stored = emulated[name].to(torch.bfloat16) if isinstance(leaf, Tensor) and leaf.dtype != torch.float32 else emulated[name]
        allowed[name] = (4 if name == "dg" else 1.5) * error(stored, want, _terms(name, x, truth)) + 4 * torch.finfo(torch.float32).eps
    return allowed


@dataclass(frozen=True)
class Row:
    """One compared tensor."""

    name: str  #: o, hk, hv, z: output and final states; dq, ..., dhk0, ...: gradients
    error: float  #: relative RMS against fp64
    allowed: float  #: what is allowed

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.name:>4}  error {self.error:.2e}  allowed {self.allowed:.2e}  {'ok' if self.ok else f'OFF BY {self.error / self.allowed:.1f}x'}"


def compare(op: Op, x: Inputs, *, gradients: bool = True, allowed: dict[str, float] | None = None) -> list[Row]:
    """Every result of ``op(**x)`` beside the recurrence in fp64.

    Args:
        op: ``chunk_gsa``, ``fused_recurrent_gsa``, :func:`stepwise` (with ``gradients=False``) or anything with their signature.
        x: as from :func:`make_inputs`; its tensors may be any views.
        gradients: compare gradients too.
        allowed: instead of :func:`tolerances`; results without an entry are not compared.
    """
    truth = results(vectorised_gsa, x, gradients=gradients, double=True)
    got = results(op, x, gradients=gradients)
    allowed = tolerances(op, x, truth, gradients) if allowed is None else allowed
    return [Row(name, error(got[name], truth[name], _terms(name, x, truth)), allowed[name]) for name in truth if name in allowed]


def check(op: Op, x: Inputs, *, gradients: bool = True, allowed: dict[str, float] | None = None) -> None:
    """As :func:`compare`.

    Raises:
        AssertionError: a result is off by more than is allowed; the message says which, and by how much.
    """
    rows = compare(op, x, gradients=gradients, allowed=allowed)
    if not all(row.ok for row in rows):
        shapes = ", ".join(f"{name} {tuple(t.shape)} {str(t.dtype)[6:]}" for name, t in x.items() if isinstance(t, Tensor))
        raise AssertionError("\n".join([f"{getattr(op, '__name__', op)} ({shapes}, {x['q'].device})", *map(str, rows)]))
