// rankship-executorch: loads, runs and times one ExecuTorch program, without Python and without torch.
//
//   rankship-executorch version
//   rankship-executorch load    [--threads N] MODEL
//   rankship-executorch infer   [--threads N] [--etdump FILE] --output PREFIX MODEL INPUT.npy...
//   rankship-executorch measure [--threads N] [--min-samples N] [--min-duration-ms N] [--max-warmup-ms N] MODEL INPUT.npy...
//
// Prints the events of Rankship's agent, one JSON object a line; the last is "done", or "error" with exit status 1.
// `infer` runs every sample and writes PREFIX.0.npy, PREFIX.1.npy, …; `measure` times single inferences of the first.
// Tracing costs time, so only `infer` writes an ETDump. The program exits when nobody reads its stdout any more.

#include <executorch/devtools/etdump/etdump_flatcc.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <getopt.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "npy.h"

#ifndef RANKSHIP_EXECUTORCH_VERSION
#error "define RANKSHIP_EXECUTORCH_VERSION, a string: the version of the libraries that this is built against"
#endif

// The wheel has the thread pool's library without its header; these two functions are needed.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t thread_count);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

// As in the agent's timing.py: a window of the warm-up ends when both are reached; the warm-up is steady by its last
// windows' medians: how many, largest / smallest, first / last if they fall.
constexpr size_t kWindowSamples = 3;
constexpr int64_t kWindowNs = 20'000'000;
constexpr size_t kSteadyWindows = 3;
constexpr double kSteadySpread = 1.05;
constexpr double kSteadyTrend = 1.02;
constexpr int64_t kNsPerMs = 1'000'000;
constexpr int kFailed = 1, kWrongUse = 2, kUnheard = 3;

// A kind (bad_artifact, bad_input, failed) and a message, as in the agent's own faults.
struct Fault {
  const char* kind;
  std::string message;
};

struct Options {
  unsigned threads = 1;
  size_t min_samples = 30;
  int64_t min_duration_ms = 1000;
  int64_t max_warmup_ms = 10'000;
  std::string output, etdump, model;
  std::vector<std::string> inputs;
};

struct Type {
  const char* descr;
  ScalarType type;
};
constexpr Type kTypes[] = {
    {"<f4", ScalarType::Float}, {"<f8", ScalarType::Double}, {"<f2", ScalarType::Half}, {"<i8", ScalarType::Long},
    {"<i4", ScalarType::Int},   {"<i2", ScalarType::Short},  {"|i1", ScalarType::Char}, {"|u1", ScalarType::Byte},
    {"|b1", ScalarType::Bool},
};

int64_t read_clock() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

std::string quote(const std::string& text) {
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

void say(const std::string& event, const std::string& rest = "") {
  std::printf("{\"event\": \"%s\"%s}\n", event.c_str(), rest.c_str());
  std::fflush(stdout);
}

std::string list(const std::vector<int64_t>& numbers) {
  std::string text;
  for (const int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

// A line "name:  123 kB" of the process's own status, in bytes; null if there is none.
std::string read_status_bytes(const std::string& name) {
  std::ifstream stream("/proc/self/status");
  for (std::string line; std::getline(stream, line);)
    if (line.compare(0, name.size() + 1, name + ":") == 0)
      return std::to_string(std::strtoll(line.c_str() + name.size() + 1, nullptr, 10) * 1024);
  return "null";
}

void check(const char* kind, const std::string& what, Error error) {
  if (error != Error::Ok) throw Fault{kind, what + ": " + executorch::runtime::to_string(error)};
}

// Loads the program and sets up its delegates, so that the first inference does not.
std::unique_ptr<Module> load(const Options& options, std::unique_ptr<executorch::etdump::ETDumpGen> tracer = nullptr) {
  if (!executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(options.threads))
    throw Fault{"failed", "cannot run on " + std::to_string(options.threads) + " threads"};
  auto module = std::make_unique<Module>(options.model, Module::LoadMode::Mmap, std::move(tracer));
  check("bad_artifact", options.model, module->load(executorch::runtime::Program::Verification::InternalConsistency));
  check("bad_artifact", options.model, module->load_forward());
  return module;
}

std::vector<npy::Array> read_inputs(Module& module, const std::vector<std::string>& paths) {
  std::vector<npy::Array> arrays;
  try {
    for (const std::string& path : paths) arrays.push_back(npy::read(path));
  } catch (const std::exception& failure) {
    throw Fault{"bad_input", failure.what()};
  }
  const size_t expected = module.method_meta("forward")->num_inputs();
  if (arrays.size() != expected)
    throw Fault{"bad_input", "the model takes " + std::to_string(expected) + " inputs, " +
                                 std::to_string(arrays.size()) + " were given"};
  if (arrays.empty()) throw Fault{"bad_input", "no inputs were given, so there are no samples to run"};
  for (const npy::Array& array : arrays)
    if (array.shape[0] == 0 || array.shape[0] != arrays[0].shape[0])
      throw Fault{"bad_input", "the inputs must be .npy files with the same number of samples"};
  return arrays;
}

// One sample as the program takes it: the values point to the tensors, and these into the arrays.
struct Feed {
  std::vector<TensorPtr> tensors;
  std::vector<EValue> values;
};

// Sample `row` of every input, with its batch dimension.
Feed prepare(std::vector<npy::Array>& arrays, size_t row) {
  Feed feed;
  for (npy::Array& array : arrays) {
    const auto known = std::find_if(std::begin(kTypes), std::end(kTypes),
                                    [&](const Type& type) { return array.descr == type.descr; });
    if (known == std::end(kTypes)) throw Fault{"bad_input", "an input has the unsupported type " + array.descr};
    std::vector<int32_t> shape = array.shape;
    shape[0] = 1;
    char* data = array.data.data() + row * array.sample_bytes();
    feed.tensors.push_back(executorch::extension::from_blob(data, shape, known->type));
    feed.values.emplace_back(*feed.tensors.back());
  }
  return feed;
}

std::vector<EValue> run(Module& module, const Feed& feed) {
  auto outputs = module.forward(feed.values);
  check("failed", "forward", outputs.error());
  return std::move(outputs.get());
}

// Appends one sample's outputs to those of the samples before.
void stack(std::vector<npy::Array>& stacked, const std::vector<EValue>& outputs) {
  stacked.resize(outputs.size());
  for (size_t position = 0; position < outputs.size(); ++position) {
    if (!outputs[position].isTensor()) throw Fault{"failed", "output " + std::to_string(position) + " is not a tensor"};
    const auto& tensor = outputs[position].toTensor();
    const auto known = std::find_if(std::begin(kTypes), std::end(kTypes),
                                    [&](const Type& type) { return tensor.scalar_type() == type.type; });
    if (known == std::end(kTypes) || tensor.dim() == 0)
      throw Fault{"failed", "output " + std::to_string(position) + " cannot be stacked in an .npy file"};
    npy::Array& array = stacked[position];
    if (array.shape.empty()) {
      array.descr = known->descr;
      array.shape.assign(tensor.sizes().begin(), tensor.sizes().end());
      array.shape[0] = 0;
    }
    array.shape[0] += static_cast<int32_t>(tensor.size(0));
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    array.data.insert(array.data.end(), data, data + tensor.nbytes());
  }
}

void infer(const Options& options) {
  auto tracer = options.etdump.empty() ? nullptr : std::make_unique<executorch::etdump::ETDumpGen>();
  executorch::etdump::ETDumpGen* trace = tracer.get();  // the module owns it
  say("opened", ", \"rss_bytes\": " + read_status_bytes("VmRSS"));
  auto module = load(options, std::move(tracer));
  std::vector<npy::Array> arrays = read_inputs(*module, options.inputs), stacked;
  for (size_t row = 0; row < static_cast<size_t>(arrays[0].shape[0]); ++row)
    stack(stacked, run(*module, prepare(arrays, row)));
  for (size_t position = 0; position < stacked.size(); ++position)
    npy::write(options.output + "." + std::to_string(position) + ".npy", stacked[position]);
  if (trace != nullptr) {
    const auto dump = trace->get_etdump_data();
    std::ofstream stream(options.etdump, std::ios::binary);
    stream.write(static_cast<const char*>(dump.buf), static_cast<std::streamsize>(dump.size));
    stream.flush();
    if (dump.buf == nullptr || !stream) throw Fault{"failed", options.etdump + " cannot be written"};
    std::free(dump.buf);
  }
  say("done", ", \"outputs\": " + std::to_string(stacked.size()));
}

std::vector<int64_t> time_inferences(Module& module, const Feed& feed, size_t min_samples,
                                     int64_t min_duration_ns) {
  std::vector<int64_t> taken;
  const int64_t end = read_clock() + min_duration_ns;
  while (true) {
    const int64_t before = read_clock();
    auto outputs = module.forward(feed.values);
    const int64_t after = read_clock();
    check("failed", "forward", outputs.error());
    taken.push_back(after - before);
    if (after >= end && taken.size() >= min_samples) return taken;
  }
}

double find_median(std::vector<int64_t> numbers) {
  std::sort(numbers.begin(), numbers.end());
  const size_t middle = numbers.size() / 2;
  const double upper = static_cast<double>(numbers[middle]);
  return numbers.size() % 2 ? upper : (upper + static_cast<double>(numbers[middle - 1])) / 2;
}

// Whether the last windows' medians are close together and not still falling.
bool is_steady(const std::vector<double>& medians) {
  if (medians.size() < kSteadyWindows) return false;
  const auto first = medians.end() - kSteadyWindows, last = medians.end() - 1;
  const bool falling = std::is_sorted(medians.rbegin(), medians.rbegin() + kSteadyWindows) && *first > *last * kSteadyTrend;
  const auto [smallest, largest] = std::minmax_element(first, medians.end());
  return *largest <= *smallest * kSteadySpread && !falling;
}

void measure(const Options& options) {
  say("opened", ", \"rss_bytes\": " + read_status_bytes("VmRSS"));
  const int64_t started = read_clock();
  auto module = load(options);
  say("loaded", ", \"load_ns\": " + std::to_string(read_clock() - started));
  std::vector<npy::Array> arrays = read_inputs(*module, options.inputs);
  const Feed feed = prepare(arrays, 0);
  std::vector<int64_t> warmup;
  std::vector<double> medians;
  const int64_t end = read_clock() + options.max_warmup_ms * kNsPerMs;
  do {
    const auto window = time_inferences(*module, feed, kWindowSamples, kWindowNs);
    warmup.insert(warmup.end(), window.begin(), window.end());
    medians.push_back(find_median(window));
  } while (!is_steady(medians) && read_clock() < end);
  const std::string peak = read_status_bytes("VmHWM");  // more work in between would cool the caches
  const int64_t loop_start = read_clock();  // steady_clock is the monotonic clock, by which meters are read
  const auto taken = time_inferences(*module, feed, options.min_samples, options.min_duration_ms * kNsPerMs);
  const int64_t loop_end = read_clock();
  say("warmed", ", \"ns\": " + list(warmup) + ", \"steady\": " + (is_steady(medians) ? "true" : "false") +
                    ", \"peak_rss_bytes\": " + peak);
  say("samples", ", \"ns\": " + list(taken) + ", \"start_ns\": " + std::to_string(loop_start) +
                     ", \"end_ns\": " + std::to_string(loop_end));
  say("done");
}

void load_only(const Options& options) {
  say("opened", ", \"rss_bytes\": " + read_status_bytes("VmRSS"));
  const int64_t started = read_clock();
  load(options);
  say("loaded", ", \"load_ns\": " + std::to_string(read_clock() - started));
  say("done");
}

void print_version(const Options&) {
  say("version", ", \"runtime\": \"executorch\", \"version\": " + quote(RANKSHIP_EXECUTORCH_VERSION));
}

[[noreturn]] void refuse(const std::string& why) {
  std::fprintf(stderr, "rankship-executorch: %s; usage: version | load | infer | measure [OPTIONS] MODEL INPUT.npy...\n",
               why.c_str());
  std::exit(kWrongUse);
}

long long parse_number(const char* text, long long least) {
  char* end = nullptr;
  const long long number = std::strtoll(text, &end, 10);
  if (*text == '\0' || *end != '\0' || number < least || number > INT32_MAX)
    refuse("expected a number of at least " + std::to_string(least) + ", not '" + text + "'");
  return number;
}

Options parse(int argc, char** argv) {
  const option known[] = {
      {"threads", required_argument, nullptr, 't'},         {"min-samples", required_argument, nullptr, 's'},
      {"min-duration-ms", required_argument, nullptr, 'd'}, {"max-warmup-ms", required_argument, nullptr, 'w'},
      {"output", required_argument, nullptr, 'o'},          {"etdump", required_argument, nullptr, 'e'},
      {nullptr, 0, nullptr, 0}};
  Options options;
  for (int found; (found = getopt_long(argc, argv, "+", known, nullptr)) != -1;) {
    if (found == 't') options.threads = static_cast<unsigned>(parse_number(optarg, 1));
    else if (found == 's') options.min_samples = static_cast<size_t>(parse_number(optarg, 1));
    else if (found == 'd') options.min_duration_ms = parse_number(optarg, 0);
    else if (found == 'w') options.max_warmup_ms = parse_number(optarg, 0);
    else if (found == 'o') options.output = optarg;
    else if (found == 'e') options.etdump = optarg;
    else refuse("an option was not understood");
  }
  if (optind < argc) options.model = argv[optind++];
  options.inputs.assign(argv + optind, argv + argc);
  return options;
}

void end_when_unheard() {
  pollfd waiting{STDOUT_FILENO, 0, 0};
  while (poll(&waiting, 1, -1) < 0) continue;
  _exit(kUnheard);
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)(const Options&)> commands = {
      {"version", print_version}, {"load", load_only}, {"infer", infer}, {"measure", measure}};
  const auto command = argc > 1 ? commands.find(argv[1]) : commands.end();
  if (command == commands.end()) refuse("no command");
  const Options options = parse(argc - 1, argv + 1);
  if (options.model.empty() != (command->first == "version")) refuse("every command but version needs a MODEL");
  if (options.output.empty() == (command->first == "infer")) refuse("infer needs --output, no other command takes it");
  if (!options.etdump.empty() && command->first != "infer") refuse("only infer takes --etdump");
  std::thread(end_when_unheard).detach();
  int status = 0;
  try {
    command->second(options);
  } catch (const Fault& fault) {
    say("error", std::string(", \"kind\": \"") + fault.kind + "\", \"message\": " + quote(fault.message));
    status = kFailed;
  } catch (const std::exception& failure) {
    say("error", ", \"kind\": \"failed\", \"message\": " + quote(failure.what()));
    status = kFailed;
  }
  _exit(status);  // the libraries' exit handlers may crash
}
