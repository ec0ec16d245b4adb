// The events of Rankship's agent, one JSON object a line, and what they tell.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

inline int64_t read_clock() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

inline std::string quote(const std::string& text) {
  std::string quoted = "\"";
  for (const unsigned char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += static_cast<char>(c);
    } else if (c < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      quoted += escape;
    } else {
      quoted += static_cast<char>(c);
    }
  }
  return quoted + '"';
}

inline void say(const std::string& event, const std::string& rest = "") {
  std::printf("{\"event\": \"%s\"%s}\n", event.c_str(), rest.c_str());
  std::fflush(stdout);
}

inline std::string list(const std::vector<int64_t>& numbers) {
  std::string text;
  for (const int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

// A line "name:  123 kB" of the process's own status, in bytes; null if there is none.
inline std::string read_status_bytes(const std::string& name) {
  std::ifstream stream("/proc/self/status");
  for (std::string line; std::getline(stream, line);)
    if (line.compare(0, name.size() + 1, name + ":") == 0)
      return std::to_string(std::strtoll(line.c_str() + name.size() + 1, nullptr, 10) * 1024);
  return "null";
}
