#include "package.h"

#include <ATen/ops/from_blob.h>
#include <caffe2/serialize/inline_container.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "failure.h"

namespace q6k {
namespace {

using caffe2::serialize::PyTorchStreamReader;

constexpr size_t LONGEST_TEXT = size_t{1} << 24;
constexpr const char* WEIGHTS = "data/weights/";
// A ZIP file's local header: its size in bytes, and the offset of the compression method.
constexpr size_t HEADER_BYTES = 30, METHOD_AT = 8;

// A whole file mapped into memory, read only: pages are read from the file on first access.
class Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) fail(path);
    struct stat about = {};
    if (fstat(file, &about) != 0) fail(path, file);
    if (!S_ISREG(about.st_mode) || about.st_size < 1) {
      close(file);
      throw Failure(Exit::PACKAGE, path + ": expected a file with content, found " +
                                       (S_ISREG(about.st_mode) ? "an empty one" : "something else") + EXPORT_AGAIN);
    }
    size_ = static_cast<size_t>(about.st_size);
    void* const memory = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    if (memory == MAP_FAILED) fail(path, file);
    close(file);
    memory_ = static_cast<const char*>(memory);
  }
  ~Mapping() { munmap(const_cast<char*>(memory_), size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const char* data() const { return memory_; }
  size_t size() const { return size_; }

 private:
  [[noreturn]] static void fail(const std::string& path, int file = -1) {
    const std::string why = std::strerror(errno);
    if (file >= 0) close(file);
    throw Failure(Exit::IO, path + ": cannot be read: " + why + ". Give the file of an exported model.");
  }

  const char* memory_ = nullptr;
  size_t size_ = 0;
};

// Lets torch's archive reader read the mapping: the same bytes as the tensors, even if the file is replaced.
class Bytes final : public caffe2::serialize::ReadAdapterInterface {
 public:
  explicit Bytes(std::shared_ptr<const Mapping> file) : file_(std::move(file)) {}
  size_t size() const override { return file_->size(); }
  size_t read(uint64_t at, void* to, size_t count, const char*) const override {
    if (at >= file_->size()) return 0;
    count = std::min(count, file_->size() - static_cast<size_t>(at));
    std::memcpy(to, file_->data() + at, count);
    return count;
  }

 private:
  std::shared_ptr<const Mapping> file_;
};

class Reader {
 public:
  explicit Reader(const std::string& path)
      : path_(path), file_(std::make_shared<const Mapping>(path)), archive_(std::make_shared<Bytes>(file_)) {}

  std::string text() {
    if (!archive_.hasRecord(PROGRAM_TEXT)) {
      refuse("an archive, but not of an exported model: it has no " + std::string(PROGRAM_TEXT));
    }
    const size_t size = archive_.getRecordSize(PROGRAM_TEXT);
    if (size > LONGEST_TEXT) {
      refuse(std::string(PROGRAM_TEXT) + " has " + std::to_string(size) + " bytes, at most " +
             std::to_string(LONGEST_TEXT) + " are read");
    }
    const auto [data, found] = archive_.getRecord(PROGRAM_TEXT);
    return {static_cast<const char*>(data.get()), found};
  }

  at::Tensor tensor(const Array& array) {
    const std::string record = WEIGHTS + array.entry;
    if (!archive_.hasRecord(record)) refuse("no entry " + record + ", which " + PROGRAM_TEXT + " names");
    const auto nbytes = static_cast<uint64_t>(array.nbytes);
    const uint64_t held = archive_.getRecordSize(record), begin = archive_.getRecordOffset(record);
    if (held != nbytes) {
      refuse(record + " has " + std::to_string(held) + " bytes, " + quoted(array.name) + " of that entry takes " +
             std::to_string(nbytes));
    }
    if (begin > file_->size() || nbytes > file_->size() - begin) {
      refuse(record + " should be " + std::to_string(nbytes) + " bytes at " + std::to_string(begin) +
             ", in a file of " + std::to_string(file_->size()));
    }
    check_stored(record, begin);
    if (begin % c10::elementSize(array.dtype)) {
      refuse(record + " is at " + std::to_string(begin) + ", not at a multiple of its numbers' size");
    }
    // torch has no read-only tensors; writing to this one would fault, as the mapping is read only.
    void* const memory = const_cast<char*>(file_->data() + begin);
    return at::from_blob(
        memory, array.shape, [file = file_](void*) {}, at::TensorOptions().dtype(array.dtype));
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Failure(Exit::PACKAGE, path_ + ": " + what + EXPORT_AGAIN);
  }

  // Compressed bytes cannot be used as weights.
  void check_stored(const std::string& record, uint64_t begin) {
    const uint64_t header = archive_.getRecordHeaderOffset(record);
    if (header > begin || begin - header < HEADER_BYTES) {
      refuse(record + " begins at " + std::to_string(begin) + ", with a header at " + std::to_string(header));
    }
    const char* const method = file_->data() + header + METHOD_AT;
    if (method[0] != 0 || method[1] != 0) refuse(record + " is compressed, expected an uncompressed entry");
  }

  const std::string& path_;
  std::shared_ptr<const Mapping> file_;
  PyTorchStreamReader archive_;
};

Package read(const std::string& path) {
  Reader reader(path);
  Package package;
  package.path = path;
  package.info = parse_program_text(path, reader.text());
  std::map<std::string, const Array*> first;
  for (const Array& array : package.info.constants) {
    const auto [known, is_new] = first.emplace(array.entry, &array);
    if (is_new) {
      package.entries.emplace(array.entry, reader.tensor(array));
    } else if (known->second->dtype != array.dtype || known->second->shape != array.shape) {
      throw Failure(Exit::PACKAGE, path + ": " + PROGRAM_TEXT + " gives " + quoted(known->second->name) + " and " +
                                       quoted(array.name) + " of entry " + array.entry + " different dtypes or shapes" +
                                       EXPORT_AGAIN);
    }
  }
  return package;
}

}  // namespace

Package read_package(const std::string& path) {
  try {
    return read(path);
  } catch (const c10::Error& error) {
    // The first sentence of torch's message is enough.
    const std::string words = one_line(error);
    throw Failure(Exit::PACKAGE, path + ": not a PT2 archive, or a damaged one: " + words.substr(0, words.find(". ")) +
                                     EXPORT_AGAIN);
  }
}

}  // namespace q6k
