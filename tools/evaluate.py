"""Run a packed model on the validation images of its run, or on other shards, and print its top-1."""

import sys

import fire

from dsquant.convert import evaluate_packed, validation_data
from dsquant.errors import ConfigError, DsquantError


def evaluate(
    packed: str,
    run: str | None = None,
    data: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    num_workers: int = 0,
) -> None:
    """Print the top-1 of a packed model.

    Args:
        packed: the packed file.
        run: the run folder whose validation images are to be taken; give this or --data.
        data: a folder or pattern of WebDataset shards.
        batch_size: images at a time; by default that of training's own evaluation, for the very same result.
        device: cuda or cpu; a GPU where there is one by default.
        num_workers: processes that decode images.
    """
    if (run is None) == (data is None):
        raise ConfigError("give either --run RUN or --data LOCATION")
    location = validation_data(str(run)) if data is None else str(data)
    found = evaluate_packed(str(packed), location, batch_size, device=device, num_workers=num_workers)
    print(f"top-1 {found['top1']:.2f} % of {found['samples']} images ({packed})")


if __name__ == "__main__":
    try:
        fire.Fire(evaluate, name="evaluate.py")
    except DsquantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
