"""Low-bit ops: one file an op, its plain PyTorch definition being the specification of every faster backend."""
