"""Say what memory and traffic a run will take, before it starts: no device, no data and no weights are needed."""

import sys

import fire

from dsquant.errors import DsquantError


def main(recipe: str, gpus: int, gpu_gib: float, nodes: int = 1, json: bool = False, **options) -> None:
    """Print what each ds_config takes on a rank, and which to take.

    Args:
        recipe: name of a recipe in dsquant/recipes, or the path of a YAML file.
        gpus: GPUs of a node. gpu_gib: GiB of memory of each. nodes: how many.
        json: print JSON in place of a table; sizes in bytes.
        options: --stage NAME, --batch SAMPLES_A_PASS, --model NAME, --device cpu, --reserve_gib G, and dotted overrides as
            for train.py.
    """
    from dsquant.plan import as_json, plan, show

    found = plan(recipe, gpus, gpu_gib, nodes, **options)
    print(as_json(found)) if json else show(found)


if __name__ == "__main__":
    try:
        fire.Fire(main, name="plan.py")
    except DsquantError as error:
        sys.exit(f"dsquant: {error}")
