/* What the C files share: instruction sets, the format's constants, and the plain structs that
 * quant/codecs/rans32_native.py fills.
 *
 * No file is compiled for more than the baseline of its architecture. Functions that use more carry
 * a target attribute and are called only where the processor was asked (cpu.c), so that one library
 * serves a cluster of different machines.
 */
#ifndef FEWBIT_NATIVE_H
#define FEWBIT_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fewbit's files are little-endian, and so is this code"
#endif

#define FEWBIT_EXPORT __attribute__((visibility("default")))
#define FEWBIT_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && !defined(FEWBIT_SCALAR_ONLY)
#define FEWBIT_X86 1
#if defined(__clang__) && __clang_major__ < 14 /* knows no name for the instruction alone */
#define FEWBIT_SSE42 __attribute__((target("sse4.2")))
#else
#define FEWBIT_SSE42 __attribute__((target("sse4.2,crc32")))
#endif
#define FEWBIT_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define FEWBIT_AVX512                                                                              \
    __attribute__((target("avx2,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq")))
#endif

enum fewbit_isa { FEWBIT_ISA_SCALAR, FEWBIT_ISA_AVX2, FEWBIT_ISA_AVX512 };

/* The best instruction set that the processor and the system have, at most `cap`. */
FEWBIT_EXPORT int fewbit_isa(int cap);
int fewbit_has_crc32(void); /* is there an instruction for CRC32C? */

/* CRC32C (Castagnoli), of bytes that follow those whose checksum is `crc`; 0 at the start. */
FEWBIT_EXPORT uint32_t fewbit_crc32c(uint32_t crc, const uint8_t *data, size_t n);

/* Working memory that calls hand to later calls, of any thread: new pages cost more than small tensors.
 * What was never used is zero. */
enum { FEWBIT_SPARES = 8 };
struct fewbit_spares {
    void *at[FEWBIT_SPARES];
};
void *fewbit_take(struct fewbit_spares *spares, size_t n_bytes); /* NULL: no memory */
void fewbit_give(struct fewbit_spares *spares, void *memory);

/* ---- chunks: quant/codecs/chunks.py draws them ---- */

enum {
    FEWBIT_CHUNK = 16384,
    FEWBIT_LANES = 32,
    FEWBIT_CARRIED = 64, /* bytes of a raw plane that the states of a chunk may carry */
    FEWBIT_MAX_PLANES = 8,
    FEWBIT_LOW = 65536,  /* L: states of a stream lie in [L, 2^32) between steps */
    FEWBIT_SLOTS = 4096, /* sum of the frequencies */
    FEWBIT_TOGETHER = 4, /* chunks whose streams may be coded in one interleaved loop */
    FEWBIT_AHEAD = 2,    /* cache lines fetched ahead in each step of a stream */
};

enum fewbit_kind { FEWBIT_BYTE, FEWBIT_BF16, FEWBIT_HALF, FEWBIT_FP32, FEWBIT_WORD, FEWBIT_LONG };

struct fewbit_chunks {
    uint8_t *data; /* elements; only read by count and encode */
    uint64_t n_bytes;
    const int64_t *starts;
    const int32_t *sizes;
    uint64_t n_chunks;
    uint64_t piece;  /* elements */
    uint64_t stride; /* bytes */
    int32_t kind;
    int32_t isa;
};

struct fewbit_group {
    uint8_t *raw;
    uint64_t raw_bytes;
    uint8_t *words;
    uint64_t words_bytes; /* what `words` has room for, or holds */
    uint64_t *index;
    uint32_t *state;
    uint32_t *crc;
};

int fewbit_n_planes(int kind); /* and bytes of an element; 0 for an unknown kind */

/* One piece of n elements <-> its planes; a plane may be anywhere. */
void fewbit_split(int isa, int kind, const uint8_t *data, uint8_t *const *planes, size_t n);
void fewbit_merge(int isa, int kind, uint8_t *data, uint8_t *const *planes, size_t n);

/* CRC32C of n_bytes that lie in pieces, one after the other. */
uint32_t fewbit_crc_pieces(const uint8_t *first, size_t piece_bytes, size_t stride, size_t n_bytes);

/* Does every chunk lie in the buffer, and is the kind one of ours? */
int fewbit_layout_is_sound(const struct fewbit_chunks *chunks);

/* Where the planes of one chunk are: elements 0..63, and from 64 on. */
struct fewbit_places {
    uint8_t *first[FEWBIT_MAX_PLANES];
    uint8_t *rest[FEWBIT_MAX_PLANES];
};

/* One chunk <-> its planes, and the checksum of its bytes. */
void fewbit_split_chunk(const struct fewbit_chunks *chunks, uint64_t c,
                        const struct fewbit_places *places);
void fewbit_merge_chunk(const struct fewbit_chunks *chunks, uint64_t c,
                        const struct fewbit_places *places);
uint32_t fewbit_chunk_checksum(const struct fewbit_chunks *chunks, uint64_t c);

/* What the calls below answer; quant/codecs/rans32_native.py makes errors of it. */
enum fewbit_answer {
    FEWBIT_CODED, /* nothing wrong */
    FEWBIT_BAD_END,
    FEWBIT_BAD_ENTRY,
    FEWBIT_BAD_LENGTH,
    FEWBIT_BAD_CONSTANT,
    FEWBIT_BAD_RAW,
    FEWBIT_BAD_STREAM,
    FEWBIT_BAD_CHECKSUM,
    FEWBIT_BAD_ARGUMENT,
    FEWBIT_NO_MEMORY,
    FEWBIT_NO_ROOM, /* for the words */
};

/* Adds to counts, [n_planes, 256]. */
FEWBIT_EXPORT int fewbit_rans32_count(const struct fewbit_chunks *chunks, uint64_t *counts);

/* Fills a group. The length of the words is the last entry of the index; all streams raw, each rounded
 * up to an even length, and one byte always have room. freq: [n_planes, 256]. */
FEWBIT_EXPORT int fewbit_rans32_encode(const struct fewbit_chunks *chunks, const uint16_t *freq,
                                       struct fewbit_group *g);

/* Writes all elements, or answers what is wrong and in which chunk (-1: in none of them). */
FEWBIT_EXPORT int fewbit_rans32_decode(const struct fewbit_chunks *chunks, const uint16_t *freq,
                                       const struct fewbit_group *g, int64_t *bad);

/* ---- streams: quant/codecs/rans32_numpy.py defines them ---- */

struct fewbit_writer {           /* one stream that is being coded */
    const uint8_t *symbols;      /* n_steps · 32, the last step padded */
    uint16_t *begin;             /* in: one behind the last word; out: the first word */
    uint32_t *state;             /* in: 1 << 16 | half; out: the end states, [32] */
    uint32_t impossible;         /* out: is there a symbol without a frequency? */
    const uint8_t *const *ahead; /* n_steps · FEWBIT_AHEAD addresses to fetch meanwhile */
};

struct fewbit_reader {     /* one stream that is being decoded */
    const uint8_t *words;  /* in: n_steps · 32 + 32 words can be read; out: behind the last used */
    const uint32_t *state; /* [32] */
    uint8_t *symbols;      /* out: n_steps · 32 */
    uint32_t ends[FEWBIT_LANES]; /* out: states behind the last step */
    const uint8_t *const *ahead; /* as above */
};

/* Encoder's entry of a symbol, low half f | c << 12, high half a float just below 1 / f. */
typedef uint64_t fewbit_code;

void fewbit_encode_scalar(struct fewbit_writer *w, int n_streams, size_t n_steps,
                          const fewbit_code *codes);
void fewbit_decode_scalar(struct fewbit_reader *r, int n_streams, size_t n_steps,
                          const uint32_t *slots);
#ifdef FEWBIT_X86
void fewbit_encode_avx2(struct fewbit_writer *w, int n_streams, size_t n_steps,
                        const fewbit_code *codes);
void fewbit_decode_avx2(struct fewbit_reader *r, int n_streams, size_t n_steps,
                        const uint32_t *slots);
void fewbit_encode_avx512(struct fewbit_writer *w, int n_streams, size_t n_steps,
                          const fewbit_code *codes);
void fewbit_decode_avx512(struct fewbit_reader *r, int n_streams, size_t n_steps,
                          const uint32_t *slots);
#endif

#endif
