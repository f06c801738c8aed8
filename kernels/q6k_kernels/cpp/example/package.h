// An exported model's file: its parsed text, and its weights as views of the mapped file.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "program_text.h"

namespace q6k {

using Tensors = std::map<std::string, at::Tensor>;

struct Package {
  std::string path;
  Info info;
  // By entry, on the CPU, each of the dtype and shape that its constants have. The file stays mapped as long as one of
  // them lives, and must not change; nothing may write to them.
  Tensors entries;
};

// Throws a Failure: of Exit::IO if the file cannot be read, of Exit::PACKAGE if it is not such a package, is cut short,
// or its parts contradict each other.
Package read_package(const std::string& path);

}  // namespace q6k
