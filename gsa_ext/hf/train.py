"""Pieces for training converted models: which parameters are new, attention transfer, distillation from logits, LoRA. Each works by itself.

    convert(model)
    optimizer = torch.optim.AdamW(train_only(model, new_parameters(model)))      # 1. transfer: each layer learns to do what its softmax attention did
    transfer_loss(model, input_ids=ids).backward()
    model = get_peft_model(model, lora_config(model))                            # 2. or train_only(model), for all of it
    model(ids, labels=ids).loss.backward()                                       #    and/or logit_kl(model(ids).logits, teacher_logits)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gsa_ext.hf.attention import GSAAttention, Tokens

NEW = ("f_proj", "g_norm", "window_mix")             # the modules of a GSA layer that the original model does not have


def gsa_layers(model: nn.Module) -> list[GSAAttention]:
    """The converted attention modules of ``model`` (wrapped or not), first to last.

    Raises:
        ValueError: there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, GSAAttention)]
    if not layers:
        raise ValueError("model: has no converted layers; gsa_ext.hf.convert it first")
    return layers


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that conversion added, by name: gates, output norms, window shares. Empty for "liger", which adds none."""
    gsa_layers(model)
    return {name: p for name, p in model.named_parameters() if any(f".{new}." in name for new in NEW)}


def train_only(model: nn.Module, parameters: dict[str, nn.Parameter] | None = None) -> list[nn.Parameter]:
    """Sets ``requires_grad`` of ``parameters`` alone (None: of all), and returns those that have it, for the optimizer."""
    chosen = None if parameters is None else {id(p) for p in parameters.values()}
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point() and (chosen is None or id(p) in chosen))
    return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def _instead(layers: Iterable[GSAAttention], make: Callable[[GSAAttention], Callable[..., Tensor]]) -> Iterator[None]:
    layers = list(layers)
    try:
        for layer in layers:
            layer.instead = make(layer)
        yield
    finally:
        for layer in layers:
            layer.instead = None


@contextmanager
def softmax_attention(model: nn.Module) -> Iterator[None]:
    """Within it the converted layers do softmax attention again, with the projections as they are now: as long as those are what they were, or with
    LoRA's adapters switched off, ``model`` is its own teacher. No cache: pass ``use_cache=False``."""
    with _instead(gsa_layers(model), lambda layer: layer.softmax_output):
        yield


def transfer_losses(model: nn.Module, relative: bool = False, **inputs: Any) -> list[Tensor]:
    """Attention transfer, layer by layer: the mean squared difference between what a GSA layer makes of its input and what its softmax attention makes
    of it, both after the output projection. Every layer is fed what the softmax model feeds it, and its gradients stay in it.

    Args:
        model: a converted model, best with ``train_only(model, new_parameters(model))``.
        relative: divide by the mean square of the softmax output, so that all layers count alike.
        **inputs: of the model: input_ids ``[B, T]``, attention_mask ``[B, T]`` (padding is not counted), cu_seq_lens_q ... ``labels`` is ignored.

    Returns:
        One loss per converted layer, fp32. Time quadratic in T, as softmax attention is.

    Raises:
        NotImplementedError: parameters sharded by ``fully_shard``, which gathers them for a model's forward and backward only.
    """
    layers = gsa_layers(model)
    if any(isinstance(p, DTensor) for p in layers[0].parameters()):
        raise NotImplementedError("attention transfer with sharded parameters is not supported; it trains few parameters: use one device or DDP")
    losses: dict[int, Tensor] = {}

    def compare(layer: GSAAttention) -> Callable[..., Tensor]:
        def forward(x: Tensor, position_embeddings: Any, tokens: Tokens | None) -> Tensor:
            target = layer.softmax_output(x, position_embeddings, tokens)
            mask = ... if tokens is None or tokens.mask is None else tokens.mask
            size = target.float().square().mean(-1)[mask].mean() if relative else 1.0
            with torch.enable_grad():
                error = layer.slots_output(x.detach(), position_embeddings, tokens).float() - target.float()
                losses[layer.layer_idx] = error.square().mean(-1)[mask].mean() / size
            return target
        return forward

    inputs = {name: x for name, x in inputs.items() if name != "labels"}
    grad = torch.is_grad_enabled()
    with _instead(layers, compare), torch.no_grad():
        getattr(model, "base_model", model)(**inputs, use_cache=False)
    return [losses[i] if grad else losses[i].detach() for i in sorted(losses)]


def transfer_loss(model: nn.Module, relative: bool = False, **inputs: Any) -> Tensor:
    """The mean of :func:`transfer_losses`."""
    losses = transfer_losses(model, relative, **inputs)
    return torch.stack([x.to(losses[0].device) for x in losses]).mean()


class AttentionTransfer(nn.Module):
    """:func:`transfer_loss` as a module, for DDP, ``Trainer`` and whatever else wraps one: ``forward(**inputs)`` gives ``{"loss": ...}``."""

    def __init__(self, model: nn.Module, relative: bool = False) -> None:
        super().__init__()
        self.model, self.relative = model, relative

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        return {"loss": transfer_loss(self.model, self.relative, **inputs)}


def logit_kl(logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's next-token distribution to the model's, in nats per token, times ``temperature ** 2``.

    Args:
        logits, teacher_logits: ``[B, T, vocabulary]``; computed in fp32. The teacher's get no gradient.
        mask: ``[B, T]``, 0 or False where a position does not count.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(f"teacher_logits: expected the shape of logits {list(logits.shape)}, given {list(teacher_logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, given {temperature}")
    p, q = (F.log_softmax(x.float() / temperature, dim=-1) for x in (teacher_logits.detach(), logits))
    divergence = (p.exp() * (p - q)).sum(-1)
    if mask is None:
        return temperature ** 2 * divergence.mean()
    weight = mask.to(divergence.dtype)
    return temperature ** 2 * (divergence * weight).sum() / weight.sum().clamp(min=1)


def lora_config(model: nn.Module, r: int = 8, lora_alpha: int = 8, **options: Any) -> Any:
    """A ``peft.LoraConfig`` for a converted model: adapters on the projections of q, k and v, and the new modules trained in full
    (``modules_to_save``). ``options``: any of LoraConfig's.

    Raises:
        ImportError: peft is not installed.
    """
    from peft import LoraConfig

    layer = gsa_layers(model)[0]
    saved = [name for name in NEW if getattr(layer, name, None) is not None]
    return LoraConfig(**{"r": r, "lora_alpha": lora_alpha, "target_modules": list(layer.projections), "modules_to_save": saved or None,
                         "task_type": "CAUSAL_LM", **options})
