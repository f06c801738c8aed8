// An exported model with one text, run in the same way as in export/program.py.
#pragma once
#include <c10/core/Device.h>

#include <memory>
#include <string>
#include <vector>

#include "package.h"

// Its header takes long to compile.
namespace torch::inductor {
class AOTIModelPackageLoader;
}

namespace q6k {

class Program {
 public:
  // Weights are copied to the device, once for all names they have; on the CPU the file's own memory is used. Throws a
  // Failure of Exit::PACKAGE if its two compiled programs do not go with its text.
  Program(Package package, c10::Device device);
  ~Program();

  const Info& info() const { return info_; }

  // Processes the next tokens of the text: one or more, each in the vocabulary, as many as the cache has room for.
  // Returns the best token after them, int64 (1, 1) on the device; nothing waits for it.
  at::Tensor prefill(const std::vector<int64_t>& ids);
  // Returns the best token after one from `prefill` or `decode`, for which the cache must have room.
  at::Tensor decode(const at::Tensor& token);

 private:
  using Loader = torch::inductor::AOTIModelPackageLoader;

  std::unique_ptr<Loader> load(const std::string& name);
  void add_state();
  at::Tensor run(const at::Tensor& tokens);
  [[noreturn]] void refuse(const std::string& what) const;

  std::string path_;
  Info info_;
  c10::Device device_;
  Tensors held_;  // constants and state by name; the programs do not keep them alive
  std::unique_ptr<Loader> prefill_, decode_;
  at::Tensor slots_;
  int64_t length_ = 0;
};

}  // namespace q6k
