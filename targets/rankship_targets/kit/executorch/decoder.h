// A program that generates: one sequence, whose cache of keys and values lies inside the program's method.
#pragma once

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "fault.h"

class Decoder {
 public:
  using Outputs = executorch::runtime::Result<std::vector<executorch::runtime::EValue>>;

  // The context is the shorter of the request's and of what the program says itself.
  Decoder(executorch::extension::Module& module, size_t context) : module_(module), context_(context) {
    const auto told = module.execute("get_max_seq_len");
    if (told.ok() && !told->empty() && told->at(0).isInt())
      context_ = std::min(context_, static_cast<size_t>(told->at(0).toInt()));
  }

  size_t context() const { return context_; }

  // The next token takes this place; those beyond it are masked until they are written over.
  void rewind(size_t position) { position_ = position; }

  // Takes the tokens at the next places. The outputs are the method's own memory, valid until the next step.
  Outputs step(int64_t* tokens, size_t count) {
    if (position_ + count > context_) throw refuse(position_ + count);
    places_.resize(count);
    for (size_t place = 0; place < count; ++place) places_[place] = static_cast<int64_t>(position_ + place);
    position_ += count;
    using executorch::aten::ScalarType;
    const int32_t length = static_cast<int32_t>(count);
    const auto given = executorch::extension::from_blob(tokens, {1, length}, ScalarType::Long);
    const auto places = executorch::extension::from_blob(places_.data(), {length}, ScalarType::Long);
    return module_.forward({executorch::runtime::EValue(*given), executorch::runtime::EValue(*places)});
  }

  Fault refuse(size_t count) const {
    const std::string limit = " tokens do not fit the context of " + std::to_string(context_);
    return Fault{"bad_input", std::to_string(count) + limit};
  }

 private:
  executorch::extension::Module& module_;
  size_t context_, position_ = 0;
  std::vector<int64_t> places_;
};

// The logits (vocabulary,) after the last token that was given.
inline std::vector<float> read_logits(const Decoder::Outputs& outputs) {
  check("failed", "forward", outputs.error());
  if (outputs->empty() || !outputs->at(0).isTensor()) throw Fault{"failed", "the first output is not a tensor"};
  const auto& tensor = outputs->at(0).toTensor();
  if (tensor.scalar_type() != executorch::aten::ScalarType::Float || tensor.dim() == 0 || tensor.numel() == 0)
    throw Fault{"failed", "the logits are no float32 tensor"};
  const size_t count = static_cast<size_t>(tensor.size(tensor.dim() - 1));
  const float* end = tensor.const_data_ptr<float>() + tensor.numel();
  return std::vector<float>(end - count, end);
}
