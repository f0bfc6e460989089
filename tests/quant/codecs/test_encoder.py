"""The two passes: what is worth coding, memory bounds, misuse."""

import numpy as np
import pytest
import torch

from fewbit.quant.codecs import encoder as encoder_module
from fewbit.quant.codecs.encoder import Encoder


def run(tensor, slab=64):
    encoder = Encoder(tensor.dtype, tuple(tensor.shape))
    for rows in tensor.split(slab):
        encoder.count(rows)
    if not encoder.settle():
        return None
    raw = [piece for rows in tensor.split(slab) for piece in encoder.encode(rows)]
    return {"raw": raw, **{plane: list(pieces) for plane, pieces in encoder.planes()}}


def n_bytes(pieces):
    return sum(piece.numel() for piece in pieces)


def weights(rows=512, columns=1024, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(rows, 1, generator=generator) * 0.5)
    return (torch.randn(rows, columns, generator=generator) * scales * 0.02).bfloat16()


def test_rate_is_near_the_entropy_of_the_exponents():
    tensor = weights(1024, 1024)
    found = run(tensor)
    exponents = tensor.view(torch.int16).numpy().view(np.uint16) >> 7 & 255
    counts = np.bincount(exponents.ravel(), minlength=256)
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    coded = sum(n_bytes(found[plane]) for plane in ("words", "state", "index"))
    assert 8 * coded / tensor.numel() <= entropy + 0.07
    total = sum(map(n_bytes, found.values()))
    assert 8 * total / tensor.numel() <= entropy + 8.08


def test_words_go_to_a_file_beyond_the_bound(tmp_path, monkeypatch):
    tensor = weights()
    wanted = run(tensor)
    monkeypatch.setattr(encoder_module, "WORDS_BYTES", 1000)
    monkeypatch.setattr(encoder_module, "_PIECE_BYTES", 777)
    found = run(tensor)
    assert len(found["words"]) > 50
    assert torch.equal(torch.cat(found["words"]), torch.cat(wanted["words"]))


def test_a_coded_tensor_is_never_larger():
    """Whatever the symbols: the plan's sizes are bounds."""
    for used in (2, 5, 60, 200, 250):
        generator = torch.Generator().manual_seed(used)
        tensor = torch.randint(0, used, (40_000,), dtype=torch.uint8, generator=generator)
        found = run(tensor.view(-1, 100))
        if found is not None:
            assert sum(map(n_bytes, found.values())) < tensor.numel()


def test_the_second_pass_must_be_complete():
    tensor = weights()
    encoder = Encoder(tensor.dtype, tuple(tensor.shape))
    encoder.count(tensor)
    assert encoder.settle()
    list(encoder.encode(tensor[:128]))
    with pytest.raises(ValueError, match=r"encoded 8 of 32 chunks"):
        list(encoder.planes())


def test_the_first_pass_must_be_complete():
    tensor = weights()
    encoder = Encoder(tensor.dtype, tuple(tensor.shape))
    encoder.count(tensor[:128])
    with pytest.raises(ValueError, match=r"counted 131072 of 524288 elements"):
        encoder.settle()
