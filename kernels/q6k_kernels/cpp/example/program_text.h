// The content of a package's `extra/q6k_program`; export/program_file.py describes it.
#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace q6k {

// A constant, or a part of the state.
struct Array {
  std::string name;   // its name in the programs
  std::string entry;  // its entry in data/weights; empty for state
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  std::vector<int64_t> shape;  // shape of the contiguous tensor
  int64_t nbytes = 0;
};

struct Capability {
  int major = 0, minor = 0;
};

inline std::string capability_text(const Capability& capability) {
  return std::to_string(capability.major) + "." + std::to_string(capability.minor);
}

struct Info {
  std::string torch;                     // the version that compiled the programs
  std::optional<Capability> capability;  // of the GPU that they are for; none: the CPU
  std::string architecture;              // GGUF's name of it
  c10::ScalarType dtype = c10::ScalarType::Undefined;  // of activations and cache
  int64_t capacity = 0;                                // positions in the cache
  int64_t chunk = 0;                                   // the most tokens of one call
  int64_t vocabulary = 0;                              // V of logits (1, V)
  std::vector<Array> constants, state;
};

constexpr const char* PROGRAM_TEXT = "extra/q6k_program";
constexpr const char* EXPORT_AGAIN = ". Export it again: `q6k-convert export BUNDLE MODEL.pt2`.";

// Parses the whole text; `path` is for messages. Throws a Failure of Exit::PACKAGE: a line that means nothing, a key
// missing or twice, a name twice, sizes whose product is more than memory can have.
Info parse_program_text(const std::string& path, const std::string& text);

}  // namespace q6k
