"""Every source under NVRTC for every GPU generation, its registers, spills and shared memory against the
limits beside the kernels ("// resources NAME: registers …, spills …, shared …, stage …"), and what it makes
for sm_90 against an error of ptxas. No GPU is needed.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from cubin import COPY_ASYNC, OPCODE, kernels, lost_policies, stage

from tinychat.kernels_cuda import driver, layout, modules
from tinychat.kernels_cuda.nvrtc import CompilerMissingError, compilers

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)

try:
    NVRTC, WHY = next(compilers()), ""
except CompilerMissingError as e:
    NVRTC, WHY = None, f"{e} pip install nvidia-cuda-nvrtc-cu12"

pytestmark = pytest.mark.skipif(NVRTC is None, reason=WHY)


def limits(source: str) -> dict[str, dict[str, int]]:
    """What a source says that its kernels may use; "NAME/256" is NAME for heads of that size and
    "NAME/coded" for coded scales, or those of each chunk; what is not named none."""
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
            "stack": int(re.search(r"(\d+) bytes stack frame", part)[1]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def check(source: str, defines: dict[str, str], architecture: int) -> None:
    image, log = NVRTC.compile(
        modules.SOURCES / source, modules.headers(), f"sm_{architecture}", defines, verbose=True
    )
    assert image.startswith(b"\x7fELF")
    assert "warning" not in log, log
    if architecture == 90:
        assert lost_policies(image) == 0, f"{source} {defines}"
    allowed, actual = limits(source), used(log)
    assert actual
    if defines == ZEROS.defines:
        for name, code in kernels(image).items():
            if "stage" in allowed[name]:
                actual[name]["stage"] = stage(code, architecture)
                assert actual[name]["stage"] > 50  # its products alone
    for name, resources in actual.items():
        for what, n in resources.items():
            coded = defines.get("BESIDE") in layout.CODED or "SPLIT" in defines
            kind = "coded" if coded else defines.get("HEAD")
            limit = allowed.get(f"{name}/{kind}", allowed[name]).get(what, 0)
            assert n <= limit, f"{name} {defines} sm_{architecture}: {n} {what}"


def attention_units(head: int, bits: int) -> list[tuple[str, dict[str, str]]]:
    return [(f"{name}.cu", {"HEAD": str(head), "KV_BITS": str(bits)}) for name in ("cache", "attention")]


def linear_units(*forms: layout.Form) -> list[tuple[str, dict[str, str]]]:
    return [(source, form.defines) for form in forms for source in ("linear.cu", "experts.cu")]


ZEROS = layout.Form(4, "UNSIGNED", "ZERO")
# Forms of 4 and 8 bits, of floats, and those of files.
FORMS = (
    layout.Form(4, "SIGNED", "FP16"),
    ZEROS,
    layout.Form(4, "UNSIGNED", "FP16_FP16"),
    layout.Form(4, "UNSIGNED", "FP32_FP32"),
    layout.Form(8, "SIGNED", "FP16"),
    layout.Form(8, "SIGNED", "FP32"),
    layout.Form(8, "SIGNED", "FP32_FP32"),
    layout.Form(16),
    layout.Form(32),
    layout.Form(2, "UNSIGNED", "INT4_INT4", 16),  # Q2_K
    layout.Form(3, "SIGNED", "INT6", 16),  # Q3_K
    layout.Form(4, "UNSIGNED", "INT6_INT6", 32),  # Q4_K
    layout.Form(5, "SIGNED", "FP16"),  # Q5_0
    layout.Form(5, "UNSIGNED", "FP16_FP16"),  # Q5_1
    layout.Form(5, "UNSIGNED", "INT6_INT6", 32),  # Q5_K
    layout.Form(6, "SIGNED", "INT8", 16),  # Q6_K
    layout.Form(4, "IQ4_NL", "FP16"),
    layout.Form(4, "IQ4_NL", "INT6", 32),  # IQ4_XS
    layout.Form(4, "E2M1", "E8M0", 32),  # MXFP4
    layout.Form(4, "E2M1", "E4M3", 16),  # NVFP4
    layout.Form(8, "E4M3", "FP32"),  # FP8
    layout.Form(4, "NF4", "FP32"),
    layout.Form(2, "UNSIGNED", "ZERO"),  # GPTQ and AWQ
    layout.Form(3, "UNSIGNED", "ZERO"),
    layout.Form(2, "UNSIGNED", "FP16_FP16"),  # MLX
    layout.Form(3, "UNSIGNED", "FP16_FP16"),
    layout.Form(6, "UNSIGNED", "FP16_FP16"),
    layout.Form(4, "UNSIGNED", "ZERO", 16),
)


# Every source, in its commonest shape.
USUAL = [
    *linear_units(ZEROS),
    ("embed.cu", layout.Form(8, "SIGNED", "FP16").defines),
    ("rows.cu", {}),
    ("logits.cu", {}),
    ("routes.cu", {}),
    ("recurrence.cu", {"WIDTH": "4", "COLUMNS": "128"}),
    *attention_units(64, 16),
]
# Another form of weight, and heads that need more registers.
OTHERS = [
    *linear_units(layout.Form(8, "SIGNED", "FP16")),
    ("linear.cu", layout.Form(4, "UNSIGNED", "INT6_INT6", 32).defines),
    ("embed.cu", layout.Form(6, "SIGNED", "INT8", 16).defines),
    ("recurrence.cu", {"WIDTH": "3", "COLUMNS": "0"}),
    ("recurrence.cu", {"WIDTH": "4", "COLUMNS": "256"}),
    *attention_units(128, 16),
]


def check_all(units: list[tuple[str, dict[str, str]]], architecture: int) -> None:
    """Two at a time: the compiler runs outside of Python."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(check, *unit, architecture) for unit in units]:
            done.result()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_source_compiles_within_its_limits(architecture):
    check_all(USUAL, architecture)


def test_every_source_is_among_the_usual():
    assert {source for source, _ in USUAL} == {f.name for f in modules.SOURCES.glob("*.cu")}


def test_other_forms_compile_within_their_limits():
    check_all(OTHERS, 86)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_compiles_for_every_gpu(architecture):
    heads = [unit for head in range(32, 257, 32) for bits in (16, 8) for unit in attention_units(head, bits)]
    check_all([*linear_units(*FORMS), *heads], architecture)
    in_half_stages = [
        (source, {**defines, "SPLIT": "1"}) for source, defines in linear_units(*FORMS)
        if defines["GROUP"] == "0" and defines["BESIDE"] != "NONE" and int(defines["BITS"]) < 8
    ]  # fmt: skip
    check_all(in_half_stages, architecture)
    check_all([("embed.cu", form.defines) for form in FORMS], architecture)


@pytest.fixture
def copying(tmp_path):
    """`copying(target, **defines)`: a kernel that copies 16 bytes and 4, once each, compiled."""
    source = tmp_path / "copy.cu"
    source.write_text(
        '#include "device.cuh"\n'
        'extern "C" __global__ void k(const u8* from, float* to) {\n'
        "    __shared__ float __align__(16) shared[5];\n"
        "    u64 policy = evict_first();\n"
        "    copy_once<16>(shared, from, policy);\n"
        "    copy_once<4>(shared + 4, from + 16, policy);\n"
        "    copy_wait<0>();\n"
        "    to[0] = shared[0] + shared[4];\n"
        "}\n"
    )
    return lambda target, **defines: NVRTC.compile(source, modules.headers(), target, defines)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_have_hints_before_hopper_and_where_they_are_not_turned_off(copying, architecture):
    def hints(**defines: str) -> int:
        return copying(f"compute_{architecture}", **defines).count(
            b"cp.async.cg.shared.global.L2::cache_hint"
        )

    assert hints() == (architecture < 90)
    assert hints(HINTS="0") == 0


def test_a_copy_whose_policy_is_lost_is_counted(copying):
    """One's register is set to what ptxas leaves there."""
    image = copying("sm_90", HINTS="1")
    (code,) = kernels(image).values()
    low, high = next((a, b) for a, b in code if a & 0xFF == COPY_ASYNC & 0xFF)
    found = low.to_bytes(8, "little") + high.to_bytes(8, "little")
    assert lost_policies(image) == 0
    lost = (low & ~OPCODE | COPY_ASYNC).to_bytes(8, "little") + (high & ~0x3F).to_bytes(8, "little")
    assert lost_policies(image.replace(found, lost)) == 1


@pytest.mark.slow
def test_with_hints_the_compilers_error_is_found():
    if NVRTC.version >= (13, 4):
        pytest.skip(f"{NVRTC.title} does not have the error")
    source, defines = modules.SOURCES / "linear.cu", ZEROS.defines
    image, _ = NVRTC.compile(source, modules.headers(), "sm_90", {**defines, "HINTS": "1"})
    assert lost_policies(image) > 0


def test_every_kernel_states_its_limits():
    for source in modules.SOURCES.glob("*.cu"):
        text = source.read_text()
        kernels = set(re.findall(r"^(?:EXPORT|LINEAR)\((\w+)", text, re.M))
        assert kernels
        assert kernels == {name.split("/")[0] for name in limits(source.name)}, source.name


def test_no_kernel_has_more_local_memory_than_room_is_left_for():
    stated = [kernel for source in modules.SOURCES.glob("*.cu") for kernel in limits(source.name).values()]
    assert max(kernel.get("stack", 0) for kernel in stated) == driver.STACK


def test_a_gpu_newer_than_the_compiler_gets_ptx():
    newest = NVRTC.architectures()[-1]
    assert NVRTC.target(86) == "sm_86"
    assert NVRTC.target(newest + 30) == f"compute_{newest}"
    image, _ = NVRTC.compile(
        modules.SOURCES / "linear.cu", modules.headers(), f"compute_{newest}", FORMS[0].defines
    )
    assert b".target" in image
