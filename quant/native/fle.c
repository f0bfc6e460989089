/* bf16 words <-> the parts of fle4 and fle3; quant/formats/fle.py draws them.
 *
 * All calls work on bands: band b is the rows 64·b … 64·b + 63 of the matrix, so that callers give bands
 * to threads. A band is made row by row, 64 columns at a time; the columns of a last, narrower tile go
 * through a tile of their own, so that nothing is written outside a row.
 *
 *     fle4   all codes become words as if there were no escapes; then entry i of a tile's list says where
 *            an exponent belongs
 *     fle3   entry i of a tile belongs to its i-th code 0, and tiles of a row take turns: each has a
 *            cursor into the list
 *
 * Decoding trusts the shapes of the parts and none of their bytes: offsets are compared with the lists,
 * positions with the matrix, codes 0 with the room between two offsets, once for a tile, an entry, or 64
 * codes. What a code 0 without an entry (fle4 only) becomes is not defined.
 */
#include "native.h"

enum { TILE = 64, HALF = 32, PANEL = 256 /* tiles whose cursors are kept at once */ };

struct fewbit_fle {
    uint16_t *words; /* [n, k]; read by count, encode and list, written by decode */
    uint8_t *sign_mantissa, *codes;
    int32_t *offset;   /* [tiles + 1] */
    int16_t *position; /* fle4 */
    uint8_t *exponent;
    int64_t n, k, escapes; /* escapes: entries that the lists hold */
    int32_t bits, base, width, isa;
};

/* Adds to counts [256] how often each exponent occurs among n words. */
FEWBIT_EXPORT void fewbit_fle_count(const uint16_t *words, int64_t n, int64_t *counts);
/* Fills sign_mantissa and codes of bands [first, last), and writes behind each tile's place in `offset`
 * how many escapes it has. */
FEWBIT_EXPORT void fewbit_fle_encode(const struct fewbit_fle *f, int64_t first, int64_t last);
/* Fills the lists of those bands. `offset` and codes are complete, and by fewbit_fle_encode. */
FEWBIT_EXPORT void fewbit_fle_list(const struct fewbit_fle *f, int64_t first, int64_t last);
/* Writes the words of those bands, and answers 0; or 1 if the parts contradict each other. */
FEWBIT_EXPORT int fewbit_fle_decode(const struct fewbit_fle *f, int64_t first, int64_t last);

FEWBIT_INLINE int64_t tiles_across(const struct fewbit_fle *f) { return (f->k + TILE - 1) / TILE; }

FEWBIT_INLINE int64_t end_of(const struct fewbit_fle *f, int64_t band) {
    return (band + 1) * TILE < f->n ? (band + 1) * TILE : f->n;
}

FEWBIT_INLINE uint64_t load8(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

FEWBIT_INLINE uint16_t with_exponent(uint16_t word, uint8_t exponent) {
    return (uint16_t)((word & 0x807F) | exponent << 7);
}

/* ---- 64 codes <-> 8 bytes of each of three planes ---- */

static const uint64_t ONES = 0x0101010101010101;

static void codes_of_planes_scalar(const uint64_t plane[3], uint8_t codes[TILE]) {
    for (int j = 0; j < 8; j++) {
        uint64_t eight = 0;
        for (int p = 0; p < 3; p++) {
            uint64_t byte = (plane[p] >> (8 * j)) & 255;
            uint64_t bits = ((byte & 127) * 0x0002040810204081) & ONES; /* bit i to byte i */
            eight |= (bits | (byte >> 7) << 56) << p;
        }
        memcpy(codes + 8 * j, &eight, 8);
    }
}

static void planes_of_codes_scalar(const uint8_t codes[TILE], uint64_t plane[3]) {
    for (int p = 0; p < 3; p++) {
        plane[p] = 0;
        for (int j = 0; j < 8; j++) {
            uint64_t bits = (load8(codes + 8 * j) >> p) & ONES;
            plane[p] |= (bits * 0x0102040810204080) >> 56 << (8 * j);
        }
    }
}

#ifdef FEWBIT_X86
#include <immintrin.h>

static FEWBIT_AVX2 void codes_of_planes_avx2(const uint64_t plane[3], uint8_t codes[TILE]) {
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2,
                                            2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    for (int half = 0; half < 2; half++) {
        __m256i sum = _mm256_setzero_si256();
        for (int p = 0; p < 3; p++) {
            __m256i bytes = _mm256_set1_epi32((int32_t)(plane[p] >> (32 * half)));
            __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(bytes, spread), bit);
            __m256i set = _mm256_cmpeq_epi8(own, bit);
            sum = _mm256_or_si256(sum, _mm256_and_si256(set, _mm256_set1_epi8((char)(1 << p))));
        }
        _mm256_storeu_si256((__m256i *)(codes + HALF * half), sum);
    }
}

static FEWBIT_AVX2 void planes_of_codes_avx2(const uint8_t codes[TILE], uint64_t plane[3]) {
    __m256i low = _mm256_loadu_si256((const __m256i *)codes);
    __m256i high = _mm256_loadu_si256((const __m256i *)(codes + HALF));
    for (int p = 0; p < 3; p++) { /* bit p of a byte to its bit 7 */
        uint32_t first = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(low, 7 - p));
        uint32_t second = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(high, 7 - p));
        plane[p] = first | (uint64_t)second << 32;
    }
}

static FEWBIT_AVX512 void codes_of_planes_avx512(const uint64_t plane[3], uint8_t codes[TILE]) {
    __m512i sum = _mm512_maskz_set1_epi8(plane[0], 1);
    sum = _mm512_mask_add_epi8(sum, plane[1], sum, _mm512_set1_epi8(2));
    sum = _mm512_mask_add_epi8(sum, plane[2], sum, _mm512_set1_epi8(4));
    _mm512_storeu_si512(codes, sum);
}

static FEWBIT_AVX512 void planes_of_codes_avx512(const uint8_t codes[TILE], uint64_t plane[3]) {
    __m512i all = _mm512_loadu_si512(codes);
    for (int p = 0; p < 3; p++) plane[p] = _mm512_test_epi8_mask(all, _mm512_set1_epi8((char)(1 << p)));
}
#endif

/* ---- loops over a band, for each instruction set ---- */

#define TARGET
#define LOOP(name) name##_scalar
#include "fle_loops.h"
#undef TARGET
#undef LOOP

#ifdef FEWBIT_X86
#define TARGET FEWBIT_AVX2
#define LOOP(name) name##_avx2
#include "fle_loops.h"
#undef TARGET
#undef LOOP
#define TARGET FEWBIT_AVX512
#define LOOP(name) name##_avx512
#include "fle_loops.h"
#undef TARGET
#undef LOOP
#define CHOOSE(name, f, band)                                                  \
    ((f)->isa == FEWBIT_ISA_AVX512 ? name##_avx512(f, band)                    \
     : (f)->isa == FEWBIT_ISA_AVX2 ? name##_avx2(f, band)                      \
                                   : name##_scalar(f, band))
#else
#define CHOOSE(name, f, band) name##_scalar(f, band)
#endif

/* ---- calls ---- */

FEWBIT_EXPORT void fewbit_fle_count(const uint16_t *words, int64_t n, int64_t *counts) {
    enum { WAYS = 4 }; /* neighbours are often equal: their sums must not wait for each other */
    int64_t of[WAYS][256] = {{0}};
    int64_t i = 0;
    for (; i + WAYS <= n; i += WAYS)
        for (int way = 0; way < WAYS; way++) of[way][(uint8_t)(words[i + way] >> 7)]++;
    for (; i < n; i++) of[0][(uint8_t)(words[i] >> 7)]++;
    for (int e = 0; e < 256; e++)
        for (int way = 0; way < WAYS; way++) counts[e] += of[way][e];
}

FEWBIT_EXPORT void fewbit_fle_encode(const struct fewbit_fle *f, int64_t first, int64_t last) {
    for (int64_t band = first; band < last; band++) CHOOSE(encode_band, f, band);
}

/* Columns of a row of a tile whose codes are 0; bit c for column c. */
static uint64_t zeros_of_row(const struct fewbit_fle *f, int64_t row, int64_t t) {
    const int64_t across = tiles_across(f);
    if (f->bits == 3) {
        const uint8_t *at = f->codes + (row * across + t) * 8;
        const int64_t plane = f->n * across * 8;
        return ~(load8(at) | load8(at + plane) | load8(at + 2 * plane));
    }
    uint64_t mask = 0;
    const uint8_t *at = f->codes + (row * across + t) * HALF;
    for (int g = 0; g < 8; g++) {
        uint64_t nibbles = (load8(at + 8 * (g & 3)) >> (g >= 4 ? 4 : 0)) & (15 * ONES);
        uint64_t none = ~(nibbles + 127 * ONES) & (128 * ONES); /* bit 7 of a byte that is 0 */
        mask |= ((none >> 7) * 0x0102040810204080) >> 56 << (8 * g);
    }
    return mask;
}

static void list_tile(const struct fewbit_fle *f, int64_t band, int64_t t) {
    const int64_t tile = band * tiles_across(f) + t;
    int32_t at = f->offset[tile];
    for (int64_t row = band * TILE; at < f->offset[tile + 1] && row < end_of(f, band); row++)
        for (uint64_t mask = zeros_of_row(f, row, t); mask; mask &= mask - 1, at++) {
            const int column = __builtin_ctzll(mask);
            f->exponent[at] = (uint8_t)(f->words[row * f->k + t * TILE + column] >> 7);
            if (f->bits == 4) f->position[at] = (int16_t)((row - band * TILE) * TILE + column);
        }
}

FEWBIT_EXPORT void fewbit_fle_list(const struct fewbit_fle *f, int64_t first, int64_t last) {
    for (int64_t band = first; band < last; band++)
        for (int64_t t = 0; t < tiles_across(f); t++) list_tile(f, band, t);
}

static int offsets_are_sound(const struct fewbit_fle *f, int64_t band) {
    const int32_t *offset = f->offset + band * tiles_across(f);
    if (offset[0] < 0 || (!band && offset[0]) || offset[tiles_across(f)] > f->escapes) return 0;
    for (int64_t t = 0; t < tiles_across(f); t++)
        if (offset[t] > offset[t + 1]) return 0;
    return 1;
}

FEWBIT_EXPORT int fewbit_fle_decode(const struct fewbit_fle *f, int64_t first, int64_t last) {
    for (int64_t band = first; band < last; band++)
        if (!offsets_are_sound(f, band) || !CHOOSE(decode_band, f, band)) return 1;
    return 0;
}
