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

void fewbit_split_chunk(const struct fewbit_chunks *chunks, uint64_t c, uint8_t *const *planes) {
    size_t n = (size_t)chunks->sizes[c], n_planes = (size_t)fewbit_n_planes(chunks->kind);
    const uint8_t *data = chunks->data + chunks->starts[c];
    uint8_t *at[FEWBIT_MAX_PLANES];
    for (size_t done = 0; done < n; done += chunks->piece, data += chunks->stride) {
        for (size_t p = 0; p < n_planes; p++) at[p] = planes[p] + done;
        fewbit_split(chunks->isa, chunks->kind, data, at,
                     n - done < chunks->piece ? n - done : chunks->piece);
    }
}

void fewbit_merge_chunk(const struct fewbit_chunks *chunks, uint64_t c, uint8_t *const *planes) {
    size_t n = (size_t)chunks->sizes[c], n_planes = (size_t)fewbit_n_planes(chunks->kind);
    uint8_t *data = chunks->data + chunks->starts[c];
    uint8_t *at[FEWBIT_MAX_PLANES];
    for (size_t done = 0; done < n; done += chunks->piece, data += chunks->stride) {
        for (size_t p = 0; p < n_planes; p++) at[p] = planes[p] + done;
        fewbit_merge(chunks->isa, chunks->kind, data, at,
                     n - done < chunks->piece ? n - done : chunks->piece);
    }
}

uint32_t fewbit_chunk_checksum(const struct fewbit_chunks *chunks, uint64_t c) {
    size_t width = (size_t)fewbit_n_planes(chunks->kind);
    return fewbit_crc_pieces(chunks->data + chunks->starts[c], chunks->piece * width,
                             chunks->stride, (size_t)chunks->sizes[c] * width);
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

/* Both planes of 2-byte elements from one table of all 65536 words: one increment an element, no split.
 * Taking the table apart costs as much as counting a few hundred thousand elements. */
static int count_words(const struct fewbit_chunks *chunks, uint64_t *counts) {
    enum { AHEAD_BYTES = 2048 };
    uint32_t *table = calloc(65536, sizeof *table);
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
    for (uint32_t word = 0; word < 65536; word++) {
        uint32_t high = chunks->kind == FEWBIT_BF16 ? (word >> 7) & 255 : word >> 8;
        uint32_t low =
            chunks->kind == FEWBIT_BF16 ? ((word >> 8) & 128) | (word & 127) : word & 255;
        counts[high] += table[word];
        counts[256 + low] += table[word];
    }
    free(table);
    return FEWBIT_CODED;
}

static int count_planes(const struct fewbit_chunks *chunks, uint64_t *counts) {
    uint8_t *planes[FEWBIT_MAX_PLANES], *room = malloc(FEWBIT_MAX_PLANES * FEWBIT_CHUNK);
    int n_planes = fewbit_n_planes(chunks->kind);
    if (!room) return FEWBIT_NO_MEMORY;
    for (int p = 0; p < n_planes; p++) planes[p] = room + (size_t)p * FEWBIT_CHUNK;
    for (uint64_t c = 0; c < chunks->n_chunks; c++) {
        fewbit_split_chunk(chunks, c, planes);
        for (int p = 0; p < n_planes; p++)
            histogram(planes[p], (size_t)chunks->sizes[c], counts + 256 * p);
    }
    free(room);
    return FEWBIT_CODED;
}

FEWBIT_EXPORT int fewbit_rans32_count(const struct fewbit_chunks *chunks, uint64_t *counts) {
    enum { WORTH_A_TABLE = 48, MOST = 1 << 17 }; /* chunks; so many do not overflow an entry */
    if (!fewbit_layout_is_sound(chunks)) return FEWBIT_BAD_ARGUMENT;
    int use_table = fewbit_n_planes(chunks->kind) == 2 && chunks->n_chunks >= WORTH_A_TABLE;
    return use_table && chunks->n_chunks <= MOST ? count_words(chunks, counts)
                                                 : count_planes(chunks, counts);
}
