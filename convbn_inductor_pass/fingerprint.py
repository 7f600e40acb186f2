"""Fingerprints of tensors' contents: 16 bytes that change when any bit of a tensor does.

A version counter misses edits (through ``.data``, NumPy, other views of the memory), a copy to
compare with costs reading twice. This reads the tensor once, at the speed of memory.

It is a tree of NH, the hash of UMAC: with 32-bit words m and random keys k,

    NH(m) = sum over i of (m[2i] + k[2i] mod 2**32) * (m[2i+1] + k[2i+1] mod 2**32)  mod 2**64

for each block of 2048 words, twice with shifted keys; the results are hashed in the same way with
other keys, until one block is left. For two given tensors of the same size that differ, the
probability over the keys that a level hides it is at most 2**-64, so that fingerprints are equal
with less than 2**-61. Keys are drawn anew in each process, whose fingerprints mean nothing in
another one.

Source: Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: Fast and Secure Message
Authentication", CRYPTO '99, theorems on NH and its Toeplitz extension.
"""

from __future__ import annotations

import array
import ctypes
import functools
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _inductor

__all__ = ["BYTES", "fingerprints", "reader", "sizes_of"]

BYTES = 16  # of one fingerprint
_LEVELS = 5  # 8 KB * 512**4 is more than any tensor has
_KEY_WORDS = 2048 + 16  # per level: a block, and the shift

_SOURCE = r"""
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
// Past the caches, where they should keep what the layers need. Addresses need not be valid.
#define FETCH(address) _mm_prefetch((const char*)(address), _MM_HINT_NTA)
#else
#define FETCH(address)
#endif

namespace {

constexpr int64_t kWords = 2048, kShift = 16;
constexpr int64_t kBlock = kWords * 4;        // bytes in a block
constexpr int64_t kHash = 16;                 // bytes of its hash
constexpr int64_t kGroup = 64;                // bytes that zeros fill up
constexpr int64_t kParallel = 128;            // blocks from which on threads pay
constexpr int64_t kStreams = 6;               // places from which memory is read in turns
constexpr int64_t kAhead = 64;                // words that are fetched ahead

// Sums of (m[2i] + k[2i]) * (m[2i+1] + k[2i+1]), kStep words at once.
struct Sum {
#if defined(__AVX512F__)
  static constexpr int64_t kStep = 16;
  __m512i sums = _mm512_setzero_si512();
  void add(const uint32_t* m, const uint32_t* k) {
    const __m512i p = _mm512_add_epi32(_mm512_loadu_si512(m), _mm512_loadu_si512(k));
    sums = _mm512_add_epi64(sums, _mm512_mul_epu32(p, _mm512_srli_epi64(p, 32)));
  }
  uint64_t total() const { return _mm512_reduce_add_epi64(sums); }
#elif defined(__AVX2__)
  static constexpr int64_t kStep = 8;
  __m256i sums = _mm256_setzero_si256();
  void add(const uint32_t* m, const uint32_t* k) {
    const __m256i p = _mm256_add_epi32(_mm256_loadu_si256((const __m256i*)m),
                                       _mm256_loadu_si256((const __m256i*)k));
    sums = _mm256_add_epi64(sums, _mm256_mul_epu32(p, _mm256_srli_epi64(p, 32)));
  }
  uint64_t total() const {
    uint64_t lanes[4];
    _mm256_storeu_si256((__m256i*)lanes, sums);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
#else
  static constexpr int64_t kStep = 2;
  uint64_t sum = 0;
  void add(const uint32_t* m, const uint32_t* k) {
    sum += (uint64_t)(uint32_t)(m[0] + k[0]) * (uint32_t)(m[1] + k[1]);
  }
  uint64_t total() const { return sum; }
#endif
};

// Adds to N hashes, each out_apart numbers after the last, those of N arrays of words, each apart
// words after the last. words: a multiple of 16, at most kWords.
template <int N>
void hash_words(const uint32_t* m, int64_t apart, int64_t words, const uint32_t* k, uint64_t* out,
                int64_t out_apart) {
  Sum first[N], second[N];
  for (int64_t i = 0; i < words; i += Sum::kStep)
    for (int n = 0; n < N; ++n) {
      const uint32_t* from = m + n * apart + i;
      FETCH(from + kAhead);
      first[n].add(from, k + i);
      second[n].add(from, k + i + kShift);
    }
  for (int n = 0; n < N; ++n) {
    out[n * out_apart] += first[n].total();
    out[n * out_apart + 1] += second[n].total();
  }
}

// Of at most a block, filled up with zeros to whole groups.
void hash_rest(const char* data, int64_t bytes, const uint32_t* key, uint64_t* out) {
  const int64_t whole = bytes / kGroup * kGroup;
  hash_words<1>((const uint32_t*)data, 0, whole / 4, key, out, 0);
  if (whole < bytes) {
    uint32_t group[kGroup / 4] = {};
    std::memcpy(group, data + whole, bytes - whole);
    hash_words<1>(group, 0, kGroup / 4, key + whole / 4, out, 0);
  }
}

// One level: adds to out a hash for each block. What the processor fetches by itself ends with a
// page: memory is read faster from several places in turns than from one.
void hash_level(const char* data, int64_t bytes, const uint32_t* key, uint64_t* out, int threads) {
  const int64_t whole = bytes / kBlock, part = whole / kStreams, rest = bytes % kBlock;
  #pragma omp parallel for num_threads(threads) if (threads > 1 && whole >= kParallel)
  for (int64_t i = 0; i < part; ++i)
    hash_words<kStreams>((const uint32_t*)(data + i * kBlock), part * kWords, kWords, key,
                         out + 2 * i, 2 * part);
  for (int64_t i = kStreams * part; i < whole; ++i)
    hash_words<1>((const uint32_t*)(data + i * kBlock), 0, kWords, key, out + 2 * i, 0);
  if (rest) hash_rest(data + whole * kBlock, rest, key, out + 2 * whole);
}

}  // namespace

#ifdef _MSC_VER
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

EXPORT void fingerprints(int64_t count, const void* const* data, const int64_t* sizes,
                         const uint32_t* keys, uint64_t* out, int threads) {
  std::vector<uint64_t> hashes, next;
  std::memset(out, 0, count * kHash);
  for (int64_t t = 0; t < count; ++t, out += 2) {
    const char* from = (const char*)data[t];
    int64_t bytes = sizes[t];
    const uint32_t* key = keys;
    while (bytes > kBlock) {
      const int64_t blocks = (bytes + kBlock - 1) / kBlock;
      next.assign(2 * blocks, 0);
      hash_level(from, bytes, key, next.data(), threads);
      hashes.swap(next);
      from = (const char*)hashes.data();
      bytes = blocks * kHash;
      key += kWords + kShift;
    }
    hash_rest(from, bytes, key, out);
  }
}
"""


@functools.cache
def _library() -> Any:
    """The function above, compiled for this processor, and its keys."""
    function = _inductor.load_cpp(_SOURCE).fingerprints
    function.restype = None
    keys = secrets.token_bytes(4 * _KEY_WORDS * _LEVELS)
    return function, ctypes.create_string_buffer(keys, len(keys))


def sizes_of(tensors: Sequence[Tensor]) -> Any:
    """How many bytes each has, in the form that ``fingerprints`` takes."""
    return (ctypes.c_int64 * len(tensors))(*[t.nbytes for t in tensors])


def reader(tensor: Tensor) -> Callable[[], object]:
    """A function that takes the tensor's fingerprint and nothing else, for timing.

    What Python adds to ``fingerprints`` is once per network, and would count for each layer.
    """
    function, keys = _library()
    data, out = ctypes.c_uint64(tensor.data_ptr()), ctypes.create_string_buffer(BYTES)
    pointers = ctypes.byref(data), sizes_of([tensor]), keys, out
    threads = ctypes.c_int(torch.get_num_threads())
    return functools.partial(function, ctypes.c_int64(1), *pointers, threads)


def fingerprints(*tensors: Tensor, sizes: Any = None) -> bytes:
    """``BYTES`` bytes for the contents of each of these tensors on CPU, in their order.

    They lie in memory without gaps and repeats. Asking for their ``sizes`` takes longer than
    hashing small ones: who knows them hands them over.
    Numbers are compared as the bits that they are, in the order in which they lie in memory:
    sizes, strides and dtypes are not part of it.
    """
    function, keys = _library()
    count = len(tensors)
    # An array of ctypes takes four times as long to fill.
    data = array.array("Q", map(Tensor.data_ptr, tensors))
    out = ctypes.create_string_buffer(BYTES * count)
    function(
        ctypes.c_int64(count),
        ctypes.c_void_p(data.buffer_info()[0]),
        sizes_of(tensors) if sizes is None else sizes,
        keys,
        out,
        ctypes.c_int(torch.get_num_threads()),
    )
    return out.raw
