"""Peers: torch's own sides compute the product; missing packages are told."""

import pytest
import torch

from bench import peers_gpu
from bench.peers_gpu import BASELINE, PEERS, Peer, group_codes, installed, row_codes, versions

N, K = 48, 256
BY_NAME = {peer.name: peer for peer in PEERS}


def product(m):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator).bfloat16()
    x = torch.randn(m, K, generator=generator).bfloat16()
    return weight, x, x.float() @ weight.float().T


@pytest.mark.parametrize("name, tolerance", [("cublas bf16", 4e-3), ("_int_mm + scales", 2e-2)])
def test_torch_sides_compute_the_product(name, tolerance):
    weight, x, wanted = product(33)
    call = BY_NAME[name].build(weight)
    for _ in range(2):  # what was derived from x is remembered
        y = call(x)
        assert y.shape == wanted.shape and y.dtype == torch.bfloat16
        assert (y.float() - wanted).norm() / wanted.norm() < tolerance


def test_int_mm_multiplies_the_codes():
    weight, x, _ = product(33)
    y = BY_NAME["_int_mm"].build(weight)(x)
    wanted = row_codes(x)[0].double() @ row_codes(weight)[0].double().T
    assert y.dtype == torch.int32 and torch.equal(y.double(), wanted)


def test_inputs_are_derived_anew_for_a_new_x():
    weight, x, _ = product(33)
    call = BY_NAME["_int_mm"].build(weight)
    first = call(x)
    assert not torch.equal(call(-x), first) and torch.equal(call(x), first)


def test_group_codes_round_to_the_nearest():
    weight, _, _ = product(1)
    codes, scale, zero = group_codes(weight)
    assert codes.shape == (N, K) and scale.shape == zero.shape == (N, K // 128)
    groups = codes.unflatten(1, (-1, 128)).float()
    decoded = (groups - zero.float().unsqueeze(2)) * scale.float().unsqueeze(2)
    error = (decoded.flatten(1) - weight.float()).norm() / weight.float().norm()
    assert error < 0.12


def test_refusals_name_what_is_needed(monkeypatch):
    assert BY_NAME["_int_mm"].refusal(16, N, K, (9, 0)) == "needs 17 rows"
    assert BY_NAME["_scaled_mm fp8"].refusal(1, N, K, (8, 0)) == "needs compute capability 8.9"
    assert BY_NAME["_scaled_mm fp8"].refusal(1, 40, K, (9, 0)) == (
        "needs N and K to be multiples of 16"
    )
    assert BY_NAME[BASELINE].refusal(1, N, K, (8, 0)) is None
    absent = Peer("x", "no-such-package-here", 4, "bf16", lambda weight: lambda x: x)
    assert absent.refusal(1, N, K, (9, 0)) == "not installed (no-such-package-here)"


def test_versions_name_every_package(monkeypatch):
    monkeypatch.setattr(
        peers_gpu, "installed", lambda name: torch.__version__ if name == "torch" else None
    )
    found = versions()
    assert found["torch"] == torch.__version__
    assert {found[name] for name in ("gemlite", "torchao", "bitsandbytes")} == {"not installed"}


def test_a_missing_package_is_an_expected_error():
    name = next(peer for peer in PEERS if installed(peer.package) is None)
    with pytest.raises(peers_gpu.PEER_ERRORS):
        name.build(product(1)[0])


def test_bytes_of_a_weight():
    assert BY_NAME[BASELINE].weight_bytes(N, K) == 2 * N * K
    assert BY_NAME["bitsandbytes nf4"].weight_bytes(N, K) == N * K // 2
