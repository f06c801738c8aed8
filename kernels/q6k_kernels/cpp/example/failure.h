// How the program fails: one line that says what is wrong, what was expected and what to do, and an exit code.
#pragma once
#include <exception>
#include <stdexcept>
#include <string>

namespace q6k {

enum class Exit : int { FAILED = 1, USAGE = 2, PACKAGE = 3, IO = 4, MISSING = 6 };

class Failure final : public std::runtime_error {
 public:
  Failure(Exit code, const std::string& text) : std::runtime_error(text), code(code) {}

  const Exit code;
};

// An exception's words in one line, torch's without the trace.
std::string one_line(const std::exception& error);

// Text from a file for a message: in quotes, short, and without characters that a terminal would act upon.
std::string quoted(const std::string& text);

}  // namespace q6k
