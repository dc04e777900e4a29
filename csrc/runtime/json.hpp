// A reader of the JSON that dtpm-export writes: enough of RFC 8259 for manifests, with an error for anything else.
#pragma once

#include <charconv>
#include <system_error>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace dtpm {

struct Json {
  enum class Kind { null, boolean, number, string, list, object };
  Kind kind = Kind::null;
  double number = 0;  // a boolean's 0 or 1 as well
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> members;

  const Json& operator[](const std::string& key) const {
    const auto found = members.find(key);
    if (found == members.end()) throw std::runtime_error("no \"" + key + "\" in it");
    return found->second;
  }
  bool has(const std::string& key) const { return members.count(key) != 0; }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}

  Json read() {
    Json value = read_value(0);
    skip_space();
    if (at_ != text_.size()) fail("text after the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("not JSON at byte " + std::to_string(at_) + ": " + what);
  }
  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) ++at_;
  }
  char peek() {
    skip_space();
    if (at_ >= text_.size()) fail("ends too early");
    return text_[at_];
  }
  void expect(char wanted) {
    if (peek() != wanted) fail(std::string("expected ") + wanted);
    ++at_;
  }
  bool word(const char* wanted) {
    const std::string w(wanted);
    if (text_.compare(at_, w.size(), w) != 0) return false;
    at_ += w.size();
    return true;
  }

  Json read_value(int depth) {
    if (depth > 64) fail("nested too deeply");
    Json value;
    const char c = peek();
    if (c == '{') {
      value.kind = Json::Kind::object;
      ++at_;
      if (peek() == '}') return ++at_, value;
      do {
        peek();
        std::string key = read_string();
        expect(':');
        value.members[key] = read_value(depth + 1);
      } while (next_of('}'));
    } else if (c == '[') {
      value.kind = Json::Kind::list;
      ++at_;
      if (peek() == ']') return ++at_, value;
      do value.items.push_back(read_value(depth + 1));
      while (next_of(']'));
    } else if (c == '"') {
      value.kind = Json::Kind::string;
      value.text = read_string();
    } else if (word("null")) {
      value.kind = Json::Kind::null;
    } else if (word("true")) {
      value.kind = Json::Kind::boolean;
      value.number = 1;
    } else if (word("false")) {
      value.kind = Json::Kind::boolean;
    } else {
      value.kind = Json::Kind::number;
      const char* start = text_.data() + at_;
      const auto found = std::from_chars(start, text_.data() + text_.size(), value.number);  // whatever the locale is
      if (found.ec != std::errc()) fail("unknown value");
      at_ += static_cast<size_t>(found.ptr - start);
    }
    return value;
  }

  // After an item: true when another one follows, false at the closing bracket.
  bool next_of(char closing) {
    const char c = peek();
    ++at_;
    if (c == closing) return false;
    if (c != ',') fail("expected a comma");
    return true;
  }

  std::string read_string() {
    if (text_[at_] != '"') fail("expected a string");
    std::string found;
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] != '\\') {
        found += text_[at_];
        continue;
      }
      if (++at_ >= text_.size()) break;
      switch (text_[at_]) {
        case 'n': found += '\n'; break;
        case 't': found += '\t'; break;
        case 'r': found += '\r'; break;
        case 'b': found += '\b'; break;
        case 'f': found += '\f'; break;
        case 'u': append_utf8(found); break;
        default: found += text_[at_];
      }
    }
    if (at_ >= text_.size()) fail("a string does not end");
    ++at_;
    return found;
  }

  // \uXXXX; names in a manifest are in the basic plane, halves of a pair are kept as they are.
  void append_utf8(std::string& to) {
    if (at_ + 4 >= text_.size()) fail("a string does not end");
    const unsigned long code = std::strtoul(text_.substr(at_ + 1, 4).c_str(), nullptr, 16);
    at_ += 4;
    if (code < 0x80) {
      to += static_cast<char>(code);
    } else if (code < 0x800) {
      to += static_cast<char>(0xC0 | (code >> 6));
      to += static_cast<char>(0x80 | (code & 0x3F));
    } else {
      to += static_cast<char>(0xE0 | (code >> 12));
      to += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
      to += static_cast<char>(0x80 | (code & 0x3F));
    }
  }

  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace dtpm
