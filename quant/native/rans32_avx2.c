/* Streams of rans32 with AVX2: 8 lanes a register, four registers a stream.
 *
 * There is no compress and no expand: a byte shuffle from a table of 256 masks does it.
 *
 *     gather[m]   the 16-bit lanes that m names, moved to the top: a store of 16 bytes that ends at the
 *                 last word puts garbage only where the words of earlier lanes come next
 *     spread[m]   words 0, 1, ... moved to the lanes that m names, zero elsewhere
 *
 * Comparisons are signed in AVX2; what is compared is either below 2^31 or compared through a maximum.
 */
#include "native.h"

#ifdef FEWBIT_X86
#include <immintrin.h>

enum { REGISTERS = 4, WIDTH = 8 };

static uint8_t gather[256][16], spread[256][16];

__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++) {
        int n = __builtin_popcount((unsigned)mask), place = 0;
        memset(gather[mask], 0x80, 16);
        memset(spread[mask], 0x80, 16);
        for (int lane = 0; lane < WIDTH; lane++) {
            if (!(mask >> lane & 1)) continue;
            int top = WIDTH - n + place;
            for (int byte = 0; byte < 2; byte++) {
                gather[mask][2 * top + byte] = (uint8_t)(2 * lane + byte);
                spread[mask][2 * lane + byte] = (uint8_t)(2 * place + byte);
            }
            place++;
        }
    }
}

FEWBIT_AVX2 FEWBIT_INLINE __m256i encode_8(__m256i x, const uint8_t *symbols,
                                           const fewbit_code *codes, uint16_t **at,
                                           __m256i *least) {
    const __m256i low_half = _mm256_set1_epi32(0xffff);
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)symbols));
    __m256i fc = _mm256_i32gather_epi32((const int *)codes, wide, 8);
    __m256 reciprocal = _mm256_i32gather_ps((const float *)codes + 1, wide, 8);
    __m256i f = _mm256_and_si256(fc, _mm256_set1_epi32(4095));
    *least = _mm256_min_epu32(*least, f);
    __m256i over = _mm256_cmpeq_epi32(_mm256_max_epu32(x, _mm256_slli_epi32(fc, 20)), x);
    unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(over));
    __m256i low = _mm256_and_si256(x, low_half);
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    words = _mm_shuffle_epi8(words, _mm_loadu_si128((const __m128i *)gather[mask]));
    _mm_storeu_si128((__m128i *)(*at - WIDTH), words);
    *at -= __builtin_popcount(mask);
    x = _mm256_blendv_epi8(x, _mm256_srli_epi32(x, 16), over);
    __m256 high_part = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
    __m256 low_part = _mm256_cvtepi32_ps(_mm256_and_si256(x, low_half));
    __m256 as_float = _mm256_add_ps(_mm256_mul_ps(high_part, _mm256_set1_ps(65536.0f)), low_part);
    __m256i quotient = _mm256_cvttps_epi32(_mm256_mul_ps(as_float, reciprocal));
    __m256i rest = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, f));
    __m256i small = _mm256_cmpgt_epi32(f, rest);
    __m256i missing =
        _mm256_andnot_si256(small, _mm256_sub_epi32(_mm256_set1_epi32(FEWBIT_SLOTS), f));
    x = _mm256_add_epi32(_mm256_add_epi32(rest, _mm256_srli_epi32(fc, 12)),
                         _mm256_slli_epi32(quotient, 12));
    return _mm256_add_epi32(x, missing);
}

FEWBIT_AVX2 static void encode_one(struct fewbit_writer *w, size_t n_steps,
                                   const fewbit_code *codes) {
    __m256i x[REGISTERS], least = _mm256_set1_epi32(1);
    uint16_t *at = w->begin;
    for (int i = 0; i < REGISTERS; i++) 
        x[i] = _mm256_loadu_si256((const __m256i *)(w->state + WIDTH * i));
    for (size_t t = n_steps; t--;) {
        const uint8_t *symbols = w->symbols + t * FEWBIT_LANES;
        for (int i = 0; i < FEWBIT_AHEAD; i++)
            __builtin_prefetch(w->ahead[FEWBIT_AHEAD * t + (size_t)i]);
        x[3] = encode_8(x[3], symbols + 24, codes, &at, &least);
        x[2] = encode_8(x[2], symbols + 16, codes, &at, &least);
        x[1] = encode_8(x[1], symbols + 8, codes, &at, &least);
        x[0] = encode_8(x[0], symbols, codes, &at, &least);
    }
    for (int i = 0; i < REGISTERS; i++)
        _mm256_storeu_si256((__m256i *)(w->state + WIDTH * i), x[i]);
    w->begin = at;
    w->impossible = _mm256_movemask_epi8(_mm256_cmpeq_epi32(least, _mm256_setzero_si256())) != 0;
}

FEWBIT_AVX2 FEWBIT_INLINE __m256i decode_8(__m256i x, const uint8_t **at, __m256i *entry_out,
                                           const uint32_t *slots) {
    const __m256i twelve = _mm256_set1_epi32(4095);
    __m256i entry = _mm256_i32gather_epi32((const int *)slots, _mm256_and_si256(x, twelve), 4);
    *entry_out = entry;
    x = _mm256_mullo_epi32(_mm256_srli_epi32(entry, 20), _mm256_srli_epi32(x, 12));
    x = _mm256_add_epi32(x, _mm256_and_si256(_mm256_srli_epi32(entry, 8), twelve));
    __m256i under = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
    unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(under));
    __m128i words = _mm_loadu_si128((const __m128i *)*at);
    words = _mm_shuffle_epi8(words, _mm_loadu_si128((const __m128i *)spread[mask]));
    *at += 2 * __builtin_popcount(mask);
    x = _mm256_blendv_epi8(x, _mm256_slli_epi32(x, 16), under);
    return _mm256_or_si256(x, _mm256_cvtepu16_epi32(words));
}

/* Low bytes of four registers, in the order of lanes. */
FEWBIT_AVX2 FEWBIT_INLINE void store_symbols(uint8_t *symbols, const __m256i entry[REGISTERS]) {
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i low =
        _mm256_packus_epi32(_mm256_and_si256(entry[0], byte), _mm256_and_si256(entry[1], byte));
    __m256i high =
        _mm256_packus_epi32(_mm256_and_si256(entry[2], byte), _mm256_and_si256(entry[3], byte));
    __m256i mixed = _mm256_packus_epi16(low, high);
    _mm256_storeu_si256((__m256i *)symbols, _mm256_permutevar8x32_epi32(mixed, order));
}

FEWBIT_AVX2 static void decode_one(struct fewbit_reader *r, size_t n_steps, const uint32_t *slots) {
    __m256i x[REGISTERS], entry[REGISTERS];
    const uint8_t *at = r->words;
    for (int i = 0; i < REGISTERS; i++)
        x[i] = _mm256_loadu_si256((const __m256i *)(r->state + WIDTH * i));
    for (size_t t = 0; t < n_steps; t++) {
        for (int i = 0; i < FEWBIT_AHEAD; i++)
            __builtin_prefetch(r->ahead[FEWBIT_AHEAD * t + (size_t)i]);
        x[0] = decode_8(x[0], &at, &entry[0], slots);
        x[1] = decode_8(x[1], &at, &entry[1], slots);
        x[2] = decode_8(x[2], &at, &entry[2], slots);
        x[3] = decode_8(x[3], &at, &entry[3], slots);
        store_symbols(r->symbols + t * FEWBIT_LANES, entry);
    }
    for (int i = 0; i < REGISTERS; i++)
        _mm256_storeu_si256((__m256i *)(r->ends + WIDTH * i), x[i]);
    r->words = at;
}

FEWBIT_AVX2 void fewbit_encode_avx2(struct fewbit_writer *w, int n_streams, size_t n_steps,
                                    const fewbit_code *codes) {
    for (int i = 0; i < n_streams; i++) encode_one(&w[i], n_steps, codes);
}

FEWBIT_AVX2 void fewbit_decode_avx2(struct fewbit_reader *r, int n_streams, size_t n_steps,
                                    const uint32_t *slots) {
    for (int i = 0; i < n_streams; i++) decode_one(&r[i], n_steps, slots);
}
#endif
