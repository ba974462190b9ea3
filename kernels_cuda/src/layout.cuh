// How weights lie in memory (kernels_cuda/layout.py writes it), for one form of weight a compilation:
//   BITS      2, 3, 4, 5, 6, 8: codes;  16: halves;  32: floats, as a half and the half that it is off by, times 2048
//   DECODING  what a code means: a number of Decoding
//   BESIDE    what turns the codes of a group into weights: a number of Beside; 16 and 32 bits have none
//   GROUP     16: groups of 16 inputs; 32: of 32, where scales are coded; 0: of any multiple of 32, told at launch
//   SPLIT     1: a stage's chunks are in groups of their own: of 32, and others that do not begin at whole stages
//
// w [n, k] in tiles of 16 outputs, each in stages of 64 inputs (up to 6 bits) or 32 (NF4, 8 bits and more). A stage is
// what the 32 lanes of a warp read, 16, 8 or 4 bytes a lane and plane, each lane what it holds of the mma's 16×16
// operand: with g = lane / 4, t = lane % 4 it has outputs g and g + 8, and of every 32 inputs (a chunk) the eight from
// 8t on. The product does not care in which order inputs are summed, so activations are read the same way: 16
// contiguous bytes a lane. In groups of 16 it has four of each half of the chunk, from 4t on: an mma takes 16 inputs,
// so its sums are those of one group.
//   4 bits    {g, chunk 0}, {g+8, chunk 0}, {g, chunk 1}, {g+8, chunk 1}: 8 codes each. Nibble i is input 2i, i+4: 2i+1
//   of tables the same, and nibble i is input i (NF4: one chunk)
//   2 bits    {chunk 0}, {chunk 1}: 16 codes each, the even inputs of g, those of g+8, then the odd ones of both
//   1 bit     both chunks: the even inputs of g and of g+8 in chunk 0, those in chunk 1, then the odd ones
//   3 bits    a plane of 2 bits (the low ones) for all lanes, then one of 1 bit; 5 bits: 4 and 1, 6 bits: 4 and 2
//   8 bits    {g}, {g+8}: 8 bytes each; numbers + 128
//   16 bits   two vectors: g, g+8
//   32 bits   four: g, g+8, and what they are off by
// Scales and offsets of FP16 … FP32_FP32: for each tile and group, eight records (of g), in this order:
//   FP16       half scale[2]                    w = q · scale
//   ZERO       half scale[2]; zeros: byte g is  w = (q − zero) · scale
//              zero of g | zero of g+8 << 4
//   FP16_FP16  half scale[2], offset[2]         w = q · scale + offset
//   FP32       float scale[2]
//   FP32_FP32  float scale[2], offset[2]
// The others are coded (beside.cuh). What is missing at the end (outputs to a multiple of 16, inputs to whole stages)
// is zero codes, scales and offsets.
#pragma once

#include "device.cuh"

enum class Decoding { UNSIGNED, SIGNED, IQ4_NL, E2M1, E4M3, NF4 };  // SIGNED: less 2^(BITS − 1)
enum class Beside { NONE, FP16, ZERO, FP16_FP16, FP32, FP32_FP32, INT4_INT4, INT6, INT6_INT6, INT8, E8M0, E4M3 };

#ifndef BITS
#define BITS 4
#define DECODING SIGNED
#define BESIDE FP16
#define GROUP 0
#endif
#ifndef SPLIT
#define SPLIT 0
#endif

constexpr Decoding DECODED = Decoding::DECODING;
constexpr Beside KIND = Beside::BESIDE;
constexpr bool CODED = KIND >= Beside::INT4_INT4;  // scales are not floats as they lie
constexpr bool OFFSETS =
    KIND == Beside::FP16_FP16 || KIND == Beside::FP32_FP32 || KIND == Beside::INT4_INT4 || KIND == Beside::INT6_INT6;
constexpr bool TABLE = DECODED == Decoding::IQ4_NL || DECODED == Decoding::E2M1;  // of 16 small integers
constexpr bool HALVES = GROUP == 16;                                              // groups are half a chunk

constexpr int TILE = 16;                                               // outputs
constexpr int CHUNK = 32;                                              // inputs that a lane has eight of
constexpr int CHUNKS = BITS < 8 && DECODED != Decoding::NF4 ? 2 : 1;   // in a stage
constexpr int STAGE = CHUNK * CHUNKS;                                  // inputs
constexpr int SCALES = HALVES ? 2 * CHUNKS : CHUNKS;                   // groups that a stage may have
constexpr int PARTS = BITS == 32 || DECODED == Decoding::NF4 ? 2 : 1;  // halves, and what they are off by

// Bytes of a lane and stage, in one plane or two: 2 bits and more, and the bits above them.
constexpr int LOW = BITS == 32 ? 64 : BITS == 16 ? 32 : BITS < 4 || DECODED == Decoding::NF4 ? 8 : 16;
constexpr int HIGH = BITS == 6 ? 8 : BITS == 5 || BITS == 3 ? 4 : 0;
constexpr int STAGE_BYTES = (LOW + HIGH) * WARP;

constexpr int RECORD = KIND == Beside::FP32_FP32                           ? 16
                       : KIND == Beside::FP16_FP16 || KIND == Beside::FP32 ? 8
                       : KIND == Beside::FP16 || KIND == Beside::ZERO      ? 4
                                                                           : 0;
constexpr int RECORDS = 8;             // of a tile and group
constexpr float OFF_BY = 1.0f / 2048;  // unit of the second half of 32 bits
