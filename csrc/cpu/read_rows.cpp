// Rows of a file, by number, into memory of the caller's: what feeds a GPU whose data do not fit it. A read for each row
// costs Python several times what it costs here, and mapped pages would count as the process's memory.
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <system_error>
#include <thread>

#include "arguments.h"

namespace seda {
namespace {

constexpr int64_t kTooShort = -1;

// 0, kTooShort where the file ends before, or what errno says.
int64_t read_whole(int file, char* to, int64_t bytes, int64_t from) {
  while (bytes > 0) {
    const ssize_t found = ::pread(file, to, static_cast<size_t>(bytes), static_cast<off_t>(from));
    if (found == 0) return kTooShort;
    if (found < 0 && errno == EINTR) continue;
    if (found < 0) return errno;
    to += found, from += found, bytes -= found;
  }
  return 0;
}

int64_t read_rows(int64_t file, int64_t start, const Tensor& rows, const Tensor& target, int64_t threads) {
  if (file < 0 || file > std::numeric_limits<int>::max()) refuse("file must be an open file's number, not ", file);
  if (start < 0) refuse("start must not be negative");
  if (threads < 1 || threads > 64) refuse("threads must be in 1 .. 64, not ", threads);
  check(target, "target", {-1, -1});
  check_contiguous(target, "target");
  check_dtype(target, "target", ScalarType::Byte);
  const int64_t count = target.size(0), bytes = target.size(1);
  const int64_t* const from = integers(rows, "rows", count);
  const int64_t last = bytes > 0 ? (std::numeric_limits<int64_t>::max() - start) / bytes - 1 : 0;
  for (int64_t i = 0; i < count && bytes > 0; ++i)
    if (from[i] < 0 || from[i] > last) refuse("rows[", i, "] is ", from[i], ", which no file has");
  char* const to = static_cast<char*>(target.mutable_data_ptr());
  const int64_t shares = std::max<int64_t>(1, std::min(threads, count));
  std::vector<int64_t> ends(static_cast<size_t>(shares), 0);
  const auto share = [&](int64_t part) {
    int64_t& end = ends[static_cast<size_t>(part)];
    for (int64_t i = part * count / shares; i < (part + 1) * count / shares && end == 0; ++i)
      end = read_whole(static_cast<int>(file), to + i * bytes, bytes, start + from[i] * bytes);
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(shares));
  int64_t begun = 1;
  try {
    for (; begun < shares; ++begun) others.emplace_back(share, begun);
  } catch (const std::exception&) {
    // The system has no more threads, or no memory for one: this one does what is left.
  }
  share(0);
  for (; begun < shares; ++begun) share(begun);
  for (std::thread& other : others) other.join();
  const auto bad = std::find_if(ends.begin(), ends.end(), [](int64_t end) { return end != 0; });
  return bad == ends.end() ? 0 : *bad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cpp, m) {
  m.def("read_rows(int file, int start, Tensor rows, Tensor(a!) target, int threads) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cpp, CompositeExplicitAutograd, m) { m.impl("read_rows", TORCH_BOX(&read_rows)); }

}  // namespace seda
