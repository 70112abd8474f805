// The kernels of one instruction set. The build compiles this file once for each, with its flags,
// HEADRACE_ISA (its name) and HEADRACE_LEVEL: 0 portable, 1 AVX2, 2 AVX-512 VNNI, 3 and BF16, 4 AMX.
//
// Nothing from the C++ standard library may be instantiated here: the linker would keep one copy of
// an inline function for the whole module, perhaps the one for the newest processor.
#include "../kernels.h"

#if HEADRACE_LEVEL >= 1
#include <immintrin.h>
#endif

#define HEADRACE_TEXT_(x) #x
#define HEADRACE_TEXT(x) HEADRACE_TEXT_(x)

namespace headrace {
namespace HEADRACE_ISA {
namespace {

#include "base.inl"
#if HEADRACE_LEVEL >= 2
#include "vectors_avx512.inl"
#include "blocks_avx512.inl"
#elif HEADRACE_LEVEL == 1
#include "blocks_avx2.inl"
#else
#include "blocks_portable.inl"
#endif
#if HEADRACE_LEVEL >= 4
#include "blocks_tiles.inl"
#endif
#include "multiply.inl"
#include "block_formats.inl"
#include "rows.inl"
#include "linear.inl"
#include "neurons.inl"
#include "scale_search.inl"
#include "highest.inl"
#include "limits.inl"
#include "attention.inl"

}  // namespace

extern const Kernels kernels;
// Made by the compiler: code of this file may run only where the processor is known to have it.
constinit const Kernels kernels = {
    HEADRACE_TEXT(HEADRACE_ISA),
    multiplies_halves,
    linear_scratch,
    prepare,
    linear,
    rows_of,
    rms_norm,
    prepare_neurons,
    neurons,
    join,
    search_scales,
    highest,
    read,
    peak_int8,
    peak_bf16,
    attention_kernels(),
};

}  // namespace HEADRACE_ISA
}  // namespace headrace
