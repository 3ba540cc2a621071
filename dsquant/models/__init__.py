"""Models by upstream name, and where each family's quantization sites are."""

from dsquant.models.inputs import Inputs, logits_of, model_outputs, move
from dsquant.models.registry import (
    build_model,
    describe,
    insert_sites,
    portable,
    stop_dropout,
    text_model,
    tokenizer_location,
    word_embeddings,
)
from dsquant.models.sites import Sites
from dsquant.models.weights import Weights, open_weights, skeleton

__all__ = [
    "Inputs",
    "Sites",
    "Weights",
    "build_model",
    "describe",
    "insert_sites",
    "logits_of",
    "model_outputs",
    "move",
    "open_weights",
    "portable",
    "skeleton",
    "stop_dropout",
    "text_model",
    "tokenizer_location",
    "word_embeddings",
]
