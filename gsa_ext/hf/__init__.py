"""Hugging Face models with Gated Slot Attention: conversion in place, generation with constant memory, saving and loading.

Importing this module is what teaches ``AutoModelForCausalLM.from_pretrained`` to load converted models and those with model_type "gsa".
"""

import gsa_ext.hf._versions  # noqa: F401 (before what needs it)
from gsa_ext.hf.attention import GSAAttention
from gsa_ext.hf.cache import GSACacheLayer, cache_bytes
from gsa_ext.hf.convert import PRESETS, convert
from gsa_ext.hf.families import FAMILIES, register
from gsa_ext.hf.graph import decode_graph
from gsa_ext.hf.model import GSAConfig, GSAForCausalLM, GSAModel

__all__ = ["FAMILIES", "PRESETS", "GSAAttention", "GSACacheLayer", "GSAConfig", "GSAForCausalLM", "GSAModel", "cache_bytes", "convert", "decode_graph",
           "register"]

register(GSAConfig, GSAModel, GSAForCausalLM)
