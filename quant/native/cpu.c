/* Which instructions the processor has, and whether the system saves their registers. */
#include "native.h"

FEWBIT_EXPORT int fewbit_isa(int cap) {
#ifdef FEWBIT_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
               __builtin_cpu_supports("sse4.2");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && cap >= FEWBIT_ISA_AVX512) return FEWBIT_ISA_AVX512;
    if (avx2 && cap >= FEWBIT_ISA_AVX2) return FEWBIT_ISA_AVX2;
#else
    (void)cap;
#endif
    return FEWBIT_ISA_SCALAR;
}
