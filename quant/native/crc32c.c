/* CRC32C: polynomial 0x1EDC6F41, bits reflected (0x82F63B78), start and end inverted.
 *
 * The instruction takes 8 bytes a cycle but answers after three, so a chunk is read at four places at
 * once and the four remainders are joined. With lengths A, B of two parts and remainders started at 0,
 *
 *     crc(A B) = crc(A) · x^(8 · |B|)  +  crc(B)      mod P, over GF(2)
 *
 * where the power comes from squaring and one product takes 32 steps: nothing beside a chunk's bytes.
 * Without the instruction, eight tables take 8 bytes at a time.
 */
#include "native.h"

#ifdef FEWBIT_X86
#include <nmmintrin.h>
#endif

#define POLYNOMIAL 0x82F63B78u

static uint32_t tables[8][256];
static int has_instruction;

__attribute__((constructor)) static void fill_tables(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (POLYNOMIAL & (0u - (crc & 1)));
        tables[0][byte] = crc;
    }
    for (int i = 1; i < 8; i++)
        for (int byte = 0; byte < 256; byte++)
            tables[i][byte] = (tables[i - 1][byte] >> 8) ^ tables[0][tables[i - 1][byte] & 255];
    has_instruction = fewbit_has_crc32();
}

FEWBIT_INLINE uint64_t load64(const uint8_t *p) {
    uint64_t value;
    memcpy(&value, p, 8);
    return value;
}

/* Remainders here are not inverted. */

FEWBIT_INLINE uint32_t eight_bytes(uint32_t crc, uint64_t word) {
    word ^= crc;
    return tables[7][word & 255] ^ tables[6][(word >> 8) & 255] ^ tables[5][(word >> 16) & 255] ^
           tables[4][(word >> 24) & 255] ^ tables[3][(word >> 32) & 255] ^
           tables[2][(word >> 40) & 255] ^ tables[1][(word >> 48) & 255] ^ tables[0][word >> 56];
}

static uint32_t one_scalar(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) crc = eight_bytes(crc, load64(p));
    for (; n; n--, p++) crc = (crc >> 8) ^ tables[0][(crc ^ *p) & 255];
    return crc;
}

static void four_scalar(uint32_t crc[4], const uint8_t *const p[4], size_t n) {
    uint32_t a = crc[0], b = crc[1], c = crc[2], d = crc[3];
    for (size_t i = 0; i < n; i += 8) {
        a = eight_bytes(a, load64(p[0] + i));
        b = eight_bytes(b, load64(p[1] + i));
        c = eight_bytes(c, load64(p[2] + i));
        d = eight_bytes(d, load64(p[3] + i));
    }
    crc[0] = a, crc[1] = b, crc[2] = c, crc[3] = d;
}

#ifdef FEWBIT_X86
FEWBIT_SSE42 static uint32_t one_sse42(uint32_t crc, const uint8_t *p, size_t n) {
    uint64_t wide = crc;
    for (; n >= 8; n -= 8, p += 8) wide = _mm_crc32_u64(wide, load64(p));
    crc = (uint32_t)wide;
    for (; n; n--, p++) crc = _mm_crc32_u8(crc, *p);
    return crc;
}

FEWBIT_SSE42 static void four_sse42(uint32_t crc[4], const uint8_t *const p[4], size_t n) {
    uint64_t a = crc[0], b = crc[1], c = crc[2], d = crc[3];
    for (size_t i = 0; i < n; i += 8) {
        a = _mm_crc32_u64(a, load64(p[0] + i));
        b = _mm_crc32_u64(b, load64(p[1] + i));
        c = _mm_crc32_u64(c, load64(p[2] + i));
        d = _mm_crc32_u64(d, load64(p[3] + i));
    }
    crc[0] = (uint32_t)a, crc[1] = (uint32_t)b, crc[2] = (uint32_t)c, crc[3] = (uint32_t)d;
}
#else
#define one_sse42 one_scalar
#define four_sse42 four_scalar
#endif

static uint32_t one(uint32_t crc, const uint8_t *p, size_t n) {
    return has_instruction ? one_sse42(crc, p, n) : one_scalar(crc, p, n);
}

static void four(uint32_t crc[4], const uint8_t *const p[4], size_t n) {
    if (has_instruction) four_sse42(crc, p, n);
    else four_scalar(crc, p, n);
}

/* a · b mod P; bit 31 is the coefficient of x^0. */
static uint32_t product(uint32_t a, uint32_t b) {
    uint32_t sum = 0;
    for (int bit = 31; bit >= 0; bit--) {
        sum ^= b & (0u - ((a >> bit) & 1));
        b = (b >> 1) ^ (POLYNOMIAL & (0u - (b & 1)));
    }
    return sum;
}

/* x^(8 n) mod P. */
static uint32_t power_of_bytes(size_t n) {
    uint32_t result = 1u << 31, square = 1u << 23;
    for (; n; n >>= 1, square = product(square, square))
        if (n & 1) result = product(result, square);
    return result;
}

static uint32_t joined(const uint32_t crc[4], size_t n_bytes_each) {
    static _Thread_local size_t known_bytes;
    static _Thread_local uint32_t known_power;
    if (known_bytes != n_bytes_each) {
        known_power = power_of_bytes(n_bytes_each);
        known_bytes = n_bytes_each;
    }
    uint32_t whole = crc[0];
    for (int i = 1; i < 4; i++) whole = product(known_power, whole) ^ crc[i];
    return whole;
}

FEWBIT_EXPORT uint32_t fewbit_crc32c(uint32_t crc, const uint8_t *data, size_t n) {
    return ~one(~crc, data, n);
}

uint32_t fewbit_crc_pieces(const uint8_t *first, size_t piece_bytes, size_t stride,
                           size_t n_bytes) {
    uint32_t crc[4] = {~0u, 0, 0, 0};
    if (n_bytes <= piece_bytes) {
        size_t quarter = n_bytes / 32 * 8;
        const uint8_t *p[4] = {first, first + quarter, first + 2 * quarter, first + 3 * quarter};
        if (quarter >= 512) {
            four(crc, p, quarter);
            crc[0] = joined(crc, quarter);
            return ~one(crc[0], first + 4 * quarter, n_bytes - 4 * quarter);
        }
        return ~one(crc[0], first, n_bytes);
    }
    if (n_bytes % (4 * piece_bytes) == 0 && piece_bytes % 8 == 0) {
        size_t n_pieces = n_bytes / piece_bytes / 4;
        for (size_t i = 0; i < n_pieces; i++) {
            const uint8_t *p[4];
            for (size_t j = 0; j < 4; j++) p[j] = first + (j * n_pieces + i) * stride;
            four(crc, p, piece_bytes);
        }
        return ~joined(crc, n_pieces * piece_bytes);
    }
    for (; n_bytes > piece_bytes; n_bytes -= piece_bytes, first += stride)
        crc[0] = one(crc[0], first, piece_bytes);
    return ~one(crc[0], first, n_bytes);
}
