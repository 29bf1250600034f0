"""``convert``: softmax attention out, Gated Slot Attention in, and the presets that say how."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gsa_ext.hf.attention import GSAAttention
from gsa_ext.hf.families import FAMILIES, Family, adopt, attention_layers, gsa_classes

Model = TypeVar("Model", bound=PreTrainedModel)

#: What a preset sets. Each value that a function argument of :func:`convert` names can be overridden, where it means something.
#:   num_slots              slots per key/value head
#:   gate                   "proj": a new projection f_proj of the hidden states; "key": the keys, before rotation, averaged to one number per slot
#:   gate_logit_normalizer  tau in g = logsigmoid(f) / tau
#:   gate_floor             the lowest log gate; None: any. Sixteen tokens at -3.7 leave 1e-25.7 of a slot: the fast path of the portable CUDA kernels, which
#:                          ends at 1e-26, and fewer windows for those for Hopper
#:   gate_spread            standard deviation of the gate's logits at the start; None: whatever weights of the model's initializer_range give
#:   half_lives             (shortest, longest) half-life of what the slots hold at the start, in tokens, by f_proj's bias; None: no bias
#:   silu                   silu on q, k and v
#:   rope                   "keep" or "drop" the rotation of q and k in the slots' attention
#:   scale                  factor on the slot logits; "softmax": the one the softmax attention has
#:   norm                   RMSNorm(silu(o)), g_norm, before the output projection
#:   window                 tokens, the current one included, of a softmax attention beside the slots, rotated and scaled as the original; None: there is none
#:   mix                    the share that the window has in the output, or "learned": one share per query head, half at the start
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2409.07146, section 4.3 (Mistral 7B to GSA): weights copied, the layer is the paper's. Not function-preserving.
    "paper": {"num_slots": 64, "gate": "proj", "gate_logit_normalizer": 8.0, "gate_floor": None, "gate_spread": None, "half_lives": None,
              "silu": True, "rope": "drop", "scale": 1.0, "norm": True, "window": None, "mix": None},
    # Liger (arXiv 2503.01496), its GSA variant: nothing new to learn; half of the output is softmax attention to the last 64 tokens.
    "liger": {"num_slots": 128, "gate": "key", "gate_logit_normalizer": 16.0, "gate_floor": None, "gate_spread": None, "half_lives": None,
              "silu": False, "rope": "drop", "scale": 1.0, "norm": False, "window": 64, "mix": 0.5},
    # As near to the softmax attention as GSA can start. q, k, v, rotation and scale untouched, no norm, and gates that are nearly always open or
    # shut: a slot holds the key and value of one past token, so that the output is softmax attention over a sample of the past, dense where it is recent.
    # Bits per byte on a teacher like the embedded one (1.66): gates that only average over time 3.85 before and 2.56 after 60 steps, these 2.08 and 1.82;
    # rotation dropped, 4.0 before. Half-lives between 2 and 90 tokens and spreads from 3 to 25 end within 0.04 of each other. The floor costs 0.002 there (two
    # seeds, 80 steps); without it between 57 and 96 % of the blocks of 16 tokens fell off the fast path.
    "t2r": {"num_slots": 64, "gate": "proj", "gate_logit_normalizer": 1.0, "gate_floor": -3.7, "gate_spread": 9.0, "half_lives": [2.0, 44.0],
            "silu": False, "rope": "keep", "scale": "softmax", "norm": False, "window": None, "mix": None},
}
# t2r, and beside the slots a window, with a share per query head that is learned: the best in docs/evidence.md (1.058 bits per byte; t2r 1.108, liger 1.101,
# paper 1.700; the window alone 1.086).
PRESETS["t2r-window"] = {**PRESETS["t2r"], "window": 64, "mix": "learned"}


def convert(
    model: Model,
    preset: str = "t2r-window",
    layers: str | Iterable[int] = "all",
    *,
    num_slots: int | None = None,
    gate: str | None = None,
    rope: str | None = None,
    scale: float | None = None,
    window: int | None = None,
    mix: float | str | None = None,
) -> Model:
    """Swaps softmax attention layers of a Hugging Face causal LM for Gated Slot Attention, in place.

    The query, key, value and output projections (and norms of q and k) stay, under their names and with their storage; ``f_proj``, the gate, is new
    (and ``g_norm`` with "paper"). The model's class becomes a subclass of what it was, with model_type ``gsa_<original>``; it trains, generates, saves
    and loads (after ``import gsa_ext.hf``) as before. Further layers can be converted later, each layer once. If the conversion fails, the model is as
    it was. Convert first, then distribute: models that are sharded, or split over devices by accelerate, are refused. New parameters have the device and
    dtype of the projections; beside quantised ones, of the norms.

    Args:
        model: a causal LM of a family in ``gsa_ext.hf.FAMILIES``.
        preset: "t2r", as near to the original function as slots alone can start; "t2r-window", the same beside a sliding window, of the four the best after
            training (docs/evidence.md); "paper" (arXiv 2409.07146); or "liger" (arXiv 2503.01496), which has no new parameters and a window, too.
            See ``gsa_ext.hf.PRESETS``.
        layers: "all", or the indices of the layers to convert (negative ones count from the end).
        num_slots: slots per key/value head; the memory of a layer is ``2 * num_slots * head_dim`` numbers per key/value head.
        gate: "proj", a new projection ``f_proj``, or "key", no projection: the logits are the keys before rotation, averaged to one per slot
            (``g = logsigmoid(pool(k)) / 16``).
        rope: "keep" or "drop" the rotary position embedding of q and k in the slots' attention.
        scale: factor on the slot logits. None: the preset's, for "t2r" and "t2r-window" layer by layer the factor that the softmax attention had.
        window: softmax attention to this many tokens, the current one and those before it (padding not counted), beside the slots. Its keys and values
            are cached, so that decoding is what was trained. All presets but "paper".
        mix: with a window, its share of the output, in (0, 1], or "learned": a share per query head (``window_mix``) that starts at one half.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: not a transformers model, or an option of the wrong type. ValueError: a family, preset, layer or value that cannot be; a layer that is
        converted already; a model that is sharded.

    Example::

        model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B", dtype=torch.bfloat16)
        gsa_ext.hf.convert(model)
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers causal language model, given {type(model).__name__}"
                        + ("; convert before wrapping it" if hasattr(model, "module") or hasattr(model, "base_model") else ""))
    model_type = model.config.model_type.removeprefix("gsa_")
    if model_type not in FAMILIES:
        raise ValueError(f"model: no conversion for model_type {model.config.model_type!r}, because {_reason(model)}; "
                         f"there is one for {', '.join(FAMILIES)}")
    family, (config_class, _, gsa_lm) = FAMILIES[model_type], gsa_classes(model_type)
    original = gsa_lm.__bases__[-1]
    if isinstance(model, FSDPModule):
        raise ValueError("model: is sharded by fully_shard; convert first, then shard")
    if type(model) not in (gsa_lm, original):
        raise ValueError(f"model: expected a {original.__name__}, given {type(model).__name__}")

    settings = _settings(preset, num_slots=num_slots, gate=gate, rope=rope, scale=scale, window=window, mix=mix)
    chosen = _chosen(layers, model.config.num_hidden_layers)
    decoder = attention_layers(model, family)
    for i in chosen:
        _check_layer(i, decoder[i], family)

    config = copy.deepcopy(model.config)
    config.__class__ = config_class
    done = (getattr(config, "gsa", None) or {}).get("layers", {})
    for i in chosen:
        attention = getattr(decoder[i], family.attention)
        done[str(i)] = {**settings, "scale": float(attention.scaling if settings["scale"] == "softmax" else settings["scale"]),
                        "gate_std": _gate_std(settings, model, getattr(decoder[i], family.input_norm) if family.input_norm else None)}
    config.gsa = {"layers": {i: done[i] for i in sorted(done, key=int)}}
    adopt(model, config)
    return model


def _reason(model: PreTrainedModel) -> str:
    """Why there is no conversion for this model."""
    config: Any = model.config
    if config.model_type == "gsa":
        return "it is a Gated Slot Attention model already"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its positions are biases on pairs of tokens (ALiBi), which slots do not have"
    if not model.can_generate():
        return "it does not generate text (an encoder, or a model with another head)"
    if hasattr(config, "kv_lora_rank"):
        return "its attention is latent (keys and values compressed together)"
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return "it is multimodal"
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if not any("rotary" in name for name in names):
        return "it has no rotary position embedding"
    return "its attention is not known here"


def _check_layer(i: int, layer: Any, family: Family) -> None:
    attention = getattr(layer, family.attention)
    if isinstance(attention, GSAAttention):
        raise ValueError(f"layers: layer {i} is a GSA layer already; give the indices of softmax layers, or load the original model")
    if any(hasattr(module, "_hf_hook") for module in attention.modules()):
        raise ValueError(f"layers: layer {i} carries an accelerate hook (device_map split or offloaded the model); "
                         "load it on one device, convert it, then distribute it")
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in layer.parameters()):
        raise ValueError(f"layers: the parameters of layer {i} are sharded; convert first, then shard (fully_shard, tensor parallelism, ZeRO-3)")
    reason = family.refusal(attention)
    if reason:
        raise ValueError(f"layers: layer {i} {reason}")


def _settings(preset: str, **given: Any) -> dict[str, Any]:
    """A preset's settings with the overrides, checked: plain JSON. What depends on the layer is filled in later."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, given {preset!r}")
    given = {name: value for name, value in given.items() if value is not None}
    settings = {"preset": preset, **copy.deepcopy(PRESETS[preset]), **given}
    if "gate" in given:
        _check("gate", settings["gate"], str, lambda x: x in ("proj", "key"), "'proj' or 'key'")
        if settings["gate"] == "key":
            settings |= {"gate_logit_normalizer": PRESETS["liger"]["gate_logit_normalizer"], "gate_floor": None, "gate_spread": None, "half_lives": None}
    _check("num_slots", settings["num_slots"], int, lambda x: x >= 1, "a whole number, at least 1")
    _check("rope", settings["rope"], str, lambda x: x in ("keep", "drop"), "'keep' or 'drop'")
    if "scale" in given:
        _check("scale", settings["scale"], (int, float), lambda x: 0 < x < math.inf, "a positive number")
    if preset == "paper" and "window" in given:
        raise ValueError("window: preset 'paper' is slots alone, with a norm on their output; leave window out, or take 't2r' or 'liger'")
    if settings["window"] is not None:
        _check("window", settings["window"], int, lambda x: x >= 1, "a whole number of tokens, at least 1")
        settings["mix"] = 0.5 if settings["mix"] is None else settings["mix"]
        if settings["mix"] != "learned":
            _check("mix", settings["mix"], (int, float), lambda x: 0 < x <= 1, "a number in (0, 1], or 'learned'")
            settings["mix"] = float(settings["mix"])
    elif "mix" in given:
        raise ValueError(f"mix: preset {preset!r} has no sliding window to mix in; give window as well, or leave mix out")
    return settings


def _check(name: str, value: Any, types: Any, holds: Callable[[Any], bool], expected: str) -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, given {value!r} of type {type(value).__name__}")
    if not holds(value):
        raise ValueError(f"{name}: expected {expected}, given {value!r}")


@torch.no_grad()
def _gate_std(settings: dict[str, Any], model: PreTrainedModel, norm: Any) -> float:
    """Standard deviation of f_proj's first weights. With a spread: by the size of hidden states that ``norm`` has normalised."""
    hidden_size = model.config.hidden_size
    if settings["gate_spread"] is None:
        return float(model.config.initializer_range)
    size = math.sqrt(hidden_size)
    weight = getattr(norm, "weight", None)
    if norm is not None and not (weight is not None and weight.is_meta):
        where = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
        signs = (torch.randint(0, 2, (hidden_size,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1).to(**where)
        size = (norm(signs) - norm(torch.zeros_like(signs))).float().norm().item()
    return settings["gate_spread"] / max(size, 1e-6)


def _chosen(layers: str | Iterable[int], count: int) -> list[int]:
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers: expected 'all' or a list of indices, given {layers!r}")
        return list(range(count))
    chosen = list(layers)
    for i in chosen:
        _check("layers", i, int, lambda i: -count <= i < count, f"indices from {-count} to {count - 1}")
    chosen = [i % count for i in chosen]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers: expected at least one index, each once, given {chosen}")
    return sorted(chosen)
