// Hopper's products by warpgroups (sm_90a): 64 rows of W from registers, tokens of x from shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/scalar.cuh"
#include "cuda/warp.cuh"

namespace macko {

constexpr int kGroupWarps = 4, kGroupThreads = kGroupWarps * kWarpSize;

// The operands of wgmma, by the number of tokens: results, and their places in the instruction.
#define MACKO_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MACKO_F8(d, i) MACKO_F4(d, i), MACKO_F4(d, i + 4)
#define MACKO_F16(d, i) MACKO_F8(d, i), MACKO_F8(d, i + 8)
#define MACKO_F32(d, i) MACKO_F16(d, i), MACKO_F16(d, i + 16)
#define MACKO_F64(d, i) MACKO_F32(d, i), MACKO_F32(d, i + 32)
#define MACKO_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MACKO_R16 MACKO_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MACKO_R32 MACKO_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MACKO_R64                                                                                             \
  MACKO_R32                                                                                                   \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63"
#define MACKO_R96                                                                                             \
  MACKO_R64                                                                                                   \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
  "%90,%91,%92,%93,%94,%95"
#define MACKO_R128                                                                                              \
  MACKO_R96                                                                                                     \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117," \
  "%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MACKO_WGMMA(tokens, type, results, operands, a0, a1, a2, a3, b)                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type " {" results "}, {%" #a0 ",%" #a1 \
               ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1, 0;"                                                            \
               : operands                                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x))
#define MACKO_WGMMA_OF(type)                                                                              \
  if constexpr (Tokens == 32) MACKO_WGMMA(32, type, MACKO_R16, MACKO_F16(d, 0), 16, 17, 18, 19, 20);      \
  if constexpr (Tokens == 64) MACKO_WGMMA(64, type, MACKO_R32, MACKO_F32(d, 0), 32, 33, 34, 35, 36);      \
  if constexpr (Tokens == 128) MACKO_WGMMA(128, type, MACKO_R64, MACKO_F64(d, 0), 64, 65, 66, 67, 68);    \
  if constexpr (Tokens == 192)                                                                            \
    MACKO_WGMMA(192, type, MACKO_R96, MACKO_F64(d, 0) MACKO_COMMA MACKO_F32(d, 64), 96, 97, 98, 99, 100); \
  if constexpr (Tokens == 256)                                                                            \
  MACKO_WGMMA(256, type, MACKO_R128, MACKO_F64(d, 0) MACKO_COMMA MACKO_F64(d, 64), 128, 129, 130, 131, 132)
#define MACKO_COMMA ,

// d += W x^T of 64 rows, 16 columns and these tokens: a lane's part of W as wgmma has it, and what describes x in
// shared memory.
template <typename T, int Tokens>
__device__ __forceinline__ void multiply_group(float (&d)[Tokens / 2], const uint32_t (&a)[4], uint64_t x) {
  if constexpr (std::is_same_v<T, __half>) {
    MACKO_WGMMA_OF("f16");
  } else {
    MACKO_WGMMA_OF("bf16");
  }
}

}  // namespace macko
