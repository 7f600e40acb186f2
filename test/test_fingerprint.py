"""Fingerprints against the hash written down in Python, and against what may change in a tensor."""

from __future__ import annotations

import ctypes
import random
import struct

import hypothesis.strategies as st
import pytest
import torch
from common import fuzz
from hypothesis import given
from torch import Tensor

from convbn_inductor_pass import _inductor, fingerprint
from convbn_inductor_pass.fingerprint import BYTES, fingerprints

BLOCK = 2048 * 4  # bytes
# Around a vector, a block, a level of 512 blocks, and where threads begin.
SIZES = [0, 4, 60, 64, 68, BLOCK - 4, BLOCK, BLOCK + 4, 128 * BLOCK, 512 * BLOCK + 4]


def of_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)


def tree_of_nh(data: bytes) -> bytes:
    """The same hash, from its definition."""
    _, buffer = fingerprint._library()
    keys = struct.unpack(f"<{len(buffer) // 4}I", buffer.raw)
    words_per_level = 2048 + 16
    for level in range(len(keys) // words_per_level):
        k = keys[level * words_per_level :]
        data += b"\0" * (-len(data) % 64)
        hashes = []
        for begin in range(0, len(data), BLOCK) if data else (0,):
            block = data[begin : begin + BLOCK]
            m = struct.unpack(f"<{len(block) // 4}I", block)
            for shift in (0, 16):
                products = (
                    ((m[i] + k[i + shift]) % 2**32) * ((m[i + 1] + k[i + 1 + shift]) % 2**32)
                    for i in range(0, len(m), 2)
                )
                hashes.append(sum(products) % 2**64)
        data = struct.pack(f"<{len(hashes)}Q", *hashes)
        if len(data) == BYTES:
            return data
    raise AssertionError("too few levels")


# The last one: blocks that are read in turns, one that is left over, and a rest.
@pytest.mark.parametrize("size", [*SIZES[:-2], 3 * BLOCK + 13, 13 * BLOCK + 13])
def test_it_is_a_tree_of_nh(size):
    data = random.Random(size).randbytes(size)
    assert fingerprints(of_bytes(data)) == tree_of_nh(data)


@pytest.mark.parametrize("size", SIZES)
def test_one_bit_shows(size):
    draw = random.Random(size)
    tensor = of_bytes(draw.randbytes(size))
    before = fingerprints(tensor)
    assert fingerprints(tensor.clone()) == before
    for _ in range(min(size, 20)):
        byte, bit = draw.randrange(size), 1 << draw.randrange(8)
        tensor[byte] ^= bit
        assert fingerprints(tensor) != before
        tensor[byte] ^= bit
    assert fingerprints(tensor) == before


@fuzz(50)
@given(st.integers(1, 3 * BLOCK), st.integers(0, 2**32 - 1))
def test_what_a_plain_sum_would_miss_shows(size, seed):
    """Two numbers that trade places, and changes that cancel each other."""
    draw = random.Random(seed)
    tensor = torch.frombuffer(bytearray(draw.randbytes(4 * size)), dtype=torch.int32)
    before = fingerprints(tensor)
    i, j = draw.randrange(size), draw.randrange(size)
    other = tensor.clone()
    other[i], other[j] = tensor[j], tensor[i]
    assert (fingerprints(other) == before) == torch.equal(other, tensor)
    other = tensor.clone()
    other[i] += 1
    other[j] -= 1
    assert (fingerprints(other) == before) == torch.equal(other, tensor)


def test_bits_count_and_not_values():
    zero, minus, nan = torch.zeros(8), -torch.zeros(8), torch.full((8,), float("nan"))
    assert fingerprints(zero) != fingerprints(minus)
    assert fingerprints(nan) == fingerprints(nan.clone())


def test_one_for_each_tensor_in_their_order():
    a, b, c = torch.randn(3), torch.randn(4, 5).bfloat16(), torch.randn(3000, dtype=torch.double)
    assert fingerprints(a, b, c) == fingerprints(a) + fingerprints(b) + fingerprints(c)
    assert fingerprints(a, b) != fingerprints(b, a)


def test_threads_do_not_matter():
    tensor, threads = torch.randn(130 * BLOCK), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fingerprints(tensor)
        torch.set_num_threads(3)
        assert fingerprints(tensor) == alone
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("without", [("AVX512F",), ("AVX512F", "AVX2")])
def test_other_processors_compute_the_same(without):
    """What stands behind the preprocessor's conditions, as far as it can be compiled here."""
    source = fingerprint._SOURCE
    for name in without:
        assert f"defined(__{name}__)" in source
        source = source.replace(f"defined(__{name}__)", "0")
    other = _inductor.load_cpp(source).fingerprints
    tensor = torch.randn(13 * BLOCK // 4 + 7)
    _, keys = fingerprint._library()
    data = (ctypes.c_void_p * 1)(tensor.data_ptr())
    sizes = (ctypes.c_int64 * 1)(tensor.nbytes)
    out = ctypes.create_string_buffer(BYTES)
    other(ctypes.c_int64(1), data, sizes, keys, out, ctypes.c_int(1))
    assert out.raw == fingerprints(tensor)
