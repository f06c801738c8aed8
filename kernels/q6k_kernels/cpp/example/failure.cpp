#include "failure.h"

#include <c10/util/Exception.h>

namespace q6k {
namespace {

constexpr size_t LONGEST_QUOTE = 80;

bool is_printable(char c) { return c >= ' ' && c <= '~'; }

}  // namespace

std::string one_line(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string text = of_torch ? of_torch->what_without_backtrace() : error.what();
  const size_t begin = text.find_first_not_of(" \n");
  if (begin == std::string::npos) return "an exception without words";
  return text.substr(begin, text.find('\n', begin) - begin);
}

std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text.substr(0, LONGEST_QUOTE)) out += is_printable(c) ? c : '?';
  return out + (text.size() > LONGEST_QUOTE ? "…'" : "'");
}

}  // namespace q6k
