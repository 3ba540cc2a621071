"""Sharded low-bit quantization-aware training of transformers on DeepSpeed, and packed models that run."""

__version__ = "0.1.0"
