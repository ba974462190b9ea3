// What a step is told, in device memory, so that a graph need not change; kernels_cuda/program.py writes it.
#pragma once

struct Step {
    int position, length;       // of the first row: rotary position, slot
    float inverse_temperature;  // of the total of `largest`, 0: none is asked for
};
