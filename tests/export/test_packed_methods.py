"""What a packed file holds of methods other than LSQ: shifted levels, one bit, biases, no centre."""

import json

import numpy as np
import torch

from dsquant.export import read_packed
from tests.export.test_packed import QKV, SITE, header_of, raw_tensor, weights_by_the_document


def test_codes_of_every_method_come_back_and_a_reader_written_from_the_document_decodes_them(method_case, tmp_path):
    path = tmp_path / "m.safetensors"
    method_case.write(path)
    packed, found = read_packed(path), 0
    for name, codes, image in weights_by_the_document(path):
        assert np.array_equal(codes, method_case.codes[name]), name
        assert torch.equal(packed.codes(name), torch.from_numpy(codes)), name
        assert np.array_equal(image, method_case.oracle.get_parameter(name).numpy()), name
        assert len(np.unique(codes)) > 1, name
        found += 1
    assert found == len(method_case.weight_sites)


def test_the_centre_of_a_binary_weight_decides_its_codes_and_is_not_in_the_file(case, tmp_path):
    made = case(1, method="bwn", activation_quant={"method": "elastic"})
    path, name = tmp_path / "m.safetensors", QKV
    made.write(path)
    moved = {**made.arguments["scales"], f"{name}:centre": made.arguments["scales"][f"{name}:centre"] + 0.2}
    made.write(tmp_path / "moved.safetensors", scales=moved)
    assert not np.array_equal(read_packed(tmp_path / "moved.safetensors").codes(name), made.codes[name])
    assert not [key for key in header_of(path)[0] if "centre" in key]


def test_one_bit_weights_take_at_most_one_point_one_bits_on_disk(case, tmp_path):
    made = case(1, method="elastic", activation_quant={"method": "elastic", "bias": "before"})
    path = tmp_path / "m.safetensors"
    info = made.write(path)
    header, _ = header_of(path)
    sites = [site for site in made.weight_sites if site.spec.n_bits == 1]
    ranges = [header[f"{site.name}_packed"]["data_offsets"] for site in sites]
    assert len(sites) == 8
    assert info.bits_per_weight[1] == 8 * sum(end - begin for begin, end in ranges) / sum(s.numel for s in sites) <= 1.1


def test_biases_are_in_the_file_under_the_name_of_their_site(case, tmp_path):
    bias = {"bias": "around"}
    made = case(2, method="statsq", granularity="per_channel", activation="per_token", activation_quant=bias)
    path = tmp_path / "m.safetensors"
    made.write(path)
    entry = json.loads(header_of(path)[0]["__metadata__"]["sites"])["activations"][SITE]
    assert (entry["granularity"], entry["bias"], entry["n_groups"], entry["features"]) == (
        "per_token",
        "around",
        17,
        128,
    )
    for role in ("before", "after"):
        assert np.array_equal(raw_tensor(path, f"{SITE}.{role}"), made.arguments["scales"][f"{SITE}:{role}"].numpy())
