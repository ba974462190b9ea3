"""Compiled kernels on the CPU: the PTX that NVRTC makes, each instruction as a line of C++ over `ptx.h`.

PTX is what ptxas or a GPU's driver gets, down to the text of the inline assembly, so this shows what the
emulation of the sources cannot: an instruction whose plain twin is right and which is itself wrong. Races,
unwritten shared memory and addresses outside of allocations fail a launch (ptx.h). Only instructions that the
kernels use are known; any other is an error with its name.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from pathlib import Path

from tinychat.kernels_cuda import modules
from tinychat.kernels_cuda.nvrtc import compilers

HERE = Path(__file__).parents[1]
MACHINE = [HERE / "kernels_cuda/ptx.h", HERE / "kernels_cuda/ptx.cpp"]
FLAGS = ("-std=c++17", "-fPIC", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off", "-w")

TYPE = r"([bsuf]\d+)"
PARAMETER = re.compile(
    r"\.param (?:\.align \d+ )?\.[a-z](\d+) (?:\.ptr (?:\.global )?(?:\.align \d+ )?)?(\w+)(?:\[(\d+)\])?"
)
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class UnknownInstructionError(Exception):
    """The translation does not know it."""


# An opcode, and the C++ for it. T, S are the types that it names; a … e the bits of its operands (a is where
# the result goes); A<T>(b) is operand b as a T.
ARITHMETIC = [
    (rf"add(?:\.rn)?\.{TYPE}", "set<T>(a, A<T>(b) + A<T>(c))"),
    (rf"sub(?:\.rn)?\.{TYPE}", "set<T>(a, A<T>(b) - A<T>(c))"),
    (rf"mul(?:\.lo|\.rn)\.{TYPE}", "set<T>(a, A<T>(b) * A<T>(c))"),
    (r"mul\.wide\.s16", "set<s32>(a, s32(A<s16>(b)) * A<s16>(c))"),
    (r"mul\.wide\.u16", "set<u32>(a, u32(A<u16>(b)) * A<u16>(c))"),
    (r"mul\.wide\.s32", "set<s64>(a, s64(A<s32>(b)) * A<s32>(c))"),
    (r"mul\.wide\.u32", "set<u64>(a, u64(A<u32>(b)) * A<u32>(c))"),
    (r"mad\.wide\.s32", "set<s64>(a, s64(A<s32>(b)) * A<s32>(c) + A<s64>(d))"),
    (r"mad\.wide\.u32", "set<u64>(a, u64(A<u32>(b)) * A<u32>(c) + A<u64>(d))"),
    (rf"mad\.lo\.{TYPE}", "set<T>(a, A<T>(b) * A<T>(c) + A<T>(d))"),
    (rf"div\.{TYPE}", "set<T>(a, divide<T>(A<T>(b), A<T>(c), LINE))"),
    (rf"rem\.{TYPE}", "set<T>(a, remainder<T>(A<T>(b), A<T>(c), LINE))"),
    (rf"div\.rn\.{TYPE}", "set<T>(a, A<T>(b) / A<T>(c))"),
    (r"fma\.rn\.f32", "set<f32>(a, std::fma(A<f32>(b), A<f32>(c), A<f32>(d)))"),
    (r"fma\.rm\.f32", "set<f32>(a, fma_down(A<f32>(b), A<f32>(c), A<f32>(d)))"),
    (rf"neg\.{TYPE}", "set<T>(a, -A<T>(b))"),
    (r"abs\.f32", "set<f32>(a, std::fabs(A<f32>(b)))"),
    (r"sqrt\.rn\.f32", "set<f32>(a, std::sqrt(A<f32>(b)))"),
    (r"rcp\.rn\.f32", "set<f32>(a, 1 / A<f32>(b))"),
    (r"rcp\.approx\.ftz\.f32", "set<f32>(a, reciprocal_approx(A<f32>(b)))"),
    (r"ex2\.approx\.ftz\.f32", "set<f32>(a, exp2_approx(A<f32>(b)))"),
    (rf"max\.{TYPE}", "set<T>(a, larger<T>(A<T>(b), A<T>(c)))"),
    (rf"min\.{TYPE}", "set<T>(a, smaller<T>(A<T>(b), A<T>(c)))"),
    (rf"and\.{TYPE}", "set<T>(a, A<T>(b) & A<T>(c))"),
    (rf"or\.{TYPE}", "set<T>(a, A<T>(b) | A<T>(c))"),
    (rf"xor\.{TYPE}", "set<T>(a, A<T>(b) ^ A<T>(c))"),
    (rf"not\.{TYPE}", "set<T>(a, ~A<T>(b))"),
    (r"lop3\.b32", "set<u32>(a, logic(A<u32>(b), A<u32>(c), A<u32>(d), A<u32>(e)))"),
    (r"and\.pred", "a = b && c"),
    (r"or\.pred", "a = b || c"),
    (r"xor\.pred", "a = b != c"),
    (r"not\.pred", "a = !b"),
    (r"mov\.pred", "a = b"),
    (rf"shl\.{TYPE}", "set<T>(a, shift_left<T>(A<T>(b), A<u32>(c)))"),
    (rf"shr\.{TYPE}", "set<T>(a, shift_right<T>(A<T>(b), A<u32>(c)))"),
    (r"shf\.l\.wrap\.b32", "set<u32>(a, funnel_left(A<u32>(b), A<u32>(c), A<u32>(d)))"),
    (rf"bfi\.{TYPE}", "set<T>(a, insert_bits<T>(A<T>(b), A<T>(c), A<u32>(d), A<u32>(e)))"),
    (r"prmt\.b32", "set<u32>(a, permute(A<u32>(b), A<u32>(c), A<u32>(d)))"),
    (rf"selp\.{TYPE}", "set<T>(a, d ? A<T>(b) : A<T>(c))"),
    (rf"mov\.{TYPE}", "set<T>(a, A<T>(b))"),
    (r"setp\.num\.f32", "a = !std::isnan(A<f32>(b)) && !std::isnan(A<f32>(c))"),
    (r"setp\.nan\.f32", "a = std::isnan(A<f32>(b)) || std::isnan(A<f32>(c))"),
    (r"sub\.f16x2", "set<u32>(a, of_pair(sub, A<u32>(b), A<u32>(c)))"),
    (r"mul\.f16x2", "set<u32>(a, of_pair(mul, A<u32>(b), A<u32>(c)))"),
    (r"fma\.rn\.f16x2", "set<u32>(a, fma_pair(A<u32>(b), A<u32>(c), A<u32>(d)))"),
    (r"add\.f16x2", "set<u32>(a, of_pair(add, A<u32>(b), A<u32>(c)))"),
    (r"cvt\.rn\.f16x2\.f32", "set<u32>(a, pack_halves(A<f32>(b), A<f32>(c)))"),
    (r"cvt\.f32\.f16", "set<f32>(a, A<f16>(b))"),
    (r"cvt\.rn\.f16\.f32", "set<f16>(a, static_cast<f16>(A<f32>(b)))"),
    (r"cvt\.rn\.f32\.(f64|[su]\d+)", "set<f32>(a, static_cast<f32>(A<T>(b)))"),
    (r"cvt\.rn\.f64\.([su]\d+)", "set<f64>(a, static_cast<f64>(A<T>(b)))"),
    (r"cvt\.rni\.(f32|f64)\.f(?:32|64)", "set<T>(a, std::nearbyint(A<T>(b)))"),
    (r"cvt\.rni\.s32\.f32", "set<s32>(a, to_int(std::nearbyint(A<f32>(b))))"),
    (r"cvt\.rzi\.s32\.f32", "set<s32>(a, to_int(A<f32>(b)))"),
    (r"cvt\.sat\.f32\.f32", "set<f32>(a, saturated(A<f32>(b)))"),
    (r"cvt\.([su]\d+)\.([su]\d+)", "set<T>(a, static_cast<T>(A<S>(b)))"),
    (r"cvta\.(?:to\.)?(?:global|local)\.u64", "set<u64>(a, A<u64>(b))"),
    (r"createpolicy\.fractional\.L2::evict_first\.b64", "set<u64>(a, 0)"),
    (r"bar\.sync", "barrier()"),
    (r"bar\.warp\.sync", "warp_barrier(A<u32>(a), LINE)"),
    (r"cp\.async\.commit_group", "copy_commit()"),
    (r"cp\.async\.wait_group", "copy_wait(A<s32>(a))"),
    (r"griddepcontrol\.launch_dependents", ""),
    (r"griddepcontrol\.wait", "wait_for_kernels()"),
    (r"ret", "end(LINE); return"),
]


def split(operands: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    return [o.strip() for o in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands) if o.strip()]


class Kernel:
    """One entry of a module, as C++."""

    def __init__(self, name: str, head: str, body: str, first_line: int, constants: set[str], overlaps: bool):
        """overlaps: it may start before the kernel that it follows has ended."""
        self.name, self.constants, self.overlaps = name, constants, overlaps
        self.parameters = [
            (n, int(bits) // 8 * int(count or 1)) for bits, n, count in PARAMETER.findall(head)
        ]
        self.most_threads = int(re.search(r"\.maxntid (\d+)", head)[1])
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.locals: dict[str, int] = {}
        self.lines: list[str] = []
        for number, text in enumerate(body.splitlines(), first_line):
            text = text.split("//")[0].strip()
            if text and text not in "{}":
                self.lines.append(self.statement(text.rstrip(";").rstrip(), number))

    def statement(self, text: str, line: int) -> str:
        if label := re.fullmatch(r"\$(\w+):", text):
            return f"{label[1]}:;"
        if text.startswith("."):
            return self.directive(text)
        condition, rest = re.fullmatch(r"(?:@(!?%\w+)\s+)?(.*)", text).groups()
        opcode, _, operands = rest.replace("\t", " ").partition(" ")
        code = self.instruction(opcode, split(operands), line)
        return f"if ({self.value(condition)}) {{ {code} }}" if condition else code

    def directive(self, text: str) -> str:
        if m := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+)(?:<(\d+)>)?", text.replace("\t", " ")):
            kind = {"pred": "bool", "f32": "u32", "f64": "u64"}.get(m[1], m[1].replace("b", "u"))
            names = [f"{m[2]}_{i}" for i in range(int(m[3]))] if m[3] else [m[2]]
            return f"{kind} {', '.join(f'{n} = {kind}(0xa5a5a5a5a5a5a5a5)' for n in names)};"
        if m := re.match(r"\.shared \.align (\d+) \.\w(\d+) (\w+)(?:\[(\d+)\])?", text):
            self.shared[m[3]] = self.shared_bytes = -(-self.shared_bytes // int(m[1])) * int(m[1])
            self.shared_bytes += int(m[2]) // 8 * int(m[4] or 1)
            return ""
        if m := re.match(r"\.local \.align \d+ \.b8\s+(\w+)\[(\d+)\]", text):
            self.locals[m[1]] = int(m[2])
            return f"alignas(16) u8 {m[1]}[{m[2]}]; memset({m[1]}, 0xff, sizeof {m[1]});"
        if text.startswith(".pragma"):
            return ""
        raise UnknownInstructionError(text)

    def value(self, operand: str) -> str:
        """The C++ for an operand's bits."""
        if operand == "%laneid":
            return "(tid(0) % 32)"
        if m := re.fullmatch(r"(!?)%(\w+?)(\d*)", operand):
            return f"{m[1]}{m[2]}_{m[3]}" if m[3] else m[2]
        if m := re.fullmatch(r"%(n?)(c?ta|t)(?:id)\.([xyz])", operand):
            return f"{m[1]}{m[2]}id({'xyz'.index(m[3])})"
        if re.fullmatch(r"0[fd][0-9A-Fa-f]+", operand):
            return f"{'u32' if operand[1] == 'f' else 'u64'}(0x{operand[2:]}ull)"
        if re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+", operand):
            return f"u64({operand}ull)"
        if operand in self.shared:
            return f"u64({self.shared[operand]})"
        if operand in self.locals or operand in self.constants:
            return f"reinterpret_cast<u64>({operand})"
        raise UnknownInstructionError(operand)

    def address(self, operand: str) -> str:
        base, _, offset = operand.strip("[]").partition("+")
        return f"as<u64>({self.value(base)}) + u64({offset or 0}ll)"

    def instruction(self, opcode: str, operands: list[str], line: int) -> str:
        if m := re.fullmatch(r"bra(?:\.uni)?", opcode):
            return f"goto {operands[0].lstrip('$')};"
        if m := re.fullmatch(
            rf"(ld|st)(?:\.volatile)?(?:\.(global|shared|local|param))?(?:\.nc)?(?:\.v([24]))?\.{TYPE}",
            opcode,
        ):
            return self.move(m[1], m[2], int(m[3] or 1), m[4], operands, line)
        if opcode.startswith("mov.b") and "{" in "".join(operands):
            return self.pack(int(opcode[5:]), *operands)
        if m := re.fullmatch(rf"setp\.(eq|ne|lt|le|gt|ge)(u?)\.{TYPE}", opcode):
            return self.compare(m[1], bool(m[2]), m[3], *map(self.value, operands))
        if opcode == "{":  # one half wanted, one not: { .reg .b16 tmp; mov.b32 {tmp, %rs1}, %r1; }
            wanted = re.fullmatch(r"\.reg \.b\d+ tmp; mov\.b(\d+) (\{.*\}), (%\w+); \}", ", ".join(operands))
            return self.pack(int(wanted[1]), wanted[2], wanted[3])
        if opcode == "shfl.sync.bfly.b32":
            to, *rest = operands
            bits = [f"as<u32>({self.value(o)})" for o in rest]
            to, _, valid = to.partition("|")
            also = f" {self.value(valid)} = true;" if valid else ""
            return f"set<u32>({self.value(to)}, shuffle_xor({', '.join(bits)}, {line}));{also}"
        if opcode == "atom.shared.add.u32":
            to, at, n = operands
            at = self.address(at)
            return f"set<u32>({self.value(to)}, atomic_add_shared({at}, as<u32>({self.value(n)}), {line}));"
        if m := re.fullmatch(r"cp\.async\.(ca|cg)\.shared\.global(?:\.L2::(?:cache_hint|128B))?", opcode):
            to, source, n, *_ = operands
            only_l2 = str(m[1] == "cg").lower()
            return f"copy_async({self.address(to)}, {self.address(source)}, {n}, {only_l2}, {line});"
        if opcode == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32":
            return self.mma(*(split(o.strip("{}")) for o in operands))
        for pattern, code in ARITHMETIC:
            if m := re.fullmatch(pattern, opcode):
                return self.arithmetic(code, m.groups(), operands, line) + ";"
        raise UnknownInstructionError(f"{opcode} {', '.join(operands)}")

    def arithmetic(self, code: str, types: tuple[str, ...], operands: list[str], line: int) -> str:
        named = dict(zip("abcde", operands, strict=False))
        other = dict(zip("TS", types, strict=False)) | {"LINE": str(line), "A": "as"}

        def of(m: re.Match) -> str:
            return self.value(named[m[0]]) if m[0] in named else other[m[0]]

        return re.sub(r"\b(?:[abcdeTSA]|LINE)\b", of, code)

    def move(self, way: str, space: str, n: int, kind: str, operands: list[str], line: int) -> str:
        where, what = operands if way == "st" else operands[::-1]
        registers = [self.value(r) for r in split(what.strip("{}"))]
        if space == "param":
            name, _, offset = where.strip("[]").partition("+")
            index, width = [p for p, _ in self.parameters].index(name), int(kind[1:]) // 8
            return " ".join(
                f"set<{kind}>({r}, parameter<{kind}>(arguments[{index}], {int(offset or 0) + width * i}));"
                for i, r in enumerate(registers)
            )
        if space is None:  # generic: no kernel takes the address of shared memory
            space = "global"
        at = self.address(where)
        if way == "ld":
            sets = " ".join(f"set<{kind}>({r}, v[{i}]);" for i, r in enumerate(registers))
            return f"{{ {kind} v[{n}]; load_{space}(v, {at}, {line}); {sets} }}"
        values = ", ".join(f"as<{kind}>({r})" for r in registers)
        return f"{{ const {kind} v[{n}] = {{{values}}}; store_{space}(v, {at}, {line}); }}"

    def pack(self, bits: int, to: str, source: str) -> str:
        if to.startswith("{"):
            parts = split(to.strip("{}"))
            each, x = bits // len(parts), self.value(source)
            return " ".join(
                f"set<u{each}>({self.value(r)}, as<u{bits}>({x}) >> {each * i});"
                for i, r in enumerate(parts)
                if r != "tmp"
            )
        parts = split(source.strip("{}"))
        each = bits // len(parts)
        sums = " | ".join(f"u{bits}(as<u{each}>({self.value(r)})) << {each * i}" for i, r in enumerate(parts))
        return f"set<u{bits}>({self.value(to)}, {sums});"

    def compare(self, how: str, unordered: bool, kind: str, to: str, a: str, b: str) -> str:
        a, b = f"as<{kind}>({a})", f"as<{kind}>({b})"
        code = f"{a} {COMPARE[how]} {b}"
        if kind.startswith("f"):
            nan = f"std::isnan({a}) || std::isnan({b})"
            code = f"({nan}) || ({code})" if unordered else f"!({nan}) && ({code})"
        return f"{to} = {code};"

    def mma(self, d: list[str], a: list[str], b: list[str], c: list[str]) -> str:
        def values(kind: str, registers: list[str]) -> str:
            return ", ".join(f"as<{kind}>({self.value(r)})" for r in registers)

        sets = " ".join(f"set<f32>({self.value(r)}, d[{i}]);" for i, r in enumerate(d))
        return (
            f"{{ const u32 a[] = {{{values('u32', a)}}}, b[] = {{{values('u32', b)}}};"
            f" const f32 c[] = {{{values('f32', c)}}}; f32 d[4]; mma_m16n8k16(d, a, b, c); {sets} }}"
        )

    def source(self) -> str:
        if self.shared_bytes > 48 << 10:
            raise UnknownInstructionError(f"{self.name} has more than 48 KB of shared memory")
        sizes = ", ".join(str(n) for _, n in self.parameters)
        body = "\n    ".join(line for line in self.lines if line)
        return f"""
extern "C" void host_{self.name}(void** arguments) {{
    begin({self.most_threads}, {str(self.overlaps).lower()});
    {body}
}}
extern "C" const int* host_{self.name}_sizes() {{ static const int all[] = {{{sizes}, 0}}; return all; }}
"""


TABLE = re.compile(r"^\.global \.align \d+ \.b8 (\w+)\[(\d+)\] = \{([^}]*)\};", re.M)
ENTRY = re.compile(r"^\.visible \.entry (\w+)\((.*?)^\{\n(.*?)^\}", re.M | re.S)


def translate(text: str) -> str:
    """A PTX module as C++ source. Raises UnknownInstructionError.

    Of what the module keeps for itself only a table of bytes is known (of the sine's); numbers that C++'s
    `constexpr` leaves behind are nobody's.
    """
    tables = TABLE.findall(text)
    if len(tables) > 1:
        raise UnknownInstructionError(", ".join(name for name, _, _ in tables))
    own = "".join(f"alignas(16) static u8 {name}[{n}] = {{{values}}};\n" for name, n, values in tables)
    own += "".join(f"static const bool known = own_memory({name}, {n});\n" for name, n, _ in tables)
    overlaps = int(re.search(r"^\.target sm_(\d+)", text, re.M)[1]) >= 90
    kernels = []
    for m in ENTRY.finditer(text):
        line = text.count("\n", 0, m.start(3)) + 1
        kernels.append(Kernel(m[1], m[2], m[3], line, {name for name, _, _ in tables}, overlaps).source())
    if not kernels:
        raise UnknownInstructionError("a module without kernels")
    return f'#include "ptx.h"\nusing namespace ptx;\n{own}{"".join(kernels)}'


class PtxCompiler:
    """In place of NVRTC: NVRTC to PTX, that to C++, g++ to a library that the emulated driver loads."""

    def __init__(self):
        self.nvrtc = next(compilers())
        self.name = f"ptx of {self.nvrtc.name}"
        self._folder = tempfile.TemporaryDirectory(prefix="tinychat-ptx-")
        self._lock = threading.Lock()

    def _machine(self) -> str:
        """ptx.cpp, compiled once for all modules."""
        made = Path(self._folder.name) / "ptx.o"
        with self._lock:
            if not made.exists():
                _gcc("-O2", "-c", str(MACHINE[1]), f"-I{modules.SOURCES}", "-o", str(made))
        return str(made)

    def target(self, capability: int) -> str:
        return f"compute_{capability}"

    def compile(self, source, headers, target, defines):
        image, _ = self.nvrtc.compile(source, headers, target, defines)
        with tempfile.TemporaryDirectory() as folder:
            code, out = Path(folder) / "module.cpp", Path(folder) / "module.so"
            code.write_text(translate(image.rstrip(b"\0").decode()))
            _gcc("-O0", "-shared", f"-I{MACHINE[0].parent}", str(code), self._machine(), "-o", str(out))
            return out.read_bytes(), ""


def _gcc(*arguments: str) -> None:
    done = subprocess.run(["g++", *FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
