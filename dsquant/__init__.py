"""Sharded low-bit quantization-aware training of transformers on DeepSpeed, and packed models that run."""

__version__ = "0.1.0"


def describe(model) -> str:
    """Return a table of every quantization site of a model: method, bits, levels, granularity, groups, offset, bias, lr.

    model: a torch.nn.Module of a quantized stage, or from `dsquant.export.load_packed`. Raises ConfigError for a model that
    is not quantized. `import dsquant` alone loads no torch.
    """
    from dsquant.models import describe as table_of

    return table_of(model)
