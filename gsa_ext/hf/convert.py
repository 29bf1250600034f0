"""``convert``: softmax attention out, Gated Slot Attention in, and the presets that say how."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from transformers import PreTrainedModel

from gsa_ext.hf.attention import GSAAttention
from gsa_ext.hf.families import FAMILIES, adopt, attention_layers, gsa_classes

Model = TypeVar("Model", bound=PreTrainedModel)

#: What a preset sets. Each value that a function argument of :func:`convert` names can be overridden.
#:   num_slots              slots per key/value head
#:   gate                   "proj": a new projection f_proj of the hidden states
#:   gate_logit_normalizer  tau in g = logsigmoid(f) / tau
#:   gate_spread            standard deviation of the gate's logits at the start; None: whatever weights of the model's initializer_range give
#:   half_lives             (shortest, longest) half-life of what the slots hold at the start, in tokens, by f_proj's bias; None: no bias
#:   silu                   silu on q, k and v
#:   rope                   "keep" or "drop" the rotation of q and k
#:   scale                  factor on the slot logits; "head_dim": head_dim ** -0.5
#:   norm                   RMSNorm(silu(o)), g_norm, before the output projection
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2409.07146, section 4.3 (Mistral 7B to GSA): weights copied, the layer is the paper's. Not function-preserving.
    "paper": {"num_slots": 64, "gate": "proj", "gate_logit_normalizer": 8.0, "gate_spread": None, "half_lives": None,
              "silu": True, "rope": "drop", "scale": 1.0, "norm": True},
    # As near to the softmax attention as GSA can start. q, k, v, rotation and scale untouched, no norm, and gates that are nearly always open or
    # shut: a slot holds the key and value of one past token, so that the output is softmax attention over a sample of the past, dense where it is recent.
    # Bits per byte on a teacher like the embedded one (1.66): gates that only average over time 3.85 before and 2.56 after 60 steps, these 2.08 and 1.82;
    # rotation dropped, 4.0 before. Half-lives between 2 and 90 tokens and spreads from 3 to 25 end within 0.04 of each other.
    "t2r": {"num_slots": 64, "gate": "proj", "gate_logit_normalizer": 1.0, "gate_spread": 9.0, "half_lives": [2.0, 44.0],
            "silu": False, "rope": "keep", "scale": "head_dim", "norm": False},
}


def convert(
    model: Model,
    preset: str = "t2r",
    layers: str | Iterable[int] = "all",
    *,
    num_slots: int | None = None,
    gate: str | None = None,
    rope: str | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Model:
    """Swaps softmax attention layers of a Hugging Face causal LM for Gated Slot Attention, in place.

    The query, key, value and output projections stay, under their names; ``f_proj``, the gate, is new (and ``g_norm`` with "paper"). The model's
    class becomes a subclass of what it was, with model_type ``gsa_<original>``; it trains, generates, saves and loads
    (after ``import gsa_ext.hf``) as before. Further layers can be converted later, each layer once. If the conversion fails, the model is as it was.

    Args:
        model: a causal LM of a family in ``gsa_ext.hf.FAMILIES``.
        preset: "t2r", as near to the original function as GSA can start, or "paper" (arXiv 2409.07146). See ``gsa_ext.hf.PRESETS``.
        layers: "all", or the indices of the layers to convert (negative ones count from the end).
        num_slots: slots per key/value head; the memory of a layer is ``2 * num_slots * head_dim`` numbers per key/value head.
        gate: "proj", a new projection ``f_proj``.
        rope: "keep" or "drop" the rotary position embedding of q and k.
        scale: factor on the slot logits.
        window: of presets with a sliding window; there is none yet.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: not a transformers model. ValueError: unknown family, preset, layer or value; a layer that is converted already.
        NotImplementedError: an option or preset that is planned, not there.

    Example::

        model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B", dtype=torch.bfloat16)
        gsa_ext.hf.convert(model)
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers causal language model, given {type(model).__name__}"
                        + ("; convert before wrapping it" if hasattr(model, "module") or hasattr(model, "base_model") else ""))
    model_type = model.config.model_type.removeprefix("gsa_")
    if model_type not in FAMILIES:
        raise ValueError(f"model: no conversion for model_type {model.config.model_type!r}; there is one for {', '.join(FAMILIES)}")
    family, (config_class, _, gsa_lm) = FAMILIES[model_type], gsa_classes(model_type)
    original = gsa_lm.__bases__[-1]
    if type(model) not in (gsa_lm, original):
        raise ValueError(f"model: expected a {original.__name__}, given {type(model).__name__}")

    settings = _settings(preset, model, num_slots=num_slots, gate=gate, rope=rope, scale=scale, window=window)
    chosen = _chosen(layers, model.config.num_hidden_layers)
    decoder = attention_layers(model, family)
    for i in chosen:
        attention = getattr(decoder[i], family.attention)
        if isinstance(attention, GSAAttention):
            raise ValueError(f"layers: layer {i} is a GSA layer already; give the indices of softmax layers, or load the original model")
        if hasattr(attention, "_hf_hook"):
            raise ValueError(f"layers: layer {i} carries an accelerate hook (device_map split or offloaded the model); "
                             "load it on one device, convert it, then distribute it")

    config = copy.deepcopy(model.config)
    config.__class__ = config_class
    done = (getattr(config, "gsa", None) or {}).get("layers", {})
    for i in chosen:
        norm = getattr(decoder[i], family.input_norm) if family.input_norm else None
        done[str(i)] = {**settings, "gate_std": _gate_std(settings, model, norm)}
    config.gsa = {"layers": {i: done[i] for i in sorted(done, key=int)}}
    adopt(model, config)
    return model


def _settings(preset: str, model: PreTrainedModel, **given: Any) -> dict[str, Any]:
    """A preset's settings with the overrides, checked: plain JSON."""
    if preset == "liger":
        raise NotImplementedError(f"preset 'liger' (gates from the keys, beside a sliding window) is not there yet; there are {', '.join(PRESETS)}")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, given {preset!r}")
    if given["gate"] == "key":
        raise NotImplementedError("gate='key' (gates from the keys) is not there yet; use gate='proj'")
    if given.pop("window") is not None:
        raise ValueError(f"window: preset {preset!r} has no sliding window; leave window out")
    settings = {"preset": preset, **copy.deepcopy(PRESETS[preset]), **{name: value for name, value in given.items() if value is not None}}
    if settings["scale"] == "head_dim" and given["scale"] is None:
        settings["scale"] = _head_dim(model) ** -0.5
    _check("num_slots", settings["num_slots"], int, lambda x: x >= 1, "a whole number, at least 1")
    _check("scale", settings["scale"], (int, float), lambda x: 0 < x < math.inf, "a positive number")
    _check("gate", settings["gate"], str, lambda x: x == "proj", "'proj'")
    _check("rope", settings["rope"], str, lambda x: x in ("keep", "drop"), "'keep' or 'drop'")
    settings["scale"] = float(settings["scale"])
    return settings


def _check(name: str, value: Any, types: Any, holds: Callable[[Any], bool], expected: str) -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, given {value!r} of type {type(value).__name__}")
    if not holds(value):
        raise ValueError(f"{name}: expected {expected}, given {value!r}")


def _gate_std(settings: dict[str, Any], model: PreTrainedModel, norm: Any) -> float:
    """Standard deviation of f_proj's first weights. With a spread: the hidden states are normalised, then multiplied by the weights of ``norm``."""
    if settings["gate_spread"] is None:
        return float(model.config.initializer_range)
    size = math.sqrt(model.config.hidden_size) if norm is None or norm.weight.is_meta else norm.weight.float().norm().item()
    return settings["gate_spread"] / max(size, 1e-6)


def _head_dim(model: PreTrainedModel) -> int:
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads


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
