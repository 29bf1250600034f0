"""Makes tests/data/gsa/<name>/: small random models of flash-linear-attention, with their logits, for tests/test_hf_gsa.py to compare with.

    python tests/data/make_gsa_fixtures.py            # a GPU, flash-linear-attention 0.6.0, transformers

Each folder has the peer's own config.json and model.safetensors, and data.safetensors: ``ids [B, T]`` and its fp32 ``logits [B, T, V]``.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "num_slots": 16, "vocab_size": 96, "intermediate_size": 96, "initializer_range": 0.15,
         "fuse_cross_entropy": False}
MODELS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "norm_eps": 1e-5},                    # as gsa-7B-mistral
    "no-affine": {"elementwise_affine": False, "num_kv_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "short-conv": {"use_short_conv": True, "num_kv_heads": 2},
    "relu": {"feature_map": "relu"},
    "t2r": {"feature_map": "t2r"},
    "wide-keys": {"exapnd_k": 0.5, "num_slots": None},
    "hybrid": {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 10000.0}},
    "hybrid-window": {"attn": {"layers": [0], "num_heads": 2, "qkv_bias": True, "window_size": 8}},
}


def main() -> None:
    import fla
    from fla.models import GSAConfig, GSAForCausalLM

    for name, options in MODELS.items():
        folder = Path(__file__).parent / "gsa" / name
        torch.manual_seed(0)
        model = GSAForCausalLM(GSAConfig(**{**SMALL, **options})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:                                  # norms and biases that are not all ones and zeros
                    parameter.add_(0.2 * torch.randn_like(parameter))
        ids = torch.randint(1, SMALL["vocab_size"], (2, 100))
        model.save_pretrained(folder)
        flash = "attn" in options                                        # flash attention has no fp32
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=flash):
            logits = model.cuda()(ids.cuda()).logits.float().cpu()
        save_file({"ids": ids, "logits": logits.contiguous()}, folder / "data.safetensors",
                  metadata={"flash-linear-attention": fla.__version__, "torch": torch.__version__, "autocast": "bfloat16" if flash else "off"})
        print(name, tuple(logits.shape), f"{logits.std():.3f}")


if __name__ == "__main__":
    main()
