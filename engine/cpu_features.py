"""The processor that kernels are compiled for; the one place that asks numba for it."""

import ctypes
import sys

import llvmlite
import numba
from llvmlite import binding
from numba.core.codegen import get_host_cpu_features
from numba.core.registry import cpu_target

ARM = ("aarch64", "arm64")  # as Linux and macOS say
_DOT_PRODUCTS = "dotprod"  # LLVM's name of ARM's products of four bytes each
_AT_HWCAP, _HWCAP_ASIMDDP = 16, 1 << 20  # Linux, arch/arm64/include/uapi/asm/hwcap.h


def processor() -> tuple[str, frozenset[str]]:
    """The architecture that numba compiles for, and what it has, by LLVM's names."""
    triple, _, features = _magic()
    return triple.split("-")[0], frozenset(f[1:] for f in features.split(",") if f[:1] == "+")


def compiled_for() -> str:
    """The processor that kernels are compiled for, and by what: their last bits depend on both."""
    return f"{' '.join(_magic())} llvmlite {llvmlite.__version__}"


def _magic() -> tuple[str, str, str]:
    """The triple, the processor's name and its features."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, features


def _has_dot_products() -> bool:
    """Whether this ARM has them; every Apple of that kind does."""
    if sys.platform != "linux":
        return sys.platform == "darwin"
    return bool(ctypes.CDLL(None).getauxval(_AT_HWCAP) & _HWCAP_ASIMDDP)


def _name_dot_products() -> None:
    """Let numba know of an ARM's dot products, which LLVM does not look for on Linux or macOS.

    It finds the others by itself. What NUMBA_CPU_FEATURES says is left as it is.
    """
    if numba.config.CPU_FEATURES is None and _has_dot_products():
        numba.config.CPU_FEATURES = f"{get_host_cpu_features()},+{_DOT_PRODUCTS}".lstrip(",")


if binding.get_process_triple().split("-")[0] in ARM:  # before numba makes up its mind
    _name_dot_products()
