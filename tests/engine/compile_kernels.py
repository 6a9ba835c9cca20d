"""Compiles every kernel of the engine for an H200, which needs none: `test_kernels_compile.py`.

A program of its own, because a process that has its kernels interpreted cannot compile them. Prints
for each kernel what the compiler made of it.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.attention_triton import PART_TOKENS, _decode_kernel, _prefill_kernel, _write_kernel
from engine.block_triton import _layer_norm_kernel
from engine.draw_triton import _draw_kernel, _filter_kernel
from engine.linear_triton import _linear_kernel, tile_of
from engine.sampling_params import COLDEST
from engine.step_ends import NOT_FINITE
from engine.step_triton import _begin_kernel, _finish_kernel, _peaks_kernel

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
    "listed": "*i32",
    "top_ks": "*i64",
    "top_ps": "*fp64",
    "min_ps": "*fp64",
    "winners": "*i64",
    "num_chunks": "i32",
}
_ENDS = {
    "chosen": "*i64",
    "integers": "*i64",
    "shares": "*fp64",
    "gathered": "*i64",
    "gathered_shares": "*fp64",
    "part_peaks": "*fp32",
    "part_ids": "*i32",
    "drawn": "*i64",
    "token_ids": "*i64",
    "num_slots": "i32",
    "num_blocks": "i32",
    "num_parts": "i32",
    "last_position": "i32",
}
_HOPPER_SHARED_BYTES = 232_448
_SMALL_SHARED_BYTES = 101_376  # a GeForce's
_HEADS = {"D": 64, "PADDED_D": 64, "BLOCK_SIZE": 16}


def reductions(code: str) -> list[str]:
    """How sums and maxima are spread over threads, from which the order of a sum follows."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", code, re.MULTILINE))
    operands = re.findall(r"\}\) : \((tensor<[^)]*)\) ->", code)
    spelled = (re.sub(r"#\w+", lambda m: layouts.get(m[0], m[0]), one) for one in operands)
    return sorted(set(spelled))


def bytes_beside_registers(cubin: bytes) -> int | None:
    """What a thread keeps in memory of its own, as it has too few registers; None: no tool says."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path  # comes with triton, as ptxas does
    except (AttributeError, RuntimeError):
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).* LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]) + int(found[2])


def compile_kernel(
    kernel: Any,
    values: str,
    constants: dict[str, Any],
    *,
    cache: str | None = None,
    allowed_bytes: int = _HOPPER_SHARED_BYTES,
    **options: Any,
) -> None:
    """Compile with tensors of `values` unless their names say otherwise; print the outcome."""
    types = {**_DRAW, **_ENDS, **_INDICES, **_SCRATCH, **_SCALARS, "rows": "*i32"}
    names = kernel.arg_names
    signature, hints = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_stride"):
            signature[name] = "i32"
        else:
            is_cached = cache is not None and name.startswith("cache_")
            signature[name] = types.get(name, f"*{cache if is_cached else values}")
        # As a launch finds it out: addresses and strides are multiples of 16.
        is_stride = signature[name] == "i32" and name.endswith("_stride")
        if signature[name].startswith("*") or is_stride:
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
        "fits": compiled.metadata.shared <= allowed_bytes,
        "has_code": len(compiled.asm["cubin"]) > 0,
        "bytes_beside_registers": bytes_beside_registers(compiled.asm["cubin"]),
        "values_in_cache": cache or values,
        "fuses": "fma.rn.f32" in ptx,
        "reductions": reductions(compiled.asm["ttgir"]),
        # Where another address of these means another program.
        "specialised": [
            parameter.name
            for parameter in kernel.params
            if not (parameter.is_constexpr or parameter.do_not_specialize_on_alignment)
        ],
    }
    sys.stdout.write(json.dumps(outcome) + "\n")


def main() -> None:
    """Compile them all as GPT-2 124M has them, in bfloat16; float32 where the code differs."""
    write = {"WIDTH": 768, "PADDED_WIDTH": 1024, "D": 64, "BLOCK_SIZE": 16}
    norm = {"WIDTH": 768, "PADDED_WIDTH": 1024}
    compile_kernel(_write_kernel, "bf16", write)
    compile_kernel(_write_kernel, "bf16", write, cache="fp8e4nv")
    compile_kernel(_layer_norm_kernel, "bf16", norm)
    draw = {"IDS": 1024}
    compile_kernel(_draw_kernel, "fp32", draw, num_warps=4, enable_fp_fusion=False)
    filters = {**draw, "CHUNKS": 1024, "TILE": 4096}
    compile_kernel(_filter_kernel, "fp32", filters, num_warps=16, enable_fp_fusion=False)
    one_chunk = {**filters, "CHUNKS": 32, "num_chunks": 1}  # of a vocabulary of characters
    compile_kernel(_filter_kernel, "fp32", one_chunk, num_warps=16, enable_fp_fusion=False)
    begin = {"WIDTH": 768, "PADDED_WIDTH": 1024, "BLOCK_SIZE": 16, "COLDEST": COLDEST}
    compile_kernel(_begin_kernel, "bf16", begin, num_warps=4)
    compile_kernel(_begin_kernel, "fp32", begin, num_warps=4)
    compile_kernel(_peaks_kernel, "fp32", {"IDS": 1024}, num_warps=4)
    finish = {"PADDED_PARTS": 64, "NOT_FINITE": NOT_FINITE}
    compile_kernel(_finish_kernel, "fp32", finish, num_warps=1)
    compile_kernel(_finish_kernel, "fp32", {**finish, "drawn": None}, num_warps=1)
    one_part = {**finish, "PADDED_PARTS": 1, "num_parts": 1}  # of a vocabulary of characters
    compile_kernel(_finish_kernel, "fp32", one_part, num_warps=1)
    for all_rows, in_turn in ((True, True), (True, False), (False, True)):
        decode = {**_HEADS, "PART": PART_TOKENS, "ALL_ROWS": all_rows, "IN_TURN": in_turn}
        for cache in ("bf16", "fp8e4nv"):
            compile_kernel(
                _decode_kernel, "bf16", decode, cache=cache, num_warps=4, enable_fp_fusion=False
            )
    tile = {"QUERIES": 64, "KEYS": 64, "OPERAND": tl.bfloat16}
    for cache in ("bf16", "fp8e4nv"):
        compile_kernel(
            _prefill_kernel, "bf16", {**_HEADS, **tile}, cache=cache, num_warps=4, num_stages=2
        )
    tile = {"QUERIES": 16, "KEYS": 32, "OPERAND": tl.float32}
    compile_kernel(_prefill_kernel, "fp32", {**_HEADS, **tile}, num_warps=4, num_stages=1)
    products: list[tuple[int, int, dict[str, Any]]] = [
        (2304, 768, {"residual": None}),
        (768, 768, {}),
        (3072, 768, {"ACTIVATION": "gelu_new", "residual": None}),
        (3072, 768, {"ACTIVATION": "gelu", "bias": None}),
        (768, 3072, {"ACTIVATION": "relu"}),
        (50257, 768, {"residual": None, "bias": None}),
    ]
    chips = (
        ("bf16", tl.bfloat16, 2, _HOPPER_SHARED_BYTES),
        ("bf16", tl.bfloat16, 2, _SMALL_SHARED_BYTES),
        ("fp32", tl.float32, 4, _SMALL_SHARED_BYTES),
    )
    for values, operand, size, shared_bytes in chips:
        # Other chips and precisions have tiles of their own for three kinds of weights.
        is_hopper = shared_bytes == _HOPPER_SHARED_BYTES
        some = products if is_hopper else [products[0], products[1], products[-1]]
        for num_out, num_in, changes in some:
            shape = tile_of(num_out, num_in, bytes_per_value=size, shared_bytes=shared_bytes)
            linear = {
                "IN": num_in, "ROWS": shape.rows, "OUTS": shape.outs, "INS": shape.ins,
                "ACTIVATION": None, "OPERAND": operand, **changes,
            }  # fmt: skip
            compile_kernel(
                _linear_kernel, values, linear, allowed_bytes=shared_bytes,
                num_warps=shape.num_warps, num_stages=shape.num_stages,
            )  # fmt: skip


if __name__ == "__main__":
    main()
