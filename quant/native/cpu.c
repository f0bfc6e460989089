/* Which instructions the processor has, and whether the system saves their registers.
 *
 * Asked of the processor itself: __builtin_cpu_supports depends on the compiler's run-time library,
 * and one that was tried answers no to everything.
 */
#include "native.h"

#ifdef FEWBIT_X86
#include <cpuid.h>

enum {
    SSE42 = 1 << 20, POPCNT = 1 << 23, OSXSAVE = 1 << 27, /* leaf 1, ecx */
    BMI1 = 1 << 3, AVX2 = 1 << 5, BMI2 = 1 << 8,          /* leaf 7, ebx */
    AVX512F = 1 << 16, AVX512DQ = 1 << 17, AVX512BW = 1 << 30,
    SAVES_YMM = 0x06, SAVES_ZMM = 0xe6, /* XCR0 */
};
#define AVX512VL (1u << 31)

static uint32_t leaf_1(void) {
    uint32_t a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) ? c : 0;
}

static uint32_t leaf_7(void) {
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) ? b : 0;
}

static uint32_t saved_registers(void) {
    uint32_t low, high;
    if (!(leaf_1() & OSXSAVE)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int has(uint32_t found, uint32_t wanted) {
    return (found & wanted) == wanted;
}
#endif

int fewbit_has_crc32(void) {
#ifdef FEWBIT_X86
    return has(leaf_1(), SSE42);
#else
    return 0;
#endif
}

static int best;

/* Once, since a virtual machine may take tens of microseconds to answer. */
__attribute__((constructor)) static void find_best(void) {
#ifdef FEWBIT_X86
    uint32_t basic = leaf_1(), more = leaf_7(), saved = saved_registers();
    int avx2 = has(basic, SSE42 | POPCNT) && has(more, BMI1 | AVX2 | BMI2) && has(saved, SAVES_YMM);
    int avx512 =
        avx2 && has(more, AVX512F | AVX512DQ | AVX512BW | AVX512VL) && has(saved, SAVES_ZMM);
    best = avx512 ? FEWBIT_ISA_AVX512 : avx2 ? FEWBIT_ISA_AVX2 : FEWBIT_ISA_SCALAR;
#endif
}

FEWBIT_EXPORT int fewbit_isa(int cap) { return cap < best ? cap : best; }
