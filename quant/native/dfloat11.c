/* DFloat11 (export/dfloat11.py): one unit's exponents to Huffman codes and back. Scalar C11.

   A window is 8 bytes of the code stream, a block 512 windows. Codes are written MSB first:

     window w      bit 0 ........................ 63 | window w+1  bit 0 ....
                       |gap|c0 |c1 |  ...   |c_last  ....|c_first ...
                       gap[w] = first bit at which a code of this window starts: 0..31

   Encoding works on slices of the unit, which threads may take in any order: the first and last
   window of a slice are shared with its neighbours and are merged with an atomic OR into zeros.
   Decoding works on ranges of blocks, in any order. It takes nothing on trust: where a window's
   codes end must be where the next window's gap says that they start, and every block must give
   exactly the elements that its output positions promise. No read is outside of the given sizes.

   Not here: making the code, the layout of luts and gaps as tensors (export/dfloat11_code.py). */

#include <stdint.h>
#include <string.h>

#define WINDOW_BITS 64
#define BLOCK_WINDOWS 512
#define BLOCK_ELEMENTS (BLOCK_WINDOWS * WINDOW_BITS) /* codes of one bit */
#define BATCH 4096
#define LOOKUP_BITS 12

enum { FINE = 0, BAD_GAP = 1, BAD_CODE = 2, BAD_COUNT = 3 };

static uint64_t big_endian(uint64_t x) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return x;
#else
  return __builtin_bswap64(x);
#endif
}

/* counts[e] += how many of `weights` (bf16) have exponent e. */
void fewbit_df11_count(const uint16_t *weights, int64_t n, int64_t *counts) {
  int64_t part[4][256] = {{0}}; /* four, so that equal neighbours do not wait for each other */
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; k++) part[k][weights[i + k] >> 7 & 255]++;
  for (; i < n; i++) part[0][weights[i] >> 7 & 255]++;
  for (int e = 0; e < 256; e++) counts[e] += part[0][e] + part[1][e] + part[2][e] + part[3][e];
}

/* Codes of a slice: elements first..first+n-1 of the unit, whose first code starts at `start_bit`.

   code[e]: the code in the upper bits; length[e]: 1..32. words: zeros at first, big-endian after.
   gaps, positions: one entry for every window and block at whose beginning a code of this slice
   ended; the entry of window 0 is the caller's. Returns the bit after the last code. */
int64_t fewbit_df11_encode(const uint16_t *weights, int64_t n, int64_t first, int64_t start_bit,
                           const uint64_t *code, const uint8_t *length, uint8_t *sign_mantissa,
                           uint64_t *words, uint8_t *gaps, uint32_t *positions) {
  int64_t window = start_bit / WINDOW_BITS;
  const int64_t first_window = window;
  unsigned used = (unsigned)(start_bit % WINDOW_BITS);
  uint64_t word = 0;
  uint8_t exponents[BATCH];
  for (int64_t begin = 0; begin < n; begin += BATCH) {
    const int m = (int)(n - begin < BATCH ? n - begin : BATCH);
    const uint16_t *from = weights + begin;
    uint8_t *to = sign_mantissa + begin;
    for (int i = 0; i < m; i++) {
      exponents[i] = (uint8_t)(from[i] >> 7);
      to[i] = (uint8_t)((from[i] >> 8 & 0x80) | (from[i] & 0x7f));
    }
    for (int i = 0; i < m; i++) {
      const uint64_t bits = code[exponents[i]];
      const unsigned taken = length[exponents[i]];
      word |= bits >> used;
      used += taken;
      if (used >= WINDOW_BITS) {
        const uint64_t out = big_endian(word);
        if (window == first_window)
          __atomic_fetch_or(&words[window], out, __ATOMIC_RELAXED);
        else
          words[window] = out;
        used -= WINDOW_BITS;
        word = bits << (taken - used); /* taken > used; 0 if the code ended with the window */
        window++;
        gaps[window] = (uint8_t)used;
        if (window % BLOCK_WINDOWS == 0)
          positions[window / BLOCK_WINDOWS] = (uint32_t)(first + begin + i + 1);
      }
    }
  }
  if (word) __atomic_fetch_or(&words[window], big_endian(word), __ATOMIC_RELAXED);
  return window * WINDOW_BITS + used;
}

/* Eight gaps of 5 bits to five bytes, `groups` times. */
void fewbit_df11_pack(const uint8_t *gaps, int64_t groups, uint8_t *packed) {
  for (int64_t i = 0; i < groups; i++) {
    uint64_t bits = 0;
    for (int k = 0; k < 8; k++) bits = bits << 5 | gaps[8 * i + k];
    for (int k = 0; k < 5; k++) packed[5 * i + k] = (uint8_t)(bits >> (32 - 8 * k));
  }
}

typedef struct {
  const uint64_t *many;   /* [4096] up to 6 symbols in bytes 0..5, their number in 6, bits in 7 */
  const uint16_t *one;    /* [4096] symbol | length << 8; 0: longer than 12 bits, or no code */
  const uint16_t *cells;  /* [tables, 256] the same for one byte; 0x8000 | table: go on there */
} Tables;

static unsigned long_code(const uint16_t *cells, uint64_t ahead) {
  unsigned cell = 0x8000;
  for (int depth = 0; depth < 4 && cell & 0x8000; depth++)
    cell = cells[(cell & 0x7fff) * 256 + (ahead >> (56 - 8 * depth) & 255)];
  return cell & 0x8000 ? 0 : cell;
}

static unsigned next_code(const Tables *tables, uint64_t ahead) {
  const unsigned cell = tables->one[ahead >> (64 - LOOKUP_BITS)];
  return cell ? cell : long_code(tables->cells, ahead);
}

static uint64_t load(const uint8_t *bytes, int64_t n, int64_t at) {
  uint64_t x = 0;
  if (at + 8 <= n)
    memcpy(&x, bytes + at, 8);
  else if (at < n)
    memcpy(&x, bytes + at, (size_t)(n - at));
  return big_endian(x);
}

static unsigned gap_of(const uint8_t *gaps, int64_t n_gaps, int64_t window) {
  const int64_t at = window * 5 / 8;
  const unsigned pair = (unsigned)gaps[at] << 8 | (at + 1 < n_gaps ? gaps[at + 1] : 0u);
  return pair >> (11 - window * 5 % 8) & 31;
}

static void merge(const uint8_t *exponents, const uint8_t *sign_mantissa, uint16_t *out, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const unsigned s = sign_mantissa[i];
    out[i] = (uint16_t)((s & 0x80) << 8 | (unsigned)exponents[i] << 7 | (s & 0x7f));
  }
}

/* All codes that start in a window, none of them the stream's last; returns the bit after them
   (64..95), or 0. `hi`, `lo`: the window and the one after. */
static unsigned whole_window(const Tables *tables, uint64_t hi, uint64_t lo, unsigned at,
                             uint8_t *exponents, int64_t *count) {
  uint8_t *to = exponents + *count;
  while (at <= WINDOW_BITS - LOOKUP_BITS) {
    const uint64_t ahead = hi << at | (lo >> 1) >> (63 - at);
    const uint64_t found = tables->many[ahead >> (64 - LOOKUP_BITS)];
    if (found >> 56) {
      const uint64_t symbols = found; /* bytes 6 and 7 are overwritten by what follows */
      for (int k = 0; k < 8; k++) to[k] = (uint8_t)(symbols >> 8 * k);
      to += found >> 48 & 255;
      at += (unsigned)(found >> 56);
    } else {
      const unsigned cell = long_code(tables->cells, ahead);
      if (!cell) return 0;
      *to++ = (uint8_t)cell;
      at += cell >> 8;
    }
  }
  while (at < WINDOW_BITS) {
    const unsigned cell = next_code(tables, hi << at | (lo >> 1) >> (63 - at));
    if (!cell) return 0;
    *to++ = (uint8_t)cell;
    at += cell >> 8;
  }
  *count = to - exponents;
  return at;
}

/* As whole_window, but stops after `need` codes. */
static unsigned last_window(const Tables *tables, uint64_t hi, uint64_t lo, unsigned at,
                            uint8_t *exponents, int64_t *count, int64_t need) {
  while (at < WINDOW_BITS && *count < need) {
    const unsigned cell = next_code(tables, hi << at | (lo >> 1) >> (63 - at));
    if (!cell) return 0;
    exponents[(*count)++] = (uint8_t)cell;
    at += cell >> 8;
  }
  return at;
}

/* Elements of blocks [begin, end) into `out`; `sign_mantissa` is the whole unit's.

   encoded [n_bytes]; gaps [n_gaps], 5 bits for each window of all blocks; positions [blocks + 1],
   ascending, differences at most 32768; the last two blocks of the unit belong into one call: all
   that is for the caller to see to. *where: the window of an error, or the bit after the last code,
   for the caller to compare with n_bytes. Windows n-2 and n-1 are special: the last code starts in
   one of them, and if it ends in the other at a whole byte, no gap was recorded there. */
int fewbit_df11_decode(const uint8_t *encoded, int64_t n_bytes, const uint8_t *gaps, int64_t n_gaps,
                       const int64_t *positions, int64_t begin, int64_t end, const uint64_t *many,
                       const uint16_t *one, const uint16_t *cells, const uint8_t *sign_mantissa,
                       uint16_t *out, int64_t *where) {
  const Tables tables = {many, one, cells};
  const int64_t n_windows = (n_bytes + 7) / 8;
  uint8_t exponents[BLOCK_ELEMENTS + 16];
  int64_t bit = begin * BLOCK_WINDOWS * WINDOW_BITS;
  bit += gap_of(gaps, n_gaps, begin * BLOCK_WINDOWS);
  for (int64_t block = begin; block < end; block++) {
    const int64_t need = positions[block + 1] - positions[block];
    const int64_t first = block * BLOCK_WINDOWS;
    const int64_t stop = first + BLOCK_WINDOWS < n_windows ? first + BLOCK_WINDOWS : n_windows;
    int64_t count = 0;
    for (int64_t window = first; window < stop; window++) {
      const int64_t start = window * WINDOW_BITS;
      const unsigned gap = gap_of(gaps, n_gaps, window);
      const int last = window + 2 >= n_windows;
      *where = window;
      if (last && count == need) { /* no code starts here */
        if (window + 1 == n_windows && bit != start + gap && (gap || bit % 8)) return BAD_GAP;
        break;
      }
      if (bit != start + gap) return BAD_GAP;
      const uint64_t hi = load(encoded, n_bytes, window * 8);
      const uint64_t lo = load(encoded, n_bytes, window * 8 + 8);
      const unsigned at = last ? last_window(&tables, hi, lo, gap, exponents, &count, need)
                               : whole_window(&tables, hi, lo, gap, exponents, &count);
      if (!at) return BAD_CODE;
      bit = start + at;
    }
    if (count != need) return BAD_COUNT;
    merge(exponents, sign_mantissa + positions[block], out + positions[block] - positions[begin], need);
  }
  *where = end * BLOCK_WINDOWS;
  if (*where < n_windows && bit != *where * WINDOW_BITS + gap_of(gaps, n_gaps, *where))
    return BAD_GAP;
  *where = bit;
  return FINE;
}
