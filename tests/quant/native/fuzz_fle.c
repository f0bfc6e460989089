/* Stores random matrices as fle4 and fle3, reads them back, damages one array and reads again: a
 * stand-alone program, to be compiled with -fsanitize=address,undefined. Every array is an allocation of
 * exactly its size.
 *
 *     fuzz_fle ROUNDS SEED      prints "rounds R refused F"; exit code 1 if a word comes back changed
 */
#include "fle.c"

#include <stdio.h>
#include <stdlib.h>

static uint64_t seed;

static uint64_t draw(uint64_t below) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (seed >> 11) % below;
}

static void *room(int64_t n) { return calloc(n ? (size_t)n : 1, 1); }

struct sizes {
    int64_t words, sign_mantissa, codes, offset, position, exponent; /* bytes */
};

static struct sizes sizes_of(const struct fewbit_fle *f) {
    const int64_t across = tiles_across(f), bands = (f->n + TILE - 1) / TILE;
    return (struct sizes){2 * f->n * f->k,
                          f->n * across * TILE,
                          f->n * across * TILE * f->bits / 8,
                          4 * (bands * across + 1),
                          f->bits == 4 ? 2 * f->escapes : 0,
                          f->escapes};
}

/* A matrix and its window; the lists have room for just what escapes. */
static struct fewbit_fle make(int isa) {
    struct fewbit_fle f = {.n = 1 + (int64_t)draw(150), .k = 1 + (int64_t)draw(200), .isa = isa};
    if (!draw(40)) f.n = 1 + (int64_t)draw(3), f.k = 16384 + (int64_t)draw(200);
    f.bits = 3 + (int)draw(2);
    f.width = (1 << f.bits) - 1 - (int)draw(2);
    f.base = (int)draw((uint64_t)(257 - f.width));
    if (f.width < (1 << f.bits) - 1 && !f.base) f.base = 1;
    f.words = room(2 * f.n * f.k);
    const uint64_t spread = draw(3) ? 20 : 256;
    int64_t counts[256] = {0};
    for (int64_t i = 0; i < f.n * f.k; i++) {
        uint64_t e = ((uint64_t)f.base + draw(spread)) & 255;
        f.words[i] = (uint16_t)(draw(2) << 15 | e << 7 | draw(128));
    }
    fewbit_fle_count(f.words, f.n * f.k, counts);
    f.escapes = f.n * f.k - (f.width < (1 << f.bits) - 1 ? counts[0] : 0);
    for (int e = f.base; e < f.base + f.width; e++) f.escapes -= counts[e];
    const struct sizes s = sizes_of(&f);
    f.sign_mantissa = room(s.sign_mantissa), f.codes = room(s.codes), f.offset = room(s.offset);
    f.position = room(s.position), f.exponent = room(s.exponent);
    return f;
}

static int64_t bands_of(const struct fewbit_fle *f) { return (f->n + TILE - 1) / TILE; }

static int comes_back(struct fewbit_fle *f) {
    fewbit_fle_encode(f, 0, bands_of(f));
    for (int64_t t = 1; t < sizes_of(f).offset / 4; t++) f->offset[t] += f->offset[t - 1];
    if (f->offset[sizes_of(f).offset / 4 - 1] != f->escapes) return 0;
    fewbit_fle_list(f, 0, bands_of(f));
    uint16_t *original = f->words;
    f->words = room(sizes_of(f).words);
    int answer = fewbit_fle_decode(f, 0, bands_of(f));
    int same = !memcmp(original, f->words, (size_t)sizes_of(f).words);
    free(original);
    return !answer && same;
}

/* A few bytes of one array, or a number of it that leads far away. */
static void damage(struct fewbit_fle *f) {
    const struct sizes s = sizes_of(f);
    uint8_t *const arrays[] = {f->codes, (uint8_t *)f->offset, (uint8_t *)f->position, f->exponent};
    const int64_t n_bytes[] = {s.codes, s.offset, s.position, s.exponent};
    const uint64_t which = draw(4);
    for (uint64_t times = 1 + draw(4); times && n_bytes[which]; times--)
        arrays[which][draw((uint64_t)n_bytes[which])] = (uint8_t)(draw(3) ? draw(256) : 255 * draw(2));
    if (!draw(4)) f->base = (int)draw(256), f->width = (int)draw(256);
    if (!draw(4)) f->offset[draw((uint64_t)s.offset / 4)] = (int32_t)(draw(2) ? INT32_MAX : INT32_MIN);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const int rounds = atoi(argv[1]), best = fewbit_isa(FEWBIT_ISA_AVX512);
    int refused = 0;
    seed = (uint64_t)atoi(argv[2]) * 0x9E3779B97F4A7C15u + 1;
    for (int round = 0; round < rounds; round++) {
        struct fewbit_fle f = make(round % (best + 1));
        if (!comes_back(&f)) return printf("round %d: another matrix came back\n", round), 1;
        damage(&f);
        refused += fewbit_fle_decode(&f, 0, bands_of(&f));
        free(f.words), free(f.sign_mantissa), free(f.codes), free(f.offset), free(f.position);
        free(f.exponent);
    }
    printf("rounds %d refused %d\n", rounds, refused);
    return 0;
}
