// The verbs of models whose residual is several streams, as Python calls them.
#include "bindings.h"
#include "stream_ops.h"

namespace tinychat {

void bind_streams(nb::class_<PyProgram>& program) {
    const auto pointers = [](const std::vector<Floats>& given, int cols, auto out) {
        require(!given.empty(), "there is no stream");
        for (const Floats& f : given) {
            require(f.cols == cols, "the streams differ");
            out.push_back(f.p);
        }
        return out;
    };
    const auto reading = [pointers](const std::vector<Floats>& given, int cols) {
        return pointers(given, cols, std::vector<const float*>());
    };
    const auto writing = [pointers](const std::vector<Floats>& given, int cols) {
        return pointers(given, cols, std::vector<float*>());
    };
    program.def(
               "tanh", [](PyProgram& p, Floats x) { p.program.other(tanh_op(x.p, x.cols)); }, "x"_a, "in place")
        .def(
            "mix_streams",
            [=](PyProgram& p, std::vector<Floats> x, Floats by, std::vector<Floats> out) {
                const int n = static_cast<int>(x.size());
                require(out.size() == x.size() && by.cols == n * n, "the streams do not fit");
                const int cols = out.empty() ? 0 : out[0].cols;
                p.program.other(mix_op(reading(x, cols), by.p, writing(out, cols), cols));
            },
            "x"_a, "by"_a, "out"_a, "out[i] = x[i] + the sum of by[i, j] * x[j]")
        .def(
            "correct_streams",
            [=](PyProgram& p, std::vector<Floats> x, Floats now, Floats by) {
                require(by.cols == static_cast<int>(x.size()), "the streams do not fit");
                p.program.other(correct_op(writing(x, now.cols), now.p, by.p, now.cols));
            },
            "x"_a, "now"_a, "by"_a, "x[i] += (1 + by[i]) * (now - x[0])")
        .def(
            "times",
            [](PyProgram& p, Floats x, nb::object by, Floats out) {
                const auto b = nb::cast<In<float>>(by);
                require(static_cast<int>(b.size()) == x.cols && out.cols == x.cols, "a vector does not fit");
                p.keep_alive(by);
                p.program.other(times_op(x.p, b.data(), out.p, x.cols));
            },
            "x"_a, "by"_a, "out"_a)
        .def(
            "resize",
            [](PyProgram& p, Floats x, Floats like) {
                require(x.cols == like.cols, "the rows do not fit");
                p.program.other(resize_op(x.p, like.p, x.cols));
            },
            "x"_a, "like"_a, "x, scaled to the magnitude of `like`")
        .def(
            "sum",
            [=](PyProgram& p, std::vector<Floats> x, float factor, Floats out) {
                p.program.other(sum_op(reading(x, out.cols), factor, out.p, out.cols));
            },
            "x"_a, "factor"_a, "out"_a)
        .def(
            "cut_gates",
            [](PyProgram& p, Floats x, float deviations) {
                require(x.cols % 2 == 0, "gate and up do not fit");
                p.program.other(cut_op(x.p, x.cols / 2, deviations));
            },
            "x"_a, "deviations"_a, "the first half, as far as it lies above its mean and so many deviations");
}

}  // namespace tinychat
