/* Streams of rans32 with AVX-512 (F, BW, VL, DQ): 16 lanes a register, two registers a stream.
 *
 * A decoder of one stream waits for latencies (a table look-up, arithmetic, the next look-up), so up to
 * four streams take their steps in turns: 4.4, 7.6 and 9.6 GB/s of bf16 with one, two and four on one
 * core that was measured. An encoder's look-ups do not depend on its states: one stream suffices.
 *
 * encode: the words of a step go below those of later steps. Lanes that overflow are compressed to the
 *         front of a register, cut to 16 bits and stored under a mask, lanes 16..31 first.
 * decode: 16 words are loaded, of which lanes below L take the first ones in ascending order (expand).
 *
 * x div f: a float estimate, the quotient or one less (rans32.c), then a correction.
 */
#include "native.h"

#ifdef FEWBIT_X86
#include <immintrin.h>

enum { HALVES = 2 };

/* One step of 16 lanes. */
FEWBIT_AVX512 FEWBIT_INLINE __m512i encode_16(__m512i x, const uint8_t *symbols,
                                              const fewbit_code *codes, uint16_t **at,
                                              __m512i *least) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd =
        _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)symbols));
    __m512i first = _mm512_i32gather_epi64(_mm512_castsi512_si256(wide), codes, 8);
    __m512i second = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(wide, 1), codes, 8);
    __m512i fc = _mm512_permutex2var_epi32(first, even, second);
    __m512 reciprocal = _mm512_castsi512_ps(_mm512_permutex2var_epi32(first, odd, second));
    __m512i f = _mm512_and_si512(fc, _mm512_set1_epi32(4095));
    *least = _mm512_min_epu32(*least, f);
    __mmask16 over = _mm512_cmpge_epu32_mask(x, _mm512_slli_epi32(fc, 20));
    int n_words = __builtin_popcount(over);
    __m256i words = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(over, x));
    *at -= n_words;
    _mm256_mask_storeu_epi16(*at, (__mmask16)_bzhi_u32(0xffff, (unsigned)n_words), words);
    x = _mm512_mask_srli_epi32(x, over, x, 16);
    __m512i quotient = _mm512_cvttps_epu32(_mm512_mul_ps(_mm512_cvtepu32_ps(x), reciprocal));
    __m512i rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, f));
    __mmask16 low = _mm512_cmpge_epu32_mask(rest, f);
    x = _mm512_add_epi32(_mm512_add_epi32(rest, _mm512_srli_epi32(fc, 12)),
                         _mm512_slli_epi32(quotient, 12));
    return _mm512_mask_add_epi32(x, low, x, _mm512_sub_epi32(_mm512_set1_epi32(FEWBIT_SLOTS), f));
}

FEWBIT_AVX512 static void encode_one(struct fewbit_writer *w, size_t n_steps,
                                     const fewbit_code *codes) {
    __m512i low = _mm512_loadu_si512(w->state), high = _mm512_loadu_si512(w->state + 16);
    __m512i least = _mm512_set1_epi32(1);
    uint16_t *at = w->begin;
    for (size_t t = n_steps; t--;) {
        const uint8_t *symbols = w->symbols + t * FEWBIT_LANES;
        for (int i = 0; i < FEWBIT_AHEAD; i++)
            __builtin_prefetch(w->ahead[FEWBIT_AHEAD * t + (size_t)i]);
        high = encode_16(high, symbols + 16, codes, &at, &least);
        low = encode_16(low, symbols, codes, &at, &least);
    }
    _mm512_storeu_si512(w->state, low);
    _mm512_storeu_si512(w->state + 16, high);
    w->begin = at;
    w->impossible = _mm512_cmpeq_epi32_mask(least, _mm512_setzero_si512()) != 0;
}

FEWBIT_AVX512 FEWBIT_INLINE __m512i decode_16(__m512i x, const uint8_t **at, uint8_t *symbols,
                                              const uint32_t *slots) {
    const __m512i twelve = _mm512_set1_epi32(4095);
    __m512i entry = _mm512_i32gather_epi32(_mm512_and_si512(x, twelve), slots, 4);
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)*at));
    _mm_storeu_si128((__m128i *)symbols, _mm512_cvtepi32_epi8(entry));
    x = _mm512_mullo_epi32(_mm512_srli_epi32(entry, 20), _mm512_srli_epi32(x, 12));
    x = _mm512_add_epi32(x, _mm512_and_si512(_mm512_srli_epi32(entry, 8), twelve));
    __mmask16 under = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(FEWBIT_LOW));
    *at += 2 * __builtin_popcount(under);
    x = _mm512_mask_slli_epi32(x, under, x, 16);
    return _mm512_or_si512(x, _mm512_maskz_expand_epi32(under, words));
}

FEWBIT_AVX512 FEWBIT_INLINE void decode_n(struct fewbit_reader *r, const int n_streams,
                                          size_t n_steps, const uint32_t *slots) {
    __m512i x[FEWBIT_TOGETHER][HALVES];
    const uint8_t *at[FEWBIT_TOGETHER];
    uint8_t *symbols[FEWBIT_TOGETHER];
    for (int i = 0; i < n_streams; i++) {
        x[i][0] = _mm512_loadu_si512(r[i].state);
        x[i][1] = _mm512_loadu_si512(r[i].state + 16);
        at[i] = r[i].words;
        symbols[i] = r[i].symbols;
    }
    for (size_t t = 0; t < n_steps; t++) {
        for (int i = 0; i < n_streams; i++) {
            for (int k = 0; k < FEWBIT_AHEAD; k++)
                __builtin_prefetch(r[i].ahead[FEWBIT_AHEAD * t + (size_t)k]);
            x[i][0] = decode_16(x[i][0], &at[i], symbols[i], slots);
            x[i][1] = decode_16(x[i][1], &at[i], symbols[i] + 16, slots);
            symbols[i] += FEWBIT_LANES;
        }
    }
    for (int i = 0; i < n_streams; i++) {
        r[i].words = at[i];
        _mm512_storeu_si512(r[i].ends, x[i][0]);
        _mm512_storeu_si512(r[i].ends + 16, x[i][1]);
    }
}

FEWBIT_AVX512 void fewbit_encode_avx512(struct fewbit_writer *w, int n_streams, size_t n_steps,
                                        const fewbit_code *codes) {
    for (int i = 0; i < n_streams; i++) encode_one(&w[i], n_steps, codes);
}

FEWBIT_AVX512 void fewbit_decode_avx512(struct fewbit_reader *r, int n_streams, size_t n_steps,
                                        const uint32_t *slots) {
    for (; n_streams >= 4; n_streams -= 4, r += 4) decode_n(r, 4, n_steps, slots);
    for (; n_streams >= 2; n_streams -= 2, r += 2) decode_n(r, 2, n_steps, slots);
    if (n_streams) decode_n(r, 1, n_steps, slots);
}
#endif
