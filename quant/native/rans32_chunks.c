/* Chunks of a buffer: where they lie, their planes, their checksums, and how often symbols occur. */
#include "native.h"

#include <stdlib.h>

/* Python has checked it too; here it costs nothing. */
int fewbit_layout_is_sound(const struct fewbit_chunks *chunks) {
    uint64_t width = (uint64_t)fewbit_n_planes(chunks->kind);
    if (!width || !chunks->piece || chunks->stride >> 48 || chunks->piece >> 48) return 0;
    for (uint64_t c = 0; c < chunks->n_chunks; c++) {
        int64_t start = chunks->starts[c];
        int32_t size = chunks->sizes[c];
        if (size < 1 || size > FEWBIT_CHUNK || start < 0 || (uint64_t)start > chunks->n_bytes)
            return 0;
        uint64_t last = ((uint64_t)size - 1) / chunks->piece;
        uint64_t end = last * chunks->stride + ((uint64_t)size - last * chunks->piece) * width;
        if (end > chunks->n_bytes - (uint64_t)start) return 0;
    }
    return 1;
}

/* Elements from `done` on, `inside` of them in this piece, up to where the piece or a plane goes on
 * elsewhere. */
static size_t part_length(const struct fewbit_chunks *chunks, size_t n, size_t done,
                          size_t inside) {
    size_t end = done < FEWBIT_CARRIED && n > FEWBIT_CARRIED ? FEWBIT_CARRIED : n;
    size_t left = chunks->piece - inside;
    return end - done < left ? end - done : left;
}

static void find_planes(const struct fewbit_places *places, size_t n_planes, size_t done,
                        uint8_t **at) {
    for (size_t p = 0; p < n_planes; p++)
        at[p] = done < FEWBIT_CARRIED ? places->first[p] + done
                                      : places->rest[p] + (done - FEWBIT_CARRIED);
}

void fewbit_split_chunk(const struct fewbit_chunks *chunks, uint64_t c,
                        const struct fewbit_places *places) {
    size_t n = (size_t)chunks->sizes[c], width = (size_t)fewbit_n_planes(chunks->kind);
    const uint8_t *data = chunks->data + chunks->starts[c];
    uint8_t *at[FEWBIT_MAX_PLANES];
    for (size_t done = 0, inside = 0; done < n;) {
        size_t length = part_length(chunks, n, done, inside);
        find_planes(places, width, done, at);
        fewbit_split(chunks->isa, chunks->kind, data + width * inside, at, length);
        done += length;
        inside += length;
        if (inside == chunks->piece && done < n) data += chunks->stride, inside = 0;
    }
}

void fewbit_merge_chunk(const struct fewbit_chunks *chunks, uint64_t c,
                        const struct fewbit_places *places) {
    size_t n = (size_t)chunks->sizes[c], width = (size_t)fewbit_n_planes(chunks->kind);
    uint8_t *data = chunks->data + chunks->starts[c];
    uint8_t *at[FEWBIT_MAX_PLANES];
    for (size_t done = 0, inside = 0; done < n;) {
        size_t length = part_length(chunks, n, done, inside);
        find_planes(places, width, done, at);
        fewbit_merge(chunks->isa, chunks->kind, data + width * inside, at, length);
        done += length;
        inside += length;
        if (inside == chunks->piece && done < n) data += chunks->stride, inside = 0;
    }
}

uint32_t fewbit_chunk_checksum(const struct fewbit_chunks *chunks, uint64_t c) {
    size_t width = (size_t)fewbit_n_planes(chunks->kind);
    return fewbit_crc_pieces(chunks->data + chunks->starts[c], chunks->piece * width,
                             chunks->stride, (size_t)chunks->sizes[c] * width);
}

/* ---- working memory ---- */

void *fewbit_take(struct fewbit_spares *spares, size_t n_bytes) {
    for (int i = 0; i < FEWBIT_SPARES; i++) {
        void *memory = __atomic_exchange_n(&spares->at[i], NULL, __ATOMIC_ACQ_REL);
        if (memory) return memory;
    }
    return calloc(1, n_bytes);
}

void fewbit_give(struct fewbit_spares *spares, void *memory) {
    for (int i = 0; i < FEWBIT_SPARES; i++) {
        void *none = NULL;
        if (__atomic_compare_exchange_n(&spares->at[i], &none, memory, 0, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED))
            return;
    }
    free(memory);
}

/* ---- count ---- */

/* Adds to counts, uint64 [256]. Four tables, or equal neighbours would wait for each other. */
static void histogram(const uint8_t *symbols, size_t n, uint64_t *counts) {
    uint32_t table[4][256];
    memset(table, 0, sizeof table);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, symbols + i, 8);
        table[0][word & 255]++;
        table[1][(word >> 8) & 255]++;
        table[2][(word >> 16) & 255]++;
        table[3][(word >> 24) & 255]++;
        table[0][(word >> 32) & 255]++;
        table[1][(word >> 40) & 255]++;
        table[2][(word >> 48) & 255]++;
        table[3][word >> 56]++;
    }
    for (; i < n; i++) table[0][symbols[i]]++;
    for (int symbol = 0; symbol < 256; symbol++)
        counts[symbol] +=
            (uint64_t)table[0][symbol] + table[1][symbol] + table[2][symbol] + table[3][symbol];
}

/* Adds a table of all 65536 words to the counts of both planes. A row of words has all but its lower 7
 * (bf16) or 8 bits in common; sums of 32 bits do not overflow before the table does. It is zero then. */
static void take_apart(int kind, uint32_t *table, uint64_t *counts) {
    uint32_t low[2][256] = {{0}}, width = kind == FEWBIT_BF16 ? 128 : 256;
    for (uint32_t row = 0; row < 65536 / width; row++, table += width) {
        uint32_t sum = 0, *sums = low[kind == FEWBIT_BF16 ? row >> 8 : 0];
        for (uint32_t i = 0; i < width; i++) {
            sums[i] += table[i];
            sum += table[i];
            table[i] = 0;
        }
        counts[row & 255] += sum;
    }
    for (uint32_t i = 0; i < 256; i++) counts[256 + i] += low[i / width][i % width];
}

/* Both planes of 2-byte elements from one table of all 65536 words: one increment an element, no split.
 * Taking the table apart costs as much as counting some ten thousand elements. */
static int count_words(const struct fewbit_chunks *chunks, uint64_t *counts) {
    enum { AHEAD_BYTES = 2048 };
    static struct fewbit_spares spares;
    uint32_t *table = fewbit_take(&spares, 65536 * sizeof *table);
    if (!table) return FEWBIT_NO_MEMORY;
    for (uint64_t c = 0; c < chunks->n_chunks; c++) {
        const uint8_t *data = chunks->data + chunks->starts[c];
        size_t n = (size_t)chunks->sizes[c];
        for (size_t done = 0; done < n; done += chunks->piece) {
            size_t length = n - done < chunks->piece ? n - done : chunks->piece;
            size_t i = 0;
            for (; i + 4 <= length; i += 4) {
                uint64_t four;
                memcpy(&four, data + 2 * i, 8);
                __builtin_prefetch(data + 2 * i + AHEAD_BYTES);
                table[four & 65535]++;
                table[(four >> 16) & 65535]++;
                table[(four >> 32) & 65535]++;
                table[four >> 48]++;
            }
            for (; i < length; i++) table[data[2 * i] | data[2 * i + 1] << 8]++;
            if (done + chunks->piece < n) data += chunks->stride;
        }
    }
    take_apart(chunks->kind, table, counts);
    fewbit_give(&spares, table);
    return FEWBIT_CODED;
}

static int count_planes(const struct fewbit_chunks *chunks, uint64_t *counts) {
    struct fewbit_places places;
    static struct fewbit_spares spares;
    uint8_t *room = fewbit_take(&spares, FEWBIT_MAX_PLANES * FEWBIT_CHUNK);
    int n_planes = fewbit_n_planes(chunks->kind);
    if (!room) return FEWBIT_NO_MEMORY;
    for (int p = 0; p < n_planes; p++) {
        places.first[p] = room + (size_t)p * FEWBIT_CHUNK;
        places.rest[p] = places.first[p] + FEWBIT_CARRIED;
    }
    for (uint64_t c = 0; c < chunks->n_chunks; c++) {
        fewbit_split_chunk(chunks, c, &places);
        for (int p = 0; p < n_planes; p++)
            histogram(places.first[p], (size_t)chunks->sizes[c], counts + 256 * p);
    }
    fewbit_give(&spares, room);
    return FEWBIT_CODED;
}

FEWBIT_EXPORT int fewbit_rans32_count(const struct fewbit_chunks *chunks, uint64_t *counts) {
    enum { WORTH_A_TABLE = 4, MOST = 1 << 17 }; /* chunks; so many do not overflow an entry */
    if (!fewbit_layout_is_sound(chunks)) return FEWBIT_BAD_ARGUMENT;
    int use_table = fewbit_n_planes(chunks->kind) == 2 && chunks->n_chunks >= WORTH_A_TABLE;
    return use_table && chunks->n_chunks <= MOST ? count_words(chunks, counts)
                                                 : count_planes(chunks, counts);
}
