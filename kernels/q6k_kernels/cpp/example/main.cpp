// Continues a text of token ids with a model that q6k-convert exported, the best token each time, without Python.
#include <c10/core/InferenceMode.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "failure.h"
#include "program.h"

namespace {

using q6k::Exit;
using q6k::Failure;
using Clock = std::chrono::steady_clock;

constexpr const char* USAGE =
    "usage: q6k_generate [--verbose] MODEL.pt2 LIBRARY COUNT ID...\n"
    "\n"
    "Continues a text with a model that `q6k-convert export` made, the best token each time, and prints the new ids.\n"
    "\n"
    "  MODEL.pt2   the model; it runs what it was exported for, the CPU or the first visible GPU\n"
    "  LIBRARY     libq6k_ops.so, from `q6k-convert build-ops`\n"
    "  COUNT       how many new ids, 1 or more\n"
    "  ID...       the text so far, its beginning-of-text token included\n"
    "  --verbose   say on stderr what runs where, and how fast prefill and decode were\n"
    "\n"
    "Exit codes: 0 done, 1 torch failed, 2 usage, 3 the model is damaged or no such package, 4 it cannot be\n"
    "read, 6 the library or the GPU is missing, or not the one that it is for.\n";

struct Arguments {
  bool help = false, verbose = false;
  std::string model, library;
  int64_t count = 0;
  std::vector<int64_t> ids;
};

[[noreturn]] void misused(const std::string& what) {
  throw Failure(Exit::USAGE, what + ". `q6k_generate --help` says more.");
}

int64_t number(const char* what, const std::string& text) {
  int64_t value = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || stop != text.data() + text.size()) {
    misused(std::string(what) + ": expected a whole number, found " + q6k::quoted(text));
  }
  return value;
}

Arguments parse(int count, char** values) {
  Arguments arguments;
  std::vector<std::string> words;
  for (int i = 1; i < count; ++i) {
    const std::string word = values[i];
    if (word == "--help" || word == "-h") {
      arguments.help = true;
    } else if (word == "--verbose") {
      arguments.verbose = true;
    } else if (word.size() > 1 && word[0] == '-' && (word[1] < '0' || word[1] > '9')) {
      misused("expected --verbose or --help, found " + q6k::quoted(word));
    } else {
      words.push_back(word);
    }
  }
  if (arguments.help) return arguments;
  if (words.size() < 4) {
    misused("expected MODEL.pt2 LIBRARY COUNT ID..., found " + std::to_string(words.size()) + " arguments");
  }
  arguments.model = words[0];
  arguments.library = words[1];
  arguments.count = number("COUNT", words[2]);
  if (arguments.count < 1) misused("COUNT: expected 1 or more, found " + words[2]);
  for (size_t i = 3; i < words.size(); ++i) arguments.ids.push_back(number("ID", words[i]));
  return arguments;
}

void check(const Arguments& arguments, const q6k::Info& info) {
  for (const int64_t id : arguments.ids) {
    if (id < 0 || id >= info.vocabulary) {
      misused("ID: the model has tokens 0 to " + std::to_string(info.vocabulary - 1) + ", found " + std::to_string(id));
    }
  }
  // The last new token does not go through the model.
  const auto given = static_cast<int64_t>(arguments.ids.size());
  if (given > info.capacity || arguments.count - 1 > info.capacity - given) {
    misused("a text of " + std::to_string(given) + " ids and " + std::to_string(arguments.count) +
            " new ones do not fit in the model's " + std::to_string(info.capacity) +
            " positions: ask for fewer, or export it with a larger capacity");
  }
}

void report(const char* what, size_t tokens, Clock::duration time) {
  const double seconds = std::chrono::duration<double>(time).count();
  std::fprintf(stderr, "%s: %zu tokens in %.3f s, %.1f a second\n", what, tokens, seconds,
               static_cast<double>(tokens) / seconds);
}

void generate(const Arguments& arguments) {
  const c10::InferenceMode no_gradients;
  q6k::Package package = q6k::read_package(arguments.model);
  check(arguments, package.info);
  const c10::Device device = q6k::device_of(package);
  q6k::load_operations(arguments.library);
  q6k::Program program(std::move(package), device);
  if (arguments.verbose) {
    const q6k::Info& info = program.info();
    std::fprintf(stderr, "%s in %s on %s, %lld positions\n", info.architecture.c_str(), c10::toString(info.dtype),
                 device.str().c_str(), static_cast<long long>(info.capacity));
  }

  const auto begin = Clock::now();
  at::Tensor token = program.prefill(arguments.ids);
  std::vector<int64_t> found = {token.item<int64_t>()};
  const auto prefilled = Clock::now();
  // On a GPU all steps are enqueued before a token is read: each step continues from the choice on the device.
  std::vector<at::Tensor> tokens;
  for (int64_t i = 1; i < arguments.count; ++i) tokens.push_back(token = program.decode(token));
  for (const at::Tensor& each : tokens) found.push_back(each.item<int64_t>());
  const auto decoded = Clock::now();

  std::string line;
  for (const int64_t id : found) line += (line.empty() ? "" : " ") + std::to_string(id);
  if (std::printf("%s\n", line.c_str()) < 0 || std::fflush(stdout) != 0) {
    throw Failure(Exit::IO, "the ids cannot be written to stdout.");
  }
  if (arguments.verbose) {
    report("prefill", arguments.ids.size(), prefilled - begin);
    if (!tokens.empty()) report("decode", tokens.size(), decoded - prefilled);
  }
}

int fail(Exit code, const std::string& text) {
  std::fprintf(stderr, "error: %s\n", text.c_str());
  return static_cast<int>(code);
}

}  // namespace

int main(int count, char** values) {
  try {
    const Arguments arguments = parse(count, values);
    if (arguments.help) {
      std::fputs(USAGE, stdout);
    } else {
      generate(arguments);
    }
    return 0;
  } catch (const Failure& failure) {
    return fail(failure.code, failure.what());
  } catch (const std::exception& error) {
    return fail(Exit::FAILED, q6k::one_line(error));
  }
}
