"""Decoding with CUDA graphs: the step from one token to the next is recorded once and replayed, instead of hundreds of launches from Python per token."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from gsa_ext.hf._versions import CACHE, own_names
from gsa_ext.hf.cache import GSACacheLayer
from gsa_ext.layer import layer_state

Held = list[dict[str, Tensor]]                                               # the tensors of each layer, by name


@contextmanager
def decode_graph(model: PreTrainedModel) -> Iterator[None]:
    """Within it, ``model`` decodes single tokens by replaying a CUDA graph: the same kernels on the same numbers, without Python in between::

        with gsa_ext.hf.decode_graph(model):
            model.generate(**inputs, max_new_tokens=200)

    For ``generate`` in all its modes (greedy, sampling, beams), and for calls of ``model`` with one token ``[B, 1]`` and a cache, without gradients. A
    graph is recorded at the first such call for each batch size, and kept until the end of the ``with``; everything else (prompts, other arguments) runs
    as without. Caches may change, be reordered, and be used afterwards. Whatever replaces parameters (``to``, merging adapters) must happen outside. On
    the CPU there are no graphs: every step then runs as usual.

    Args:
        model: a converted causal LM or ``GSAForCausalLM``, all of whose layers are GSA layers, on one device.

    Raises:
        TypeError: not such a model. ValueError: a model with softmax layers, whose cache grows, or on several devices. RuntimeError, from the first step: a
        model that waits for the device in its forward pass (such as rotary embeddings that depend on the length), and so cannot be recorded.
    """
    _check(model)
    eager = model.forward
    own = vars(model).get("forward")
    steps = _Steps(eager)
    model.forward = functools.wraps(eager)(lambda *args, **kwargs: steps(*args, **kwargs))      # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own                                              # type: ignore[method-assign]


def _check(model: Any) -> None:
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or not (hasattr(config, "gsa") or config.model_type == "gsa") or not model.can_generate():
        raise TypeError(f"model: expected a causal LM with GSA layers, given {type(model).__name__}")
    softmax = config.attn is not None if config.model_type == "gsa" else len((config.gsa or {"layers": ()})["layers"]) < config.num_hidden_layers
    if softmax:
        raise ValueError("model: has softmax layers, whose keys and values grow with every token, so that no two steps are the same graph; "
                         "convert all layers (a sliding window beside the slots is fine)")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"model: expected one device, given {', '.join(sorted(map(str, devices)))}")


class _Steps:
    """``model.forward`` with a recorded step for each kind of call that can have one."""

    OPTIONS = {"logits_to_keep"}                                             # plain numbers that a recording depends on
    HANDLED = OPTIONS | {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"}

    def __init__(self, eager: Callable[..., Any]) -> None:
        self.eager, self.recorded = eager, dict[Hashable, _Step]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = own_names(kwargs if not args else {**kwargs, "input_ids": args[0]})
        if len(args) > 1 or not self.can(given):
            return self.eager(*args, **kwargs)
        ids, cache, mask, positions = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask", "position_ids"))
        assert ids is not None and cache is not None
        inputs = {"input_ids": ids, "position_ids": ids.new_full((1, 1), cache.get_seq_length()) if positions is None else positions}
        if mask is not None:
            inputs["attention_mask"] = mask[:, -1:]
        options = {name: given[name] for name in self.OPTIONS if name in given}
        autocast = torch.is_autocast_enabled(ids.device.type) and torch.get_autocast_dtype(ids.device.type)
        key = tuple((name, x.shape, x.dtype) for name, x in inputs.items()), *options.items(), autocast, *(x.dtype for x in cache.layers[0].tensors().values())
        if key not in self.recorded:
            self.recorded[key] = _Step(self.eager, inputs, options, [layer.tensors() for layer in cache.layers])
        return self.recorded[key](inputs, cache)

    def can(self, given: dict[str, Any]) -> bool:
        ids, cache, mask = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
        if torch.is_grad_enabled() or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1 or cache is None:
            return False
        if any(value is not None and value is not False for name, value in given.items() if name not in self.HANDLED):
            return False
        if any(given.get(name) is False for name in ("use_cache", "return_dict")) or not isinstance(given.get("logits_to_keep", 0), int):
            return False
        B, seen = ids.shape[0], cache.get_seq_length()
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] not in (1, seen + 1)):
            return False
        layers = [layer for layer in cache.layers if isinstance(layer, GSACacheLayer) and layer.slots is not None and layer.slots[0].shape[0] == B]
        return 0 < len(layers) == len(cache.layers)


class _Step:
    """One recorded step: buffers for the inputs and the states, which the recording reads and writes, and what replays it."""

    def __init__(self, eager: Callable[..., Any], inputs: dict[str, Tensor], options: dict[str, Any], states: Held) -> None:
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        self.held: Held = [{name: x.clone(memory_format=torch.contiguous_format) for name, x in layer.items()} for layer in states]
        self.owner: Callable[[], Any] = lambda: None                         # the cache whose layers hold these very states
        cache = DynamicCache()
        layers = [layer_state(cache, i, GSACacheLayer) for i in range(len(states))]

        def step() -> Any:
            for layer, held in zip(layers, self.held):
                layer.restore(held, 1)
            out = eager(**self.inputs, **options, **{CACHE: cache}, use_cache=True, return_dict=True)
            for layer, held in zip(layers, self.held):                       # what came as a new tensor
                for name, x in layer.tensors().items():
                    if x is not held[name]:
                        held[name].copy_(x)
            return out

        self.replay = step
        if self.inputs["input_ids"].is_cuda:
            self.replay = self._record(step)

    @staticmethod
    def _record(step: Callable[[], Any]) -> Callable[[], Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):                                               # libraries make their workspaces, on states that are not needed yet
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = step()
        except RuntimeError as error:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):                   # or torch's generator thinks that it goes on: no random numbers any more
                torch.zeros(1, device="cuda")
            raise RuntimeError("decode_graph: this model's step cannot be recorded, because its forward pass waits for the device or looks at numbers; "
                               f"generate without decode_graph ({error})") from error

        def replay() -> Any:
            graph.replay()
            return out

        return replay

    def __call__(self, inputs: dict[str, Tensor], cache: Any) -> Any:
        self._adopt(cache)
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        out = self.replay()
        for layer in cache.layers:
            layer.seen += 1
        return type(out)(logits=out.logits.clone(), **{CACHE: cache})

    def _adopt(self, cache: Any) -> None:
        """Makes the layers of ``cache`` hold the buffers, with their own contents; the cache that held them so far keeps a copy."""
        owner = self.owner()
        if owner is not cache:
            for layer, held in zip(owner.layers if owner is not None else (), self.held):
                now = layer.tensors()
                if any(now.get(name) is x for name, x in held.items()):
                    layer.restore({name: x.clone() for name, x in now.items()}, layer.seen)
            self.owner = weakref.ref(cache)
        for layer, held in zip(cache.layers, self.held):
            now = layer.tensors()
            if any(now[name] is not x for name, x in held.items()):
                for name, x in held.items():
                    if now[name] is not x:
                        x.copy_(now[name])
                layer.restore(held, layer.seen)
