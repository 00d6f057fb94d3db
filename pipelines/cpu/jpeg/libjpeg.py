"""Functions and structures of libjpeg-turbo, from the library that Pillow is linked with.

Pillow's wheels ship libjpeg-turbo. Kernels call its functions directly, without the GIL. Offsets are those of 64-bit
Linux in the ABIs 6.2 and 8.0, which agree on the fields used here.

libjpeg reports an error by calling `error_exit`, which must not return. As in C programs, the callback jumps back to
the caller of `set_jump`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.typing.templates import Signature
from numba.extending import intrinsic
from numba.types import int32, intp
from PIL import _imaging

from configs.utils.errors import UserError
from pipelines.cpu.jit import native_callback

PREFIX = "model_zhu_"  # of symbols, since other libraries in the process may be linked with another libjpeg
FUNCTIONS = (
    "jpeg_std_error",
    "jpeg_CreateDecompress",
    "jpeg_mem_src",
    "jpeg_read_header",
    "jpeg_start_decompress",
    "jpeg_crop_scanline",
    "jpeg_skip_scanlines",
    "jpeg_read_scanlines",
    "jpeg_finish_decompress",
    "jpeg_abort_decompress",
    "jpeg_destroy_decompress",
)
ABIS = ((62, 632), (80, 656))  # JPEG_LIB_VERSION and sizeof(jpeg_decompress_struct)

# struct jpeg_decompress_struct: offsets in units of 8 bytes (first line) and of 4 bytes
ERROR_MANAGER, CLIENT_DATA = 0, 3
IMAGE_WIDTH, IMAGE_HEIGHT, OUT_COLOR_SPACE, SCALE_NUM, SCALE_DENOM, DCT_METHOD = 12, 13, 16, 17, 18, 24
OUTPUT_WIDTH, OUTPUT_HEIGHT, OUTPUT_SCANLINE = 34, 35, 42
RGB, ACCURATE, FAST = 2, 0, 1  # JCS_RGB, JDCT_ISLOW, JDCT_IFAST
# struct jpeg_error_mgr: offsets in units of 8 bytes
ERROR_EXIT, OUTPUT_MESSAGE, WARNINGS = 0, 2, 16


def _function(name: str, *signature: types.Type) -> types.ExternalFunction:
    return types.ExternalFunction(PREFIX + name, signature[0](*signature[1:]))


std_error = _function("jpeg_std_error", intp, intp)
create = _function("jpeg_CreateDecompress", types.void, intp, int32, intp)
memory_source = _function("jpeg_mem_src", types.void, intp, intp, intp)
read_header = _function("jpeg_read_header", int32, intp, int32)
start = _function("jpeg_start_decompress", int32, intp)
crop_columns = _function("jpeg_crop_scanline", types.void, intp, intp, intp)
skip_rows = _function("jpeg_skip_scanlines", int32, intp, int32)
read_rows = _function("jpeg_read_scanlines", int32, intp, intp, int32)
finish = _function("jpeg_finish_decompress", int32, intp)
abort = _function("jpeg_abort_decompress", types.void, intp)
_long_jump = types.ExternalFunction("longjmp", types.void(intp, int32))
_pointer = types.CPointer(types.intp)


@intrinsic
def set_jump(typing: object, buffer: types.Integer) -> tuple[Signature, Callable[..., ir.Value]]:
    """Return 0, and return again with another value when an error jumps to `buffer`, the address of a jmp_buf."""

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, values: list[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
        function = cgutils.get_or_insert_function(builder.module, kind, "_setjmp")
        function.attributes.add("returns_twice")  # keeps LLVM from reusing stack slots and from inlining the caller
        return builder.call(function, values)

    return int32(intp), generate


def _jump_back(decompressor: types.CPointer) -> None:
    _long_jump(decompressor[CLIENT_DATA], 1)


def _ignore(decompressor: types.CPointer) -> None:
    """Discard a message, which libjpeg would print."""


error_exit = native_callback(types.void(_pointer))(_jump_back)
output_message = native_callback(types.void(_pointer))(_ignore)


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Load the library and define its functions as symbols for kernels. Call this before the first kernel.

    Raises:
        UserError: Pillow is linked with another JPEG library.
    """
    library = ctypes.CDLL(_imaging.__file__)  # symbols are also looked up in the libraries that this one is linked with
    try:
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in FUNCTIONS]
    except AttributeError as error:
        raise unsupported(str(error)) from None
    for name, address in zip(FUNCTIONS, addresses, strict=True):
        binding.add_symbol(PREFIX + name, address)
    return library


def unsupported(reason: str) -> UserError:
    return UserError(
        f"Pillow ({_imaging.__file__}) is not linked with a supported version of libjpeg-turbo ({reason}); install "
        "Pillow's wheel, e.g. with pip install --force-reinstall --only-binary :all: pillow"
    )
