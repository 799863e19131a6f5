// What the CPU operators share.
#pragma once

#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Compiles a function for plain x86-64, AVX2 and AVX-512; the loader picks one for the machine it runs on, so
// a wheel built here is fast elsewhere. What such a function calls has to be inlined into it: D2IT_INLINE.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define D2IT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define D2IT_CLONES
#endif
#define D2IT_INLINE inline __attribute__((always_inline))
