"""Packed models: write them, read them, run them. Nothing here knows how a model was trained."""

from dsquant.export.packed import PackedInfo, PackedModel, read_packed, write_packed
from dsquant.export.runtime import PackedConv2d, PackedLinear, load_packed

__all__ = ["PackedConv2d", "PackedInfo", "PackedLinear", "PackedModel", "load_packed", "read_packed", "write_packed"]
