"""Models by upstream name, and where each family's quantization sites are."""

from dsquant.models.inputs import Inputs, logits_of, model_outputs, move
from dsquant.models.registry import build_model, describe, insert_sites, portable, text_model, tokenizer_location
from dsquant.models.sites import Sites

__all__ = [
    "Inputs",
    "Sites",
    "build_model",
    "describe",
    "insert_sites",
    "logits_of",
    "model_outputs",
    "move",
    "portable",
    "text_model",
    "tokenizer_location",
]
