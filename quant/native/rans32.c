/* Groups of chunks, coded and decoded in one call: quant/codecs/rans32_numpy.py defines the format.
 *
 * encode, for a few chunks at a time:  gather pieces, checksum, split -> code plane by plane -> append
 * decode:                              decode plane by plane -> merge, scatter pieces -> checksum
 *
 * Between the steps a chunk stays in the cache. Up to FEWBIT_TOGETHER chunks of one length go
 * through one loop, because a stream alone waits for its own table look-ups most of the time.
 *
 * A decoder trusts nothing that was stored. Offsets are checked before anything is read; the loop
 * over steps has no checks, since a step uses at most 32 words: a stream so close to the end of the
 * words that it could run over it is decoded from a copy with room behind.
 */
#include "native.h"

enum { RANS, CONSTANT, RAW };
enum { PLANE_ROOM = FEWBIT_CHUNK + 64, WORD_ROOM = FEWBIT_CHUNK + 64 };
enum { LINE = 64, MOST_LINES = FEWBIT_AHEAD * FEWBIT_CHUNK / FEWBIT_LANES };
#define OFFSET_MASK (((uint64_t)1 << 62) - 1)

static void encode_streams(int isa, struct fewbit_writer *w, int n, size_t n_steps,
                           const fewbit_code *codes) {
#ifdef FEWBIT_X86
    if (isa == FEWBIT_ISA_AVX512) {
        fewbit_encode_avx512(w, n, n_steps, codes);
        return;
    }
    if (isa == FEWBIT_ISA_AVX2) {
        fewbit_encode_avx2(w, n, n_steps, codes);
        return;
    }
#endif
    (void)isa;
    fewbit_encode_scalar(w, n, n_steps, codes);
}

static void decode_streams(int isa, struct fewbit_reader *r, int n, size_t n_steps,
                           const uint32_t *slots) {
#ifdef FEWBIT_X86
    if (isa == FEWBIT_ISA_AVX512) {
        fewbit_decode_avx512(r, n, n_steps, slots);
        return;
    }
    if (isa == FEWBIT_ISA_AVX2) {
        fewbit_decode_avx2(r, n, n_steps, slots);
        return;
    }
#endif
    (void)isa;
    fewbit_decode_scalar(r, n, n_steps, slots);
}

/* ---- what a call works with ---- */

/* Chunks from `c` on that have the same length, at most `most`. */
static int run_length(const struct fewbit_chunks *chunks, uint64_t c, int most) {
    int n = 1;
    while (n < most && c + (uint64_t)n < chunks->n_chunks &&
           chunks->sizes[c + (uint64_t)n] == chunks->sizes[c])
        n++;
    return n;
}

struct scratch {
    uint8_t planes[FEWBIT_TOGETHER][FEWBIT_MAX_PLANES][PLANE_ROOM];
    uint16_t words[FEWBIT_TOGETHER][FEWBIT_MAX_PLANES][WORD_ROOM];
    fewbit_code codes[FEWBIT_MAX_PLANES][256];
    uint32_t slots[FEWBIT_MAX_PLANES][FEWBIT_SLOTS];
    uint8_t carried[FEWBIT_TOGETHER][FEWBIT_CARRIED];
    uint32_t halves[FEWBIT_TOGETHER][FEWBIT_LANES];
    uint8_t pad[FEWBIT_MAX_PLANES];
    int coded[FEWBIT_MAX_PLANES];
    int n_planes, n_coded, n_raw;
    const uint8_t *ahead[FEWBIT_TOGETHER][MOST_LINES];
};

static struct fewbit_spares spares; /* each a scratch */

/* Which planes are coded. Frequencies must sum to 0 or 4096, and none may exceed 4095. */
static int read_frequencies(struct scratch *s, int kind, const uint16_t *freq) {
    s->n_planes = fewbit_n_planes(kind);
    s->n_coded = 0;
    for (int p = 0; p < s->n_planes; p++, freq += 256) {
        uint32_t sum = 0, most = 0;
        for (int symbol = 0; symbol < 256; symbol++) {
            sum += freq[symbol];
            if (freq[symbol] > most) most = freq[symbol], s->pad[p] = (uint8_t)symbol;
        }
        if ((sum && sum != FEWBIT_SLOTS) || most >= FEWBIT_SLOTS) return FEWBIT_BAD_ARGUMENT;
        s->coded[p] = sum != 0;
        s->n_coded += s->coded[p];
    }
    s->n_raw = s->n_planes - s->n_coded;
    return FEWBIT_CODED;
}

/* A float at most 1 / f, short of it by less than 2^-20 of it however conversions round: the estimated
 * quotient, below 2^20, is then the quotient or one less. */
static uint32_t reciprocal_bits(uint32_t f) {
    float value = f ? (float)((1.0 - 1.0 / 2097152) / f) : 0.0f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static void fill_codes(struct scratch *s, const uint16_t *freq) {
    for (int p = 0; p < s->n_planes; p++) {
        uint32_t start = 0;
        for (int symbol = 0; symbol < 256; symbol++) {
            uint32_t f = freq[256 * p + symbol];
            s->codes[p][symbol] = (uint64_t)reciprocal_bits(f) << 32 | start << 12 | f;
            start += f;
        }
    }
}

static void fill_slots(struct scratch *s, const uint16_t *freq) {
    for (int p = 0; p < s->n_planes; p++) {
        uint32_t *slot = s->slots[p];
        for (uint32_t symbol = 0; s->coded[p] && symbol < 256; symbol++) {
            uint32_t f = freq[256 * p + (int)symbol];
            for (uint32_t bias = 0; bias < f; bias++) *slot++ = f << 20 | bias << 8 | symbol;
        }
    }
}

/* Bytes of its first raw plane that the states of a chunk of n elements carry. */
static size_t carried_bytes(const struct scratch *s, size_t n) {
    return s->n_coded && s->n_raw && n >= FEWBIT_CARRIED ? FEWBIT_CARRIED : 0;
}

static uint64_t raw_bytes(const struct scratch *s, size_t n) {
    return (uint64_t)s->n_raw * n - carried_bytes(s, n);
}

/* Does `raw` hold what the chunks need, no more and no less? */
static int raw_fits(const struct scratch *s, const struct fewbit_chunks *chunks,
                    const struct fewbit_group *g) {
    uint64_t total = 0;
    for (uint64_t c = 0; c < chunks->n_chunks; c++) total += raw_bytes(s, (size_t)chunks->sizes[c]);
    return total == g->raw_bytes;
}

/* Where each plane of chunk number j of a run goes to or comes from: scratch, or `raw` at an offset. */
static void place_planes(struct scratch *s, const struct fewbit_group *g, int j, size_t n,
                         uint64_t at, struct fewbit_places *places) {
    size_t head = n < FEWBIT_CARRIED ? n : FEWBIT_CARRIED, n_carried = carried_bytes(s, n);
    for (int p = 0; p < s->n_planes; p++) {
        if (s->coded[p]) {
            places->first[p] = s->planes[j][p];
            places->rest[p] = s->planes[j][p] + head;
            continue;
        }
        places->first[p] = n_carried ? s->carried[j] : g->raw + at;
        places->rest[p] = g->raw + at + head - n_carried;
        at += n - n_carried;
        n_carried = 0;
    }
}

/* Lists the cache lines of the chunk c and of its part of `raw`, as many as a coder has steps for; it
 * fetches them while it works on another chunk. Wrong addresses would only be useless. */
static void list_lines(struct scratch *s, int j, const struct fewbit_chunks *chunks, uint64_t c,
                       const struct fewbit_group *g, uint64_t raw_at) {
    const uint8_t **list = s->ahead[j];
    size_t n_lines = 0, width = (size_t)s->n_planes;
    if (c < chunks->n_chunks) {
        size_t n = (size_t)chunks->sizes[c], piece = chunks->piece * width;
        const uint8_t *data = chunks->data + chunks->starts[c];
        for (size_t done = 0; done < n * width; done += piece) {
            size_t length = n * width - done < piece ? n * width - done : piece;
            for (size_t at = 0; at < length && n_lines < MOST_LINES; at += LINE)
                list[n_lines++] = data + at;
            if (done + piece < n * width) data += chunks->stride;
        }
        uint64_t length = raw_bytes(s, n);
        for (size_t at = 0; raw_at + length <= g->raw_bytes && at < length; at += LINE) {
            if (n_lines == MOST_LINES) break;
            list[n_lines++] = g->raw + raw_at + at;
        }
    }
    while (n_lines < MOST_LINES) list[n_lines++] = s->planes[0][0];
}

/* The same for every chunk of the run behind this one. */
static void list_next_run(struct scratch *s, const struct fewbit_chunks *chunks, uint64_t c,
                          int n_together, const struct fewbit_group *g, uint64_t raw_at) {
    uint64_t each = raw_bytes(s, (size_t)chunks->sizes[c]);
    for (int j = 0; j < n_together; j++) {
        uint64_t distance = (uint64_t)(j + n_together);
        list_lines(s, j, chunks, c + distance, g, raw_at + distance * each);
    }
}

/* ---- encode ---- */

/* The 16 bits that the states of chunk number j carry in each lane. */
static void fill_halves(struct scratch *s, int j, size_t n) {
    int carries = carried_bytes(s, n) != 0;
    for (int lane = 0; lane < FEWBIT_LANES; lane++) {
        uint32_t low = s->carried[j][lane], high = s->carried[j][lane + FEWBIT_LANES];
        s->halves[j][lane] = carries ? low | high << 8 : 0;
    }
}

static const uint32_t no_halves[FEWBIT_LANES];

/* Appends one stream to the words and fills its entries. */
static int append_stream(const struct fewbit_writer *w, const uint16_t *end, size_t n,
                         const uint32_t *halves, uint64_t row, struct fewbit_group *g,
                         uint64_t *used) {
    size_t n_bytes = 2 * (size_t)(end - w->begin);
    uint64_t mode = RANS;
    const void *source = w->begin;
    if (n == 1 || !memcmp(w->symbols, w->symbols + 1, n - 1)) {
        mode = CONSTANT;
        n_bytes = 0;
    } else if (w->impossible || n_bytes >= n) {
        mode = RAW;
        source = w->symbols;
        n_bytes = n;
    }
    g->index[row] = mode << 62 | *used;
    uint32_t symbol = mode == CONSTANT ? w->symbols[0] : 0;
    for (int lane = 0; mode != RANS && lane < FEWBIT_LANES; lane++)
        w->state[lane] = symbol << 16 | halves[lane];
    if (n_bytes + 1 > g->words_bytes - *used && n_bytes) return FEWBIT_NO_ROOM;
    memcpy(g->words + *used, source, n_bytes);
    *used += n_bytes;
    if (n_bytes & 1) g->words[(*used)++] = 0;
    return FEWBIT_CODED;
}

/* One plane of a run of chunks: the writers, and their streams below the end of s->words. */
static void encode_plane(struct scratch *s, const struct fewbit_chunks *chunks, uint64_t c,
                         int n_together, int p, int place, struct fewbit_group *g,
                         struct fewbit_writer *writers) {
    size_t n = (size_t)chunks->sizes[c], n_steps = (n + FEWBIT_LANES - 1) / FEWBIT_LANES;
    for (int j = 0; j < n_together; j++) {
        uint64_t row = (c + (uint64_t)j) * (uint64_t)s->n_coded + (uint64_t)place;
        const uint32_t *halves = place ? no_halves : s->halves[j];
        memset(s->planes[j][p] + n, s->pad[p], n_steps * FEWBIT_LANES - n);
        writers[j].ahead = s->ahead[j];
        writers[j].symbols = s->planes[j][p];
        writers[j].begin = s->words[j][p] + WORD_ROOM;
        writers[j].state = g->state + row * FEWBIT_LANES;
        for (int lane = 0; lane < FEWBIT_LANES; lane++)
            writers[j].state[lane] = FEWBIT_LOW | halves[lane];
    }
    encode_streams(chunks->isa, writers, n_together, n_steps, s->codes[p]);
}

static int encode_run(struct scratch *s, const struct fewbit_chunks *chunks, uint64_t c,
                      int n_together, uint64_t raw_at, struct fewbit_group *g, uint64_t *used) {
    struct fewbit_writer writers[FEWBIT_MAX_PLANES][FEWBIT_TOGETHER];
    size_t n = (size_t)chunks->sizes[c];
    list_next_run(s, chunks, c, n_together, g, raw_at);
    for (int j = 0; j < n_together; j++, raw_at += raw_bytes(s, n)) {
        struct fewbit_places places;
        place_planes(s, g, j, n, raw_at, &places);
        g->crc[c + (uint64_t)j] = fewbit_chunk_checksum(chunks, c + (uint64_t)j);
        fewbit_split_chunk(chunks, c + (uint64_t)j, &places);
        fill_halves(s, j, n);
    }
    for (int p = 0, place = 0; p < s->n_planes; p++)
        if (s->coded[p]) encode_plane(s, chunks, c, n_together, p, place++, g, writers[p]);
    uint64_t row = c * (uint64_t)s->n_coded;
    for (int j = 0; j < n_together; j++) {
        const uint32_t *halves = s->halves[j];
        for (int p = 0; p < s->n_planes; p++) {
            if (!s->coded[p]) continue;
            if (append_stream(&writers[p][j], s->words[j][p] + WORD_ROOM, n, halves, row++, g, used))
                return FEWBIT_NO_ROOM;
            halves = no_halves;
        }
    }
    return FEWBIT_CODED;
}

FEWBIT_EXPORT int fewbit_rans32_encode(const struct fewbit_chunks *chunks, const uint16_t *freq,
                                       struct fewbit_group *g) {
    struct scratch *s = fewbit_take(&spares, sizeof *s);
    if (!s) return FEWBIT_NO_MEMORY;
    int wrong = fewbit_layout_is_sound(chunks) ? read_frequencies(s, chunks->kind, freq)
                                               : FEWBIT_BAD_ARGUMENT;
    uint64_t raw_at = 0, used = 0;
    if (!wrong && !raw_fits(s, chunks, g)) wrong = FEWBIT_BAD_ARGUMENT;
    if (!wrong) fill_codes(s, freq);
    for (uint64_t c = 0; !wrong && c < chunks->n_chunks;) {
        int n_together = run_length(chunks, c, FEWBIT_TOGETHER);
        wrong = encode_run(s, chunks, c, n_together, raw_at, g, &used);
        raw_at += raw_bytes(s, (size_t)chunks->sizes[c]) * (uint64_t)n_together;
        c += (uint64_t)n_together;
    }
    if (!wrong) g->index[chunks->n_chunks * (uint64_t)s->n_coded] = used;
    fewbit_give(&spares, s);
    return wrong;
}

/* ---- decode ---- */

static int check_index(const struct scratch *s, const struct fewbit_chunks *chunks,
                       const struct fewbit_group *g, int64_t *bad) {
    uint64_t row = 0, last = g->index[chunks->n_chunks * (uint64_t)s->n_coded];
    *bad = -1;
    if (last > g->words_bytes) return FEWBIT_BAD_END;
    for (uint64_t c = 0; c < chunks->n_chunks; c++) {
        for (int place = 0; place < s->n_coded; place++, row++) {
            uint64_t mode = g->index[row] >> 62, begin = g->index[row] & OFFSET_MASK;
            uint64_t end = g->index[row + 1] & OFFSET_MASK, n = (uint64_t)chunks->sizes[c];
            *bad = (int64_t)c;
            if (mode > RAW || end < begin || end > last || begin & 1) return FEWBIT_BAD_ENTRY;
            if (mode == CONSTANT && end != begin) return FEWBIT_BAD_LENGTH;
            if (mode == RAW && end - begin != n + (n & 1)) return FEWBIT_BAD_LENGTH;
        }
    }
    return FEWBIT_CODED;
}

/* Do the upper halves of all states say the same? */
static int high_is(const uint32_t *state, uint32_t wanted) {
    uint32_t any = 0;
    for (int lane = 0; lane < FEWBIT_LANES; lane++) any |= state[lane] >> 16 ^ wanted;
    return !any;
}

/* A stream that is not RANS. */
static int copy_stream(const struct fewbit_group *g, uint64_t row, uint8_t *symbols, size_t n) {
    const uint32_t *state = g->state + row * FEWBIT_LANES;
    if (g->index[row] >> 62 == CONSTANT) {
        if (state[0] >> 24 || !high_is(state, state[0] >> 16)) return FEWBIT_BAD_CONSTANT;
        memset(symbols, (int)(state[0] >> 16), n);
        return FEWBIT_CODED;
    }
    const uint8_t *stream = g->words + (g->index[row] & OFFSET_MASK);
    if (!high_is(state, 0) || (n & 1 && stream[n])) return FEWBIT_BAD_RAW;
    memcpy(symbols, stream, n);
    return FEWBIT_CODED;
}

/* What the states of a stream of chunk number j carry. Where there is nothing to be carried, no bit may
 * be set. */
static int take_halves(struct scratch *s, int j, size_t n, int place, const uint32_t *state) {
    uint32_t any = 0;
    if (place == 0 && carried_bytes(s, n)) {
        for (int lane = 0; lane < FEWBIT_LANES; lane++) {
            s->carried[j][lane] = (uint8_t)state[lane];
            s->carried[j][lane + FEWBIT_LANES] = (uint8_t)(state[lane] >> 8);
        }
        return FEWBIT_CODED;
    }
    for (int lane = 0; lane < FEWBIT_LANES; lane++) any |= state[lane] & 65535;
    return any ? FEWBIT_BAD_STREAM : FEWBIT_CODED;
}

/* Where a stream can be read for as long as its steps may read: in place, or from a copy. */
static const uint8_t *readable(struct scratch *s, int j, int p, const struct fewbit_group *g,
                               uint64_t begin, size_t n_steps) {
    uint64_t wanted = (n_steps + 1) * 2 * FEWBIT_LANES, left = g->words_bytes - begin;
    if (left >= wanted) return g->words + begin;
    uint8_t *copy = (uint8_t *)s->words[j][p];
    memcpy(copy, g->words + begin, (size_t)left);
    memset(copy + left, 0, (size_t)(wanted - left));
    return copy;
}

/* Decodes one plane of a run of chunks into scratch, and what its states carry. */
static int decode_plane(struct scratch *s, const struct fewbit_chunks *chunks,
                        const struct fewbit_group *g, uint64_t c, int n_together, int p, int place,
                        int64_t *bad) {
    struct fewbit_reader readers[FEWBIT_TOGETHER];
    const uint8_t *begins[FEWBIT_TOGETHER];
    int number[FEWBIT_TOGETHER]; /* of a stream's chunk in the run */
    uint64_t first = c * (uint64_t)s->n_coded + (uint64_t)place, step = (uint64_t)s->n_coded;
    size_t n = (size_t)chunks->sizes[c], n_steps = (n + FEWBIT_LANES - 1) / FEWBIT_LANES;
    int n_streams = 0, wrong = FEWBIT_CODED;
    for (int j = 0; j < n_together; j++) {
        uint64_t row = first + (uint64_t)j * step;
        const uint32_t *state = g->state + row * FEWBIT_LANES;
        *bad = (int64_t)(c + (uint64_t)j);
        if (g->index[row] >> 62 != RANS) {
            wrong = copy_stream(g, row, s->planes[j][p], n);
            if (!wrong) wrong = take_halves(s, j, n, place, state);
            if (wrong) return wrong;
            continue;
        }
        begins[n_streams] = readable(s, j, p, g, g->index[row] & OFFSET_MASK, n_steps);
        readers[n_streams].ahead = s->ahead[n_streams];
        readers[n_streams].words = begins[n_streams];
        readers[n_streams].state = state;
        readers[n_streams].symbols = s->planes[j][p];
        number[n_streams++] = j;
    }
    decode_streams(chunks->isa, readers, n_streams, n_steps, s->slots[p]);
    for (int i = 0; i < n_streams; i++) {
        uint64_t row = first + (uint64_t)number[i] * step;
        uint64_t length = (g->index[row + 1] & OFFSET_MASK) - (g->index[row] & OFFSET_MASK);
        *bad = (int64_t)(c + (uint64_t)number[i]);
        if (!high_is(readers[i].ends, 1) || (uint64_t)(readers[i].words - begins[i]) != length)
            return FEWBIT_BAD_STREAM;
        wrong = take_halves(s, number[i], n, place, readers[i].ends);
        if (wrong) return wrong;
    }
    return FEWBIT_CODED;
}

static int decode_run(struct scratch *s, const struct fewbit_chunks *chunks,
                      const struct fewbit_group *g, uint64_t c, int n_together, uint64_t raw_at,
                      int64_t *bad) {
    size_t n = (size_t)chunks->sizes[c];
    list_next_run(s, chunks, c, n_together, g, raw_at);
    for (int p = 0, place = 0; p < s->n_planes; p++) {
        if (!s->coded[p]) continue;
        int wrong = decode_plane(s, chunks, g, c, n_together, p, place++, bad);
        if (wrong) return wrong;
    }
    for (int j = 0; j < n_together; j++, raw_at += raw_bytes(s, n)) {
        struct fewbit_places places;
        uint64_t chunk = c + (uint64_t)j;
        place_planes(s, g, j, n, raw_at, &places);
        fewbit_merge_chunk(chunks, chunk, &places);
        *bad = (int64_t)chunk;
        if (fewbit_chunk_checksum(chunks, chunk) != g->crc[chunk]) return FEWBIT_BAD_CHECKSUM;
    }
    return FEWBIT_CODED;
}

FEWBIT_EXPORT int fewbit_rans32_decode(const struct fewbit_chunks *chunks, const uint16_t *freq,
                                       const struct fewbit_group *g, int64_t *bad) {
    struct scratch *s = fewbit_take(&spares, sizeof *s);
    *bad = -1;
    if (!s) return FEWBIT_NO_MEMORY;
    int wrong = fewbit_layout_is_sound(chunks) ? read_frequencies(s, chunks->kind, freq)
                                               : FEWBIT_BAD_ARGUMENT;
    if (!wrong && !raw_fits(s, chunks, g)) wrong = FEWBIT_BAD_ARGUMENT;
    if (!wrong) wrong = check_index(s, chunks, g, bad);
    if (!wrong) fill_slots(s, freq);
    uint64_t raw_at = 0;
    for (uint64_t c = 0; !wrong && c < chunks->n_chunks;) {
        int n_together = run_length(chunks, c, FEWBIT_TOGETHER);
        wrong = decode_run(s, chunks, g, c, n_together, raw_at, bad);
        raw_at += raw_bytes(s, (size_t)chunks->sizes[c]) * (uint64_t)n_together;
        c += (uint64_t)n_together;
    }
    fewbit_give(&spares, s);
    return wrong;
}
