// Macros around the kernel bodies: which instruction set the functions between GB_BEGIN and GB_END may use.
#pragma once

#define GB_TEXT_(x) #x
#define GB_TEXT(x) GB_TEXT_(x)
#define GB_INLINE static inline __attribute__((always_inline))

// accumulators stay in registers only where the loops over them are gone
#define GB_UNROLL _Pragma("GCC unroll 32")

#if defined(__x86_64__) || defined(__i386__)
#define GB_X86 1
#include <immintrin.h>
#else
#define GB_X86 0
#endif

// The matrix unit: where the compiler knows it and the system can be asked for it. Clang does not add an instruction set
// to that of the functions around, so it does without.
#if GB_X86 && defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __has_include(<amxint8intrin.h>)
#define GB_AMX 1
#else
#define GB_AMX 0
#endif

// GB_BEGIN_WIDE: in vectors of 512 bits, which GCC has to be told
#if !GB_X86
#define GB_BEGIN(isa)
#define GB_BEGIN_WIDE(isa)
#define GB_END
#elif defined(__clang__)
#define GB_BEGIN(isa) _Pragma(GB_TEXT(clang attribute push(__attribute__((target(isa))), apply_to = function)))
#define GB_BEGIN_WIDE(isa) GB_BEGIN(isa)
#define GB_END _Pragma("clang attribute pop")
#else
#define GB_BEGIN(isa) _Pragma("GCC push_options") _Pragma(GB_TEXT(GCC target(isa)))
#define GB_BEGIN_WIDE(isa) _Pragma("GCC push_options") _Pragma(GB_TEXT(GCC target(isa, "prefer-vector-width=512")))
#define GB_END _Pragma("GCC pop_options")
#endif
