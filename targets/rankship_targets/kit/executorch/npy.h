// Arrays in numpy's .npy files (format version 1 to 3): little-endian, C order, samples on the first axis.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace npy {

constexpr size_t kPreambleBytes = 10;  // magic, version, length of the header in format version 1
constexpr size_t kAlignment = 64;

struct Array {
  std::string descr;  // numpy's own word for the type, such as "<f4"
  size_t item_bytes = 0;
  std::vector<int32_t> shape;
  std::vector<char> data;

  size_t sample_bytes() const { return shape[0] == 0 ? 0 : data.size() / static_cast<size_t>(shape[0]); }
};

// The text after `key` in the header, which is a Python literal written by numpy.
inline std::string find_value(const std::string& header, const std::string& key, const std::string& path) {
  const size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) throw std::runtime_error(path + ": its header lacks '" + key + "'");
  const size_t begin = header.find_first_not_of(' ', at + key.size() + 3);
  if (begin == std::string::npos) throw std::runtime_error(path + ": its header ends after '" + key + "'");
  return header.substr(begin);
}

inline std::vector<int32_t> parse_shape(const std::string& text, const std::string& path) {
  std::vector<int32_t> shape;
  const size_t end = text.find(')');
  if (text.empty() || text[0] != '(' || end == std::string::npos) throw std::runtime_error(path + ": no shape");
  for (size_t at = 1; at < end;) {
    const size_t digit = text.find_first_of("0123456789", at);
    if (digit >= end) break;
    size_t length = 0;
    const long long size = std::stoll(text.substr(digit, end - digit), &length);
    if (size > INT32_MAX) throw std::runtime_error(path + ": an axis of " + std::to_string(size));
    shape.push_back(static_cast<int32_t>(size));
    at = digit + length;
  }
  return shape;
}

inline Array read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  unsigned char preamble[12] = {};
  if (!stream.read(reinterpret_cast<char*>(preamble), kPreambleBytes) || std::memcmp(preamble, "\x93NUMPY", 6) != 0)
    throw std::runtime_error(path + " is no readable .npy file");
  size_t length = preamble[8] | preamble[9] << 8;
  if (preamble[6] > 1) {
    stream.read(reinterpret_cast<char*>(preamble) + kPreambleBytes, 2);
    length |= static_cast<size_t>(preamble[10]) << 16 | static_cast<size_t>(preamble[11]) << 24;
  }
  if (length > 1 << 20) throw std::runtime_error(path + ": a header of " + std::to_string(length) + " bytes");
  std::string header(length, '\0');
  if (!stream.read(header.data(), static_cast<std::streamsize>(length))) throw std::runtime_error(path + " is cut off");

  Array array;
  const std::string descr = find_value(header, "descr", path);
  const size_t quote = descr.find('\'', 1);
  if (descr[0] != '\'' || quote != 4) throw std::runtime_error(path + ": elements are no plain numbers");
  array.descr = descr.substr(1, 3);
  array.item_bytes = static_cast<size_t>(array.descr[2] - '0');
  if (find_value(header, "fortran_order", path).compare(0, 5, "False") != 0)
    throw std::runtime_error(path + " is in Fortran order");
  array.shape = parse_shape(find_value(header, "shape", path), path);
  if (array.shape.empty()) throw std::runtime_error(path + " has no axis of samples");
  size_t bytes = array.item_bytes;
  for (const int32_t size : array.shape)
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes))
      throw std::runtime_error(path + ": too large a shape");
  const std::streampos begin = stream.tellg();
  stream.seekg(0, std::ios::end);
  if (static_cast<size_t>(stream.tellg() - begin) < bytes) throw std::runtime_error(path + " is cut off");
  stream.seekg(begin);
  array.data.resize(bytes);
  stream.read(array.data.data(), static_cast<std::streamsize>(bytes));
  if (!stream) throw std::runtime_error(path + " cannot be read");
  return array;
}

inline void write(const std::string& path, const Array& array) {
  std::string shape;
  for (const int32_t size : array.shape) shape += std::to_string(size) + ", ";
  std::string header = "{'descr': '" + array.descr + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append(kAlignment - (kPreambleBytes + header.size() + 1) % kAlignment, ' ').push_back('\n');
  std::ofstream stream(path, std::ios::binary);
  stream.write("\x93NUMPY\x01\x00", 8);
  stream.put(static_cast<char>(header.size() & 0xff)).put(static_cast<char>(header.size() >> 8));
  stream << header;
  stream.write(array.data.data(), static_cast<std::streamsize>(array.data.size()));
  stream.flush();
  if (!stream) throw std::runtime_error(path + " cannot be written");
}

}  // namespace npy
