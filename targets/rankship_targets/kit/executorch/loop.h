// The warm-up and the timed loop of `measure`, as in the agent's timing.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "events.h"
#include "fault.h"

// A window of the warm-up ends when both are reached; the warm-up is steady by its last windows' medians: how many,
// largest / smallest, first / last if they fall.
constexpr size_t kWindowSamples = 3;
constexpr int64_t kWindowNs = 20'000'000;
constexpr size_t kSteadyWindows = 3;
constexpr double kSteadySpread = 1.05;
constexpr double kSteadyTrend = 1.02;
constexpr int64_t kNsPerMs = 1'000'000;

struct Limits {
  size_t min_samples = 30;
  int64_t min_duration_ms = 1000;
  int64_t max_warmup_ms = 10'000;
};

// `make_ready` is called before each inference, outside of its time.
template <typename MakeReady, typename Run>
std::vector<int64_t> time_inferences(MakeReady make_ready, Run run, size_t min_samples, int64_t min_duration_ns) {
  std::vector<int64_t> taken;
  const int64_t end = read_clock() + min_duration_ns;
  while (true) {
    make_ready();
    const int64_t before = read_clock();
    auto outputs = run();
    const int64_t after = read_clock();
    check("failed", "forward", outputs.error());
    taken.push_back(after - before);
    if (after >= end && taken.size() >= min_samples) return taken;
  }
}

inline double find_median(std::vector<int64_t> numbers) {
  std::sort(numbers.begin(), numbers.end());
  const size_t middle = numbers.size() / 2;
  const double upper = static_cast<double>(numbers[middle]);
  return numbers.size() % 2 ? upper : (upper + static_cast<double>(numbers[middle - 1])) / 2;
}

// Whether the last windows' medians are close together and not still falling.
inline bool is_steady(const std::vector<double>& medians) {
  if (medians.size() < kSteadyWindows) return false;
  const auto first = medians.end() - kSteadyWindows, last = medians.end() - 1;
  const bool falling = std::is_sorted(medians.rbegin(), medians.rbegin() + kSteadyWindows) && *first > *last * kSteadyTrend;
  const auto [smallest, largest] = std::minmax_element(first, medians.end());
  return *largest <= *smallest * kSteadySpread && !falling;
}

// Warms up, times inferences, and says both.
template <typename MakeReady, typename Run>
void measure_loop(const Limits& limits, MakeReady make_ready, Run run) {
  std::vector<int64_t> warmup;
  std::vector<double> medians;
  const int64_t end = read_clock() + limits.max_warmup_ms * kNsPerMs;
  do {
    const auto window = time_inferences(make_ready, run, kWindowSamples, kWindowNs);
    warmup.insert(warmup.end(), window.begin(), window.end());
    medians.push_back(find_median(window));
  } while (!is_steady(medians) && read_clock() < end);
  const std::string peak = read_status_bytes("VmHWM");  // more work in between would cool the caches
  const int64_t loop_start = read_clock();  // steady_clock is the monotonic clock, by which meters are read
  const auto taken = time_inferences(make_ready, run, limits.min_samples, limits.min_duration_ms * kNsPerMs);
  const int64_t loop_end = read_clock();
  say("warmed", ", \"ns\": " + list(warmup) + ", \"steady\": " + (is_steady(medians) ? "true" : "false") +
                    ", \"peak_rss_bytes\": " + peak);
  say("samples", ", \"ns\": " + list(taken) + ", \"start_ns\": " + std::to_string(loop_start) +
                     ", \"end_ns\": " + std::to_string(loop_end));
  say("done");
}
