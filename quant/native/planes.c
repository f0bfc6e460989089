/* Elements <-> byte planes, most significant first; quant/codecs/planes.py draws them.
 *
 * 4-byte elements go through halves of 16 bits, a few hundred at a time, so that the loops for 2-byte
 * elements do the rest. 8-byte elements are rare in checkpoints and take the plain way.
 */
#include "native.h"

enum { BLOCK = 512 };

#define TARGET
#define LOOP(name) name##_scalar
#include "planes_loops.h"
#undef TARGET
#undef LOOP

#ifdef FEWBIT_X86
#define TARGET FEWBIT_AVX2
#define LOOP(name) name##_avx2
#include "planes_loops.h"
#undef TARGET
#undef LOOP
#define TARGET FEWBIT_AVX512
#define LOOP(name) name##_avx512
#include "planes_loops.h"
#undef TARGET
#undef LOOP
#define CHOOSE(isa, name, ...)                                                                     \
    do {                                                                                           \
        if ((isa) == FEWBIT_ISA_AVX512) name##_avx512(__VA_ARGS__);                                \
        else if ((isa) == FEWBIT_ISA_AVX2) name##_avx2(__VA_ARGS__);                               \
        else name##_scalar(__VA_ARGS__);                                                           \
    } while (0)
#else
#define CHOOSE(isa, name, ...) ((void)(isa), name##_scalar(__VA_ARGS__))
#endif

int fewbit_n_planes(int kind) {
    switch (kind) {
    case FEWBIT_BYTE: return 1;
    case FEWBIT_BF16:
    case FEWBIT_HALF: return 2;
    case FEWBIT_FP32:
    case FEWBIT_WORD: return 4;
    case FEWBIT_LONG: return 8;
    default: return 0;
    }
}

/* Buffers of elements need not be aligned: blocks go through an aligned copy, which stays in L1. */

static void split_block(int isa, int kind, const uint8_t *data, uint8_t *const *planes, size_t at,
                        size_t n) {
    uint16_t halves[2][BLOCK];
    if (fewbit_n_planes(kind) == 2) {
        memcpy(halves[0], data, 2 * n);
        if (kind == FEWBIT_BF16)
            CHOOSE(isa, split_bf16, halves[0], planes[0] + at, planes[1] + at, n);
        else CHOOSE(isa, split_half, halves[0], planes[0] + at, planes[1] + at, n);
        return;
    }
    uint32_t words[BLOCK];
    memcpy(words, data, 4 * n);
    CHOOSE(isa, split_words, words, halves[0], halves[1], n);
    if (kind == FEWBIT_FP32) CHOOSE(isa, split_bf16, halves[0], planes[0] + at, planes[1] + at, n);
    else CHOOSE(isa, split_half, halves[0], planes[0] + at, planes[1] + at, n);
    CHOOSE(isa, split_half, halves[1], planes[2] + at, planes[3] + at, n);
}

static void merge_block(int isa, int kind, uint8_t *data, uint8_t *const *planes, size_t at,
                        size_t n) {
    uint16_t halves[2][BLOCK];
    if (kind == FEWBIT_BF16 || kind == FEWBIT_FP32)
        CHOOSE(isa, merge_bf16, halves[0], planes[0] + at, planes[1] + at, n);
    else CHOOSE(isa, merge_half, halves[0], planes[0] + at, planes[1] + at, n);
    if (fewbit_n_planes(kind) == 2) {
        memcpy(data, halves[0], 2 * n);
        return;
    }
    uint32_t words[BLOCK];
    CHOOSE(isa, merge_half, halves[1], planes[2] + at, planes[3] + at, n);
    CHOOSE(isa, merge_words, words, halves[0], halves[1], n);
    memcpy(data, words, 4 * n);
}

void fewbit_split(int isa, int kind, const uint8_t *data, uint8_t *const *planes, size_t n) {
    size_t width = (size_t)fewbit_n_planes(kind);
    if (width == 1) {
        memcpy(planes[0], data, n);
    } else if (width == 8) {
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < 8; j++) planes[j][i] = data[8 * i + 7 - j];
    } else {
        for (size_t at = 0; at < n; at += BLOCK)
            split_block(isa, kind, data + width * at, planes, at, n - at < BLOCK ? n - at : BLOCK);
    }
}

void fewbit_merge(int isa, int kind, uint8_t *data, uint8_t *const *planes, size_t n) {
    size_t width = (size_t)fewbit_n_planes(kind);
    if (width == 1) {
        memcpy(data, planes[0], n);
    } else if (width == 8) {
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < 8; j++) data[8 * i + 7 - j] = planes[j][i];
    } else {
        for (size_t at = 0; at < n; at += BLOCK)
            merge_block(isa, kind, data + width * at, planes, at, n - at < BLOCK ? n - at : BLOCK);
    }
}
