"""Whether this machine's GPU may be trusted: its self-check, in child processes which may crash or hang, and
what `--device auto` makes of it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict

from tinychat.backends import cuda_device, cuda_record
from tinychat.backends.cuda_record import VARIANTS, Record, Variant
from tinychat.base import children
from tinychat.base.errors import TinychatError
from tinychat.kernels_cuda.modules import Modules

CHILD = "tinychat.gpu_check"
SECONDS = 300  # that a child may take: most of it is compiling


def open_proved(tell: Callable[[str], None] | None = None) -> Modules:
    """The GPU, if it has passed its self-check with this driver, compiler and these kernels; the check is
    made where it was not. tell: hears what takes long.

    Raises TinychatError where there is none, or it failed.
    """
    record = cuda_record.stored()
    if record is None or record.stamp != cuda_record.stamp():
        record = run(tell=tell)  # before anything is computed here: it may hang
    modules = cuda_device.open_modules(tell=tell)
    if record.key != cuda_record.key_of(modules):
        record = run(tell=tell)  # another GPU, or another compiler
    if not record.passed:
        failed = next((name for name, came in record.trials.items() if isinstance(came, str)), "opening it")
        raise TinychatError(
            f"{modules.device.name} failed its self-check ({failed}).",
            "tinychat doctor --gpu repeats it and says what to report.",
        )
    record.variant.apply(modules)
    return modules


def run(
    command: list[str] | None = None, seconds: float = SECONDS, tell: Callable[[str], None] | None = None
) -> Record:
    """Check the GPU in child processes, one for each way of running kernels until one passes, and keep the
    result.

    command: in place of the check's module. Raises TinychatError where there is no GPU to check.
    """
    command = command or children.python_command(CHILD)
    for variant in VARIANTS:
        if tell:
            how = [word for word, on in asdict(variant).items() if not on]
            tell("Checking the GPU" + (f" without {' and '.join(how)}." if how else "."))
        record = _child([*command, json.dumps(asdict(variant))], variant, seconds)
        if record.passed:
            break
    try:
        record.store()
    except OSError as e:
        raise TinychatError(
            f"What the GPU's self-check came to cannot be kept: {e.strerror}.",
            "Make room, or mend TINYCHAT_HOME.",
        ) from e
    return record


def _child(command: list[str], variant: Variant, seconds: float) -> Record:
    """What one child came to. Where it ended without a word, the trial that it had begun is to blame."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as cried:
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=cried, timeout=seconds, check=False
            ).returncode
            end = f"the process ended ({code})"
        except subprocess.TimeoutExpired:
            end = f"nothing happened within {seconds:g} seconds"
        for file in (said, cried):
            file.seek(0)
        lines, last_words = said.read().decode(errors="replace").splitlines(), cried.read()[-2000:]
    record, begun, ended = Record("", False, variant), "opening the GPU", False
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        begun = event.get("begin", begun)
        record.trials |= event.get("end", {})
        record.facts |= event.get("facts", {})
        record.key = event.get("key", record.key)
        if "refused" in event:
            raise TinychatError(*event["refused"])
        ended = ended or "done" in event
    failed = [name for name, result in record.trials.items() if isinstance(result, str)]
    record.passed = ended and not failed
    if not ended:
        record.trials[begun] = end
        record.facts["stderr"] = last_words.decode(errors="replace")
    return record
