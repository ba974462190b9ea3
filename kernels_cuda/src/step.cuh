// What a step is told of its sequences, in device memory, so that a graph holds for any of them: kernels_cuda/inputs.py
// writes it anew for every step. A step's rows are those of several sequences, one behind the other; in each memory a
// sequence has its own block table and length.
#pragma once

// Where a row is written: slot `slot` of its sequence, whose slot s lies in block tables[table + s / SLOTS]. Tables may
// begin behind slot 0 (table is then too small by what they leave out): of a window, what lies behind it is not there.
struct Place {
    int slot, table;
};

// How a row passes through a state memory, in place of `Place`. source: of a sequence's first row the slot with the
// state before it, -1: zeros; of its i-th row behind that -1 - i. kept: the slot that gets the state behind the row, or
// -1.
struct Pass {
    int source, kept;
};

// Rows row … row + rows - 1 of the step, behind `length` slots that were there before.
struct Sequence {
    int row, rows, length, table;
};

// Sixteen queries of a sequence, from its query `query` on (row query / group, head query % group of a KV head's), or
// what is left of them. rows 0: nothing to do.
struct Piece {
    Sequence of;
    int query;
};

// A sequence whose last `watched` rows tell what they attended to, in planes of scores from `plane` on: apart from each
// other, or all in one.
struct Watch {
    Sequence of;
    int watched, plane, apart;
};
