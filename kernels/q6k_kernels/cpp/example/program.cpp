#include "program.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "failure.h"

namespace q6k {
namespace {

// Multiple that the slots of a call are rounded up to, so that allocations come in few sizes.
constexpr int64_t SLOTS_AT_ONCE = 256;

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t memory_bytes() { return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE); }

}  // namespace

Program::Program(Package package, c10::Device device)
    : path_(std::move(package.path)), info_(std::move(package.info)), device_(device) {
  for (auto& [entry, tensor] : package.entries) tensor = tensor.to(device_);
  for (const Array& array : info_.constants) held_.emplace(array.name, package.entries.at(array.entry));
  add_state();
  prefill_ = load("prefill");
  decode_ = load("decode");
}

Program::~Program() = default;

void Program::add_state() {
  int64_t total = 0;
  for (const Array& array : info_.state) {
    if (__builtin_add_overflow(total, array.nbytes, &total) || (device_.is_cpu() && total > memory_bytes())) {
      refuse("its cache takes more than the memory of this machine, " + std::to_string(memory_bytes()) + " bytes");
    }
  }
  for (const Array& array : info_.state) {
    held_.emplace(array.name, at::zeros(array.shape, at::TensorOptions().dtype(array.dtype).device(device_)));
  }
}

std::unique_ptr<Program::Loader> Program::load(const std::string& name) {
  std::unique_ptr<Loader> loader;
  try {
    // Single-threaded: otherwise each call would wait for the device to finish the call before.
    loader = std::make_unique<Loader>(path_, name, true, 1, device_.index());
  } catch (const std::exception& error) {
    refuse("the program " + name + " does not load: " + one_line(error));
  }
  auto* const runner = loader->get_runner();
  const auto dtypes = runner->getConstantNamesToDtypes();
  std::unordered_map<std::string, at::Tensor> wanted;
  for (const auto& [inner, outer] : runner->getConstantNamesToOriginalFQNs()) {
    const auto found = held_.find(outer);
    if (found == held_.end()) refuse("the program " + name + " asks for " + quoted(outer) + ", which is not in it");
    const auto dtype = dtypes.find(inner);
    if (dtype == dtypes.end() || dtype->second != static_cast<int32_t>(found->second.scalar_type())) {
      refuse("the program " + name + " asks for " + quoted(outer) + " of another dtype than " +
             c10::toString(found->second.scalar_type()));
    }
    wanted.emplace(outer, found->second);
  }
  loader->load_constants(wanted, false, true, true);
  return loader;
}

at::Tensor Program::prefill(const std::vector<int64_t>& ids) {
  const auto count = static_cast<int64_t>(ids.size());
  const at::Tensor host = at::from_blob(const_cast<int64_t*>(ids.data()), {1, count}, at::kLong);
  at::Tensor logits;
  for (int64_t at = 0; at < count; at += info_.chunk) {
    // Copied, so that it is aligned and does not depend on the lifetime of the ids.
    logits = run(host.narrow(1, at, std::min(info_.chunk, count - at)).clone().to(device_));
  }
  return logits.argmax(-1, true);
}

at::Tensor Program::decode(const at::Tensor& token) { return run(token).argmax(-1, true); }

at::Tensor Program::run(const at::Tensor& tokens) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(device_);
  const int64_t end = length_ + tokens.size(1);
  const int64_t seen = std::min(up_to(end, SLOTS_AT_ONCE), info_.capacity);
  if (!slots_.defined() || slots_.size(0) != seen) slots_ = at::arange(seen, options);
  auto& loader = tokens.size(1) == 1 ? decode_ : prefill_;
  const std::vector<at::Tensor> out = loader->run({tokens, at::arange(length_, end, options), slots_});
  const std::vector<int64_t> shape = {1, info_.vocabulary};
  if (out.size() != 1 || out[0].scalar_type() != at::kFloat || out[0].sizes() != at::IntArrayRef(shape)) {
    refuse("its programs should give logits, float32 (1, " + std::to_string(info_.vocabulary) + "), and do not");
  }
  length_ = end;
  return out[0];
}

void Program::refuse(const std::string& what) const {
  throw Failure(Exit::PACKAGE, path_ + ": " + what + EXPORT_AGAIN);
}

}  // namespace q6k
