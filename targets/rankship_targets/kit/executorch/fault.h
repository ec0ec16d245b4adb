// What ends a request: a kind and a message, as in the agent's own faults.
#pragma once

#include <executorch/runtime/core/error.h>

#include <string>

// Kinds: bad_artifact, bad_input, failed.
struct Fault {
  const char* kind;
  std::string message;
};

inline void check(const char* kind, const std::string& what, executorch::runtime::Error error) {
  using executorch::runtime::Error;
  if (error != Error::Ok) throw Fault{kind, what + ": " + executorch::runtime::to_string(error)};
}
