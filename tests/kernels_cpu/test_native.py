"""The C++ test binary: NEON under qemu, and everything under the sanitizers."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOM = Path(__file__).resolve().parents[2] / "kernels_cpu"
BINDINGS = ("module", "bind_")  # need Python
COMMON = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-w", "-pthread"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
X86_FLAGS = {"isa_avx2": AVX2, "isa_avxvnni": AVX2, "isa_avx512": AVX512, "isa_amx": AVX512}


def build(folder: Path, compiler: str, flags: list[str], isa_flags: dict[str, list[str]]) -> Path:
    """The test binary, its translation units compiled side by side."""
    sources = [ROOM / "test" / "main.cpp"]
    for f in sorted((ROOM / "src").glob("*.cpp")):
        if not f.stem.startswith(BINDINGS) and (
            not f.stem.startswith("isa_") or f.stem == "isa_scalar" or f.stem in isa_flags
        ):
            sources.append(f)
    running, objects = [], []
    for s in sources:
        o = folder / f"{s.stem}.o"
        command = [
            compiler,
            *COMMON,
            *flags,
            *isa_flags.get(s.stem, []),
            "-I",
            str(ROOM / "src"),
            "-c",
            str(s),
            "-o",
            str(o),
        ]
        running.append(subprocess.Popen(command))
        objects.append(str(o))
    assert all(p.wait() == 0 for p in running)
    binary = folder / "kernels_test"
    subprocess.run([compiler, *COMMON, *flags, *objects, "-o", str(binary)], check=True)
    return binary


def check(command: list[str]) -> str:
    r = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, (r.stdout + r.stderr)[-4000:]
    assert r.stdout.endswith("passed\n")
    return r.stdout


def need(*tools: str) -> None:
    missing = [t for t in tools if not shutil.which(t)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")


@pytest.mark.long  # a minute to compile and to emulate
def test_neon_gives_the_bits_of_the_scalar_kernels(tmp_path):
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    neon = {"isa_neon": ["-march=armv8.2-a+dotprod"], "isa_i8mm": ["-march=armv8.2-a+dotprod+i8mm"]}
    binary = build(tmp_path, "aarch64-linux-gnu-g++", ["-static"], neon)
    assert check(["qemu-aarch64", "-cpu", "max", str(binary), "kernels"]).split()[:2] == ["i8mm", "neon"]
    check(["qemu-aarch64", "-cpu", "max", str(binary), "threads"])
    for cpu, isas in {"neoverse-n1": ["neon", "scalar"], "cortex-a72": ["scalar"]}.items():
        assert check(["qemu-aarch64", "-cpu", cpu, str(binary), "isas"]).split()[:-1] == isas


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")
@pytest.mark.parametrize(
    ("sanitizer", "parts"), [("address,undefined", ["kernels", "threads"]), ("thread", ["threads"])]
)
def test_the_sanitizers_find_nothing(sanitizer, parts, tmp_path):
    need("g++")
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g1"]
    binary = build(tmp_path, "g++", flags, X86_FLAGS)
    for part in parts:
        check([str(binary), part])


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_tiles_are_configured_before_they_are_used(compiler, tmp_path):
    """In machine code, whatever the optimizer thinks of the configuration: the trial made at start."""
    need(compiler, "objdump")
    o = tmp_path / "amx.o"
    optimized = [flag for flag in COMMON if flag != "-O1"] + ["-O3"]
    subprocess.run([compiler, *optimized, "-c", str(ROOM / "src" / "amx.cpp"), "-o", str(o)], check=True)
    code = subprocess.run(["objdump", "-d", str(o)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(ldtilecfg|tile\w+|tdp\w+) *(.*)", code)
    names = ["ldtilecfg", "tilezero", "tileloadd", "tileloadd", "tdpbssd", "tilestored", "tilerelease"]
    assert [name for name, _ in found] == names * 8
    for i in range(0, len(found), len(names)):
        _, zero, a, b, product, stored, _ = (
            set(re.findall(r"tmm\d", operands)) for _, operands in found[i:][:7]
        )
        assert product == zero | a | b
        assert len(product) == 3
        assert stored == zero
    before, config = re.search(r"(.*?)ldtilecfg (0x\w+)\(%rsp\)", code, re.DOTALL).groups()
    written = re.findall(r"mov\w* .*,(0x\w+)\(%rsp\)", before)
    assert any(0 <= int(at, 16) - int(config, 16) < 64 for at in written)
