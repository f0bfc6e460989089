/* Codes random chunks, damages one array at a time, and decodes: a stand-alone program, to be compiled
 * with -fsanitize=address,undefined. Every array is an allocation of exactly its size.
 *
 *     fuzz_rans32 ROUNDS SEED      prints "rounds R damaged D undetected U"; exit code 1 if U > 0
 */
#include "native.h"

#include <stdio.h>
#include <stdlib.h>

static uint64_t seed;

static uint64_t draw(uint64_t below) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (seed >> 11) % below;
}

static void *copy_of(const void *source, size_t n) {
    void *copy = malloc(n ? n : 1);
    if (n) memcpy(copy, source, n);
    return copy;
}

/* Any frequencies that sum to 4096, with one for every symbol that occurs. */
static void choose_frequencies(const uint64_t *counts, uint16_t *freq) {
    uint32_t sum = 0, most = 0;
    for (uint32_t s = 0; s < 256; s++) {
        freq[s] = (uint16_t)(counts[s] ? 1 + draw(14) : 0);
        sum += freq[s];
        if (counts[s] > counts[most]) most = s;
    }
    freq[most] = (uint16_t)(freq[most] + 4096 - sum);
    if (freq[most] == 4096) freq[most]--, freq[(most + 1) & 255]++;
}

struct problem {
    struct fewbit_chunks chunks;
    struct fewbit_group group;
    uint16_t *freq;
    uint8_t *coded_from;
    size_t n_rows, n_raw;
};

static void make(struct problem *p) {
    int kind = (int)draw(6), width = fewbit_n_planes(kind);
    uint64_t n_chunks = 1 + draw(9), piece = draw(2) ? FEWBIT_CHUNK : 1 + draw(300), total = 0,
             n_bytes = 0;
    uint64_t stride = (piece + draw(4)) * (uint64_t)width + draw(3);
    int64_t *starts = malloc(n_chunks * sizeof *starts);
    int32_t *sizes = malloc(n_chunks * sizeof *sizes);
    for (uint64_t c = 0; c < n_chunks; c++) {
        int32_t size = (int32_t)(draw(40) ? 1 + draw(700) : FEWBIT_CHUNK - draw(2));
        sizes[c] = c && draw(3) ? sizes[c - 1] : size;
        starts[c] = (int64_t)n_bytes;
        uint64_t last = ((uint64_t)sizes[c] - 1) / piece;
        n_bytes += last * stride + ((uint64_t)sizes[c] - last * piece) * (uint64_t)width;
        total += (uint64_t)sizes[c];
    }
    uint8_t *data = malloc(n_bytes);
    uint64_t n_symbols = 1 + draw(draw(2) ? 256 : 12);
    for (uint64_t i = 0; i < n_bytes; i++) data[i] = (uint8_t)(draw(4) ? draw(n_symbols) : 60);
    p->chunks = (struct fewbit_chunks){data,  n_bytes, starts, sizes,       n_chunks,
                                       piece, stride,  kind,   (int)draw(3)};
    p->chunks.isa = fewbit_isa(p->chunks.isa);
    uint64_t counts[8 * 256] = {0};
    if (fewbit_rans32_count(&p->chunks, counts)) abort();
    p->freq = calloc((size_t)width * 256, 2);
    size_t n_coded = 0;
    for (int plane = 0; plane < width; plane++) {
        if (!draw(4)) continue;
        choose_frequencies(counts + 256 * plane, p->freq + 256 * plane);
        n_coded++;
    }
    p->n_rows = n_coded * n_chunks;
    size_t n_raw = (size_t)width - n_coded;
    p->n_raw = n_raw * total;
    for (uint64_t c = 0; n_raw && n_coded && c < n_chunks; c++)
        p->n_raw -= sizes[c] >= FEWBIT_CARRIED ? FEWBIT_CARRIED : 0;
    size_t room = n_coded * (total + n_chunks) + 1;
    p->group = (struct fewbit_group){malloc(p->n_raw ? p->n_raw : 1),
                                     p->n_raw,
                                     malloc(room),
                                     room,
                                     malloc(8 * (p->n_rows + 1)),
                                     malloc(128 * p->n_rows + 1),
                                     malloc(4 * n_chunks)};
    if (fewbit_rans32_encode(&p->chunks, p->freq, &p->group)) abort();
    uint64_t used = p->group.index[p->n_rows];
    uint8_t *words = copy_of(p->group.words, used);
    free(p->group.words);
    p->group.words = words;
    p->group.words_bytes = used;
    p->coded_from = data;
}

static void release(struct problem *p) {
    free((void *)p->chunks.starts), free((void *)p->chunks.sizes), free(p->coded_from),
        free(p->freq);
    free(p->group.raw), free(p->group.words), free(p->group.index), free(p->group.state),
        free(p->group.crc);
}

static void flip(void *array, size_t n) { ((uint8_t *)array)[draw(n)] ^= (uint8_t)(1 + draw(255)); }

/* Damages one array; 0 if there was nothing to damage. */
static int damage(struct problem *p) {
    struct fewbit_group *g = &p->group;
    switch (draw(9)) {
    case 0: flip(g->index, 8 * (p->n_rows + 1)); return 1;
    case 1:
        if (p->n_rows) flip(g->state, 128 * p->n_rows);
        return p->n_rows > 0;
    case 2:
        if (g->words_bytes) flip(g->words, g->words_bytes);
        return g->words_bytes > 0;
    case 3: flip(g->crc, 4 * p->chunks.n_chunks); return 1;
    case 4:
        if (p->n_raw) flip(g->raw, p->n_raw);
        return p->n_raw > 0;
    case 5: {
        if (!g->words_bytes) return 0;
        uint8_t *shorter = copy_of(g->words, g->words_bytes -= 1 + draw(g->words_bytes));
        free(g->words);
        g->words = shorter;
        return 1;
    }
    case 6: { /* a raw plane that is shorter */
        if (!p->n_raw) return 0;
        uint8_t *shorter = copy_of(g->raw, g->raw_bytes -= 1 + draw(p->n_raw));
        free(g->raw);
        g->raw = shorter;
        return 1;
    }
    case 7: { /* offsets that still ascend */
        if (p->n_rows < 2) return 0;
        uint64_t row = 1 + draw(p->n_rows - 1), mask = ((uint64_t)1 << 62) - 1, old = g->index[row];
        uint64_t low = g->index[row - 1] & mask, high = g->index[row + 1] & mask;
        g->index[row] = (old & ~mask) | (low + draw(high - low + 1));
        return g->index[row] != old;
    }
    default: { /* random states */
        if (!p->n_rows) return 0;
        uint32_t *state = g->state + 32 * draw(p->n_rows);
        for (int lane = 0; lane < 32; lane++) state[lane] = (uint32_t)draw((uint64_t)1 << 32);
        return 1;
    }
    }
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 1000, damaged = 0, undetected = 0;
    seed = (argc > 2 ? strtoull(argv[2], NULL, 10) : 1) * 0x9E3779B97F4A7C15u | 1;
    for (int round = 0; round < rounds; round++) {
        struct problem p;
        int64_t bad;
        make(&p);
        p.chunks.data = malloc(p.chunks.n_bytes);
        memcpy(p.chunks.data, p.coded_from, p.chunks.n_bytes);
        for (uint64_t c = 0; c < p.chunks.n_chunks; c++) p.chunks.data[p.chunks.starts[c]] ^= 255;
        if (fewbit_rans32_decode(&p.chunks, p.freq, &p.group, &bad))
            return fprintf(stderr, "refused its own\n"), 2;
        if (memcmp(p.chunks.data, p.coded_from, p.chunks.n_bytes))
            return fprintf(stderr, "no round trip\n"), 2;
        if (damage(&p)) {
            damaged++;
            undetected += !fewbit_rans32_decode(&p.chunks, p.freq, &p.group, &bad);
        }
        if (!draw(4)) { /* frequencies that are none, or of other data: any answer, no crash */
            flip(p.freq, 512 * (size_t)fewbit_n_planes(p.chunks.kind));
            (void)fewbit_rans32_decode(&p.chunks, p.freq, &p.group, &bad);
        }
        free(p.chunks.data);
        release(&p);
    }
    printf("rounds %d damaged %d undetected %d\n", rounds, damaged, undetected);
    return undetected > 0;
}
