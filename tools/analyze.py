"""Where a model suffers from quantization: python tools/analyze.py sensitivity|outliers|oscillation|allocate|all --help"""

import sys

import fire

from dsquant.analysis.commands import Analyze
from dsquant.errors import DsquantError


def main(command: list[str] | None = None) -> int:
    """Run one command; give the exit status."""
    try:
        fire.Fire(Analyze, command=command, name="analyze.py")
    except DsquantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
