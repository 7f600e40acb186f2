"""Masks are loaded and stored as bytes with vector instructions, on AVX2 and AVX512."""

from test.upstream.edits import Change, Edit

MASK, MASK_256, MASK_512 = (
    f"torch/include/ATen/cpu/vec/{name}.h"
    for name in ("vec_mask", "vec256/vec256_mask", "vec512/vec512_mask")
)

# Edits put text after a piece of a line, so that blank lines are as they should be.
DECLARED = "VecMask;"
HOOK = """

/**
 * One vector of a mask from bools in memory, and back. A loop over the bytes is
 * not vectorized in every build (Inductor compiles with
 * -fno-tree-loop-vectorize), so archs specialize this for signed integers; floats
 * use that of their size.
 */
template <typename int_t>
struct VecMaskBytes {
  static constexpr bool is_vectorized = false;
};"""

MEMBER = "VectorizedN<T, N> mask_;"
METHODS = """

  using Bytes = VecMaskBytes<int_same_size_t<T>>;

  static VecMask<T, N> load_bytes(const bool* b, int count) {
    using int_t = int_same_size_t<T>;
    bool buffer[size()] = {};
    if (count < size()) {
      std::memcpy(buffer, b, count);
      b = buffer;
    }
    VectorizedN<int_t, N> mask;
    for (int i = 0; i < N; i++) {
      mask[i] = Bytes::load(b + i * Vectorized<T>::size());
    }
    return VecMask<int_t, N>(mask).template cast<T, N>();
  }

  void store_bytes(bool* b, int count) const {
    auto mask = cast<int_same_size_t<T>, N>();
    bool buffer[size()];
    bool* out = count < size() ? buffer : b;
    for (int i = 0; i < N; i++) {
      Bytes::store(mask[i], out + i * Vectorized<T>::size());
    }
    if (count < size()) {
      std::memcpy(b, buffer, count);
    }
  }"""

LOAD = """
    if constexpr (
        std::is_same_v<std::remove_const_t<U>, bool> && Bytes::is_vectorized) {
      return load_bytes(b, %s);
    }"""

STORE = """
    if constexpr (Bytes::is_vectorized) {
      return store_bytes(b, count);
    }"""

COMPILER = "!defined(_MSC_VER)"
AVX2 = """

template <>
struct VecMaskBytes<int32_t> {
  static constexpr bool is_vectorized = true;

  static inline Vectorized<int32_t> load(const bool* ptr) {
    auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(ptr));
    return _mm256_cmpgt_epi32(
        _mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
  }

  static inline void store(const Vectorized<int32_t>& mask, bool* ptr) {
    auto words = _mm_packs_epi32(
        _mm256_castsi256_si128(mask), _mm256_extracti128_si256(mask, 1));
    auto is_zero =
        _mm_cmpeq_epi8(_mm_packs_epi16(words, words), _mm_setzero_si128());
    auto bytes = _mm_add_epi8(is_zero, _mm_set1_epi8(1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(ptr), bytes);
  }
};

template <>
struct VecMaskBytes<int64_t> {
  static constexpr bool is_vectorized = true;

  static inline Vectorized<int64_t> load(const bool* ptr) {
    int32_t bytes;
    std::memcpy(&bytes, ptr, sizeof(bytes));
    return _mm256_cmpgt_epi64(
        _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)),
        _mm256_setzero_si256());
  }

  static inline void store(const Vectorized<int64_t>& mask, bool* ptr) {
    int bits = _mm256_movemask_pd(_mm256_castsi256_pd(mask));
    // Bit i to byte i: the products of the bits do not overlap
    int32_t bytes = (bits * 0x00204081) & 0x01010101;
    std::memcpy(ptr, &bytes, sizeof(bytes));
  }
};"""

AVX512 = """

template <>
struct VecMaskBytes<int32_t> {
  static constexpr bool is_vectorized = true;

  static inline Vectorized<int32_t> load(const bool* ptr) {
    auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ptr));
    return _mm512_movm_epi32(_mm_test_epi8_mask(bytes, bytes));
  }

  static inline void store(const Vectorized<int32_t>& mask, bool* ptr) {
    auto bytes = _mm_maskz_set1_epi8(_mm512_test_epi32_mask(mask, mask), 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(ptr), bytes);
  }
};

template <>
struct VecMaskBytes<int64_t> {
  static constexpr bool is_vectorized = true;

  static inline Vectorized<int64_t> load(const bool* ptr) {
    auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(ptr));
    return _mm512_movm_epi64(_mm_test_epi8_mask(bytes, bytes));
  }

  static inline void store(const Vectorized<int64_t>& mask, bool* ptr) {
    auto bytes = _mm_maskz_set1_epi8(_mm512_test_epi64_mask(mask, mask), 1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(ptr), bytes);
  }
};"""


def append(file: str, inside: str, piece: str, text: str) -> Edit:
    return Edit(file, inside, piece, "swap", piece + text)


CHANGE = Change(
    name="cpp_byte_masks",
    title="[inductor][cpp] Load and store bool masks with vector instructions",
    new_files={},
    removed=(),
    edits=(
        append(MASK, "", DECLARED, HOOK),
        append(MASK, "", MEMBER, METHODS),
        append(MASK, "", "from(U* b) {", LOAD % "size()"),
        append(MASK, "", "from(U* b, int count) {", LOAD % "count"),
        append(MASK, "", "int count = size()) {", STORE),
        append(MASK_256, "", COMPILER, AVX2),
        append(MASK_512, "", COMPILER, AVX512),
    ),
    tests=("test_cpp_byte_masks.py",),
)
