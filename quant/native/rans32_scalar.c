/* Streams of rans32 without vectors: for every processor, and the plainest form of the loops.
 *
 * Branches on the data would be mispredicted, so that a word is always written or read, and the place
 * moves on only if it was due. x div f as in the other files: a float estimate, the quotient or one
 * less (rans32.c says why), then a correction.
 */
#include "native.h"

void fewbit_encode_scalar(struct fewbit_writer *w, int n_streams, size_t n_steps,
                          const fewbit_code *codes) {
    for (int i = 0; i < n_streams; i++) {
        uint32_t x[FEWBIT_LANES], impossible = 0;
        uint16_t *at = w[i].begin;
        memcpy(x, w[i].state, sizeof x);
        for (size_t t = n_steps; t--;) {
            const uint8_t *symbols = w[i].symbols + t * FEWBIT_LANES;
            for (int lane = FEWBIT_LANES - 1; lane >= 0; lane--) {
                fewbit_code code = codes[symbols[lane]];
                uint32_t f = code & 4095, c = (uint32_t)code >> 12, bits = (uint32_t)(code >> 32);
                uint32_t state = x[lane], over = (state >> 20) >= f;
                float reciprocal;
                memcpy(&reciprocal, &bits, 4);
                impossible |= f == 0;
                at[-1] = (uint16_t)state;
                at -= over;
                state >>= 16 * over;
                uint32_t quotient = (uint32_t)(int32_t)((float)state * reciprocal);
                uint32_t rest = state - quotient * f, low = rest >= f;
                x[lane] = (quotient << 12) + rest + c + ((FEWBIT_SLOTS - f) & (0u - low));
            }
        }
        memcpy(w[i].state, x, sizeof x);
        w[i].begin = at;
        w[i].impossible = impossible;
    }
}

void fewbit_decode_scalar(struct fewbit_reader *r, int n_streams, size_t n_steps,
                          const uint32_t *slots) {
    for (int i = 0; i < n_streams; i++) {
        uint32_t x[FEWBIT_LANES];
        const uint8_t *at = r[i].words;
        memcpy(x, r[i].state, sizeof x);
        for (size_t t = 0; t < n_steps; t++) {
            uint8_t *symbols = r[i].symbols + t * FEWBIT_LANES;
            for (int lane = 0; lane < FEWBIT_LANES; lane++) {
                uint32_t entry = slots[x[lane] & 4095];
                uint32_t state = (entry >> 20) * (x[lane] >> 12) + ((entry >> 8) & 4095);
                uint32_t under = state < FEWBIT_LOW;
                uint16_t word;
                memcpy(&word, at, 2);
                symbols[lane] = (uint8_t)entry;
                x[lane] = under ? state << 16 | word : state;
                at += 2 * under;
            }
        }
        memcpy(r[i].ends, x, sizeof x);
        r[i].words = at;
    }
}
