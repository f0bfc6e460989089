/* Loops of fle.c over one band, included once for each instruction set: LOOP names a function, TARGET is
 * its attribute. All but the planes of fle3 is plain C, written so that compilers vectorise it.
 */

/* Words of codes and of signs and mantissas. before: base − 1, mod 256. */
TARGET FEWBIT_INLINE void LOOP(widen)(const uint8_t *restrict codes, const uint8_t *restrict low,
                                      uint16_t *restrict out, int n, uint8_t before, uint8_t width) {
    for (int i = 0; i < n; i++) {
        uint8_t inside = (uint8_t)(codes[i] + before);
        uint16_t e = codes[i] > width ? 0 : inside, s = low[i];
        out[i] = (uint16_t)((uint16_t)((s & 128) << 8) | (uint16_t)(e << 7) | (s & 127));
    }
}

TARGET FEWBIT_INLINE void LOOP(split_nibbles)(const uint8_t *restrict both, uint8_t *restrict codes) {
    for (int j = 0; j < HALF; j++) codes[j] = both[j] & 15;
    for (int j = 0; j < HALF; j++) codes[HALF + j] = both[j] >> 4;
}

/* Escapes of one row of a tile of fle3. -> are there as many entries? */
TARGET FEWBIT_INLINE int LOOP(fill_in)(const struct fewbit_fle *f, uint64_t mask, int32_t *cursor,
                                       int32_t end, uint16_t *out) {
    int32_t at = *cursor;
    if (__builtin_popcountll(mask) > end - at) return 0;
    for (; mask; mask &= mask - 1, at++) {
        const int column = __builtin_ctzll(mask);
        out[column] = with_exponent(out[column], f->exponent[at]);
    }
    *cursor = at;
    return 1;
}

/* One row of one tile, as 64 words. cursor, end: of fle3. */
TARGET FEWBIT_INLINE int LOOP(row_of_tile)(const struct fewbit_fle *f, int64_t place, uint16_t *out,
                                           int32_t *cursor, int32_t end) {
    const uint8_t before = (uint8_t)(f->base - 1), width = (uint8_t)f->width;
    const uint8_t *low = f->sign_mantissa + place * TILE;
    uint8_t codes[TILE];
    if (f->bits == 4) {
        LOOP(split_nibbles)(f->codes + place * HALF, codes);
        LOOP(widen)(codes, low, out, TILE, before, width);
        return 1;
    }
    const uint8_t *at = f->codes + place * 8;
    const int64_t next = f->n * tiles_across(f) * 8;
    const uint64_t plane[3] = {load8(at), load8(at + next), load8(at + 2 * next)};
    LOOP(codes_of_planes)(plane, codes);
    LOOP(widen)(codes, low, out, TILE, before, width);
    return LOOP(fill_in)(f, ~(plane[0] | plane[1] | plane[2]), cursor, end, out);
}

/* Tiles [first, last) of a band, at most PANEL. */
TARGET static int LOOP(decode_panel)(const struct fewbit_fle *f, int64_t band, int64_t first,
                                     int64_t last) {
    const int64_t across = tiles_across(f), whole = f->k / TILE;
    const int32_t *offset = f->offset + band * across + first;
    int32_t cursor[PANEL];
    memcpy(cursor, offset, sizeof *cursor * (size_t)(last - first));
    for (int64_t row = band * TILE; row < end_of(f, band); row++)
        for (int64_t t = first; t < last; t++) {
            uint16_t *out = f->words + row * f->k + t * TILE, edge[TILE];
            uint16_t *made = t < whole ? out : edge;
            int32_t *own = cursor + (t - first);
            if (!LOOP(row_of_tile)(f, row * across + t, made, own, offset[t - first + 1])) return 0;
            if (t >= whole) memcpy(out, edge, sizeof *out * (size_t)(f->k % TILE));
        }
    for (int64_t t = 0; f->bits == 3 && t < last - first; t++)
        if (cursor[t] != offset[t + 1]) return 0;
    return 1;
}

/* Entries of the lists of fle4, of tile t of a band. -> are they inside it? */
TARGET static int LOOP(rewrite)(const struct fewbit_fle *f, int64_t band, int64_t t) {
    const int32_t *offset = f->offset + band * tiles_across(f) + t;
    const int64_t rows = end_of(f, band) - band * TILE;
    const int64_t columns = f->k - t * TILE < TILE ? f->k - t * TILE : TILE;
    uint16_t *corner = f->words + band * TILE * f->k + t * TILE;
    for (int32_t i = offset[0]; i < offset[1]; i++) {
        const int64_t y = f->position[i] >> 6, x = f->position[i] & 63;
        if (y < 0 || y >= rows || x >= columns) return 0;
        corner[y * f->k + x] = with_exponent(corner[y * f->k + x], f->exponent[i]);
    }
    return 1;
}

TARGET static int LOOP(decode_band)(const struct fewbit_fle *f, int64_t band) {
    const int64_t across = tiles_across(f);
    for (int64_t t = 0; t < across; t += PANEL)
        if (!LOOP(decode_panel)(f, band, t, across - t < PANEL ? across : t + PANEL)) return 0;
    for (int64_t t = 0; f->bits == 4 && t < across; t++)
        if (!LOOP(rewrite)(f, band, t)) return 0;
    return 1;
}

/* 64 words -> signs and mantissas, codes, and how many of these are 0. */
TARGET FEWBIT_INLINE int LOOP(codes_of_words)(const struct fewbit_fle *f, const uint16_t *restrict words,
                                              uint8_t *restrict low, uint8_t *restrict codes) {
    const uint8_t before = (uint8_t)(f->base - 1), width = (uint8_t)f->width;
    const uint8_t most = (uint8_t)((1 << f->bits) - 1), of_zero = width < most ? most : 0;
    uint8_t zeros = 0;
    for (int i = 0; i < TILE; i++) {
        uint8_t e = (uint8_t)(words[i] >> 7), c = (uint8_t)(e - before);
        c = (uint8_t)(c - 1) < width ? c : 0;
        c |= e ? 0 : of_zero;
        low[i] = (uint8_t)(((words[i] >> 8) & 128) | (words[i] & 127));
        codes[i] = c;
        zeros = (uint8_t)(zeros + !c);
    }
    return zeros;
}

TARGET static int LOOP(encode_band)(const struct fewbit_fle *f, int64_t band) {
    const int64_t across = tiles_across(f), whole = f->k / TILE, next = f->n * across * 8;
    memset(f->offset + band * across + 1, 0, sizeof *f->offset * (size_t)across);
    for (int64_t row = band * TILE; row < end_of(f, band); row++)
        for (int64_t t = 0; t < across; t++) {
            const uint16_t *words = f->words + row * f->k + t * TILE;
            uint16_t edge[TILE];
            uint8_t codes[TILE];
            if (t >= whole) { /* padding has code 1 and zero bytes: the exponent `base` */
                for (int i = 0; i < TILE; i++) edge[i] = (uint16_t)(f->base << 7);
                memcpy(edge, words, sizeof *words * (size_t)(f->k % TILE));
                words = edge;
            }
            const int64_t place = row * across + t;
            f->offset[band * across + t + 1] +=
                LOOP(codes_of_words)(f, words, f->sign_mantissa + place * TILE, codes);
            if (f->bits == 4) {
                uint8_t *both = f->codes + place * HALF;
                for (int j = 0; j < HALF; j++) both[j] = (uint8_t)(codes[j] | codes[HALF + j] << 4);
            } else {
                uint64_t plane[3];
                LOOP(planes_of_codes)(codes, plane);
                for (int p = 0; p < 3; p++) memcpy(f->codes + place * 8 + p * next, &plane[p], 8);
            }
        }
    return 0;
}
