"""Turn a run's last checkpoint, or that of one of its stages, into one file: packed, or float weights."""

import sys

import fire

from dsquant.convert import convert_run, export_float
from dsquant.errors import DsquantError


def convert(run: str, out: str, stage: str | None = None, step: int | None = None, as_float: bool = False) -> None:
    """Write the packed model of RUN to OUT, or with --as_float its float32 weights, for `model.checkpoint`.

    Args:
        run: the run folder; its checkpoint may be of any ZeRO stage and number of ranks.
        out: the file to write, for example model.packed.safetensors; an older one is replaced.
        stage: a stage of the recipe; the last one with a checkpoint by default.
        step: of its kept checkpoints, that of this step, such as `best_step` of summary.json; the newest by default.
        as_float: write plain safetensors with upstream names; of a quantized stage, its latents.
    """
    stage = None if stage is None else str(stage)
    if as_float:
        print(export_float(str(run), str(out), stage, step))
        return
    packed = convert_run(str(run), str(out), stage, step)
    print(f"{packed.path}: {packed.file_bytes:,} bytes, {packed.float_bytes:,} in float32")
    for n_bits, stored in packed.bits_per_weight.items():
        print(f"{n_bits}-bit weights take {stored:.3f} bits each")


if __name__ == "__main__":
    try:
        fire.Fire(convert, name="convert.py")
    except DsquantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
