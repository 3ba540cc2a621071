"""Name the first number of a training step that is not finite: what stops a run when skipping steps has not helped.

Hooks read every tensor back from the device, so nothing of this is there while training goes well.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


def first_nonfinite(
    module: nn.Module, inputs: Any, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]
) -> str | None:
    """Return where the first number that is not finite appears as a step is taken again, or None where all are finite.

    Looked at in the order of computation: the inputs, the output of each module, the loss; then the gradients of these outputs
    and of parameters, in the order of the backward pass. `forward` returns the loss.
    """
    found = [] if _finite(inputs) else ["the inputs of the model"]
    handles = list(_watch(module, found))
    try:
        loss = forward()
        if not found and not _finite(loss):
            found.append("the loss, though what the model puts out is finite")
        backward(loss)  # also after a find: on other ranks it waits for this one
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _watch(module: nn.Module, found: list[str]) -> Iterator[Any]:
    def look(what: str, value: Any) -> None:
        if not found and not _finite(value):
            found.append(what)

    def of_output(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            look(f"the output of {name}", output)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: look(f"the gradient of the output of {name}", gradient))

        return hook

    def of_parameter(name: str) -> Callable[[Tensor], None]:
        return lambda gradient: look(f"the gradient of {name}", gradient)

    for name, part in module.named_modules():
        yield part.register_forward_hook(of_output(name or "the model"))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield parameter.register_hook(of_parameter(name))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors in tensors, dicts, tuples and lists."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(value))
