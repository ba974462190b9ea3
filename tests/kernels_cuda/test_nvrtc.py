"""Which of a machine's compilers is taken: libraries in place of NVRTC (nvrtc.cpp), and what is here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from emulation import FLAGS, folder, needs_emulation

from tinychat.backends import cuda_device
from tinychat.kernels_cuda import nvrtc
from tinychat.kernels_cuda.nvrtc import CompileError, CompilerMissingError, compilers

NEEDY, MUTE = "-needy", "-mute"


@pytest.fixture
def compiler():
    try:
        return next(compilers())
    except CompilerMissingError as e:
        pytest.skip(f"{e} {cuda_device.INSTALL}")


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("TINYCHAT_NVRTC", "/nowhere/libnvrtc.so.12")
    with pytest.raises(CompilerMissingError, match="NVRTC"):
        next(compilers())


def test_a_compiler_newer_than_the_driver_is_not_taken(compiler, monkeypatch):
    monkeypatch.setenv("TINYCHAT_NVRTC", compiler.path)
    assert next(compilers((compiler.version[0], 0))).version == compiler.version
    with pytest.raises(CompilerMissingError, match=r"NVRTC 1\d\.\d+ is newer than the driver \(CUDA 11\.8\)"):
        next(compilers((11, 8)))


def test_what_the_compiler_says_is_kept(compiler, tmp_path):
    (tmp_path / "bad.cu").write_text("__global__ void k() { nonsense(); }")
    with pytest.raises(CompileError, match="nonsense"):
        compiler.compile(tmp_path / "bad.cu", [], "sm_86", {})


def test_the_key_of_kernels_has_the_patch_and_the_options(compiler, monkeypatch):
    major, minor = compiler.version
    assert compiler.name.startswith(f"nvrtc {major}.{minor}.")
    before = compiler.name
    monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "--use_fast_math"))
    assert compiler.name == f"{before} --use_fast_math"


def test_every_compiler_of_this_machine_compiles_alone(compiler):
    """Each in a process of its own: nobody has loaded builtins for it. TINYCHAT_NVRTC names it."""
    code = (
        "from tinychat.kernels_cuda import modules\n"
        "from tinychat.kernels_cuda.nvrtc import compilers\n"
        "c = next(compilers())\n"
        "image, _ = c.compile(modules.SOURCES / 'embed.cu', modules.headers(), 'sm_90', {})\n"
        "assert image.startswith(b'\\x7fELF')\n"
    )
    for path in nvrtc.candidates():
        subprocess.run([sys.executable, "-c", code], check=True, env={"TINYCHAT_NVRTC": path})


@lru_cache
def library() -> Path:
    out = folder() / "libnvrtc-fake.so"
    subprocess.run(
        ["g++", *FLAGS, str(Path(__file__).parent / "nvrtc.cpp"), "-ldl", "-o", str(out)], check=True
    )
    return out


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(name, …)`: a wheel for each of these compilers, and no other compiler."""

    def with_compilers(*names: str) -> None:
        for i, name in enumerate(names):
            lib = tmp_path / f"site-{i}" / "nvidia" / "cu13" / "lib"
            lib.mkdir(parents=True)
            if name == "damaged":
                (lib / "libnvrtc.so.13").write_bytes(b"\x7fELF and then nothing")
            else:
                shutil.copy(library(), lib / f"libnvrtc.so.{name}")
        monkeypatch.setattr(nvrtc.sys, "path", [str(tmp_path / f"site-{i}") for i in range(len(names))])
        monkeypatch.delenv("TINYCHAT_NVRTC", raising=False)
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setattr(nvrtc, "TOOLKITS", ())
        monkeypatch.setattr(nvrtc.ctypes.util, "find_library", lambda name: None)

    return with_compilers


def names(driver: tuple[int, int] | None) -> list[str]:
    return [c.name.split()[1] for c in compilers(driver)]


@needs_emulation
@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (None, ["13.5.77", "13.0.77", "12.9.77", "12.4.77"]),
        ((13, 5), ["13.5.77", "13.0.77", "12.9.77", "12.4.77"]),
        ((13, 2), ["13.0.77", "12.9.77", "12.4.77", "13.5.77"]),  # what 13.5 makes may load all the same
        ((12, 6), ["12.4.77", "12.9.77"]),
        ((12, 0), ["12.4.77", "12.9.77"]),
    ],
)
def test_the_newest_compiler_that_the_driver_knows_is_the_first(machine, driver, expected):
    machine("12.9", "13.5", "12.4", "13.0", "11.8")
    assert names(driver) == expected


@needs_emulation
def test_one_that_does_not_load_or_compile_leaves_the_next(machine):
    machine("13.5" + MUTE, "damaged", "12.9", "13.0" + NEEDY)
    assert names((13, 5)) == ["12.9.77"]


@needs_emulation
def test_builtins_beside_a_compiler_are_loaded_before_it(machine, tmp_path):
    machine("13.0" + NEEDY, "12.9")
    source = tmp_path / "empty.cpp"
    source.write_text("")
    out = tmp_path / "site-0" / "nvidia" / "cu13" / "lib" / "libnvrtc-builtins.so.99"
    subprocess.run(["g++", "-shared", str(source), f"-Wl,-soname,{out.name}", "-o", str(out)], check=True)
    assert names(None) == ["13.0.77", "12.9.77"]


@needs_emulation
@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("11.8", "NVRTC 11.8 is older than CUDA 12"),
        ("damaged", "does not load"),
        ("13.5", r"NVRTC 13.5 is newer than the driver \(CUDA 12.4\)"),
        ("12.9" + MUTE, "does not compile .*failed to open libnvrtc-builtins"),
    ],
)
def test_where_none_works_it_is_said_why(machine, compiler, why):
    machine(compiler)
    with pytest.raises(CompilerMissingError, match=why):
        names((12, 4))


@needs_emulation
def test_a_library_in_the_working_directory_is_not_loaded(machine, tmp_path, monkeypatch):
    machine("12.9")
    monkeypatch.chdir(tmp_path / "site-0")
    monkeypatch.setattr(nvrtc.sys, "path", ["", "."])
    assert nvrtc.candidates() == []
