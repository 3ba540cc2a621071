"""What a packed file holds, byte for byte, and what is refused when one is written or read."""

import json
import os
import re
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsquant.config import ModelConfig
from dsquant.errors import ExportError
from dsquant.export import read_packed
from dsquant.ops.pack import pack
from dsquant.spec import Grouping, QuantSpec, WeightSite

QKV = "blocks.0.attn.qkv.weight"
SITE = "blocks.1.mlp.fc2.input"
GRANULARITIES = ["per_tensor", "per_channel", "per_head"]


def header_of(path):
    """Return (header, where tensor data starts), by the safetensors specification."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    return json.loads(blob[8 : 8 + length]), 8 + length


def raw_tensor(path, name):
    header, start = header_of(path)
    begin, end = header[name]["data_offsets"]
    dtype = {"F32": "<f4", "I32": "<i4", "I64": "<i8"}[header[name]["dtype"]]
    return np.frombuffer(path.read_bytes()[start + begin : start + end], dtype).reshape(header[name]["shape"])


def weights_by_the_document(path, table="weights"):
    """Decode every weight of a table of sites as docs/packed_format.md says, with numpy and json alone."""
    header, _ = header_of(path)
    for name, entry in json.loads(header["__metadata__"]["sites"])[table].items():
        n_bits, shape = entry["n_bits"], raw_tensor(path, f"{name}_shape")
        rows, cols = shape[0], int(np.prod(shape[1:]))
        row_bytes = raw_tensor(path, f"{name}_packed").view(np.uint8)
        bits = np.unpackbits(row_bytes, axis=1, bitorder="little")[:, : cols * n_bits].reshape(rows, cols, n_bits)
        codes = (bits * (1 << np.arange(n_bits))).sum(axis=2) - 2 ** (n_bits - 1)
        group = (np.arange(codes.size) // entry["inner"]) % entry["n_groups"]
        image = (codes.reshape(-1).astype(np.float32) + np.float32(entry["shift"])) * raw_tensor(path, f"{name}_scale")[
            group
        ]
        yield name, codes.reshape(shape), image.reshape(shape)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_codes_in_the_file_are_those_of_the_definition(case, tmp_path, n_bits, granularity):
    made = case(n_bits, granularity)
    made.write(tmp_path / "m.safetensors")
    packed = read_packed(tmp_path / "m.safetensors")
    assert packed.weights.keys() == made.codes.keys()
    for name, codes in made.codes.items():
        assert torch.equal(packed.codes(name), torch.from_numpy(codes)), name
        assert torch.equal(packed.image(name), made.oracle.get_parameter(name)), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_a_reader_written_from_the_document_decodes_the_same_weights(case, tmp_path, n_bits, granularity):
    made = case(n_bits, granularity)
    path = tmp_path / "m.safetensors"
    made.write(path)
    found = 0
    for name, codes, image in weights_by_the_document(path):
        assert np.array_equal(codes, made.codes[name]), name
        assert np.array_equal(image, made.oracle.get_parameter(name).numpy()), name
        found += 1
    assert found == len(made.weight_sites)


def test_the_example_of_the_document_is_what_is_written(case, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "packed_format.md").read_text()
    latents = {"fc.weight": torch.tensor([[0.25, -2.1, 0.75], [0.9, -0.375, 0.1]])}
    site = WeightSite("fc.weight", (2, 3), QuantSpec(3, granularity="per_channel"), Grouping(2, 3))
    path = tmp_path / "m.safetensors"
    case(2).write(
        path,
        latents=latents,
        weight_sites=[site],
        activation_sites=[],
        scales={"fc.weight:scale": torch.tensor([0.5, 0.25])},
    )
    rows = [row.tobytes().hex(" ") for row in raw_tensor(path, "fc.weight_packed")]
    assert rows == ["84 01 00 00", "17 01 00 00"]
    assert re.search(r"bytes +84 01 00 00 +17 01 00 00\n", text)
    assert torch.equal(read_packed(path).image("fc.weight"), torch.tensor([[0.0, -2.0, 1.0], [0.75, -0.5, 0.0]]))
    assert pack(torch.full((1, 11), 3, dtype=torch.int8), 3).numpy().tobytes().hex(" ") in text


def test_the_file_names_everything_that_a_reader_needs(case, tmp_path):
    made = case(2, "per_head", activation="per_head")
    path = tmp_path / "m.safetensors"
    made.write(path)
    header, _ = header_of(path)
    entries = {
        k: v if k.endswith("version") or k == "format" else json.loads(v) for k, v in header["__metadata__"].items()
    }
    assert entries["format"] == "dsquant-packed"
    assert entries["version"] == "1"
    assert entries["model"]["name"] == "vit_tiny_patch16_224"
    assert not entries["model"].keys() & {"pretrained", "checkpoint", "rotate"}  # the last: not before version 3
    method = {"n_bits": 2, "method": "lsq", "shift": 0.0}
    assert entries["sites"]["weights"][QKV] == {**method, "shape": [96, 32], "n_groups": 6, "inner": 512}
    site = {
        "signed": False,
        "granularity": "per_tensor",
        "offset": True,
        "bias": "none",
        "n_groups": 1,
        "features": 128,
    }
    assert entries["sites"]["activations"][SITE] == method | site
    assert entries["sites"]["activations"]["blocks.0.attn.probs"]["n_groups"] == 2
    assert entries["data"] == made.arguments["data"]
    assert entries["training"] == {"recipe": "test", "stage": "w2a2", "step": 7}
    assert header[f"{SITE}.scale"] | {"data_offsets": 0} == {"dtype": "F32", "shape": [1], "data_offsets": 0}
    assert raw_tensor(path, f"{SITE}.offset") == made.arguments["scales"][f"{SITE}:offset"].numpy()
    assert QKV not in header
    assert np.array_equal(raw_tensor(path, "norm.weight"), made.arguments["latents"]["norm.weight"].numpy())


def test_two_bit_weights_take_at_most_two_point_one_bits_on_disk(case, tmp_path):
    made = case(2, "per_tensor")
    path = tmp_path / "m.safetensors"
    info = made.write(path)
    header, _ = header_of(path)
    sites = [site for site in made.weight_sites if site.spec.n_bits == 2]
    ranges = [header[f"{site.name}_packed"]["data_offsets"] for site in sites]
    stored = 8 * sum(end - begin for begin, end in ranges) / sum(site.numel for site in sites)
    assert len(sites) == 8
    assert stored <= 2.1
    assert info.bits_per_weight[2] == stored
    assert info.file_bytes == path.stat().st_size
    assert info.float_bytes == 4 * sum(p.numel() for p in made.oracle.parameters())


def test_the_file_is_a_header_and_numbers_and_nothing_else(case, tmp_path):
    """No byte is left in which a pickle could hide."""
    path = tmp_path / "m.safetensors"
    case(3).write(path)
    header, start = header_of(path)
    ranges = sorted(v["data_offsets"] for k, v in header.items() if k != "__metadata__")
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert start + ranges[-1][1] == path.stat().st_size
    assert {v["dtype"] for k, v in header.items() if k != "__metadata__"} == {"F32", "I32", "I64"}


def test_the_same_model_gives_the_same_bytes(case, tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path in paths:
        case(2).write(path)
    assert len({path.read_bytes() for path in paths}) == 1
    assert paths[0].stat().st_size % 4 == 0
    assert header_of(paths[0])[1] % 8 == 0


def test_codes_of_the_run_are_stored_as_they_are(case, tmp_path):
    """A frozen weight keeps a code that its latent would not round to."""
    made = case(2)
    codes = {QKV: torch.from_numpy(made.codes[QKV].copy())}
    codes[QKV][0, :5] = torch.tensor([1, -2, 0, 1, -1], dtype=torch.int8)
    made.write(tmp_path / "m.safetensors", codes=codes)
    packed = read_packed(tmp_path / "m.safetensors")
    assert torch.equal(packed.codes(QKV), codes[QKV])
    other = "blocks.1.attn.qkv.weight"
    assert torch.equal(packed.codes(other), torch.from_numpy(made.codes[other]))


def test_buffers_keep_their_values(case, tmp_path):
    buffers = {"a.running_mean": torch.arange(3, dtype=torch.bfloat16), "a.count": torch.tensor(2**40 + 1)}
    case(2).write(tmp_path / "m.safetensors", buffers=buffers)
    packed = read_packed(tmp_path / "m.safetensors")
    assert buffers.keys() <= packed.rest
    assert packed.tensor("a.running_mean").dtype == torch.float32
    assert torch.equal(packed.tensor("a.running_mean"), torch.arange(3.0))
    assert int(packed.tensor("a.count")) == 2**40 + 1


def changed(tensors, name, value):
    copy = {key: tensor.clone() for key, tensor in tensors.items()}
    copy[name].view(-1)[0] = value
    return copy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_is_refused_and_nothing_is_left(case, tmp_path, value):
    for name in (QKV, "norm.bias"):
        with pytest.raises(ExportError, match=f"{name} holds NaN or infinity"):
            case(2).write(tmp_path / "m.safetensors", latents=changed(case(2).arguments["latents"], name, value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (f"{QKV}:scale", float("nan"), "holds NaN or infinity"),
        (f"{SITE}:offset", float("inf"), "holds NaN or infinity"),
        (f"{QKV}:scale", 0.0, "holds 0.0; scales are positive"),
        (f"{SITE}:scale", -1.0, "holds -1.0; scales are positive"),
    ],
)
def test_a_scale_that_cannot_be_used_is_refused(case, tmp_path, key, value, message):
    with pytest.raises(ExportError, match=re.escape(f"{key} {message}")):
        case(2).write(tmp_path / "m.safetensors", scales=changed(case(2).arguments["scales"], key, value))
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_do_not_fit_the_sites_are_refused(case, tmp_path):
    made = case(2)
    latents, scales = made.arguments["latents"], made.arguments["scales"]
    codes = torch.from_numpy(made.codes[QKV])
    bad = {
        f"{QKV} is a quantized weight but has no latent": {"latents": {k: v for k, v in latents.items() if k != QKV}},
        f"{QKV} is (32, 96), its site has (96, 32)": {"latents": {**latents, QKV: latents[QKV].t()}},
        f"{QKV} is torch.bfloat16; latents are float32": {"latents": {**latents, QKV: latents[QKV].bfloat16()}},
        f"{SITE}:offset is missing": {"scales": {k: v for k, v in scales.items() if k != f"{SITE}:offset"}},
        "x:scale is of no site of this model": {"scales": {**scales, "x:scale": torch.ones(1)}},
        f"{QKV}:scale is (1,), its site has 3 values": {"scales": {**scales, f"{QKV}:scale": torch.ones(1)}},
        "norm.weight has codes but is no quantized weight": {"codes": {"norm.weight": codes}},
        f"{QKV}: codes from -2 to 2 do not fit 2 bits": {"codes": changed({QKV: codes}, QKV, 2)},
        f"{QKV}: codes are torch.int8 (32, 96)": {"codes": {QKV: codes.t()}},
        "two tensors of this model would be called norm.weight": {"buffers": {"norm.weight": torch.ones(32)}},
        "data must hold ['channels', 'crop_pct'": {"data": {"image_size": 16}},
        "model.name 'hf-hub:a/b' is an address": {"model": ModelConfig(name="hf-hub:a/b", num_classes=5)},
    }
    for message, changes in bad.items():
        with pytest.raises(ExportError, match=re.escape(message)):
            made.write(tmp_path / "m.safetensors", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(case, tmp_path, monkeypatch, broken):
    path = tmp_path / "m.safetensors"
    path.write_text("older")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(ExportError, match=r"m\.safetensors cannot be written: .*No space left"):
        case(2).write(path)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_mode_that_the_umask_gives(case, tmp_path):
    case(2).write(tmp_path / "folder" / "m.safetensors")
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("folder/m.safetensors", "plain")}
    assert len(modes) == 1


def test_a_truncated_file_is_refused_wherever_it_was_cut(case, tmp_path):
    path = tmp_path / "m.safetensors"
    case(2).write(path)
    whole, (_, start) = path.read_bytes(), header_of(path)
    for length in (0, 7, 8, start // 2, start, start + 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError, match=f"{re.escape(str(path))} is missing, truncated or no safetensors file"):
            read_packed(path)


def test_a_file_that_is_no_packed_model_is_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    with pytest.raises(ExportError, match=r"foreign\.safetensors is missing"):
        read_packed(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ExportError, match="is no packed model: its format is None"):
        read_packed(path)
    save_file({"weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ExportError, match="is no packed model: its format is 'pt'"):
        read_packed(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(ExportError, match="no safetensors file"):
        read_packed(path)


@pytest.mark.parametrize(
    "name", [f"{QKV}_packed", f"{QKV}_scale", f"{QKV}_shape", f"{SITE}.scale", f"{SITE}.offset", "head.weight_packed"]
)
def test_a_missing_tensor_is_named(case, tmp_path, rewrite, name):
    path = tmp_path / "m.safetensors"
    case(2).write(path)
    rewrite(path, drop=[name])
    with pytest.raises(ExportError, match=f"lacks the tensor {re.escape(name)}"):
        read_packed(path)


def edited(path, entry, edit):
    with safe_open(path, "pt") as file:
        value = json.loads(file.metadata()[entry])
    edit(value)
    return {entry: json.dumps(value)}


def test_a_header_that_cannot_be_meant_is_refused(case, tmp_path, rewrite):
    path = tmp_path / "m.safetensors"
    case(2).write(path)
    whole = path.read_bytes()
    edits = {
        "has version '4' of the packed format; this dsquant reads '1', '2', '3'": lambda: {"version": "4"},
        "damaged header (JSONDecodeError": lambda: {"sites": "{"},
        "damaged header (ConfigError: n_bits is 9": lambda: edited(
            path, "sites", lambda s: s["weights"][QKV].update(n_bits=9)
        ),
        "damaged header (ValueError": lambda: edited(path, "sites", lambda s: s["weights"][QKV].update(inner=0)),
        "damaged header (TypeError": lambda: edited(path, "sites", lambda s: s["weights"][QKV].update(n_bits=2.0)),
        "damaged header (ValueError: data lacks std": lambda: edited(path, "data", lambda d: d.pop("std")),
        "weight_packed is I32 [96, 2], its site needs I32 [96, 3]": lambda: edited(
            path, "sites", lambda s: s["weights"][QKV].update(n_bits=3)
        ),
        f"{QKV}_shape disagrees with the header's [96, 31]": lambda: edited(
            path, "sites", lambda s: s["weights"][QKV].update(shape=[96, 31], inner=1)
        ),
        "model.kwargs sets checkpoint_path": lambda: edited(
            path, "model", lambda m: m["kwargs"].update(checkpoint_path="x.pth")
        ),
        "model.name 'local-dir:/tmp' is an address": lambda: edited(
            path, "model", lambda m: m.update(name="local-dir:/tmp")
        ),
    }
    for message, edit in edits.items():
        path.write_bytes(whole)
        rewrite(path, header=edit())
        with pytest.raises(ExportError, match=re.escape(message)):
            read_packed(path)
    path.write_bytes(whole)
    rewrite(path, drop=["model"])
    with pytest.raises(ExportError, match="damaged header"):
        read_packed(path)


def test_training_knobs_that_this_version_does_not_know_do_not_matter(case, tmp_path, rewrite):
    path = tmp_path / "m.safetensors"
    case(2).write(path)
    rewrite(path, header=edited(path, "quant", lambda q: q.update(a_later_knob=1)))
    assert read_packed(path).quant.weight == case(2).arguments["quant"].weight
