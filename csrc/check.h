#pragma once

#include <sstream>
#include <stdexcept>

namespace d2it {

// Throws what Python sees as a RuntimeError with these words and nothing around them.
template <typename... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error(message.str());
}

} // namespace d2it
