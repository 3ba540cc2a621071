"""What a user gets wrong ends in one clear message and a non-zero exit, with no traceback and nothing half-written."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from dsquant.data import make_digits
from tests.integration.runs import TINY, ds_config, run, run_forked, train_command


def recipe_with(folder, **stage_keys):
    """Write the tiny recipe with more keys in its float stage."""
    tree = yaml.safe_load(TINY.read_text())
    tree["stages"]["fp"] |= stage_keys
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def clashing_ds_config(folder):
    path = folder / "clash.json"
    path.write_text(json.dumps(json.loads(ds_config("zero1").read_text()) | {"train_batch_size": 128}))
    return path


def shards_with(folder, harm):
    """Write the digits as shards, harm the second one for training, and return the options that name them."""
    make_digits(folder / "shards")
    harm(folder / "shards" / "train" / "train-0001.tar")
    return ["--data.source=shards", f"--data.train={folder}/shards/train", f"--data.val={folder}/shards/val"]


def cut(tar):
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])


def overwrite_an_image(tar):
    """Change the bytes of the first image only, so that nothing shows before it is decoded."""
    content = bytearray(tar.read_bytes())
    png = content.index(b"\x89PNG")
    content[png + 8 : png + 60] = bytes(52)
    tar.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory):
    """Return the folders of two finished runs of two steps a stage: the tiny recipe's, and one of another width."""
    folder = tmp_path_factory.mktemp("small")
    options = {"own": [], "other": ["--model.kwargs.embed_dim=32"]}

    def make(name):
        more = ["--max_steps", 2, "--checkpoint.every_steps=1", *options[name], "--out_dir", folder / name]
        return run_forked(train_command("--recipe", TINY, *more), folder / f"{name}.log").ok()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, options))
    return folder


def with_checkpoints_of(small_runs, folder, keep):
    """Copy a run, and give it those checkpoints of another model's run that match a pattern, and no others."""
    run_dir = shutil.copytree(small_runs / "own", folder / "run")
    shutil.rmtree(run_dir / "checkpoints")
    for path in (small_runs / "other" / "checkpoints").glob(keep):
        shutil.copytree(path, run_dir / "checkpoints" / path.parent.name / path.name)
    return ["--resume"]


# name: (options, what the message must hold); a function is called with the folder of the case and with small_runs
RULE = "--stages.w2a2.quant.rules=[{match: 'blocks.9.*', n_bits: 4}]"
CASES = {
    "unknown key in the recipe": (
        lambda folder, _: ["--recipe", recipe_with(folder, learning_rat=1e-3)],
        ["stages.fp.learning_rat", "0.001", "unknown key", "warmup"],
    ),
    "unknown key in an override": (["--stages.w2a2.quant.obr.wieght=1"], ["quant.obr.wieght", "unknown key", "weight"]),
    "unknown option": (["--max_step=3"], ["max_step", "unknown key"]),
    "wrong type": (["--stages.fp.batch_size=many"], ["stages.fp.batch_size", "'many'", "integer"]),
    "unknown recipe": (["--recipe", "digits_w3a3"], ["digits_w3a3", "digits_w2a2"]),
    "ds_config that clashes": (
        lambda folder, _: ["--ds_config", clashing_ds_config(folder)],
        ["train_batch_size", "128", "64", "ds_config"],
    ),
    "ds_config that is missing": (
        ["--ds_config", "ds_configs/zero9.json"],
        ["ds_configs/zero9.json", "does not exist"],
    ),
    "shard folder that is missing": (
        ["--data.source=shards", "--data.train=/no/such/folder", "--data.val=/no/such/folder"],
        ["/no/such/folder", "does not exist", "make_shards.py"],
    ),
    "truncated tar": (lambda folder, _: shards_with(folder, cut), ["train-0001.tar", "truncated"]),
    "image that cannot be decoded": (
        lambda folder, _: ["--max_steps", 30, "--data.num_workers=1", *shards_with(folder, overwrite_an_image)],
        ["train-0001.tar", "cannot decode"],
    ),
    "checkpoint of another model": (
        lambda folder, small: with_checkpoints_of(small, folder, "fp/step_00000001"),
        ["another model", "step_00000001"],
    ),
    "finished stage of another model": (
        lambda folder, small: with_checkpoints_of(small, folder, "fp/*"),
        ["another model", "step_00000002"],
    ),
    "finished run of another model": (
        lambda folder, small: with_checkpoints_of(small, folder, "*/*"),
        ["another model", "step_00000002"],
    ),
    "folder that holds a run": (
        lambda folder, small: [] if shutil.copytree(small / "own", folder / "run") else None,
        ["already holds a run", "--resume", "--out_dir"],
    ),
    "nothing to resume": (["--resume"], ["nothing to resume", "recipe.yaml"]),
    "another recipe on resume": (
        lambda folder, small: ["--resume", "--seed=5"] if shutil.copytree(small / "own", folder / "run") else None,
        ["seed was 0 and is now 5", "--out_dir"],
    ),
    "batch that does not divide": (
        ["--stages.w2a2.gradient_accumulation=3"],
        ["batch_size 64", "not divisible", "1 ranks x 3 accumulation steps"],
    ),
    "unknown model": (["--model.name=vit_tinny_patch16_224"], ["vit_tinny_patch16_224", "vit_tiny_patch16_224"]),
    "unknown backend": (["--backend=quant_linear=gpu"], ["'gpu'", "auto, torch, cpu"]),
    "backend that this machine lacks": (["--backend=cuda"], ["DSQ_BACKEND=cuda forces GPU code", "tensors on cpu"]),
    "rule that matches nothing": ([RULE], ["blocks.9.*", "matches no site", "patch_embed.proj"]),
}
OWN_RECIPE = {"unknown key in the recipe", "unknown recipe"}


@pytest.fixture(scope="module")
def ended(tmp_path_factory, small_runs):
    """Return, for every case, how its command ended and the folder it was given, all cases having run side by side."""
    top = tmp_path_factory.mktemp("errors")

    def attempt(case):
        options, folder = CASES[case][0], top / case.replace(" ", "_")
        folder.mkdir()
        options = options(folder, small_runs) if callable(options) else options
        fresh = [] if case in OWN_RECIPE or "--resume" in options else ["--recipe", TINY]
        steps = [] if "--resume" in options else ["--max_steps", 2]
        command = train_command(*fresh, *steps, "--out_dir", folder / "run", *options)
        before = {p for p in (folder / "run").rglob("*") if p.is_file()}
        return case, (run_forked(command, folder / "log"), folder / "run", before)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(attempt, CASES))


@pytest.mark.parametrize("case", CASES)
def test_a_users_error_ends_in_one_clear_message(ended, case):
    code, output = ended[case][0].code, ended[case][0].output
    assert code != 0, output
    assert "Traceback" not in output, output
    assert output.count("dsquant: ") == 1, output
    message = output.split("dsquant: ")[1]
    assert len(message.splitlines()) <= 6, output
    for part in CASES[case][1]:
        assert part in message, (part, message)


@pytest.mark.parametrize("case", CASES)
def test_a_users_error_leaves_nothing_half_written(ended, case):
    _, run_dir, before = ended[case]
    left = {p for p in run_dir.rglob("*") if p.is_file()}
    assert before <= left
    assert not [p for p in left if ".partial" in p.name or p.name.endswith(".tmp")]
    assert not [p for p in left - before if p.name in ("summary.json", "model.packed.safetensors", "report.html")]


FOUND_LATE = {"image that cannot be decoded"}


@pytest.mark.parametrize("case", [c for c in CASES if c not in FOUND_LATE and "model" not in c.split()[-2:]])
def test_a_users_error_is_found_before_the_first_training_step(ended, case):
    _, run_dir, before = ended[case]
    metrics = run_dir / "metrics.jsonl"
    assert metrics in before or not metrics.exists() or '"train"' not in metrics.read_text()


def test_on_two_ranks_the_message_appears_once(tmp_path):
    command = train_command("--stages.fp.lrr=1", "--out_dir", tmp_path / "run", ranks=2)
    ended = run(command, tmp_path / "log")
    assert ended.code != 0
    assert ended.output.count("stages.fp.lrr: unknown key") == 1, ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "run").exists()


def test_what_one_of_two_ranks_meets_ends_both_with_its_message(tmp_path):
    """The image that cannot be decoded is in the data of one rank alone; the other waits for it in a reduction."""
    options = ["--recipe", TINY, "--max_steps", 30, *shards_with(tmp_path, overwrite_an_image)]
    ended = run_forked(train_command(*options, "--out_dir", tmp_path / "run", ranks=2), tmp_path / "log", timeout=120)
    assert ended.code != 0
    assert ended.output.count("cannot decode") == 1, ended.output
    assert "Traceback" not in ended.output, ended.output
