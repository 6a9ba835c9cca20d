"""What Triton's interpreter does otherwise than a GPU, in one place; knows no kernels.

Under `TRITON_INTERPRET=1`, set before the first import of triton, kernels run in numpy on a CPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)

_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def operand_type(dtype: torch.dtype) -> Any:
    """The type in which a matrix product of values of a dtype takes its operands.

    Their own: products of two 16-bit numbers are exact in the float32 they are added up in. The
    interpreter keeps bfloat16 as its bits and would multiply those, so there they are widened.
    """
    return tl.float32 if IS_INTERPRETED else _TYPES[dtype]
