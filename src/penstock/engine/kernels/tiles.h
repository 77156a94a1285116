// AMX: whether this process may use tiles, and their shape, the same for all of ours.
#pragma once

#include <cstdint>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define PENSTOCK_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileInputs = 32;  // numbers of a row of the left operand
constexpr int64_t kTileSize = kTileRows * kTileInputs;

#ifdef PENSTOCK_TILES

// Whether the operating system lets this process use tiles.
inline bool tiles_allowed() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

// The compiler does not know all that the instructions read from memory: what was written before
// this is there after it, and nothing that comes after is written before.
inline void tiles_see_memory() { asm volatile("" ::: "memory"); }

// Eight tiles of 16 rows of 64 bytes, for the calling thread, until they are released.
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = kTileRows;
  }
  tiles_see_memory();
  _tile_loadconfig(&config);
  tiles_see_memory();
}

inline void release_tiles() { _tile_release(); }

#else

inline bool tiles_allowed() { return false; }
inline void configure_tiles() {}
inline void release_tiles() {}

#endif

}  // namespace
