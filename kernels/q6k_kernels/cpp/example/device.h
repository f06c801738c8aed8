// Where a package runs, and the library of the operations.
#pragma once
#include <c10/core/Device.h>

#include <string>

#include "package.h"

namespace q6k {

// Loads `libq6k_ops.so`, whose operations the programs call. Throws a Failure of Exit::MISSING if there is no such
// file, if it does not load, or if it is another library.
void load_operations(const std::string& path);

// The CPU, or the first GPU that CUDA_VISIBLE_DEVICES leaves. Throws a Failure of Exit::MISSING if the package is
// for another torch, for a GPU where there is none, or for another compute capability.
c10::Device device_of(const Package& package);

}  // namespace q6k
