"""Which model families can be converted, and the classes that their converted models get: one row of ``FAMILIES`` per family.

For a family ``llama`` there are ``GsaLlamaConfig`` (model_type "gsa_llama"), ``GsaLlamaModel`` and ``GsaLlamaForCausalLM``, subclasses of the family's
own classes; they are attributes of this module and registered with the Auto classes.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from gsa_ext.hf._versions import CACHE, takes_cache
from gsa_ext.hf.attention import GateProjection, GSAAttention, Tokens, WindowMix
from gsa_ext.hf.cache import check_cache
from gsa_ext.hf.rotary import rotate_halves
from gsa_ext.layer import token_mask


@dataclass(frozen=True)
class Family:
    """How a family's attention is built. A family that differs in more than names overrides the methods."""

    model_type: str
    attention: str = "self_attn"                                             # attribute of a decoder layer
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")      # what the GSA module takes over: input projections, output projection
    norms: tuple[str, str] = ("q_norm", "k_norm")                            # of q and k, taken over where the attention has them
    wide_norms: bool = False                                                 # they normalise all heads together, not each by itself
    input_norm: str | None = "input_layernorm"                               # what normalises the attention's input, in a decoder layer
    rotary: str = "apply_rotary_pos_emb"                                     # in the family's modeling file
    keywords: bool = True                                                    # the decoder layer hands its keyword arguments on to the attention

    @property
    def output(self) -> str:
        return self.modules[-1]

    def heads(self, config: Any) -> tuple[int, int]:
        """Query heads and key/value heads."""
        return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    def head_dim(self, attention: nn.Module) -> int:
        return attention.head_dim                                            # type: ignore[return-value]

    def window(self, attention: Any) -> int | None:
        """The sliding window of the softmax attention itself, in tokens, the current one included."""
        if getattr(attention.config, "layer_types", None) and attention.config.layer_types[attention.layer_idx] != "sliding_attention":
            return None
        return attention.sliding_window if hasattr(attention, "sliding_window") else getattr(attention.config, "sliding_window", None)

    def rotates(self, attention: Any) -> bool:
        """Whether this layer rotates q and k (some families have layers without a position embedding)."""
        return getattr(attention, "use_rope", True)

    def refusal(self, attention: Any) -> str | None:
        """Why this layer cannot be converted, or None."""
        if getattr(attention, "attn_logit_softcapping", None) is not None:
            return (f"caps its attention logits at {attention.attn_logit_softcapping:g}, and slot logits cannot be capped; the cap hardly matters to trained "
                    "models: load the model with from_pretrained(..., attn_logit_softcapping=None), then convert it")
        if not getattr(attention, "is_causal", True):
            return "is bidirectional, and slots are filled from the past only"
        return None

    def divide(self, module: GSAAttention, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the input projections give, to q, k, v ``[B, T, heads, head_dim]``, normalised as the family does, before rotation."""
        q, k, v = outputs
        if self.wide_norms:
            q, k = self.normalise(module, q, k)
        q, k, v = (x.unflatten(-1, (-1, module.head_dim)) for x in (q, k, v))
        if not self.wide_norms:
            q, k = self.normalise(module, q, k)
        clip = module.clip
        return (q, k, v) if clip is None else (q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip))

    def normalise(self, module: GSAAttention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q_norm, k_norm = map(module._modules.get, self.norms)                # getattr takes long to find that there is none
        return q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)

    def rotate(self, module: GSAAttention, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The family's own rotation, of as many leading dimensions as there are angles."""
        if module.rotates_halves and not torch.compiler.is_compiling():  # a compiler sees through the formula
            return rotate_halves(q, k, cos, sin)
        n = cos.shape[-1]
        if n >= module.head_dim:
            return module.apply_rotary(q, k, cos, sin, unsqueeze_dim=2)
        rotated = module.apply_rotary(q[..., :n], k[..., :n], cos, sin, unsqueeze_dim=2)
        return torch.cat([rotated[0], q[..., n:]], -1), torch.cat([rotated[1], k[..., n:]], -1)


class FusedFamily(Family):
    """One projection for q, k and v: all query heads, then all key heads, then all value heads."""

    def divide(self, module: GSAAttention, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return outputs[0].unflatten(-1, (-1, module.head_dim)).split([module.num_heads, module.num_kv_heads, module.num_kv_heads], dim=-2)


class NeoXFamily(Family):
    """One projection for q, k and v, head by head; as many key/value heads as query heads."""

    def heads(self, config: Any) -> tuple[int, int]:
        return config.num_attention_heads, config.num_attention_heads

    def head_dim(self, attention: nn.Module) -> int:
        return attention.head_size                                           # type: ignore[return-value]

    def divide(self, module: GSAAttention, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return outputs[0].unflatten(-1, (-1, 3 * module.head_dim)).chunk(3, dim=-1)


class HeadwiseFamily(Family):
    """A norm of its own for every head, which expects heads before tokens."""

    def normalise(self, module: GSAAttention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().normalise(module, q.transpose(1, 2), k.transpose(1, 2))
        return q.transpose(1, 2), k.transpose(1, 2)


class LocalRotaryFamily(Family):
    """Only the layers with a sliding window rotate, where the model has such layers."""

    def rotates(self, attention: Any) -> bool:
        layer_types = getattr(attention.config, "layer_types", None) or ()
        return "sliding_attention" not in layer_types or layer_types[attention.layer_idx] == "sliding_attention"


#: Attention with rotated q and k, by model_type. Mixture-of-experts models keep their experts: only the attention is swapped.
FAMILIES: dict[str, Family] = {family.model_type: family for family in (
    Family("llama"),
    Family("mistral"),
    Family("mixtral"),
    Family("qwen2"),
    Family("qwen3"),
    Family("qwen3_moe"),
    Family("gemma2"),
    Family("gemma3_text"),
    FusedFamily("phi3", modules=("qkv_proj", "o_proj")),
    Family("olmo2", wide_norms=True, input_norm=None),
    Family("granite"),
    NeoXFamily("gpt_neox", attention="attention", modules=("query_key_value", "dense")),
    HeadwiseFamily("stablelm", norms=("q_layernorm", "k_layernorm"), keywords=False),
    Family("cohere"),
    LocalRotaryFamily("cohere2"),
    Family("smollm3"),
    Family("apertus", input_norm="attention_layernorm"),
    Family("arcee"),
    Family("cwm"),
    Family("ernie4_5"),
    Family("ernie4_5_moe"),
    LocalRotaryFamily("exaone4", input_norm=None),
    Family("flex_olmo", wide_norms=True, input_norm=None),
    Family("gemma"),
    Family("glm"),
    Family("glm4"),
    Family("glm4_moe"),
    Family("granitemoe"),
    Family("helium"),
    Family("ministral"),
    Family("nemotron", keywords=False),
    Family("olmo"),
    Family("olmo3", wide_norms=True, input_norm=None),
    Family("olmoe", wide_norms=True),
    Family("phi", modules=("q_proj", "k_proj", "v_proj", "dense"), norms=("q_layernorm", "k_layernorm")),
    Family("phimoe"),
    Family("qwen2_moe"),
    Family("seed_oss"),
    Family("starcoder2"),
    Family("vaultgemma"),
)}


def attention_layers(model: nn.Module, family: Family) -> list[nn.Module]:
    """The decoder layers of a base model or causal LM of this family."""
    base = model.base_model if isinstance(model, PreTrainedModel) else model
    return list(base.layers)                                                 # type: ignore[arg-type]


def install(model: PreTrainedModel, family: Family, layers: dict[str, dict[str, Any]]) -> None:
    """Puts GSA modules where ``layers`` (as in ``config.gsa["layers"]``) says, all or none."""
    decoder = attention_layers(model, family)
    made = {int(i): GSAAttention(decoder[int(i)], family, settings) for i, settings in layers.items()}
    for i, module in made.items():
        setattr(decoder[i], family.attention, module)
        if not family.keywords:
            decoder[i].register_forward_pre_hook(_hand_down, with_kwargs=True)


def _hand_down(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """For decoder layers that pass no keyword arguments on, but a mask: in its place. Gradient checkpointing keeps arguments, and runs the layer again after
    other calls, in newer versions of transformers without this hook."""
    return args, {**kwargs, "attention_mask": kwargs.get("gsa_tokens")}


MODULE = "modeling_gsa_ext"
SOURCE = '''"""Lets tools that do not import gsa_ext load this model with trust_remote_code=True; gsa_ext must be installed."""

import gsa_ext.hf  # noqa: F401
from {module} import {names}
'''


class GSAModelMixin:
    """What all models with GSA layers share. A saved one brings a module that imports gsa_ext, and an ``auto_map`` that names it."""

    _is_stateful = True                                                      # generate: no assisted decoding
    _supports_context_parallel = False                                       # ranks would have to hand on their slots

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers does; and the module."""
        config, model, lm = [kind.__name__ for kind in _auto_classes(self.config_class)]      # type: ignore[attr-defined]
        self.config.auto_map = {"AutoConfig": f"{MODULE}.{config}", "AutoModel": f"{MODULE}.{model}",            # type: ignore[attr-defined]
                                "AutoModelForCausalLM": f"{MODULE}.{lm}"}
        if kwargs.get("is_main_process", True):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            Path(save_directory, f"{MODULE}.py").write_text(SOURCE.format(module=type(self).__module__, names=", ".join(sorted((config, model, lm)))))
        super().save_pretrained(save_directory, *args, **kwargs)             # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """transformers asks for it after loading by ``auto_map``, and would save a copy of this file from then on. Nothing to do."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' own would give wrong tokens."""
        raise NotImplementedError("continuous batching (generate_batch) keeps keys and values in pages, which GSA layers do not have; use generate")


def _auto_classes(config: Any) -> tuple[Any, Any, Any]:
    return config, MODEL_MAPPING[config], MODEL_FOR_CAUSAL_LM_MAPPING[config]


class _GSAModule(GSAModelMixin):
    """What converted base models and causal LMs share."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (GateProjection, WindowMix)):
            module.reset_parameters()
        else:
            super()._init_weights(module)                                    # type: ignore[misc]


class _GSAModel(_GSAModule):
    """Tells the GSA layers about padding and packing, of which softmax layers learn by masks between pairs of tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)                                             # type: ignore[call-arg]
        install(self, FAMILIES[config.model_type.removeprefix("gsa_")], config.gsa["layers"] if config.gsa else {})   # type: ignore[arg-type]

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the original model's. Padding: ``attention_mask [B, T]`` (``[B, seen + T]`` with a cache). Packing (B = 1): any one of
        ``cu_seq_lens_q [N + 1]``, ``seq_idx [1, T]``, or ``position_ids`` that restart."""
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        hybrid = len((self.config.gsa or {"layers": ()})["layers"]) < self.config.num_hidden_layers   # type: ignore[attr-defined]
        call = Call(inputs.shape[0], inputs.shape[1], attention_mask, position_ids, past_key_values, use_cache, kwargs,
                    train=self.training)                                                      # type: ignore[attr-defined]
        if call.tokens.cu_seqlens is not None:
            position_ids = call.position_ids
            if hybrid and call.tokens.mask is not None:
                if not call.tokens.mask.all():
                    raise ValueError("packed sequences with padding: softmax layers cannot tell the sequences apart; drop the padding and the attention_mask")
                attention_mask = None                                                         # transformers sees packing only without it

        if not hybrid:
            # No layer reads a mask between pairs of tokens. One that is 4-D already is passed through: nothing quadratic is built.
            attention_mask = inputs.new_empty(inputs.shape[0], 1, 0, 0, dtype=torch.bool)
        return super().forward(                                                               # type: ignore[misc]
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            use_cache=call.use_cache, gsa_tokens=call.tokens, **{CACHE: past_key_values}, **kwargs)


class _GSACausalLM(_GSAModule):
    def __init__(self, config: Any) -> None:
        super().__init__(config)                                             # type: ignore[call-arg]
        adopt(self, config)                                                  # type: ignore[arg-type]


def adopt(model: PreTrainedModel, config: Any) -> None:
    """Makes the plain causal LM inside ``model`` the converted one that ``config`` (of the converted class) describes."""
    family = FAMILIES[config.model_type.removeprefix("gsa_")]
    _, base_class, class_ = gsa_classes(family.model_type)
    done = (getattr(model.config, "gsa", None) or {}).get("layers", {}) if type(model.base_model) is base_class else {}
    new = config.gsa["layers"] if config.gsa else {}
    install(model, family, {i: settings for i, settings in new.items() if i not in done})
    before = {id(model.config), id(model.base_model.config)}
    for module in model.modules():
        if id(getattr(module, "config", None)) in before:
            module.config = config
    for part, converted in ((model.base_model, base_class), (model, class_)):
        part.__class__ = converted
        _record_outputs(part)


class Call:
    """What a model with GSA layers finds out about the arguments of a forward pass: checked, padding and packing in ``tokens``.

    Args:
        B, T: rows and tokens. attention_mask, position_ids, past_key_values, use_cache, kwargs: as given to the model.
        train: the model is in training mode; then there is no cache unless it is asked for.
    """

    def __init__(self, B: int, T: int, attention_mask: Any, position_ids: Tensor | None, past_key_values: Any, use_cache: bool | None,
                 kwargs: dict[str, Any], train: bool) -> None:
        check_cache(past_key_values)
        if kwargs.get("cache") is not None:
            raise ValueError("cache: paged caches hold keys and values, which GSA layers do not have; pass past_key_values")
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim != 2):
            raise ValueError("attention_mask: a model with GSA layers takes a padding mask [B, T] of zeros and ones; "
                             "masks between pairs of tokens mean nothing to a recurrent layer" +
                             ("" if isinstance(attention_mask, dict) else f", given {list(attention_mask.shape)}"))
        mask = None if attention_mask is None else token_mask(attention_mask, B, T, seen)
        lengths = kwargs.get("cu_seq_lens_q")
        cu_seqlens = _packing(B, T, mask, position_ids, kwargs.get("cu_seq_lens_k") if lengths is None else lengths, kwargs.get("seq_idx"))
        if cu_seqlens is not None:
            if use_cache or past_key_values is not None:
                raise ValueError("packed sequences cannot be cached: pass use_cache=False and no past_key_values, "
                                 "or give the sequences as a padded batch")
            use_cache = False
            position_ids = _restarting_positions(cu_seqlens, T) if position_ids is None else position_ids
        elif use_cache is None and past_key_values is None and train and torch.is_grad_enabled():
            use_cache = False
        self.tokens, self.position_ids, self.use_cache = Tokens(mask, cu_seqlens), position_ids, use_cache


def _packing(B: int, T: int, mask: Tensor | None, position_ids: Tensor | None, cu_seq_lens: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """cu_seqlens of packed sequences, or None. Looking at the contents of ``seq_idx`` and ``position_ids`` waits for the device, as transformers does."""
    if cu_seq_lens is not None:
        if B != 1:
            raise ValueError(f"cu_seq_lens_q: packed sequences need batch size 1, given {B}; lay the sequences end to end in one row")
        return cu_seq_lens
    if T <= 1:
        return None
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (B, T):
            raise ValueError(f"seq_idx: expected shape [B, T] = [{B}, {T}], given {list(seq_idx.shape)}")
        starts, name = seq_idx[:, 1:] != seq_idx[:, :-1], "seq_idx"
    elif position_ids is not None and position_ids.ndim == 2:
        starts, name = position_ids[:, 1:] != position_ids[:, :-1] + 1, "position_ids"
        if mask is not None:
            starts = starts & mask[:, 1:] & mask[:, :-1]                     # positions at padding are arbitrary
    else:
        return None
    if torch.compiler.is_compiling():                                        # whether there are any cannot be asked while tracing
        torch._assert_async((~starts).all(), f"packed sequences by {name} in a compiled model: pass cu_seq_lens_q as well")
        return None
    if not starts.any():
        return None
    if B != 1:
        raise ValueError(f"{name}: packed sequences (positions that restart) need batch size 1, given {B}; lay the sequences end to end in one row")
    inner = starts[0].nonzero()[:, 0] + 1
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), T)])


def _restarting_positions(cu_seqlens: Tensor, T: int) -> Tensor:
    t = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True)
    return (t - cu_seqlens.long()[sequence])[None]


@functools.cache
def gsa_classes(model_type: str) -> tuple[type, type, type]:
    """The converted config, base model and causal LM classes of a family, derived from its own."""
    config_base: Any = CONFIG_MAPPING[model_type]
    model_base: Any = MODEL_MAPPING[config_base]
    lm_base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_base]

    class Config(config_base):                                               # type: ignore[valid-type, misc]
        """The original configuration, and in ``gsa`` what was converted: ``{"layers": {"<index>": settings}}``."""

        gsa: dict[str, Any] | None = None

        @classmethod
        def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
            """As that of the models."""

    Config.model_type = f"gsa_{model_type}"
    Config.base_model_tp_plan = None                                         # the original's would split heads that f_proj knows nothing of
    names = [f"Gsa{base.__name__}" for base in (config_base, model_base, lm_base)]
    members = {"__module__": __name__, "config_class": Config}
    classes: tuple[type, type, type] = (
        Config,
        type(names[1], (_GSAModel, model_base), {**members, "__doc__": f"``{model_base.__name__}`` with GSA layers, see :func:`gsa_ext.hf.convert`."}),
        type(names[2], (_GSACausalLM, lm_base), {**members, "__doc__": f"``{lm_base.__name__}`` with GSA layers, see :func:`gsa_ext.hf.convert`."}),
    )
    for name, class_ in zip(names, classes):
        class_.__name__ = class_.__qualname__ = name
        globals()[name] = class_                                             # can be pickled and imported by name
    return classes


def _record_outputs(model: Any) -> None:
    """``output_hidden_states`` is looked up by class. transformers notes a class when it constructs a model of it, which conversion does not do."""
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return
    registry: Any = output_capturing._CAN_RECORD_REGISTRY
    registry[str(type(model)) if type(registry) is dict else model] = model._can_record_outputs     # the key is the model itself in newer versions


def register(*further: Any) -> None:
    """Registers the converted classes of every family that the installed transformers has, and ``further`` (config, base model, causal LM), with the
    Auto classes. ``import gsa_ext.hf`` does it."""
    for config, model, lm in [gsa_classes(name) for name in FAMILIES if name in CONFIG_MAPPING] + ([further] if further else []):
        AutoConfig.register(config.model_type, config, exist_ok=True)        # type: ignore[attr-defined]
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, lm, exist_ok=True)
