// rankship-executorch: loads, runs and times one ExecuTorch program, without Python and without torch.
//
//   rankship-executorch version
//   rankship-executorch load    [--threads N] MODEL
//   rankship-executorch infer   [--threads N] [--etdump FILE] --output PREFIX MODEL INPUT.npy...
//   rankship-executorch measure [--threads N] [--min-samples N] [--min-duration-ms N] [--max-warmup-ms N] MODEL INPUT.npy...
//   rankship-executorch generate [--threads N] --context N --new-tokens N [--end TOKEN]... MODEL PROMPT.npy
//
// With --prompt-tokens N and --context N the model generates, and the one input holds token ids (samples, n): `infer`
// writes the logits after the prompt and after each further token, `measure` times --phase prefill or decode.
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
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "decoder.h"
#include "events.h"
#include "fault.h"
#include "loop.h"
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
using executorch::runtime::EValue;

constexpr int kFailed = 1, kWrongUse = 2, kUnheard = 3;

struct Options {
  unsigned threads = 1;
  Limits loop;
  size_t prompt_tokens = 0, context = 0, new_tokens = 0;  // a context of 0: the model does not generate
  std::string output, etdump, phase, model;
  std::vector<std::string> inputs;
  std::vector<int64_t> ends;
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

// The one input's sequences of tokens; at least `least` of them in each, and no more than the context has room for.
std::vector<std::vector<int64_t>> read_tokens(const Decoder& decoder, const Options& options, size_t least) {
  try {
    if (options.inputs.size() != 1) throw std::runtime_error("a decoder takes one input, its tokens");
    const npy::Array array = npy::read(options.inputs[0]);
    if (array.descr != "<i8" || array.shape.size() != 2 || array.shape[0] == 0)
      throw std::runtime_error("a decoder takes sequences of int64 tokens, given: " + array.descr);
    const size_t length = static_cast<size_t>(array.shape[1]);
    if (length < least)
      throw std::runtime_error(std::to_string(length) + " tokens, expected " + std::to_string(least) + " or more");
    if (length > decoder.context()) throw decoder.refuse(length);
    const int64_t* data = reinterpret_cast<const int64_t*>(array.data.data());
    std::vector<std::vector<int64_t>> samples;
    for (int32_t row = 0; row < array.shape[0]; ++row) samples.emplace_back(data + row * length, data + (row + 1) * length);
    return samples;
  } catch (const std::exception& failure) {
    throw Fault{"bad_input", failure.what()};
  }
}

// The logits of every sequence after its prompt and after each further token, (samples, n - P + 1, vocabulary).
npy::Array follow(Module& module, const Options& options) {
  Decoder decoder(module, options.context);
  npy::Array stacked;
  stacked.descr = "<f4";
  for (auto& tokens : read_tokens(decoder, options, options.prompt_tokens)) {
    decoder.rewind(0);
    int32_t rows = 0, vocabulary = 0;
    for (size_t place = 0; place < tokens.size(); ++rows) {
      const size_t count = place == 0 ? options.prompt_tokens : 1;
      const std::vector<float> logits = read_logits(decoder.step(tokens.data() + place, count));
      const char* data = reinterpret_cast<const char*>(logits.data());
      stacked.data.insert(stacked.data.end(), data, data + logits.size() * sizeof(float));
      vocabulary = static_cast<int32_t>(logits.size());
      place += count;
    }
    stacked.shape = {stacked.shape.empty() ? 1 : stacked.shape[0] + 1, rows, vocabulary};
  }
  return stacked;
}

void infer(const Options& options) {
  auto tracer = options.etdump.empty() ? nullptr : std::make_unique<executorch::etdump::ETDumpGen>();
  executorch::etdump::ETDumpGen* trace = tracer.get();  // the module owns it
  say("opened", ", \"rss_bytes\": " + read_status_bytes("VmRSS"));
  auto module = load(options, std::move(tracer));
  std::vector<npy::Array> stacked;
  if (options.context > 0) {
    stacked.push_back(follow(*module, options));
  } else {
    std::vector<npy::Array> arrays = read_inputs(*module, options.inputs);
    for (size_t row = 0; row < static_cast<size_t>(arrays[0].shape[0]); ++row)
      stack(stacked, run(*module, prepare(arrays, row)));
  }
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

// Says that the program is open, loads it and says how long that took.
std::unique_ptr<Module> load_timed(const Options& options) {
  say("opened", ", \"rss_bytes\": " + read_status_bytes("VmRSS"));
  const int64_t started = read_clock();
  auto module = load(options);
  say("loaded", ", \"load_ns\": " + std::to_string(read_clock() - started));
  return module;
}

void measure_phase(Module& module, const Options& options) {
  Decoder decoder(module, options.context);
  const size_t prompt = options.prompt_tokens, more = options.phase == "decode";
  std::vector<int64_t> tokens = read_tokens(decoder, options, prompt + more)[0];
  size_t held = 0;
  if (options.phase == "prefill") {
    measure_loop(options.loop, [&] { decoder.rewind(0); }, [&] { return decoder.step(tokens.data(), prompt); });
    return;
  }
  read_logits(decoder.step(tokens.data(), prompt));
  held = prompt;
  const auto make_ready = [&] {
    if (held < tokens.size()) return;
    decoder.rewind(prompt);
    held = prompt;
  };
  measure_loop(options.loop, make_ready, [&] { return decoder.step(tokens.data() + held++, 1); });
}

void measure(const Options& options) {
  auto module = load_timed(options);
  if (options.context > 0) return measure_phase(*module, options);
  std::vector<npy::Array> arrays = read_inputs(*module, options.inputs);
  const Feed feed = prepare(arrays, 0);
  measure_loop(options.loop, [] {}, [&] { return module->forward(feed.values); });
}

// The likeliest token after the prompt, then after that one, and so on, until an end or a full context.
void generate(const Options& options) {
  auto module = load_timed(options);
  Decoder decoder(*module, options.context);
  std::vector<int64_t> given = read_tokens(decoder, options, 1)[0], tokens, taken;
  const size_t most = std::min(options.new_tokens, decoder.context() - given.size() + 1);  // the last is not given back
  while (tokens.size() < most) {
    const int64_t before = read_clock();
    const std::vector<float> logits = read_logits(decoder.step(given.data(), given.size()));
    tokens.push_back(std::max_element(logits.begin(), logits.end()) - logits.begin());
    taken.push_back(read_clock() - before);
    if (std::find(options.ends.begin(), options.ends.end(), tokens.back()) != options.ends.end()) break;
    given = {tokens.back()};
  }
  const std::vector<int64_t> others(taken.begin() + 1, taken.end());
  say("generated", ", \"tokens\": " + list(tokens) + ", \"first_ns\": " + std::to_string(taken[0]) + ", \"ns\": " +
                       list(others) + ", \"peak_rss_bytes\": " + read_status_bytes("VmHWM"));
  say("done");
}

void load_only(const Options& options) {
  load_timed(options);
  say("done");
}

void print_version(const Options&) {
  say("version", ", \"runtime\": \"executorch\", \"version\": " + quote(RANKSHIP_EXECUTORCH_VERSION));
}

[[noreturn]] void refuse(const std::string& why) {
  std::fprintf(stderr, "rankship-executorch: %s; usage: version | load | infer | measure | generate [OPTIONS] MODEL INPUT...\n",
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
      {"prompt-tokens", required_argument, nullptr, 'p'},   {"context", required_argument, nullptr, 'c'},
      {"new-tokens", required_argument, nullptr, 'n'},      {"end", required_argument, nullptr, 'x'},
      {"phase", required_argument, nullptr, 'a'},
      {nullptr, 0, nullptr, 0}};
  Options options;
  for (int found; (found = getopt_long(argc, argv, "+", known, nullptr)) != -1;) {
    if (found == 't') options.threads = static_cast<unsigned>(parse_number(optarg, 1));
    else if (found == 's') options.loop.min_samples = static_cast<size_t>(parse_number(optarg, 1));
    else if (found == 'd') options.loop.min_duration_ms = parse_number(optarg, 0);
    else if (found == 'w') options.loop.max_warmup_ms = parse_number(optarg, 0);
    else if (found == 'o') options.output = optarg;
    else if (found == 'e') options.etdump = optarg;
    else if (found == 'p') options.prompt_tokens = static_cast<size_t>(parse_number(optarg, 1));
    else if (found == 'c') options.context = static_cast<size_t>(parse_number(optarg, 1));
    else if (found == 'n') options.new_tokens = static_cast<size_t>(parse_number(optarg, 1));
    else if (found == 'x') options.ends.push_back(parse_number(optarg, 0));
    else if (found == 'a') options.phase = optarg;
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
      {"version", print_version}, {"load", load_only}, {"infer", infer}, {"measure", measure},
      {"generate", generate}};
  const auto command = argc > 1 ? commands.find(argv[1]) : commands.end();
  if (command == commands.end()) refuse("no command");
  const Options options = parse(argc - 1, argv + 1);
  if (options.model.empty() != (command->first == "version")) refuse("every command but version needs a MODEL");
  if (options.output.empty() == (command->first == "infer")) refuse("infer needs --output, no other command takes it");
  if (!options.etdump.empty() && command->first != "infer") refuse("only infer takes --etdump");
  const bool generates = command->first == "generate";
  if (generates != (options.new_tokens > 0)) refuse("generate needs --new-tokens, no other command takes it");
  if ((options.prompt_tokens > 0) != (options.context > 0)) refuse("--prompt-tokens and --context go together");
  if (generates && options.context == 0) refuse("generate needs --context");
  const bool phased = command->first == "measure" && options.context > 0;
  if (phased != (options.phase == "prefill" || options.phase == "decode"))
    refuse("measure of a model that generates needs --phase prefill or decode, no other command takes it");
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
