#!/usr/bin/env bash
# Check and time the GPU path: benchmarks/gpu.sh [FOLDER]; the report is FOLDER/gpu.md.
# Needs an NVIDIA GPU, a C compiler (Triton's) and no network: Python 3.11 to 3.13 with torch, triton,
# numpy, numba, rich and msgspec. The part over HTTP also wants fastapi, starlette, pydantic,
# pydantic-core, annotated-types, typing-inspection, uvicorn, uvloop, httptools, prometheus-client,
# tiktoken, safetensors and typer, and is left out without. What is missing may lie as wheels in
# ./wheels, a version of each; the server's, for Python 3.12, by
#   pip download -d wheels --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#       --platform manylinux2014_x86_64 msgspec fastapi uvicorn httptools
# Under ten minutes: the report gets eight, the tests what is left.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-gpu-report}}
python=${PYTHON:-python3}
mkdir -p "$out"
if compgen -G 'wheels/*.whl' > /dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" wheels/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -c '
import importlib, sys
missing = []
for name in ("torch", "triton", "numpy", "numba", "rich", "msgspec"):
    try:  # a numba, say, that lies there but refuses its numpy is missing too
        importlib.import_module(name)
    except Exception as error:
        missing.append(f"{name} ({error})")
sys.exit("not importable: " + ", ".join(missing) + "; put wheels into wheels/" if missing else 0)
' || exit 1
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1
timeout 480 "$python" -m benchmarks.gpu --device cuda --out "$out" --limit-seconds 440
status=$?
# The same tests that CI runs in the interpreter, and those that need a device.
timeout 90 "$python" -m pytest -q -p no:cacheprovider -W default tests/engine/test_attention_triton.py \
    tests/engine/test_block_triton.py tests/engine/test_draw_triton.py tests/engine/test_step_triton.py \
    tests/engine/test_cuda_graph.py tests/engine/test_rounds.py tests/engine/test_loading.py \
    > "$out/tests.txt" 2>&1 || status=1
tail -n 5 "$out/tests.txt"
exit "$status"
