"""Sentences from tables to shards to tokens, with a small tokenizer made here."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizerFast

from dsquant.config import parse_config
from dsquant.data import (
    EvalStream,
    ShardSet,
    Tokenize,
    TrainStream,
    check_shards,
    copy_tokenizer,
    shard_text_table,
    write_shards,
)
from dsquant.data.reading import read_shard
from dsquant.data.text import decode_text
from dsquant.errors import ConfigError, DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "saved")
    return folder / "saved"


def sentence(number):
    return " ".join(f"w{(number + i) % 50}" for i in range(1 + number % 9))


@pytest.fixture
def table(tmp_path):
    """A headerless TSV of 40 sentences whose label is that of their number, modulo 3."""
    path = tmp_path / "train.tsv"
    path.write_text("".join(f"{sentence(i)}\t{i % 3}\n" for i in range(40)))
    return path


@pytest.fixture
def shards(table, tmp_path):
    return shard_text_table(table, tmp_path / "out", text_column=0, label_column=1, samples_per_shard=11)


def contents(shards):
    for url, count in zip(shards.urls, shards.counts, strict=True):
        for record in read_shard(url, count):
            yield record, json.loads(record["json"])


def test_a_tsv_becomes_shuffled_shards_with_an_index_and_classes(table, shards, tmp_path):
    assert shards.counts == (11, 11, 11, 7)
    assert ShardSet.open(tmp_path / "out") == shards
    assert (tmp_path / "out" / "classes.txt").read_text() == "0\n1\n2\n"
    found = [(content["text"], int(record["cls"])) for record, content in contents(shards)]
    rows = [(sentence(i), i % 3) for i in range(40)]
    assert sorted(found) == sorted(rows)
    assert found != rows
    again = shard_text_table(table, tmp_path / "again", text_column=0, label_column=1, samples_per_shard=11)
    assert [Path(url).read_bytes() for url in again.urls] == [Path(url).read_bytes() for url in shards.urls]
    assert check_shards(tmp_path / "out").labels == {0: 14, 1: 13, 2: 13}


def test_pairs_scores_names_and_quotes_survive(tmp_path):
    rows = [{"a": 'he said "so', "b": "é\tx", "y": 2.5}, {"a": "two", "b": "three", "y": -1}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"text_column": "a", "text_pair_column": "b", "label_column": "y"}
    scored = shard_text_table(tmp_path / "t.jsonl", tmp_path / "scores", regression=True, **columns)
    found = sorted((float(record["score"]), content) for record, content in contents(scored))
    assert found == [(-1.0, {"text": "two", "text_pair": "three"}), (2.5, {"text": 'he said "so', "text_pair": "é\tx"})]
    assert not (tmp_path / "scores" / "classes.txt").exists()
    (tmp_path / "t.tsv").write_text('sentence\tlabel\nhe said "so\tyes\nno\tno\n')
    named = shard_text_table(tmp_path / "t.tsv", tmp_path / "named", text_column="sentence", label_column="label")
    assert (tmp_path / "named" / "classes.txt").read_text() == "no\nyes\n"
    assert {(c["text"], int(r["cls"])) for r, c in contents(named)} == {('he said "so', 1), ("no", 0)}


def test_a_saved_data_set_of_one_split_is_read(table, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    found = datasets.Dataset.from_dict({"sentence": ["w1", "w2"], "label": [1, 0]})
    found.save_to_disk(str(tmp_path / "saved"))
    made = shard_text_table(tmp_path / "saved", tmp_path / "out", text_column="sentence", label_column="label")
    assert {(c["text"], int(r["cls"])) for r, c in contents(made)} == {("w1", 1), ("w2", 0)}


def test_a_second_split_takes_the_classes_of_the_first(tmp_path):
    columns = {"text_column": 0, "label_column": 1}
    (tmp_path / "a.tsv").write_text("x\tgood\ny\tbad\n")
    (tmp_path / "b.tsv").write_text("z\tgood\n")
    (tmp_path / "c.tsv").write_text("z\tugly\n")
    shard_text_table(tmp_path / "a.tsv", tmp_path / "out", **columns)
    second = shard_text_table(tmp_path / "b.tsv", tmp_path / "out", prefix="val", **columns)
    assert [record["cls"] for record, _ in contents(second)] == [b"1"]
    with pytest.raises(DataError, match=r"label 'ugly' is none of the classes in .*classes\.txt: bad, good"):
        shard_text_table(tmp_path / "c.tsv", tmp_path / "out", prefix="test", **columns)


@pytest.mark.parametrize(
    ("content", "columns", "said"),
    [
        ("x\t0\ny\n", (0, 1), r"t\.tsv, row 2: no column 1; it has 0"),
        ("a\tb\nx\t0\n", ("text", "b"), r"row 1: no column 'text'; it has a, b"),
        (" \t0\n", (0, 1), "row 1: its text is empty"),
        ("", (0, 1), "holds no rows"),
    ],
)
def test_a_row_at_fault_is_named_and_nothing_is_written(tmp_path, content, columns, said):
    (tmp_path / "t.tsv").write_text(content)
    with pytest.raises(DataError, match=said):
        shard_text_table(tmp_path / "t.tsv", tmp_path / "out", text_column=columns[0], label_column=columns[1])
    assert not (tmp_path / "out").exists()


def test_a_label_that_is_no_number_cannot_be_regressed_on(tmp_path):
    (tmp_path / "t.tsv").write_text("x\t1.5\ny\thigh\n")
    with pytest.raises(DataError, match="row 2: the label 'high' is no number"):
        shard_text_table(tmp_path / "t.tsv", tmp_path / "out", text_column=0, label_column=1, regression=True)


def test_a_sentence_is_cut_and_padded_to_the_same_length(tokenizer):
    tokenize = Tokenize(tokenizer, 6)
    short, long = tokenize({"text": "w1 w2"}), tokenize({"text": "w1 w2 w3 w4 w5 w6"})
    assert short["input_ids"].tolist() == [2, 6, 7, 3, 0, 0]
    assert short["attention_mask"].tolist() == [1, 1, 1, 1, 0, 0]
    assert long["input_ids"].tolist() == [2, 6, 7, 8, 9, 3]
    pair = tokenize({"text": "w1", "text_pair": "w2"})
    assert pair["input_ids"].tolist() == [2, 6, 3, 7, 3, 0]
    assert pair["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 0]


def test_padding_to_the_longest_pads_no_further_and_marks_what_it_adds(tokenizer):
    tokenize = Tokenize(tokenizer, 20, "longest")
    batch, labels = tokenize.stack([(tokenize({"text": "w1"}), 1), (tokenize({"text": "w1 w2 w3"}), 0)])
    assert batch["input_ids"].tolist() == [[2, 6, 3, 0, 0], [2, 6, 7, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert (labels.dtype, labels.tolist()) == (torch.int64, [1, 0])
    assert tokenize.stack([(tokenize({"text": "w1"}), 0.5)])[1].dtype == torch.float32


def stream(shards, tokenizer, rank=0, world_size=1, workers=0, pad_to="max_length", **options):
    return TrainStream(
        shards, transform=Tokenize(tokenizer, 8, pad_to), batch_size=4, rank=rank, world_size=world_size, seed=3,
        num_workers=workers, shuffle_buffer=16, **options,
    )  # fmt: skip


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(one, other):
    return all(
        torch.equal(a[1], b[1]) and all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[0].keys() == b[0].keys()
        for a, b in zip(one, other, strict=True)
    )


def test_batches_of_text_are_the_same_for_any_number_of_workers_and_after_a_resume(shards, tokenizer):
    wanted = take(stream(shards, tokenizer).batches(), 23)  # more than two epochs of ten
    assert wanted[0][0]["input_ids"].shape == (4, 8)
    assert same(wanted, take(stream(shards, tokenizer, workers=2).batches(), 23))
    assert same(wanted[13:], take(stream(shards, tokenizer).batches(13), 10))
    assert not same(wanted[:10], wanted[10:20])


def test_buckets_pad_less_and_keep_every_sentence_the_resume_and_the_workers(shards, tokenizer):
    def words(batches):
        return sorted(tuple(row[row != 0].tolist()) for tokens, _ in batches for row in tokens["input_ids"])

    options = {"pad_to": "longest", "bucket_batches": 4}
    plain = take(stream(shards, tokenizer, pad_to="longest").batches(), 10)
    wanted = take(stream(shards, tokenizer, **options).batches(), 23)  # more than two epochs of ten
    assert words(wanted[:10]) == words(plain)
    for bucket in (slice(0, 4), slice(4, 8), slice(8, 10)):  # of the same samples as without buckets, and less to pad
        assert words(wanted[bucket]) == words(plain[bucket])
    padding = [sum(int((t["attention_mask"] == 0).sum()) for t, _ in found) for found in (wanted[:10], plain)]
    assert padding[0] < padding[1] / 2
    assert same(wanted, take(stream(shards, tokenizer, workers=3, **options).batches(), 23))
    assert same(wanted[13:], take(stream(shards, tokenizer, **options).batches(13), 10))


def test_buckets_give_every_rank_batches_of_like_length_at_a_time(shards, tokenizer):
    options = {"pad_to": "longest", "bucket_batches": 5, "world_size": 2}
    per_rank = [take(stream(shards, tokenizer, rank=rank, **options).batches(), 5) for rank in range(2)]
    tokens = [[batch["attention_mask"].sum().item() for batch, _ in batches] for batches in per_rank]
    assert all((a[0] - b[0]) * (a[1] - b[1]) >= 0 for a, b in combinations(zip(*tokens, strict=True), 2)), tokens
    assert max(tokens[0]) > 2 * min(tokens[0])


def test_every_validation_sentence_is_counted_once_and_padding_carries_no_label(shards, tokenizer):
    seen, batches = [], 0
    for rank in range(3):
        one = EvalStream(shards, transform=Tokenize(tokenizer, 12), batch_size=4, rank=rank, world_size=3)
        for tokens, labels in one.batches():
            batches += 1
            assert tokens["input_ids"].shape == (4, 12)
            assert bool((tokens["attention_mask"].sum(1) > 0).all())  # padding is a real sentence: no row of NaN
            seen += [tuple(ids.tolist()) for ids in tokens["input_ids"][labels >= 0]]
    wanted = [tuple(Tokenize(tokenizer, 12)({"text": sentence(i)})["input_ids"].tolist()) for i in range(40)]
    assert batches == 3 * 4
    assert sorted(seen) == sorted(wanted)


def test_padding_of_scores_is_not_a_number(tokenizer, tmp_path):
    samples = [(f"s{i}", {"json": b'{"text": "w1"}', "score": b"-1.5"}) for i in range(3)]
    made = write_shards(samples, tmp_path, "val", 10)
    ((_, labels),) = EvalStream(made, transform=Tokenize(tokenizer, 8), batch_size=4, rank=0, world_size=1).batches()
    assert labels[:3].tolist() == [-1.5] * 3
    assert math.isnan(labels[3])


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"json": b"{", "cls": b"1"}, "no readable json member"),
        ({"json": b'{"sentence": "x"}', "cls": b"1"}, "json must hold a text"),
        ({"json": b'{"text": "x", "text_pair": 3}', "cls": b"1"}, "json must hold a text"),
        ({"json": b'{"text": "x"}', "cls": b"-1"}, "cls holds b'-1', which is no label"),
        ({"json": b'{"text": "x"}', "score": b"nan"}, "score holds b'nan', which is no label"),
    ],
)
def test_a_damaged_sample_is_named_with_its_shard(members, said):
    with pytest.raises(DataError, match=rf"shard a\.tar, sample s1: {said}"):
        decode_text({"__url__": "a.tar", "__key__": "s1", **members}, lambda sample: sample)


def test_the_tokenizer_of_a_run_is_its_own_copy(tokenizer, tmp_path):
    folder = copy_tokenizer(str(tokenizer), tmp_path / "run" / "tokenizer")
    assert AutoTokenizer.from_pretrained(str(folder))("w1 w2")["input_ids"] == [2, 6, 7, 3]
    assert copy_tokenizer("/nowhere", folder) == folder  # a resumed run keeps it
    with pytest.raises(ConfigError, match=r"no tokenizer at /nowhere.*set data\.tokenizer"):
        copy_tokenizer("/nowhere", tmp_path / "other")


def recipe(model=None, distill=None, **data):
    data = {"task": "text", "train": "t", "val": "v", "max_length": 16, **data}
    stages = {
        "a": {"steps": 1, "batch_size": 1, "lr": 1},
        "b": {"steps": 1, "batch_size": 1, "lr": 1, "distill": distill},
    }
    model = {"library": "transformers", "name": "bert", "num_classes": 2, **(model or {})}
    return parse_config({"recipe": "r", "model": model, "data": data, "stages": stages}, "here")


def test_the_model_takes_the_length_of_the_data():
    assert recipe().model.max_length == 16
    assert parse_config(recipe().model_dump(mode="json"), "again") == recipe()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_length": None}, r"data\.max_length is needed where data\.task is text"),
        ({"augment": "none"}, r"data\.augment has no use where data\.task is text"),
        ({"task": "image", "image_size": 8, "max_length": 4}, r"data\.max_length has no use where data\.task is image"),
        ({"task": "image", "max_length": None}, r"data\.image_size is needed"),
        ({"source": "digits"}, r"data\.source is digits; text comes from shards"),
        ({"bucket_batches": 8}, r"data\.bucket_batches saves padding only where data\.pad_to is longest"),
        ({"max_len": 4}, r"data\.max_len: unknown key.*max_length"),
        ({"metric": "bleu"}, r"data\.metric"),
        ({"metric": "pearson_spearman"}, r"pearson_spearman and model\.num_classes 1 go together"),
        ({"model": {"num_classes": 1}}, r"pearson_spearman and model\.num_classes 1 go together"),
        ({"model": {"library": "timm"}}, r"model\.library is timm; data\.task text needs transformers"),
    ],
)
def test_a_recipe_for_text_that_contradicts_itself_is_an_error_that_names_the_key(changes, said):
    with pytest.raises(ConfigError, match=said):
        recipe(**changes)


def test_hidden_states_are_no_part_of_stored_labels():
    assert recipe(distill={"teacher": "a", "hidden": 2.0}).stages["b"].distill.hidden == 2.0
    with pytest.raises(ConfigError, match=r"hidden states need an online teacher, not soft_labels"):
        recipe(distill={"teacher": "soft_labels", "hidden": 2.0})
