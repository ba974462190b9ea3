// What stands beside codes: scales and offsets of a stage's groups, as they lie in memory (layout.cuh) and as floats.
//
// Coded ones are integers of 4, 6 or 8 bits (signed where there is no offset: stored with half their range added)
// times halves for each 256 inputs, powers of two (E8M0), or small floats times one float for the row (E4M3). They stay
// as small as they are in a file: groups of 32 inputs (or 16), for each group and g = 0…7 a field for the scale of g,
// of g + 8, and their offsets. A tile has a block for each 256 inputs, of three planes:
//   times   half scale[2], offset[2] for each g (none of E8M0; E4M3: float scale[2], once, before the first block)
//   fields of 4 bits (the lower ones of 6) or 8   a stage has 4 to 64 bits for each g; stages lie behind each other in
//   the upper 2 bits of 6                         units of 4 bytes (or a stage's 8), each unit for all eight g
// A lane fetches its g's unit: stages that share one are those of neighbouring warps.
#pragma once

#include "codes.cuh"

constexpr int NUMBERS = OFFSETS ? 4 : 2;  // of a group: scales of outputs g and g + 8, and offsets
constexpr int FIELD = KIND == Beside::INT4_INT4 || KIND == Beside::INT6 || KIND == Beside::INT6_INT6 ? 4 : 8;
constexpr bool SIX = KIND == Beside::INT6 || KIND == Beside::INT6_INT6;
constexpr int FIELDS = SCALES * NUMBERS * FIELD, UPPER = SIX ? SCALES * NUMBERS * 2 : 0;  // bits of a stage and g
constexpr int TIMES = KIND == Beside::E8M0 ? 0 : KIND == Beside::E4M3 ? 8 : NUMBERS * 2;  // bytes of g
constexpr int IN_BLOCK = 256 / STAGE;                                                     // stages

// Words of a lane: a record, or of coded ones its times, fields and upper bits.
constexpr int FIELD_WORDS = FIELDS > 32 ? 2 : 1, UPPER_WORDS = SIX ? 1 : 0, TIMES_WORDS = TIMES / 4;
constexpr int WORDS = CODED ? TIMES_WORDS + FIELD_WORDS + UPPER_WORDS : RECORD / 4;
constexpr int RUNS = CODED ? 1 : SCALES;                                           // of words, in a stage
constexpr int BESIDE_BYTES = RUNS * (4 * WORDS + (KIND == Beside::ZERO ? 4 : 0));  // of a lane and stage

struct Weights {
    const u8 *codes, *meta, *zeros;
    int stages, group, groups;
};

// A lane's eight inputs of a chunk are two quads of four; so many of them at a time are in one group.
constexpr int QUADS = HALVES ? 1 : 2;

// Which of a stage's scales, and which of its records, are those of a quad.
DEVICE int scale_of(int chunk, int quad) { return HALVES ? 2 * chunk + quad : chunk; }
DEVICE int record_in(int chunk, int quad) { return CODED ? 0 : HALVES || SPLIT ? scale_of(chunk, quad) : 0; }

// Where the records of a tile's group begin that scale c of a stage is of.
DEVICE size_t record_of(const Weights& w, int tile, int stage, int c) {
    int group = (stage * STAGE + c * (STAGE / SCALES)) / (HALVES ? 16 : w.group);
    if (group >= w.groups) group = w.groups - 1;  // zeros behind the last input
    return (static_cast<size_t>(tile) * w.groups + group) * RECORDS;
}

// Bytes of a block's planes, and what stands before the first block.
constexpr int FIELD_BYTES = IN_BLOCK * FIELDS / 8 * RECORDS, UPPER_BYTES = IN_BLOCK * UPPER / 8 * RECORDS;
constexpr int HEAD = KIND == Beside::E4M3 ? TIMES * RECORDS : 0, TIMES_BYTES = HEAD ? 0 : TIMES * RECORDS;
constexpr int BLOCK = TIMES_BYTES + FIELD_BYTES + UPPER_BYTES;

// Where a tile's coded scales begin; behind that, where the times, fields and upper bits of a stage and g are.
DEVICE const u8* coded(const Weights& w, int tile) {
    return w.meta + static_cast<size_t>(tile) * (HEAD + divide_up(w.stages, IN_BLOCK) * BLOCK);
}

DEVICE u32 block_of(u32 stage) { return stage / IN_BLOCK * BLOCK; }
DEVICE u32 times_at(u32 stage, int g) { return (HEAD ? 0 : block_of(stage)) + g * TIMES; }

constexpr int FIELD_UNIT = FIELDS > 32 ? 8 : 4;
DEVICE u32 fields_at(u32 stage, int g) {
    u32 unit = stage % IN_BLOCK * FIELDS / (8 * FIELD_UNIT);
    return HEAD + block_of(stage) + TIMES_BYTES + (unit * RECORDS + g) * FIELD_UNIT;
}

DEVICE u32 upper_at(u32 stage, int g) {
    u32 unit = stage % IN_BLOCK * UPPER / 32;
    return block_of(stage) + TIMES_BYTES + FIELD_BYTES + (unit * RECORDS + g) * 4;
}

template <int N>
DEVICE void copy_words(u32* to, const u8* from) {
    auto* words = reinterpret_cast<const u32*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = words[i];
}

// Where a lane finds what stands beside the codes of one stage, of the one STEP stages on, and so forth: nothing is
// divided on the way. Coded: a stage's place in its block is always the same.
template <int STEP>
struct Places {
    const u8 *meta, *zeros;            // plain: of a lane, in the first of all records
    const u8 *times, *fields, *upper;  // coded
    size_t tile;                       // records (coded: bytes) to the next tile's, 0 where there is none
    u32 record;                        // eight a group
    int left;                          // groups from this one to the tile's last
    int size, at;                      // inputs of a group, and of the stage's before it
    int step, rest;                    // groups and inputs that STEP stages are
    static_assert(!CODED || STEP % IN_BLOCK == 0);

    DEVICE_MEMBER Places(const Weights& w, int of, int stage, bool next) {
        [[maybe_unused]] int g = lane_id() / 4;
        if constexpr (CODED) {
            const u8* from = coded(w, of);
            times = from + times_at(stage, g), fields = from + fields_at(stage, g), upper = from + upper_at(stage, g);
            tile = next ? coded(w, 1) - w.meta : 0;
        } else if constexpr (RECORD > 0) {
            size = HALVES ? 16 : w.group;
            int group = stage * STAGE / size;
            at = stage * STAGE - group * size;
            step = STEP * STAGE / size, rest = STEP * STAGE - step * size;
            record = (static_cast<u32>(of) * w.groups + group) * RECORDS;
            meta = w.meta + g * RECORD;
            if constexpr (KIND == Beside::ZERO) zeros = w.zeros + g / 4 * 4;
            left = w.groups - 1 - group;
            tile = next ? static_cast<size_t>(w.groups) * RECORDS : 0;
        }
    }

    DEVICE_MEMBER void move() {
        if constexpr (CODED) {
            constexpr int BYTES = STEP / IN_BLOCK * BLOCK;
            if constexpr (!HEAD) times += BYTES;
            fields += BYTES;
            if constexpr (SIX) upper += BYTES;
        } else if constexpr (RECORD > 0) {
            int n = step;
            if (!HALVES) {
                at += rest;
                if (at >= size) at -= size, ++n;
            }
            left -= n;
            record += n * RECORDS;
        }
    }

    // Groups from the stage's first to that of its scale c; zeros behind the last input.
    DEVICE_MEMBER int ahead(int c) const {
        int n = HALVES ? c : at + c * CHUNK >= size ? 1 : 0;
        return n < left ? n : left;
    }
};

// A stage's scales of the r-th tile to shared memory: `to` is the tile's, zeros lie at `zeros`.
template <class Places>
DEVICE void fetch_beside(u8* to, u8* zeros, const Places& from, size_t r) {
    [[maybe_unused]] int lane = lane_id();
    if constexpr (CODED) {
        if constexpr (TIMES > 0) copy_async<TIMES>(to + lane * TIMES, from.times + r * from.tile);
        to += TIMES * WARP;
        copy_async<FIELD_UNIT>(to + lane * FIELD_UNIT, from.fields + r * from.tile);
        to += FIELD_UNIT * WARP;
        if constexpr (SIX) copy_async<4>(to + lane * 4, from.upper + r * from.tile);
    } else if constexpr (RECORD > 0) {
#pragma unroll
        for (int c = 0; c < SCALES; ++c) {
            if (!HALVES && c > 0 && !SPLIT) break;
            size_t at = from.record + (c > 0 ? from.ahead(c) * RECORDS : 0);
            at += r * from.tile;
            copy_async<RECORD>(to + lane * RECORD + c * WARP * RECORD, from.meta + at * RECORD);
            if constexpr (KIND == Beside::ZERO) copy_async<4>(zeros + lane * 4 + c * WARP * 4, from.zeros + at);
        }
    }
}

// A lane's words of a stage, as `fetch_beside` left them. run: of a plain record.
DEVICE void read_fetched(const u8* from, int run, u32 (&words)[WORDS ? WORDS : 1]) {
    int lane = lane_id();
    if constexpr (CODED) {
        const u8* fields = from + TIMES * WARP;
        copy_words<TIMES_WORDS>(words, from + lane * TIMES);
        copy_words<FIELD_WORDS>(words + TIMES_WORDS, fields + lane * FIELD_UNIT);
        copy_words<UPPER_WORDS>(words + TIMES_WORDS + FIELD_WORDS, fields + (FIELD_UNIT * WARP + lane * 4));
    } else {
        copy_words<WORDS>(words, from + (run * WARP + lane) * RECORD);
    }
}

DEVICE void read_coded(u32* words, const u8* from, int stage, int g) {
    copy_words<TIMES_WORDS>(words, from + times_at(stage, g));
    copy_words<FIELD_WORDS>(words + TIMES_WORDS, from + fields_at(stage, g));
    if constexpr (SIX) copy_words<1>(words + TIMES_WORDS + FIELD_WORDS, from + upper_at(stage, g));
}

// The same words, straight from memory.
DEVICE void read_beside(const Weights& w, int tile, int stage, u32 (&words)[RUNS][WORDS ? WORDS : 1],
                        u32 (&zeros)[RUNS]) {
    [[maybe_unused]] int g = lane_id() / 4;
    if constexpr (CODED) {
        read_coded(words[0], coded(w, tile), stage, g);
    } else if constexpr (RECORD > 0) {
#pragma unroll
        for (int c = 0; c < SCALES; ++c) {
            if (!HALVES && c > 0 && !SPLIT) break;
            size_t at = record_of(w, tile, stage, c) + g;
            copy_words<WORDS>(words[c], w.meta + at * RECORD);
            if constexpr (KIND == Beside::ZERO) zeros[c] = w.zeros[at];
        }
    }
}

// The bits of field i of scale c in a stage's run of `bits`, which begins in a word of its own or shares one.
template <int RUN, int BITS_EACH>
DEVICE u32 field(const u32* words, u32 stage, int index) {
    u32 word = RUN < 32 ? words[0] >> stage * RUN % 32 : RUN > 32 && index * BITS_EACH >= 32 ? words[1] : words[0];
    return word >> index * BITS_EACH % 32 & ((1u << BITS_EACH) - 1);
}

// A coded number as it is before it is multiplied. An integer below 2²³ in the last bits of a float is that much more
// than 2²³.
DEVICE float number_of(u32 code) {
    constexpr float SHIFT = 8388608.0f;
    if constexpr (KIND == Beside::E8M0) return float_of(code ? code << 23 : 1 << 22);
    if constexpr (KIND == Beside::E4M3) return float_of((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
    return float_of(0x4b000000 | code) - (SHIFT + (KIND == Beside::INT6 ? 32 : KIND == Beside::INT8 ? 128 : 0));
}

// Scales of outputs g and g + 8, and their offsets: the c-th of a stage, out of the lane's words.
DEVICE void scales_of(const u32* words, int stage, int c, float (&s)[4]) {
    s[0] = s[1] = 1, s[2] = s[3] = 0;
    if constexpr (CODED) {
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) {
            u32 code = field<FIELDS, FIELD>(words + TIMES_WORDS, stage, c * NUMBERS + i);
            if constexpr (SIX) code |= field<UPPER, 2>(words + TIMES_WORDS + FIELD_WORDS, stage, c * NUMBERS + i) << 4;
            s[i] = number_of(code);
            if constexpr (KIND == Beside::E4M3)
                s[i] *= float_of(words[i]);
            else if constexpr (TIMES > 0)
                s[i] *= i % 2 ? high_float(words[i / 2]) : low_float(words[i / 2]);
        }
    } else if constexpr (KIND == Beside::FP32 || KIND == Beside::FP32_FP32) {
        for (int i = 0; i < WORDS; ++i) s[i] = float_of(words[i]);
    } else if constexpr (KIND != Beside::NONE) {
        s[0] = low_float(words[0]), s[1] = high_float(words[0]);
        if constexpr (OFFSETS) s[2] = low_float(words[1]), s[3] = high_float(words[1]);
    }
}

// One weight, for those who need few: output n, input k; group: inputs that share a scale.
DEVICE float weight_at(const Weights& w, int n, int k) {
    int tile = n / TILE, row = n % TILE, stage = k / STAGE, half = row / 8;
    float q = value_at(w.codes + (static_cast<size_t>(tile) * w.stages + stage) * STAGE_BYTES, row, k);
    if constexpr (KIND == Beside::NONE) return q;
    u32 words[WORDS ? WORDS : 1] = {};
    int c = k % STAGE / (STAGE / SCALES), g = row % 8;
    float zero = 0;
    if constexpr (CODED) {
        read_coded(words, coded(w, tile), stage, g);
    } else {
        size_t at = (static_cast<size_t>(tile) * w.groups + k / w.group) * RECORDS + g;
        copy_words<WORDS>(words, w.meta + at * RECORD);
        if constexpr (KIND == Beside::ZERO) zero = static_cast<float>(w.zeros[at] >> 4 * half & 15);
    }
    float s[4];
    scales_of(words, stage, c, s);
    return fmaf(q - zero, half ? s[1] : s[0], half ? s[3] : s[2]);
}
