"""The CUDA driver, through its C interface: one device, one stream, memory, modules, launches, graphs.

`libcuda.so.1` is part of the driver, so nothing has to be installed or to match. Python launches each kernel
of a step once, while a graph is captured; afterwards a step is one call.
"""

from __future__ import annotations

import ctypes
import glob
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import numpy as np

LIBRARY = "libcuda.so.1"
# Where it lies when the loader does not know: WSL, NixOS, containers, Jetson.
PLACES = (
    "/usr/lib/wsl/lib",
    "/run/opengl-driver/lib",
    "/usr/local/nvidia/lib64",
    "/usr/lib/*-linux-gnu/nvidia",
    "/usr/lib/*-linux-gnu/tegra",
)
OLDEST_DRIVER = 12000  # CUDA 12.0: graphs as they are used here
OLDEST_CAPABILITY = 80  # cp.async and mma.m16n8k16
OVERLAP = (12, 3), 90  # driver and capability from which a kernel may start before the last one has ended

LAUNCH = "cuLaunchKernelEx"
OUT_OF_MEMORY, NO_DEVICE = 2, 100
# After these every call fails until the process ends (cuda.h): bad memory, links and addresses, traps, hangs.
LOST = {214, 220, 226, 700, 702, 710, *range(714, 720), 721, 999}
# A module that this driver does not take: of a newer compiler, of another GPU, or damaged.
REFUSED = {200, 209, 218, 221, 222, 300}
INTEGRATED, PROCESSORS, THREADS, MAJOR, MINOR = 18, 16, 39, 75, 76  # CUdevice_attribute
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
NON_BLOCKING = 1  # a stream that does not wait for the default one
RELAXED_CAPTURE = 2  # memory may be freed meanwhile: Python decides when
HELD = 64 << 20  # bytes of the host's that copies under way may keep
STACK = 512  # bytes of a thread: the most that a kernel says it has in local memory
GRAPHS = 64 << 20  # bytes of as many graphs as are kept


class DeviceMissingError(Exception):
    """No driver, no GPU, or one that the kernels do not run on; the text says which."""


class DeviceError(Exception):
    """A call failed: `code` is a CUresult, the text its name."""

    def __init__(self, call: str, code: int, name: str):
        self.code = code
        super().__init__(f"{call}: {name}")


class OutOfMemoryError(DeviceError):
    """The device has no room."""


class PinnedMemoryError(OutOfMemoryError):
    """The driver pins no more of the host's memory."""


class RefusedError(DeviceError):
    """The driver does not take a module."""


class LostError(DeviceError):
    """The device cannot be used in this process any more."""


class Memory:
    """Bytes on the device. Slices share them; the whole frees them."""

    def __init__(self, address: int, size: int, owner: Any = None):
        self.address, self.size, self._owner = address, size, owner

    def __getitem__(self, part: slice) -> Memory:
        """The bytes from `part.start` to `part.stop`."""
        start, stop, _ = part.indices(self.size)
        return Memory(self.address + start, stop - start, self._owner or self)


class SharedMemory(Memory):
    """Bytes of the host's that the device reads over the bus, by the same address. `bytes`: uint8 [size]."""

    def __init__(self, bytes: np.ndarray):
        super().__init__(bytes.ctypes.data, bytes.size, bytes)
        self.bytes = bytes

    def __getitem__(self, part: slice) -> SharedMemory:
        """The bytes from `part.start` to `part.stop`."""
        return SharedMemory(self.bytes[part])


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with an int for its value."""

    _fields_ = [("id", c_int), ("_", c_int), ("value", c_int), ("_rest", ctypes.c_char * 60)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", c_uint),
    ]


class Kernel:
    """A function of a module."""

    def __init__(self, handle: c_void_p, name: str, module: Any):
        self.handle, self.name, self._module = handle, name, module


class Device:
    """The first GPU (CUDA_VISIBLE_DEVICES says which that is)."""

    def __init__(self, library: str = LIBRARY):
        """Raises DeviceMissingError."""
        self.lost: LostError | None = None
        self.busy = False  # whether something was put on the stream since `synchronize`
        self._spent: list[tuple[str, Any]] = []  # to be freed then
        self._held: list[np.ndarray] = []  # that copies may read or write until then
        self._held_bytes = 0
        self._popped = byref(c_void_p())  # made here: when Python ends, names may be gone before memory is
        self._library = _open(library)
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        self.driver_version = version.value // 1000, version.value % 1000 // 10
        if version.value < OLDEST_DRIVER:
            raise DeviceMissingError(
                "The NVIDIA driver knows CUDA {}.{}; 12.0 is needed.".format(*self.driver_version)
            )
        try:
            self._call("cuInit", 0)
        except DeviceError as e:
            raise DeviceMissingError(f"There is no usable NVIDIA GPU ({e}).") from None
        n, device = c_int(), c_int()
        self._call("cuDeviceGetCount", byref(n))
        if not n.value:
            raise DeviceMissingError("There is no NVIDIA GPU.")
        self._call("cuDeviceGet", byref(device), 0)
        self._device = device
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), device)
        self.name = text.value.decode(errors="replace")
        self.capability = 10 * self._attribute(MAJOR) + self._attribute(MINOR)
        self.processors = self._attribute(PROCESSORS)
        self.threads = self._attribute(THREADS)
        self.integrated = bool(self._attribute(INTEGRATED))  # shares its memory with the CPU, as on Jetson
        if self.capability < OLDEST_CAPABILITY:
            raise DeviceMissingError(
                f"{self.name} has compute capability {self.capability / 10}; 8.0 (Ampere) or newer is needed."
            )
        self.overlaps = self.driver_version >= OVERLAP[0] and self.capability >= OVERLAP[1]
        self._overlap = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._last_call = ""
        self._context, self._stream = c_void_p(), c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), device)
        self.enter()
        self._call("cuStreamCreate", byref(self._stream), NON_BLOCKING)

    def enter(self) -> None:
        """Make it the calling thread's device: steps may come from any thread."""
        self._call("cuCtxSetCurrent", self._context)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    @property
    def room(self) -> int:
        """Bytes that the driver itself takes later on: for graphs, and for local memory, of which each thread
        that the GPU has room for gets as much as the largest kernel needs.
        """
        return GRAPHS + self.processors * self.threads * STACK

    # Memory. Copies are ordered with launches and run in the background; what they read and write, and what
    # is given up meanwhile, is kept until `synchronize`.

    def allocate(self, size: int) -> Memory:
        """Raises OutOfMemoryError."""
        address = c_uint64()
        try:
            self._call("cuMemAlloc_v2", byref(address), c_size_t(max(size, 16)))
        except OutOfMemoryError:
            if not self._spent:
                raise
            self.synchronize()
            self._call("cuMemAlloc_v2", byref(address), c_size_t(max(size, 16)))
        return Memory(address.value, size, _Freed(self, "cuMemFree_v2", address))

    def pinned(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Host memory that the device reads and writes itself."""
        address, size = c_void_p(), int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            self._call("cuMemHostAlloc", byref(address), c_size_t(max(size, 16)), c_uint(0))
        except OutOfMemoryError as e:
            raise PinnedMemoryError("cuMemHostAlloc", e.code, "CUDA_ERROR_OUT_OF_MEMORY") from None
        raw: Any = (ctypes.c_uint8 * max(size, 16)).from_address(address.value or 0)
        raw._owner = _Freed(self, "cuMemFreeHost", address)
        return np.frombuffer(raw, np.uint8)[:size].view(dtype).reshape(shape)

    def shared(self, size: int) -> SharedMemory:
        """Host memory that kernels read over the bus (with unified addresses all pinned memory is that).
        Raises PinnedMemoryError.
        """
        return SharedMemory(self.pinned((size,), np.uint8))

    def upload(self, to: Memory, data: np.ndarray) -> None:
        """Into device memory. Nobody may write to the array before `synchronize`. What is put into shared
        memory must be new there: kernels that read what it was may still run.
        """
        data = np.ascontiguousarray(data)
        if isinstance(to, SharedMemory):
            to.bytes[: data.nbytes] = data.reshape(-1).view(np.uint8)
        elif data.nbytes:
            self._hold(data)
            size = c_size_t(data.nbytes)
            self._put("cuMemcpyHtoDAsync_v2", c_uint64(to.address), c_void_p(data.ctypes.data), size)

    def download(self, to: np.ndarray, data: Memory) -> None:
        """Out of device memory; complete after `synchronize`."""
        if to.nbytes:
            self._hold(to)
            size = c_size_t(to.nbytes)
            self._put("cuMemcpyDtoHAsync_v2", c_void_p(to.ctypes.data), c_uint64(data.address), size)

    def copy(self, to: Memory, data: Memory) -> None:
        """Within the device."""
        size = c_size_t(data.size)
        self._put("cuMemcpyDtoDAsync_v2", c_uint64(to.address), c_uint64(data.address), size)

    def clear(self, memory: Memory) -> None:
        """Zero bytes."""
        size = c_size_t(memory.size)
        self._put("cuMemsetD8Async", c_uint64(memory.address), ctypes.c_ubyte(0), size)

    def synchronize(self) -> None:
        """Wait for everything so far."""
        self._call("cuStreamSynchronize", self._stream)
        self.busy = False
        self._held, self._held_bytes = [], 0
        while self._spent:
            function, address = self._spent.pop()
            getattr(self._library, function)(address)

    def _put(self, function: str, *arguments: Any) -> None:
        self.busy = True
        self._call(function, *arguments, self._stream)

    def _hold(self, data: np.ndarray) -> None:
        if self._held_bytes > HELD:
            self.synchronize()
        self._held.append(data)
        self._held_bytes += data.nbytes

    def _release(self, function: str, address: Any) -> None:
        """Free what nobody holds any more, now or when nothing can be reading it. Any thread may call this,
        and what other libraries do with the driver is left alone.
        """
        if self.lost or not self._context:  # the context took its memory along
            return
        if self.busy:
            self._spent.append((function, address))
        else:
            self._library.cuCtxPushCurrent_v2(self._context)
            getattr(self._library, function)(address)
            self._library.cuCtxPopCurrent_v2(self._popped)

    # Kernels

    def module(self, image: bytes) -> c_void_p:
        """Load machine code or PTX. Raises RefusedError."""
        module = c_void_p()
        self._call("cuModuleLoadData", byref(module), c_char_p(image))
        return module

    def kernel(self, module: c_void_p, name: str) -> Kernel:
        """One of its functions."""
        function = c_void_p()
        self._call("cuModuleGetFunction", byref(function), module, name.encode())
        return Kernel(function, name, module)

    def launch(self, kernel: Kernel, grid: Sequence[int], threads: int, *arguments: Any) -> None:
        """Arguments by their Python type: Memory (or None) is a pointer, int an int, float a float, a
        ctypes structure itself.

        With `overlaps`, a kernel that follows a kernel may start before that one has ended; it waits for it
        itself (device.cuh).
        """
        values = [_argument(a) for a in arguments]
        pointers = (c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        config = _LaunchConfig((*grid, 1, 1)[:3], (threads, 1, 1), 0, self._stream)
        if self.overlaps and self._last_call == LAUNCH:
            config.attributes, config.n_attributes = ctypes.pointer(self._overlap), 1
        self.busy = True
        self._call(LAUNCH, byref(config), kernel.handle, pointers, None, what=kernel.name)

    # Graphs

    def capture(self, launches: Callable[[], None]) -> Graph:
        """Graph of what `launches` puts on the stream, to be replayed in one call. Nothing runs yet."""
        graph, executable = c_void_p(), c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, RELAXED_CAPTURE)
        try:
            launches()
        except BaseException:
            self._library.cuStreamEndCapture(self._stream, byref(graph))
            raise
        self._call("cuStreamEndCapture", self._stream, byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", byref(executable), graph, c_uint64(0))
        finally:
            self._library.cuGraphDestroy(graph)
        return Graph(self, executable)

    # Time, for benchmarks

    def seconds(self, work: Callable[[], None]) -> float:
        """How long the device is busy with what `work` puts on the stream."""
        events = [c_void_p(), c_void_p()]
        for e in events:
            self._call("cuEventCreate", byref(e), 0)
        self._call("cuEventRecord", events[0], self._stream)
        work()
        self._call("cuEventRecord", events[1], self._stream)
        self._call("cuEventSynchronize", events[1])
        milliseconds = c_float()
        self._call("cuEventElapsedTime", byref(milliseconds), *events)
        for e in events:
            self._call("cuEventDestroy_v2", e)
        return milliseconds.value / 1000

    def close(self) -> None:
        """Give the device back. Memory and graphs must be gone."""
        if self._context:
            if not self.lost:
                self.synchronize()
            self._library.cuStreamDestroy_v2(self._stream)
            self._library.cuDevicePrimaryCtxRelease_v2(self._device)
            self._context = c_void_p()

    def _attribute(self, which: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), which, self._device)
        return value.value

    def _call(self, function: str, *arguments: Any, what: str | None = None) -> None:
        if self.lost:
            raise self.lost
        code = getattr(self._library, function)(*arguments)
        self._last_call = function
        if code:
            name = c_char_p()
            self._library.cuGetErrorName(code, byref(name))
            error = _kind(code)(what or function, code, (name.value or b"unknown error").decode())
            if isinstance(error, LostError):
                self.lost = error
            raise error


def _open(library: str) -> ctypes.CDLL:
    """The driver's library. Raises DeviceMissingError."""
    names = [library]
    if library == LIBRARY:
        names += [f for place in PLACES for f in sorted(glob.glob(f"{place}/{LIBRARY}"))]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceMissingError("No NVIDIA driver is installed.")


def _kind(code: int) -> type[DeviceError]:
    if code == OUT_OF_MEMORY:
        return OutOfMemoryError
    return LostError if code in LOST else RefusedError if code in REFUSED else DeviceError


class Graph:
    """Recorded launches."""

    def __init__(self, device: Device, executable: c_void_p):
        self._device, self._executable = device, executable

    def replay(self) -> None:
        """Put all of them on the stream."""
        self._device._put("cuGraphLaunch", self._executable)

    def __del__(self):
        self._device._release("cuGraphExecDestroy", self._executable)


class _Freed:
    """Frees memory when nobody holds it any more."""

    def __init__(self, device: Device, function: str, address: Any):
        self._device, self._function, self._address = device, function, address

    def __del__(self):
        self._device._release(self._function, self._address)


def _argument(value: Any) -> Any:
    if isinstance(value, Memory):
        return c_uint64(value.address)
    if value is None:
        return c_uint64(0)
    if isinstance(value, ctypes.Structure):
        return value
    return c_float(value) if isinstance(value, float) else c_int(value)
