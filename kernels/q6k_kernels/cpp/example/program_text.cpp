#include "program_text.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <map>
#include <set>
#include <utility>

#include "failure.h"

namespace q6k {
namespace {

constexpr const char* FIRST_LINE = "q6k-program 1";
constexpr size_t MOST_DIMENSIONS = 8;
constexpr size_t LONGEST_WORD = 64;
constexpr int64_t LARGEST_DIMENSION = 999'999'999'999;
constexpr int64_t LARGEST_COUNT = 9'999'999'999;

const std::pair<const char*, c10::ScalarType> DTYPES[] = {
    {"uint8", c10::ScalarType::Byte},   {"int8", c10::ScalarType::Char},
    {"int32", c10::ScalarType::Int},    {"int64", c10::ScalarType::Long},
    {"float16", c10::ScalarType::Half}, {"bfloat16", c10::ScalarType::BFloat16},
    {"float32", c10::ScalarType::Float},
};

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  for (size_t begin = 0;;) {
    const size_t end = text.find(at, begin);
    parts.push_back(text.substr(begin, end - begin));
    if (end == std::string::npos) return parts;
    begin = end + 1;
  }
}

// Digits alone, at least `least` and at most `most`.
std::optional<int64_t> number(const std::string& text, int64_t least, int64_t most) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  if (text.empty() || text[0] < '0' || text[0] > '9') return std::nullopt;
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < least || value > most) return std::nullopt;
  return value;
}

bool is_word(const std::string& text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) { return c > ' ' && c != 0x7f; });
}

class Parser {
 public:
  explicit Parser(const std::string& path) : path_(path) {}

  Info parse(const std::string& text) {
    std::vector<std::string> lines = split(text, '\n');
    if (lines[0] != FIRST_LINE) {
      refuse("begins with " + quoted(lines[0]) + ", expected '" + FIRST_LINE + "'");
    }
    if (!lines.back().empty()) refuse("ends within the line " + quoted(lines.back()) + ": its end is missing");
    lines.pop_back();
    for (size_t i = 1; i < lines.size(); ++i) {
      if (!take(split(lines[i], ' '))) {
        refuse("has as line " + std::to_string(i + 1) + " " + quoted(lines[i]) + ", which means nothing");
      }
    }
    for (const char* key : {"torch", "device", "architecture", "dtype", "capacity", "chunk", "vocabulary"}) {
      const auto lines_of = seen_[key];
      if (lines_of != 1) refuse("should have one line of " + std::string(key) + ", found " + std::to_string(lines_of));
    }
    if (info_.chunk > info_.capacity) {
      refuse("has chunks of " + std::to_string(info_.chunk) + " tokens, more than its capacity of " +
             std::to_string(info_.capacity));
    }
    return std::move(info_);
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Failure(Exit::PACKAGE, path_ + ": " + PROGRAM_TEXT + " " + what + EXPORT_AGAIN);
  }

  // Returns whether the line, a key and its values, follows the format.
  bool take(const std::vector<std::string>& words) {
    const std::string& key = words[0];
    ++seen_[key];
    if (key == "constant") return words.size() == 5 && take_constant(words);
    if (key == "state") return words.size() == 4 && take_array(words, 1, Array(), info_.state);
    if (key == "device") return take_device(words);
    if (words.size() != 2) return false;
    if (key == "capacity") return take_count(words[1], info_.capacity);
    if (key == "chunk") return take_count(words[1], info_.chunk);
    if (key == "vocabulary") return take_count(words[1], info_.vocabulary);
    if (!is_word(words[1]) || words[1].size() > LONGEST_WORD) return false;
    if (key == "dtype") {
      info_.dtype = dtype(words[1]);
    } else if (key == "torch") {
      info_.torch = words[1];
    } else if (key == "architecture") {
      info_.architecture = words[1];
    } else {
      return false;
    }
    return true;
  }

  static bool take_count(const std::string& word, int64_t& count) {
    const auto value = number(word, 1, LARGEST_COUNT);
    count = value.value_or(0);
    return value.has_value();
  }

  bool take_device(const std::vector<std::string>& words) {
    if (words.size() == 2 && words[1] == "cpu") return true;
    if (words.size() != 3 || words[1] != "cuda") return false;
    const std::vector<std::string> parts = split(words[2], '.');
    if (parts.size() != 2) return false;
    const auto major = number(parts[0], 0, 99), minor = number(parts[1], 0, 9);
    if (!major || !minor) return false;
    info_.capability = Capability{static_cast<int>(*major), static_cast<int>(*minor)};
    return true;
  }

  bool take_constant(const std::vector<std::string>& words) {
    Array array;
    array.entry = words[1];
    if (array.entry.compare(0, 4, "q6k_") != 0 || !number(array.entry.substr(4), 0, 999'999'999)) return false;
    return take_array(words, 2, std::move(array), info_.constants);
  }

  // Words from `at` on are dtype, shape and name.
  bool take_array(const std::vector<std::string>& words, size_t at, Array array, std::vector<Array>& arrays) {
    array.dtype = dtype(words[at]);
    array.name = words[at + 2];
    if (!is_word(array.name)) return false;
    if (!names_.insert(array.name).second) refuse("names " + quoted(array.name) + " twice");
    const std::string& shape = words[at + 1];
    array.nbytes = static_cast<int64_t>(c10::elementSize(array.dtype));
    if (shape != "scalar") {
      const std::vector<std::string> sizes = split(shape, 'x');
      if (sizes.size() > MOST_DIMENSIONS) return false;
      for (const std::string& size : sizes) {
        const auto value = number(size, 0, LARGEST_DIMENSION);
        if (!value) return false;
        array.shape.push_back(*value);
        if (__builtin_mul_overflow(array.nbytes, *value, &array.nbytes)) {
          refuse("gives " + quoted(array.name) + " the shape " + shape + ", more than memory can have");
        }
      }
    }
    arrays.push_back(std::move(array));
    return true;
  }

  c10::ScalarType dtype(const std::string& word) const {
    std::string known;
    for (const auto& [name, value] : DTYPES) {
      if (word == name) return value;
      known += (known.empty() ? "" : ", ") + std::string(name);
    }
    refuse("names a dtype " + quoted(word) + "; known are " + known);
  }

  const std::string& path_;
  Info info_;
  std::map<std::string, int> seen_;
  std::set<std::string> names_;
};

}  // namespace

Info parse_program_text(const std::string& path, const std::string& text) { return Parser(path).parse(text); }

}  // namespace q6k
