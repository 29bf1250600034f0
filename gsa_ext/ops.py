"""The public functions. Shapes are [B, T, heads, dim]; everything native lives under ``torch.ops.gsa`` (csrc/ops.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gsa_ext import _load

State = tuple[Tensor, ...]
_C = _load.library()
_ops = torch.ops.gsa


def _short(name: str, *of_token: int) -> Callable[..., Tensor]:
    """``torch.ops.gsa.<name>(*args)``, in half the time where there is nothing about the arguments that torch's way in would have to look at.

    With ``of_token`` for what a layer has: these arguments have a second axis, of one token, and so has the result.
    """
    native, by_torch = _C.short_way(name, sum(1 << i for i in of_token)), getattr(_ops, name)

    def call(*args: Any) -> Tensor:
        o = None if torch.compiler.is_dynamo_compiling() else native(*args)
        if o is not None:
            return o
        if not of_token:
            return by_torch(*args)
        return by_torch(*(x[:, 0] if i in of_token and x is not None else x for i, x in enumerate(args)))[:, None]

    return call


step, step_of_token = _short("step"), _short("step", 0, 1, 2, 3, 4, 10, 12, 13)              # q, k, v, s, g, mask, cos, sin
conv_step_of_token = _short("conv_step", 0, 4)                                               # x, mask
window_step_of_token = _short("window_step", 0, 1, 2, 7, 8, 9)                               # q, k, v, mask, cos, sin
silu_norm, mix = _short("silu_norm"), _short("mix")


def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | None = None,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """Gated Slot Attention over whole sequences in the chunked parallel form: the op to train with.

    Linear in T, differentiable in every tensor argument, bitwise repeatable. With HQ = r * H query heads, query head i reads the slots of
    key/value head i // r.

    Args:
        q: ``[B, T, HQ, K]``, bf16, fp16, fp32; fp64 on the CPU.
        k: ``[B, T, H, K]``, dtype of q; HQ a multiple of H.
        v: ``[B, T, H, V]``, dtype of q.
        s: write strength ``[B, T, H, M]``, dtype of q or fp32. None: coupled to the gate, ``s = 1 - exp(g)``, computed in fp32.
        g: log of the forget gate ``[B, T, H, M]`` in [-inf, 0], dtype of q or fp32 (natural logarithm). None: ABC, where s holds raw
            slot logits of any size.
        scale: factor on the slot logits; None means ``K ** -0.5``. The paper's layer passes 1.0.
        initial_state: ``(Hk [N, H, K, M], Hv [N, H, M, V])``, in ABC ``(Hk, Hv, z [N, H, M])``; fp32 (fp64 for fp64 inputs); N = B or the
            number of packed sequences; N = 1 is the same start for all of them.
        output_final_state: return the states after the last token, ready to be handed on as ``initial_state``.
        checkpoint_level: 0, 1 or 2. Levels 0 and 1 keep the chunk-boundary states for backward, level 2 (default) recomputes them, as does every
            level where fp32 inputs are multiplied in TF32. Level 0 keeps what depends on the gates alone, too, for the kernels for Hopper (16-bit
            inputs, K = V = 64 or 128, M a multiple of 8 up to 128): a state, and as much again for every 64 slots, for each 64 tokens and key/value
            head. No bit of any result depends on the level.
        cu_seqlens: ``[N + 1]`` int32 or int64, on q's device: B must be 1, and tokens ``cu_seqlens[n]:cu_seqlens[n+1]`` are sequence n. Never read back
            to the host; contents are checked when they are on the CPU, or anywhere after :func:`gsa_ext.set_checks`.
        cu_seqlens_cpu: accepted for compatibility; where given, its contents are checked.
        chunk_size: accepted for compatibility (a power of two); the kernels choose their own.
        state_indices: ``[N]`` int32 or int64, on q's device: ``initial_state`` is a pool of P states, ``(Hk [P, H, K, M], Hv [P, H, M, V])`` (in ABC z
            too), contiguous, of which sequence n has row ``state_indices[n]``, no row twice. It starts from what is there, and its state after the last
            token is written there, **in place**; no other row is touched. A new sequence wants a row of zeros (in ABC z of -inf). -1: padding, whose
            o is 0, whatever its tokens hold, and which changes no state. So prompts, parts of prompts and single tokens can share one packed batch,
            and :func:`gsa_step` goes on with the same pool. No gradients. For 16-bit inputs the pool may be in bf16, as for :func:`gsa_step`: they are
            computed with in fp32 and rounded once, at the end.

    Returns:
        ``(o [B, T, HQ, V] in q's dtype, final_state or None)``. With ``state_indices`` the final state is ``initial_state`` itself, the pool.

    Raises:
        ValueError: a shape, value or combination that does not fit. TypeError: a dtype. RuntimeError: devices, a build without CUDA, or
        ``state_indices`` with grad mode on and an input that requires grad.

    Source: arXiv 2409.07146, eq. 6 and section 3.2; ABC: arXiv 2110.02488.
    """
    if cu_seqlens_cpu is not None:
        _check_host_lengths(cu_seqlens_cpu, q)
    if chunk_size is not None and (chunk_size <= 0 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size: expected a power of two, given {chunk_size}")
    if state_indices is not None:
        return _prefill(q, k, v, s, g, scale, initial_state, output_final_state, cu_seqlens, state_indices, False, False)
    hk0, hv0, z0 = _unpack(initial_state, g)
    if g is not None:
        o, hk, hv, _ = _ops.chunk(q, k, v, s, g, scale, hk0, hv0, cu_seqlens, output_final_state, checkpoint_level)
        return o, ((hk, hv) if output_final_state else None)
    write, gate, z = _ops.abc_gates(_slot_logits(s, q, k), z0, cu_seqlens, False)
    o, hk, hv, _ = _ops.chunk(q, k, v, write, gate, scale, hk0, hv0, cu_seqlens, output_final_state, checkpoint_level)
    return o, ((hk, hv, z) if output_final_state else None)


def fused_recurrent_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | None = None,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """Gated Slot Attention token by token, in fp32 (fp64) throughout: short sequences, and a check on the chunked form.

    A NaN in the input reaches no position before it. Arguments, results and errors as :func:`chunk_gsa`, and:

    Args:
        reverse: visit the tokens of every sequence from last to first; the initial state enters at the last token, the final state leaves
            at the first.
    """
    if state_indices is not None:
        return _prefill(q, k, v, s, g, scale, initial_state, output_final_state, cu_seqlens, state_indices, True, reverse)
    hk0, hv0, z0 = _unpack(initial_state, g)
    if g is not None:
        o, hk, hv = _ops.recurrent(q, k, v, s, g, scale, hk0, hv0, cu_seqlens, output_final_state, reverse)
        return o, ((hk, hv) if output_final_state else None)
    write, gate, z = _ops.abc_gates(_slot_logits(s, q, k), z0, cu_seqlens, reverse)
    o, hk, hv = _ops.recurrent(q, k, v, write, gate, scale, hk0, hv0, cu_seqlens, output_final_state, reverse)
    return o, ((hk, hv, z) if output_final_state else None)


def gsa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | None,
    g: Tensor | None,
    state: State,
    scale: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of decoding: the states are updated **in place**, the output is returned. No gradients.

    Args:
        q: ``[B, HQ, K]``; k: ``[B, H, K]``; v: ``[B, H, V]``; s, g: ``[B, H, M]``, either None as in :func:`chunk_gsa`.
        state: ``(Hk [P, H, K, M], Hv [P, H, M, V])``, in ABC ``(Hk, Hv, z [P, H, M])``, contiguous, fp32 (fp64 for fp64 inputs). Written.
            bf16 is allowed for 16-bit inputs: half the memory and time, but each step rounds the state to 8 bits. Where slots remember about 10, 170,
            1 200, 9 000 tokens the state is off by 0.4, 1.4, 4, 9 % (relative RMS) after 10 000 steps, o by 0.2, 0.3, 0.9, 3 %.
        scale: as in :func:`chunk_gsa`.
        state_indices: ``[B]`` int32 or int64: the row of the pool that belongs to each row of the batch, no row twice. -1: a padding row,
            whose o is 0 and which changes no state. None: P = B, row b.

    Returns:
        o ``[B, HQ, V]``, dtype of q.

    Raises:
        RuntimeError: grad mode is on and an input requires grad (use :func:`fused_recurrent_gsa`); the rest as :func:`chunk_gsa`.
    """
    hk, hv, z = _unpack(state, g, name="state")
    if hk is None or hv is None:
        raise ValueError("state: expected (Hk, Hv), given None; start from zeros of shapes [P, H, K, M] and [P, H, M, V]")
    return step(q, k, v, s, g, hk, hv, z, scale, state_indices)


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor | None, scale: float | None, pool: State | None, output_final_state: bool,
    cu_seqlens: Tensor | None, state_indices: Tensor, recurrent: bool, reverse: bool,
) -> tuple[Tensor, State | None]:
    hk, hv, z = _unpack(pool, g)
    if hk is None or hv is None:
        raise ValueError("initial_state: expected a pool of states, because there are state_indices, given None; "
                         "make one of zeros, of shapes [P, H, K, M] and [P, H, M, V]")
    if g is None:
        s = _slot_logits(s, q, k)
    return _ops.prefill(q, k, v, s, g, hk, hv, z, scale, state_indices, cu_seqlens, recurrent, reverse), (pool if output_final_state else None)


def _unpack(state: Any, g: Tensor | None, name: str = "initial_state") -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if state is None:
        return None, None, None
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple of tensors, given {type(state).__name__}")
    want = 2 if g is not None else 3
    if len(state) != want:
        raise ValueError(f"{name}: expected {'(Hk, Hv)' if want == 2 else '(Hk, Hv, z), because g is None (ABC)'}, given a tuple of {len(state)}; "
                         "hand on the final state as it was returned")
    return state[0], state[1], state[2] if want == 3 else None


def _slot_logits(s: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """What ABC (g is None) asks of s beyond what the ops check."""
    if s is None:
        raise ValueError("s and g are both None: give g (coupled write s = 1 - exp(g)), s (ABC: raw slot logits), or both")
    if s.dim() != 4 or s.shape[:3] != k.shape[:3]:
        raise ValueError(f"s: expected shape [B, T, H, M] = [{', '.join(map(str, k.shape[:3]))}, M], given {list(s.shape)}")
    if s.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"s: expected q's dtype {q.dtype} or float32, given {s.dtype}")
    return s


def _check_host_lengths(lengths: Tensor, q: Tensor) -> None:
    values = lengths.tolist()
    if not values or values[0] != 0 or values[-1] != q.shape[1] or any(b < a for a, b in zip(values, values[1:])):
        raise ValueError(f"cu_seqlens_cpu: expected 0 = c[0] <= c[1] <= ... <= c[N] = T = {q.shape[1]}, given {values}")
