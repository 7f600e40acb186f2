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

import ctypes
import functools
import secrets
from typing import Any

import torch
from torch import Tensor

from . import _inductor

__all__ = ["BYTES", "fingerprints"]

BYTES = 16  # of one fingerprint
_LEVELS = 5  # 8 KB * 512**4 is more than any tensor has
_KEY_WORDS = 2048 + 16  # per level: a block, and the shift

_SOURCE = r"""
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kWords = 2048, kShift = 16;
constexpr int64_t kBlock = kWords * 4;        // bytes in a block
constexpr int64_t kHash = 16;                 // bytes of its hash
constexpr int64_t kParallel = 128;            // blocks from which on threads pay
constexpr int64_t kAhead = 1024;              // words that are fetched ahead

// words: a multiple of 16, at most kWords.
void hash_words(const uint32_t* m, int64_t words, const uint32_t* k, uint64_t* out) {
  uint64_t first = 0, second = 0;
#if defined(__AVX512F__)
  __m512i a = _mm512_setzero_si512(), b = a;
  for (int64_t i = 0; i < words; i += 16) {
    _mm_prefetch((const char*)(m + i + kAhead), _MM_HINT_NTA);
    const __m512i x = _mm512_loadu_si512(m + i);
    const __m512i p = _mm512_add_epi32(x, _mm512_loadu_si512(k + i));
    const __m512i q = _mm512_add_epi32(x, _mm512_loadu_si512(k + i + kShift));
    a = _mm512_add_epi64(a, _mm512_mul_epu32(p, _mm512_srli_epi64(p, 32)));
    b = _mm512_add_epi64(b, _mm512_mul_epu32(q, _mm512_srli_epi64(q, 32)));
  }
  first = _mm512_reduce_add_epi64(a);
  second = _mm512_reduce_add_epi64(b);
#elif defined(__AVX2__)
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int64_t i = 0; i < words; i += 8) {
    _mm_prefetch((const char*)(m + i + kAhead), _MM_HINT_NTA);
    const __m256i x = _mm256_loadu_si256((const __m256i*)(m + i));
    const __m256i p = _mm256_add_epi32(x, _mm256_loadu_si256((const __m256i*)(k + i)));
    const __m256i q = _mm256_add_epi32(x, _mm256_loadu_si256((const __m256i*)(k + i + kShift)));
    a = _mm256_add_epi64(a, _mm256_mul_epu32(p, _mm256_srli_epi64(p, 32)));
    b = _mm256_add_epi64(b, _mm256_mul_epu32(q, _mm256_srli_epi64(q, 32)));
  }
  uint64_t lanes[8];
  _mm256_storeu_si256((__m256i*)lanes, a);
  _mm256_storeu_si256((__m256i*)(lanes + 4), b);
  for (int i = 0; i < 4; ++i) { first += lanes[i]; second += lanes[i + 4]; }
#else
  for (int64_t i = 0; i < words; i += 2) {
    first += (uint64_t)(uint32_t)(m[i] + k[i]) * (uint32_t)(m[i + 1] + k[i + 1]);
    second += (uint64_t)(uint32_t)(m[i] + k[i + kShift])
        * (uint32_t)(m[i + 1] + k[i + 1 + kShift]);
  }
#endif
  out[0] = first;
  out[1] = second;
}

// One level: a hash for each block, the last one filled up with zeros to a multiple of 16 words.
void hash_level(const char* data, int64_t bytes, const uint32_t* key, uint64_t* out, int threads) {
  const int64_t whole = bytes / kBlock, rest = bytes % kBlock;
  #pragma omp parallel for num_threads(threads) if (threads > 1 && whole >= kParallel)
  for (int64_t i = 0; i < whole; ++i)
    hash_words((const uint32_t*)(data + i * kBlock), kWords, key, out + 2 * i);
  if (rest) {
    uint32_t words[kWords];
    const int64_t count = (rest + 63) / 64 * 16;
    std::memset(words + count - 16, 0, 64);
    std::memcpy(words, data + whole * kBlock, rest);
    hash_words(words, count, key, out + 2 * whole);
  }
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
  for (int64_t t = 0; t < count; ++t, out += 2) {
    const char* from = (const char*)data[t];
    int64_t bytes = sizes[t];
    const uint32_t* key = keys;
    do {
      const int64_t blocks = bytes == 0 ? 1 : (bytes + kBlock - 1) / kBlock;
      next.assign(2 * blocks, 0);
      hash_level(from, bytes, key, next.data(), threads);
      hashes.swap(next);
      from = (const char*)hashes.data();
      bytes = blocks * kHash;
      key += kWords + kShift;
    } while (bytes > kHash);
    std::memcpy(out, hashes.data(), kHash);
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


def fingerprints(*tensors: Tensor) -> bytes:
    """``BYTES`` bytes for the contents of each of these tensors on CPU, in their order.

    They lie in memory without gaps and repeats.
    Numbers are compared as the bits that they are, in the order in which they lie in memory:
    sizes, strides and dtypes are not part of it.
    """
    function, keys = _library()
    count = len(tensors)
    data = (ctypes.c_void_p * count)(*[t.data_ptr() for t in tensors])
    sizes = (ctypes.c_int64 * count)(*[t.nbytes for t in tensors])
    out = ctypes.create_string_buffer(BYTES * count)
    threads = ctypes.c_int(torch.get_num_threads())
    function(ctypes.c_int64(count), data, sizes, keys, out, threads)
    return out.raw
