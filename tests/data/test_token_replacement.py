"""Tokens in place of others: which are alike, how many are replaced, and that it does not depend on workers, ranks or resumes."""

from itertools import islice

import pytest
import torch
from transformers import BertTokenizerFast

from dsquant.config import load_config
from dsquant.data import ReplaceTokens, Tokenize, TrainStream, shard_text_table, similar_tokens, write_similar_tokens
from dsquant.engine import World
from dsquant.errors import ConfigError
from dsquant.run_data import eval_stream, train_stream

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = SPECIAL + [f"w{i}" for i in range(40)] + [f"##c{i}" for i in range(30)]
FIXED = set(range(len(SPECIAL)))
DATA = {"data.train": "train-*.tar", "data.val": "val-*.tar"}


def embeddings():
    return torch.randn(len(TOKENS), 12, generator=torch.Generator().manual_seed(0))


def brute_force(vectors, tokens, fixed, neighbours):
    """Sort all pairs in float64, one token at a time."""
    vectors = vectors.double()
    table = []
    for i, name in enumerate(tokens):
        alike = (j for j, other in enumerate(tokens) if other.startswith("##") == name.startswith("##"))
        others = [j for j in alike if j != i and j not in fixed]
        near = sorted(others, key=lambda j: -float(torch.cosine_similarity(vectors[i], vectors[j], dim=0)))[:neighbours]
        table.append([i] * neighbours if i in fixed else near + [i] * (neighbours - len(near)))
    return torch.tensor(table, dtype=torch.int32)


@pytest.mark.parametrize("neighbours", [1, 7, 35])
def test_neighbours_are_the_nearest_by_cosine_of_the_same_kind(neighbours):
    found = similar_tokens(embeddings(), TOKENS, FIXED, neighbours)
    assert found.dtype == torch.int32
    assert torch.equal(found, brute_force(embeddings(), TOKENS, FIXED, neighbours))  # of 35, 29 go on with a word


def test_lengths_of_embeddings_and_rows_at_a_time_decide_nothing(monkeypatch):
    found = similar_tokens(embeddings(), TOKENS, FIXED, 7)
    lengths = torch.rand(len(TOKENS), 1, generator=torch.Generator().manual_seed(1)) + 0.1
    monkeypatch.setattr("dsquant.data.token_replacement.ROWS", 9)
    assert torch.equal(similar_tokens(embeddings() * lengths, TOKENS, FIXED, 7), found)


def test_tokens_that_begin_a_word_stay_such_in_other_tokenizers():
    tokens = ["<s>", *("Ġ" * (i % 2) + f"t{i}" for i in range(20))]
    table = similar_tokens(embeddings()[:21], tokens, {0}, 4)
    for i in range(1, 21):
        assert {tokens[j][0] == "Ġ" for j in table[i].tolist()} == {i % 2 == 0}


def test_more_neighbours_than_tokens_leaves_tokens_as_they_are():
    assert similar_tokens(embeddings()[:3], [*TOKENS[:2], "word"], {0, 1}, 15).tolist() == [[i] * 15 for i in range(3)]


@pytest.fixture
def table(tmp_path):
    write_similar_tokens(similar_tokens(embeddings(), TOKENS, FIXED, 7), tmp_path / "similar.safetensors")
    return tmp_path / "similar.safetensors"


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share_of_tokens_gives_way_to_neighbours_each_as_often(table, share):
    torch.manual_seed(0)
    ids = torch.full((20_000,), 9)
    found = ReplaceTokens(table, share)(ids)
    neighbours = similar_tokens(embeddings(), TOKENS, FIXED, 7)[9].tolist()
    counts = torch.bincount(found, minlength=len(TOKENS))
    assert found.dtype == torch.int64
    assert int(counts[9]) + sum(int(counts[i]) for i in neighbours) == 20_000
    expected, deviation = 20_000 * share / 7, (20_000 * share / 7) ** 0.5
    assert all(abs(int(counts[i]) - expected) < 5 * deviation for i in neighbours)


def test_special_tokens_stay(table):
    torch.manual_seed(0)
    ids = torch.tensor([2, *range(5, 75), 3, 0, 0])
    found = ReplaceTokens(table, 1.0)(ids)
    assert found[[0, 71, 72, 73]].tolist() == [2, 3, 0, 0]
    assert (found[1:71] != ids[1:71]).all()
    assert (found[1:71] >= 5).all()


@pytest.fixture
def shards(tmp_path):
    """48 sentences of 6 words, labelled by their number, beside a tokenizer that knows them."""
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    rows = (f"{' '.join(f'w{(3 * i + j) % 40}' for j in range(6))}\t{i}\n" for i in range(48))
    (tmp_path / "rows.tsv").write_text("".join(rows))
    return shard_text_table(tmp_path / "rows.tsv", tmp_path / "out", text_column=0, label_column=1, samples_per_shard=7)


@pytest.fixture
def streams(tmp_path, table, shards):
    """A function from options to the streams of all ranks."""

    def make(world_size=1, num_workers=0, replace=True):
        words = Tokenize(tmp_path / "tokenizer", 12, replace=ReplaceTokens(table, 0.5) if replace else None)
        options = {"world_size": world_size, "seed": 3, "num_workers": num_workers, "shuffle_buffer": 16}
        return [
            TrainStream(shards, transform=words, batch_size=8 // world_size, rank=r, **options)
            for r in range(world_size)
        ]

    return make


def by_label(batches):
    found = {}
    for tokens, labels in batches:
        found |= dict(zip(labels.tolist(), tokens["input_ids"].tolist(), strict=True))
    return found


def sentences(streams, start, stop):
    """{label: tokens} of these batches of one epoch, over all ranks."""
    return by_label(batch for stream in streams for batch in islice(stream.batches(start), stop - start))


def test_what_a_sentence_becomes_depends_on_seed_epoch_and_sample_alone(streams):
    first = sentences(streams(), 0, 6)
    assert len(first) == 48
    assert sentences(streams(world_size=2), 0, 6) == first
    assert sentences(streams(num_workers=2), 0, 6) == first
    second = sentences(streams(), 6, 12)
    assert sentences(streams(num_workers=1), 6, 12) == second
    plain = sentences(streams(replace=False), 0, 6)
    assert len(plain) == 48
    assert sum(first[i] != plain[i] for i in plain) >= 40
    assert sum(first[i] != second[i] for i in first) >= 40


def test_a_run_replaces_tokens_in_the_stages_that_say_so_and_in_no_validation(shards, table, tmp_path):
    changes = {"data.max_length": 12, "data.shuffle_buffer": 16, "data.num_workers": 0}
    changes |= {f"stages.{name}.batch_size": 8 for name in ("fp", "w4a4", "w1a2")}
    config = load_config("sst2_minilm", DATA | changes | {"stages.w1a2.distill.replace_tokens": 0.5})
    world = World(rank=0, size=1, device=torch.device("cpu"), bf16=False)
    rest = (shards, None, tmp_path / "tokenizer", table, world, 1)
    fp, w4a4, w1a2 = (
        sentences([train_stream(config, config.stages[name], *rest)], 0, 6) for name in ("fp", "w4a4", "w1a2")
    )
    assert fp == w4a4
    assert len(w1a2) == 48
    assert sum(w1a2[i] != fp[i] for i in fp) >= 40
    found = by_label(eval_stream(config.data, shards, tmp_path / "tokenizer", world).batches())
    assert {i: found[i] for i in range(48)} == fp


@pytest.mark.parametrize(
    ("recipe", "changes", "named"),
    [
        ("sst2_minilm", {"stages.w4a4.distill.hard": 0.5}, "labels"),
        ("sst2_minilm", {"model.pretrained": False}, "model.pretrained"),
        ("sst2_minilm", {"stages.w4a4.distill.replace_tokens": 1.5}, "replace_tokens"),
        ("sst2_minilm", {"stages.w4a4.distill": {"teacher": "fp", "replace_token": 0.3}}, "replace_tokens"),
        ("cifar10_mckd", {}, "data.task is image"),
    ],
)
def test_a_recipe_that_cannot_replace_tokens_is_refused(recipe, changes, named):
    stage = next(name for name, s in load_config(recipe, DATA).stages.items() if s.distill)
    with pytest.raises(ConfigError, match=named):
        load_config(recipe, DATA | {f"stages.{stage}.distill.replace_tokens": 0.3} | changes)
