/* Loops of planes.c, included once for each instruction set: LOOP names a function, TARGET is its
 * attribute. They are plain C, written so that compilers vectorise them.
 */

TARGET static void LOOP(split_bf16)(const uint16_t *restrict data, uint8_t *restrict exponent,
                                    uint8_t *restrict rest, size_t n) {
    for (size_t i = 0; i < n; i++) {
        exponent[i] = (uint8_t)(data[i] >> 7);
        rest[i] = (uint8_t)(((data[i] >> 8) & 128) | (data[i] & 127));
    }
}

TARGET static void LOOP(split_half)(const uint16_t *restrict data, uint8_t *restrict high,
                                    uint8_t *restrict low, size_t n) {
    for (size_t i = 0; i < n; i++) {
        high[i] = (uint8_t)(data[i] >> 8);
        low[i] = (uint8_t)data[i];
    }
}

TARGET static void LOOP(merge_bf16)(uint16_t *restrict data, const uint8_t *restrict exponent,
                                    const uint8_t *restrict rest, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t e = exponent[i], s = rest[i];
        data[i] = (uint16_t)((uint16_t)((s & 128) << 8) | (uint16_t)(e << 7) | (s & 127));
    }
}

TARGET static void LOOP(merge_half)(uint16_t *restrict data, const uint8_t *restrict high,
                                    const uint8_t *restrict low, size_t n) {
    for (size_t i = 0; i < n; i++) data[i] = (uint16_t)((uint16_t)(high[i] << 8) | low[i]);
}

TARGET static void LOOP(split_words)(const uint32_t *restrict data, uint16_t *restrict high,
                                     uint16_t *restrict low, size_t n) {
    for (size_t i = 0; i < n; i++) {
        high[i] = (uint16_t)(data[i] >> 16);
        low[i] = (uint16_t)data[i];
    }
}

TARGET static void LOOP(merge_words)(uint32_t *restrict data, const uint16_t *restrict high,
                                     const uint16_t *restrict low, size_t n) {
    for (size_t i = 0; i < n; i++) data[i] = (uint32_t)high[i] << 16 | low[i];
}
