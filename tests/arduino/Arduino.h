// What a sketch needs of an Arduino, for a computer: time passes by being asked for, pins swing, and the serial line is standard output.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>

enum : uint8_t { A0 = 14, A1, A2, A3 };

inline uint64_t passed() { // microseconds
  static uint64_t now = 0;
  return now += 100;
}

inline uint32_t micros() { return static_cast<uint32_t>(passed() + 0xfff00000u); } // wraps soon

inline int analogRead(uint8_t pin) { return 512 + static_cast<int>(102 * std::sin(static_cast<double>(passed()) * 1e-5 + pin)); }

struct SerialPort {
  void begin(unsigned long) {}
  std::size_t write(const uint8_t *data, std::size_t size) {
    const std::size_t written = std::fwrite(data, 1, size, stdout);
    std::fflush(stdout);
    return written;
  }
};

static SerialPort Serial;
