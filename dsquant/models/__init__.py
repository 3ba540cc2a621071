"""Models by upstream name, and where each family's quantization sites are."""

from dsquant.models.registry import build_model, describe, insert_sites
from dsquant.models.sites import Sites

__all__ = ["Sites", "build_model", "describe", "insert_sites"]
