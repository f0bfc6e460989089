"""DFloat11 seen from outside: weights to code, and the published kernel's thread logic in plain Python.

`kernel` decodes as a GPU block does, without sharing any code with the package: each thread loads its
8 bytes and 4 more, walks the byte tables from its gap on, counts the codes that start in its window,
waits for the sum of the threads before it, then decodes again and writes.
"""

import numpy as np

WINDOW, LOOK_AHEAD, THREADS = 8, 4, 512


def weights(exponents, seed=0):
    """bf16 patterns uint16 with the given exponents, other bits random."""
    exponents = np.asarray(exponents, np.uint16)
    random = np.random.default_rng(seed).integers(0, 2**16, len(exponents), dtype=np.uint16)
    return exponents << 7 | random & 0x807F


def normal(n, seed=0, scale=0.02):
    """n normal values, truncated to bf16 patterns uint16."""
    values = np.random.default_rng(seed).standard_normal(n) * scale
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def ruler(n):
    """n weights that need no random numbers: exponent 121 − trailing zeros of 1, 2, …, n."""
    i = np.arange(1, n + 1, dtype=np.int64)
    zeros = np.log2(i & -i).astype(np.int64)
    rest = i * 2654435761 >> 24 & 255
    return ((rest & 128) << 8 | (121 - zeros) << 7 | rest & 127).astype(np.uint16)


def kernel(parts):
    """uint16 [n] of a unit's tensors. Fails where a thread would loop for ever or run away."""
    luts, encoded = parts["luts"].tolist(), parts["encoded_exponent"].tobytes()
    positions = parts["output_positions"].view("<u4").tolist()
    gaps = "".join(f"{byte:08b}" for byte in parts["gaps"].tobytes())
    n = len(parts["sign_mantissa"])
    exponents = [None] * n
    for block in range(-(-len(encoded) // (WINDOW * THREADS))):
        at = positions[block]
        for thread in range(block * THREADS, (block + 1) * THREADS):
            begin = thread * WINDOW
            if begin >= len(encoded):
                break
            window = encoded[begin : begin + WINDOW + LOOK_AHEAD]
            gap = int(gaps[5 * thread : 5 * thread + 5], 2)
            for symbol in thread_codes(luts, window.ljust(WINDOW + LOOK_AHEAD, b"\0"), gap):
                if at < n:
                    exponents[at] = symbol
                at += 1
        end = positions[min(block + 1, len(positions) - 1)]
        assert at == end or end == n, f"block {block} decodes to {at}, {end} was promised"
    sign_mantissa = parts["sign_mantissa"].astype(np.uint16)
    return (sign_mantissa & 128) << 8 | np.array(exponents, np.uint16) << 7 | sign_mantissa & 127


def thread_codes(luts, window, at):
    """Codes that start in the first 64 bits of 12 bytes, from bit `at` on."""
    bits, found = int.from_bytes(window, "big"), []
    while at < 8 * WINDOW:
        ahead = bits << at >> 64 & 0xFFFFFFFF
        row, depth = 0, 0
        symbol = luts[0][ahead >> 24]
        while symbol >= 240:
            row, depth = 256 - symbol, depth + 1
            assert depth < 4 and row < len(luts) - 1, f"a jump to row {row} after {depth} bytes"
            symbol = luts[row][ahead >> 8 * (3 - depth) & 255]
        assert luts[-1][symbol], f"symbol {symbol} has no length: the thread would never end"
        found.append(symbol)
        at += luts[-1][symbol]
    return found
