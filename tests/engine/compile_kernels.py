"""Compiles every kernel of the engine for an H200, which needs none: `test_kernels_compile.py`.

A program of its own, because a process that has its kernels interpreted cannot compile them. Prints
for each kernel what the compiler made of it.
"""

import json
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.attention_triton import _decode_kernel, _prefill_kernel, _write_kernel
from engine.block_triton import _layer_norm_kernel
from engine.draw_triton import _draw_kernel
from engine.linear_triton import _linear_kernel

_INDICES = {"positions": "*i64", "row_sequences": "*i64", "tables": "*i32", "tiles": "*i32"}
_SCRATCH = {"mixtures": "*fp32", "maxima": "*fp32", "totals": "*fp32", "num_done": "*i32"}
_SCALARS = {"scale": "fp32", "epsilon": "fp32", "num_rows": "i32", "num_out": "i32"}
_DRAW = {
    "logits": "*fp32",
    "best": "*fp32",
    "temperatures": "*fp64",
    "num_ids": "i32",
    "seeds": "*i64",
    "choices": "*i64",
    "peaks": "*fp64",
    "ids": "*i64",
}
_HEADS = {"D": 64, "PADDED_D": 64, "BLOCK_SIZE": 16}


def compile_kernel(kernel: Any, values: str, constants: dict[str, Any], **options: int) -> None:
    """Compile with tensors of `values` unless their names say otherwise; print the outcome."""
    types = {**_DRAW, **_INDICES, **_SCRATCH, **_SCALARS, "rows": "*i32"}
    names = kernel.arg_names
    signature, hints = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_stride"):
            signature[name] = "i32"
        else:
            signature[name] = types.get(name, f"*{values}")
        # As a launch finds it out: addresses and strides are multiples of 16.
        if signature[name].startswith("*") or name.endswith("_stride"):
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=hints,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    outcome = {
        "kernel": kernel.__name__,
        "values": values,
        "uses_tensor_cores": "wgmma.mma_async" in ptx,
        "loads_ahead": "cp.async" in ptx,
        "shared_bytes": compiled.metadata.shared,
        "has_code": len(compiled.asm["cubin"]) > 0,
    }
    sys.stdout.write(json.dumps(outcome) + "\n")


def main() -> None:
    """Compile them all as GPT-2 124M has them, in bfloat16; float32 where the code differs."""
    write = {"WIDTH": 768, "PADDED_WIDTH": 1024, "D": 64, "BLOCK_SIZE": 16}
    norm = {"WIDTH": 768, "PADDED_WIDTH": 1024}
    linear = {"IN": 768, "ROWS": 64, "INS": 64, "ACTIVATION": None, "OPERAND": tl.bfloat16}
    compile_kernel(_write_kernel, "bf16", write)
    compile_kernel(_layer_norm_kernel, "bf16", norm)
    compile_kernel(_draw_kernel, "fp32", {"IDS": 1024, "NO_CHANCE": -19.5}, num_warps=4)
    for all_rows in (True, False):
        decode = {**_HEADS, "SPLIT": 256, "KEYS": 32, "ALL_ROWS": all_rows}
        compile_kernel(_decode_kernel, "bf16", decode, num_warps=4, num_stages=2)
    tile = {"QUERIES": 64, "KEYS": 64, "OPERAND": tl.bfloat16}
    compile_kernel(_prefill_kernel, "bf16", {**_HEADS, **tile}, num_warps=4, num_stages=2)
    tile = {"QUERIES": 16, "KEYS": 32, "OPERAND": tl.float32}
    compile_kernel(_prefill_kernel, "fp32", {**_HEADS, **tile}, num_warps=4, num_stages=1)
    for changes in (
        {"OUTS": 16},
        {"OUTS": 32, "ACTIVATION": "gelu_new", "residual": None},
        {"OUTS": 32, "ACTIVATION": "gelu", "bias": None},
        {"OUTS": 64, "ACTIVATION": "relu", "residual": None, "bias": None},
    ):
        compile_kernel(_linear_kernel, "bf16", {**linear, **changes}, num_warps=4, num_stages=4)


if __name__ == "__main__":
    main()
