"""A real run over damaged shards: it goes on, and says in its output and its record what was damaged."""

import os
import tarfile
from pathlib import Path

from dsquant.data import make_digits
from tests.integration.runs import TINY, ds_config, records, run_forked, train_command


def test_a_run_over_damaged_shards_goes_on_and_records_what_was_damaged(tmp_path):
    train, val = make_digits(tmp_path / "digits")
    with tarfile.open(train.urls[1]) as tar:
        cut = tar.getmembers()[-6].offset  # before the last three samples
    os.truncate(train.urls[1], cut)
    options = [f"--data.{name}={Path(shards.urls[0]).parent}" for name, shards in (("train", train), ("val", val))]
    options += ["--data.source=shards", "--data.max_damaged=5", "--data.num_workers=1", "--stages.w2a2=null"]
    options += ["--recipe", TINY, "--ds_config", ds_config("zero1"), "--max_steps=66", "--out_dir", tmp_path / "run"]
    ended = run_forked(train_command(*options, ranks=2), tmp_path / "log").ok()
    (record,) = records(tmp_path / "run", "data")
    lost = sorted(number for entry in record["damage"] for number in entry["samples"])
    assert lost == [train.counts[1] - back for back in (4, 3, 2, 1)]  # of a cut shard the last one is not trusted
    assert (record["stage"], record["step"], record["damaged"]) == ("fp", 66, 4)
    assert {entry["shard"] for entry in record["damage"]} == {train.urls[1]}
    cause = record["damage"][0]["cause"]
    assert cause.startswith(
        f"shard {train.urls[1]}: {train.counts[1] - 3} samples where {train.counts[1]} were counted"
    )
    assert any(f"rank {rank}, worker 0: " in ended.output and cause in ended.output for rank in (0, 1))
