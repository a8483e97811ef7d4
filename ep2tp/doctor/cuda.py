"""The few calls of the CUDA driver API that the P2P probe needs, by ctypes: it takes neither torch nor a compiler."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_ALREADY_ENABLED = 704
NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetByPCIBusId": (POINTER(c_int), c_char_p),
    "cuDeviceGetP2PAttribute": (POINTER(c_int), c_int, c_int, c_int),
    "cuDeviceCanAccessPeer": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxEnablePeerAccess": (c_void_p, c_uint),
    "cuCtxSynchronize": (),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemcpyPeer": (c_uint64, c_void_p, c_uint64, c_void_p, c_size_t),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *([c_uint] * 7), c_void_p, POINTER(c_void_p), c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}


# What moves bytes, or is to make that possible; memory copies report what went wrong in a kernel before them.
_TRANSFERS = frozenset(
    {
        "cuCtxEnablePeerAccess",
        "cuMemcpyPeer",
        "cuLaunchKernel",
        "cuCtxSynchronize",
        "cuMemcpyHtoD_v2",
        "cuMemcpyDtoH_v2",
    }
)


class CudaError(Exception):
    """A call of the driver failed; names the call and the error.

    Attributes:
        is_lack: whether it lacked what a transfer needs (memory, a free GPU), before anything was transferred.
    """

    def __init__(self, message: str, is_lack: bool = True) -> None:
        super().__init__(message)
        self.is_lack = is_lack


class Driver:
    """The driver's library, loaded and initialised."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"libcuda.so.1 cannot be loaded: {error}") from None
        for name, arguments in _SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        self("cuInit", 0)

    def __call__(self, name: str, *arguments: Any, accept: tuple[int, ...] = ()) -> None:
        """Call a function of the driver.

        Raises:
            CudaError: it returned neither 0 nor one of ``accept``.
        """
        status = getattr(self._library, name)(*arguments)
        if status and status not in accept:
            words = c_char_p()
            self._library.cuGetErrorName(status, byref(words))
            raise CudaError(f"{name}: {(words.value or b'unknown error').decode()} ({status})", name not in _TRANSFERS)

    def device(self, bus_id: str) -> Device:
        """The GPU at a PCI address."""
        ordinal = c_int()
        self("cuDeviceGetByPCIBusId", byref(ordinal), bus_id.encode())
        return Device(self, ordinal.value)


@dataclass
class Device:
    """One GPU with its primary context."""

    driver: Driver
    ordinal: int

    @cached_property
    def context(self) -> c_void_p:
        """The primary context, which is created on first use."""
        context = c_void_p()
        self.driver("cuDevicePrimaryCtxRetain", byref(context), self.ordinal)
        return context

    def use(self) -> None:
        """Make it the device that further calls of this thread mean."""
        self.driver("cuCtxSetCurrent", self.context)

    def can_access(self, peer: Device) -> bool:
        """Whether the driver offers direct access to the peer's memory."""
        answer = c_int()
        self.driver("cuDeviceCanAccessPeer", byref(answer), self.ordinal, peer.ordinal)
        return bool(answer.value)

    def attribute(self, attribute: int, peer: Device) -> bool:
        """A P2P attribute towards a peer."""
        answer = c_int()
        self.driver("cuDeviceGetP2PAttribute", byref(answer), attribute, self.ordinal, peer.ordinal)
        return bool(answer.value)

    def enable(self, peer: Device) -> None:
        """Map the peer's memory, so that kernels and copies of this device reach it directly."""
        self.use()
        self.driver("cuCtxEnablePeerAccess", peer.context, 0, accept=(_ALREADY_ENABLED,))

    def put(self, data: bytes) -> int:
        """Memory of this device that holds ``data``; returns its address. It lives as long as the process."""
        self.use()
        address = c_uint64()
        self.driver("cuMemAlloc_v2", byref(address), len(data))
        self.driver("cuMemcpyHtoD_v2", address, data, len(data))
        return address.value

    def get(self, address: int, size: int) -> bytes:
        """``size`` bytes at an address of this device's memory."""
        self.use()
        data = ctypes.create_string_buffer(size)
        self.driver("cuMemcpyDtoH_v2", data, address, size)
        return data.raw

    def copy_to(self, peer: Device, target: int, source: int, size: int) -> None:
        """Copy from this device's memory to the peer's, by the copy engines; returns when it is done."""
        self.use()
        self.driver("cuMemcpyPeer", target, peer.context, source, self.context, size)
        self.wait()

    def load(self, ptx: str) -> dict[str, c_void_p]:
        """Load a module; the driver compiles it. Returns its kernels by name."""
        self.use()
        module = c_void_p()
        self.driver("cuModuleLoadData", byref(module), ptx.encode())
        kernels = {}
        for line in ptx.splitlines():
            if line.startswith(".visible .entry "):
                name = line.split()[2].partition("(")[0]
                kernels[name] = c_void_p()
                self.driver("cuModuleGetFunction", byref(kernels[name]), module, name.encode())
        return kernels

    def launch(self, kernel: c_void_p, blocks: int, threads: int, *arguments: c_uint64 | c_uint) -> None:
        """Start a kernel on this device, without waiting for it."""
        self.use()
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self.driver("cuLaunchKernel", kernel, blocks, 1, 1, threads, 1, 1, 0, None, pointers, None)

    def wait(self) -> None:
        """Wait until this device has done all that was started."""
        self.use()
        self.driver("cuCtxSynchronize")
