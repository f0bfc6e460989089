/* Codes of a KV stream <-> symbols in the order of coding; quant/kv_stream_predict.py says the maths.
 *
 *     codes    [rows, tokens, channels]
 *     symbols  group after group: [rows, tokens, channels of the group], position p of the order
 *
 * mean (1024ths of a code, so a' there) and correlation come in the order of coding, so that the loops
 * over a group are plain vectors; `order` says where a position's code lies. A guess looks at the token
 * before, never at a neighbouring channel. Any bytes as symbols stay within the buffers.
 */
#include "native.h"

enum { ONE_SHIFT = 10, BLOCK = 256 };

struct fewbit_kv_run {
    uint8_t *codes;
    uint8_t *symbols;
    const uint32_t *order;      /* [channels], a permutation */
    const int32_t *mean;        /* [channels] */
    const int32_t *correlation; /* [channels] */
    const int64_t *edges;       /* [n_groups + 1], positions */
    int64_t n_groups, rows, tokens, channels;
    int32_t centre, isa;
};

FEWBIT_INLINE int32_t guess(int32_t last, int32_t mean, int32_t correlation, int32_t c) {
    int32_t beyond = (last - c) * (1 << ONE_SHIFT) - mean;
    int32_t value = (mean + ((beyond * correlation) >> ONE_SHIFT) + (1 << (ONE_SHIFT - 1))) >> ONE_SHIFT;
    value = value < -c ? -c : value;
    return value > c ? c : value;
}

FEWBIT_INLINE int32_t wrap(int32_t value, int32_t n) {
    value = value < 0 ? value + n : value;
    return value >= n ? value - n : value;
}

/* At most BLOCK positions of one row, all tokens. The first token follows its mean: correlation 0. */
FEWBIT_INLINE void block(const struct fewbit_kv_run *run, int64_t row, int64_t first, int64_t width,
                         uint8_t *symbols, int64_t stride, int decoding) {
    const int32_t c = run->centre, n = 2 * c + 1;
    const int32_t *mean = run->mean + first, *correlation = run->correlation + first;
    const uint32_t *order = run->order + first;
    uint8_t *codes = run->codes + row * run->tokens * run->channels;
    uint8_t last[BLOCK], now[BLOCK];
    memset(last, c, sizeof last);
    memset(now, c, sizeof now);
    for (int64_t token = 0; token < run->tokens; token++) {
        const int32_t follows = token > 0;
        if (!decoding)
            for (int64_t i = 0; i < width; i++) now[i] = codes[order[i]];
        for (int64_t i = 0; i < width; i++) {
            int32_t g = guess(last[i], mean[i], follows * correlation[i], c);
            if (decoding) now[i] = (uint8_t)wrap(symbols[i] + g, n);
            else symbols[i] = (uint8_t)wrap(now[i] - g, n);
        }
        if (decoding)
            for (int64_t i = 0; i < width; i++) codes[order[i]] = now[i];
        memcpy(last, now, sizeof last);
        codes += run->channels;
        symbols += stride;
    }
}

FEWBIT_INLINE void all(const struct fewbit_kv_run *run, int decoding) {
    for (int64_t group = 0; group < run->n_groups; group++) {
        const int64_t first = run->edges[group], stride = run->edges[group + 1] - first;
        for (int64_t row = 0; row < run->rows; row++) {
            uint8_t *symbols = run->symbols + run->rows * run->tokens * first + row * run->tokens * stride;
            for (int64_t at = 0; at < stride; at += BLOCK) {
                const int64_t width = stride - at < BLOCK ? stride - at : BLOCK;
                block(run, row, first + at, width, symbols + at, stride, decoding);
            }
        }
    }
}

static void encode_scalar(const struct fewbit_kv_run *run) { all(run, 0); }
static void decode_scalar(const struct fewbit_kv_run *run) { all(run, 1); }
#ifdef FEWBIT_X86
static FEWBIT_AVX2 void encode_avx2(const struct fewbit_kv_run *run) { all(run, 0); }
static FEWBIT_AVX2 void decode_avx2(const struct fewbit_kv_run *run) { all(run, 1); }
static FEWBIT_AVX512 void encode_avx512(const struct fewbit_kv_run *run) { all(run, 0); }
static FEWBIT_AVX512 void decode_avx512(const struct fewbit_kv_run *run) { all(run, 1); }
#define CHOOSE(name, run)                                          \
    do {                                                           \
        if ((run)->isa == FEWBIT_ISA_AVX512) name##_avx512(run);   \
        else if ((run)->isa == FEWBIT_ISA_AVX2) name##_avx2(run);  \
        else name##_scalar(run);                                   \
    } while (0)
#else
#define CHOOSE(name, run) name##_scalar(run)
#endif

FEWBIT_EXPORT void fewbit_kv_encode(const struct fewbit_kv_run *run) { CHOOSE(encode, run); }
FEWBIT_EXPORT void fewbit_kv_decode(const struct fewbit_kv_run *run) { CHOOSE(decode, run); }
