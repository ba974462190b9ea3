// What a step is about: spans of different sequences, side by side as rows that the ops between them see as one.
#pragma once

#include <algorithm>
#include <vector>

#include "layout.h"
#include "state.h"

namespace tinychat {

// Where a span lies in one of the program's memories, and what it wants of it. Of a state memory: `length` is the slot
// of the state before its first row (-1: it begins), `blocks` are the slots that get the states behind its rows.
struct SpanSlots {
    const int32_t* blocks = nullptr;  // logical slot s is slot s % 16 of pool block blocks[s / 16]
    int length = 0;                   // slots before the span's first row
    // The attention that each slot gets from the span's last scored_rows rows is added to these, for eviction:
    // [layers][kv_heads][score_slots], for each of those rows, or of all of them to the same.
    float* scores = nullptr;
    int scored_rows = 0, score_slots = 0;
    bool sum_scores = false;
    // Of a memory in 4 bits: the blocks of its tail that the rows are written to, -1 for none, from the block of slot
    // `length` on; and where the step has blocks for all of them that one layer uses after the other.
    const int32_t* exact = nullptr;
    int scratch = 0;
};

// Consecutive rows of the step that belong to one sequence.
struct Span {
    int first = 0, rows = 0;
};

// Inputs of a step: everything that an op needs beside its own buffers. One object serves many steps, so that a step
// of the size of an earlier one allocates nothing.
struct StepState {
    explicit StepState(int memories = 0) : memories(memories) {}

    int memories;  // KV memories of the program
    int rows = 0;  // of all spans
    std::vector<Span> spans;
    std::vector<SpanSlots> slots;       // [spans][memories]
    std::vector<int32_t> ids;           // [rows]
    std::vector<long long> positions;   // [rows]
    std::vector<int32_t> asked;         // rows that get logits, ascending: the tail of each span
    float* logits = nullptr;            // [asked rows, vocab] or null
    int32_t* greedy = nullptr;          // [asked rows] or null
    const KvPool* pools = nullptr;      // [memories]; set by the program
    const StatePool* states = nullptr;  // likewise

    int logit_rows() const { return static_cast<int>(asked.size()); }
    const SpanSlots& slots_of(size_t span, int memory) const { return slots[span * memories + memory]; }
    SpanSlots& slots_of(size_t span, int memory) { return slots[span * memories + memory]; }
    // The span that a row belongs to.
    size_t span_at(int row) const {
        const auto behind =
            std::upper_bound(spans.begin(), spans.end(), row, [](int r, const Span& s) { return r < s.first; });
        return behind - spans.begin() - 1;
    }

    void clear(int n_memories) {
        memories = n_memories, rows = 0;
        spans.clear(), slots.clear(), ids.clear(), positions.clear(), asked.clear();
        logits = nullptr, greedy = nullptr;
    }
    // A span behind the others; its slots are to be filled in. Rows from logits_from on get logits.
    void add(const int32_t* tokens, int n, long long position, int logits_from) {
        spans.push_back({rows, n});
        slots.resize(spans.size() * memories);
        ids.insert(ids.end(), tokens, tokens + n);
        for (int i = 0; i < n; i++) positions.push_back(position + i);
        for (int i = logits_from; i < n; i++) asked.push_back(rows + i);
        rows += n;
    }
};

}  // namespace tinychat
