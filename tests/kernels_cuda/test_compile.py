"""Every source under NVRTC for every GPU generation, its registers, spills and shared memory against the
limits beside the kernels ("// resources NAME: registers …, spills …, shared …"). No GPU is needed.
"""

from __future__ import annotations

import re

import pytest

from tinychat.kernels_cuda import layout, modules
from tinychat.kernels_cuda.nvrtc import CompilerMissingError, Nvrtc

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)
COMMON = (layout.Form(4, "ZERO"), layout.Form(8, "SYMMETRIC"))

try:
    NVRTC, WHY = Nvrtc(), ""
except CompilerMissingError as e:
    NVRTC, WHY = None, f"{e} pip install nvidia-cuda-nvrtc-cu12"

pytestmark = pytest.mark.skipif(NVRTC is None, reason=WHY)


def limits(source: str) -> dict[str, dict[str, int]]:
    """What a source says that its kernels may use; "NAME/256" is NAME for heads of that size."""
    found = {}
    for name, rest in re.findall(
        r"^// resources ([\w/]+): (.*)$", (modules.SOURCES / source).read_text(), re.M
    ):
        found[name] = {word: int(n) for word, n in re.findall(r"(\w+) (\d+)", rest)}
    return found


def used(log: str) -> dict[str, dict[str, int]]:
    """What ptxas says that they do use."""
    found: dict[str, dict[str, int]] = {}
    for part in re.split(r"(?=Compiling entry function)", log)[1:]:
        name = re.match(r"Compiling entry function '(\w+)'", part)[1]
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spills": int(re.search(r"(\d+) bytes spill stores", part)[1]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def check(source: str, defines: dict[str, str], architecture: int) -> None:
    image, log = NVRTC.compile(
        modules.SOURCES / source, modules.headers(), f"sm_{architecture}", defines, verbose=True
    )
    assert image.startswith(b"\x7fELF")
    assert "warning" not in log, log
    allowed, actual = limits(source), used(log)
    assert actual
    for name, resources in actual.items():
        for what, n in resources.items():
            limit = allowed.get(f"{name}/{defines.get('HEAD')}", allowed[name])[what]
            assert n <= limit, f"{name} {defines} sm_{architecture}: {n} {what}"


def each(forms):
    return [pytest.param(f, id=f"{f.bits}-{f.meta}") for f in forms]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("form", each(COMMON))
def test_linears_compile_within_their_limits(form, architecture):
    check("linear.cu", form.defines, architecture)


@pytest.mark.parametrize("form", each(f for f in layout.FORMS if f not in COMMON))
def test_rarer_linears_compile_within_their_limits(form):
    check("linear.cu", form.defines, 86)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["rows.cu", "embed.cu"])
def test_the_rest_compiles_within_its_limits(source, architecture):
    check(source, COMMON[1].defines if source == "embed.cu" else {}, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["cache.cu", "attention.cu"])
def test_attention_compiles_within_its_limits(source, architecture):
    check(source, {"HEAD": "64", "KV_BITS": "16"}, architecture)


@pytest.mark.parametrize("head", [32, 96, 128, 256])
@pytest.mark.parametrize("bits", [16, 8])
def test_other_heads_compile_within_their_limits(head, bits):
    for source in ("cache.cu", "attention.cu"):
        check(source, {"HEAD": str(head), "KV_BITS": str(bits)}, 86)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("head", range(32, 257, 32))
def test_every_head_compiles_for_every_gpu(head, bits, architecture):
    for source in ("cache.cu", "attention.cu"):
        check(source, {"HEAD": str(head), "KV_BITS": str(bits)}, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("form", each(f for f in layout.FORMS if f not in COMMON))
def test_rarer_linears_compile_for_every_gpu(form, architecture):
    check("linear.cu", form.defines, architecture)


def test_every_kernel_states_its_limits():
    for source in modules.SOURCES.glob("*.cu"):
        text = source.read_text()
        kernels = set(re.findall(r"^(?:EXPORT|LINEAR)\((\w+)", text, re.M))
        assert kernels
        assert kernels == {name.split("/")[0] for name in limits(source.name)}, source.name


def test_a_gpu_newer_than_the_compiler_gets_ptx():
    newest = NVRTC.architectures()[-1]
    assert NVRTC.target(86) == "sm_86"
    assert NVRTC.target(newest + 30) == f"compute_{newest}"
    image, _ = NVRTC.compile(
        modules.SOURCES / "linear.cu", modules.headers(), f"compute_{newest}", layout.FORMS[0].defines
    )
    assert b".target" in image
