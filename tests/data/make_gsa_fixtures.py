"""Makes tests/data/gsa/<name>/: small random models of flash-linear-attention, with their logits, for tests/test_hf_gsa.py to compare with.

    python tests/data/make_gsa_fixtures.py [folder]       # a GPU, flash-linear-attention 0.6.0, transformers

Each folder has the peer's config.json and model.safetensors (bf16, and exactly what the logits were computed from), and data.safetensors: ``ids [B, T]``
and ``logits [B, T, V]``, both computed in fp32: the peer's Triton kernels without TF32, and in one configuration each, because tuning takes minutes and
changes no result. Its softmax layers call flash_attn, which has no fp32; the definition is put in its place.
"""

import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path

os.environ["TRITON_F32_DEFAULT"] = "ieee"

import torch
import triton
from safetensors.torch import save_file
from triton.runtime.autotuner import Autotuner

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "num_slots": 16, "vocab_size": 48, "intermediate_size": 48, "initializer_range": 0.2,
         "fuse_cross_entropy": False}
MODELS = {
    "plain": {},
    "grouped": {"num_kv_heads": 1, "norm_eps": 1e-5},                    # as gsa-7B-mistral
    "no-affine": {"elementwise_affine": False, "exapnd_v": 2, "gate_logit_normalizer": 16},
    "tied": {"tie_word_embeddings": True},
    "short-conv": {"use_short_conv": True, "num_kv_heads": 1},
    "relu": {"feature_map": "relu", "intermediate_size": None, "hidden_ratio": 1},
    "t2r": {"feature_map": "t2r"},
    "narrow-keys": {"hidden_size": 64, "exapnd_k": 0.5, "num_slots": None, "num_hidden_layers": 1},
    "hybrid": {"attn": {"layers": [1], "num_heads": 2, "num_kv_heads": 1, "rope_theta": 500.0}},
    "hybrid-window": {"attn": {"layers": [0], "num_heads": 1, "qkv_bias": True, "window_size": 8}},
}
T = 70                                                                   # above 64 the peer's layer takes its chunked kernels


def attention(q, k, v, causal, window_size):
    """flash_attn_func by its definition. q ``[B, T, HQ, D]``, k and v ``[B, T, H, D]``."""
    back = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(q.shape[1], device=q.device)
    seen = (back >= 0) & ((back <= window_size[0]) if window_size[0] >= 0 else True)
    assert causal
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).double() for x in (k, v))
    p = torch.einsum("bihd,bjhd->bhij", q.double(), k).mul(q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v).to(q.dtype)


def main(folder: Path) -> None:
    flash = types.ModuleType("flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    flash.flash_attn_func, flash.flash_attn_varlen_func = attention, None
    sys.modules["flash_attn"] = flash
    init = Autotuner.__init__
    Autotuner.__init__ = lambda self, fn, names, configs, *args, **kwargs: init(self, fn, names, configs[:1], *args, **kwargs)

    import fla
    from fla.models import GSAConfig, GSAForCausalLM

    for name, options in MODELS.items():
        torch.manual_seed(0)
        model = GSAForCausalLM(GSAConfig(**{**SMALL, **options})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:                                  # norms and biases that are not all ones and zeros
                    parameter.add_(0.2 * torch.randn_like(parameter))
                parameter.copy_(parameter.to(torch.bfloat16))
        ids = torch.randint(1, SMALL["vocab_size"], (2, T))
        model.save_pretrained(folder / name, state_dict={key: x.to(torch.bfloat16) for key, x in model.state_dict().items()
                                                         if key != "lm_head.weight" or not model.config.tie_word_embeddings})
        with torch.no_grad():
            logits = model.cuda()(ids.cuda(), use_cache=False).logits.cpu()
        assert logits.dtype == torch.float32 and logits.isfinite().all()
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        for wrong in {"exapnd_k", "exapnd_v"} & options.keys():          # the peer takes one spelling and writes the other; the hub has the first
            config[wrong] = config.pop(wrong.replace("exapnd", "expand"))
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file({"ids": ids, "logits": logits.contiguous()}, folder / name / "data.safetensors",
                  metadata={"flash-linear-attention": fla.__version__, "torch": torch.__version__, "triton": triton.__version__})
        print(name, tuple(logits.shape), f"{logits.std():.3f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "gsa")
