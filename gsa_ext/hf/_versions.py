"""Refuses a transformers that is too new, before anything of it is used."""

import transformers

if tuple(int(x) for x in transformers.__version__.split(".")[:2]) >= (5, 24):
    # from 5.24 on forward calls `cache` what was `past_key_values`, in models and in their layers
    raise ImportError(f"gsa_ext.hf works with transformers 5.17 to 5.23, found {transformers.__version__}: pip install 'transformers<5.24'")
