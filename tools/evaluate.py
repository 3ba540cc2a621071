"""Run a packed model on the validation samples of its run, or on other shards, and print how it scores."""

import sys

import fire

from dsquant.convert import evaluate_packed, validation_data
from dsquant.errors import ConfigError, DsquantError
from dsquant.run_folder import TOKENIZER


def evaluate(
    packed: str,
    run: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    num_workers: int = 0,
) -> None:
    """Print the top-1 of a packed model, or the metric of its recipe.

    Args:
        packed: the packed file.
        run: the run folder whose validation samples are to be taken; give this or --data.
        data: a folder or pattern of WebDataset shards.
        tokenizer: folder of a text model's tokenizer; that of RUN, or the one beside the file, by default.
        batch_size: samples at a time; by default that of training's own evaluation, for the very same result.
        device: cuda or cpu; a GPU where there is one by default.
        num_workers: processes that decode samples.
    """
    if (run is None) == (data is None):
        raise ConfigError("give either --run RUN or --data LOCATION")
    location = validation_data(str(run)) if data is None else str(data)
    if run is not None and tokenizer is None:
        tokenizer = f"{run}/{TOKENIZER}"
    found = evaluate_packed(
        str(packed), location, batch_size, tokenizer=tokenizer, device=device, num_workers=num_workers
    )
    scores = {name: value for name, value in found.items() if name not in ("loss", "samples")}
    for name, value in scores.items():
        print(f"{name.replace('top1', 'top-1')} {value:.2f} % of {found['samples']} samples ({packed})")


if __name__ == "__main__":
    try:
        fire.Fire(evaluate, name="evaluate.py")
    except DsquantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
