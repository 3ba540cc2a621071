"""What the commands of `tools/bench.py` run: one file a command."""
