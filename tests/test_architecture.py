"""Who may import whom: the table of the house, enforced."""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "weights", "engine", "server", "training")

# What a room may import of the others; server sees only named modules of them.
ALLOWED_ROOMS = {
    "model": set[str](),
    "weights": {"model"},
    "engine": {"model", "weights"},
    "training": {"model", "weights", "engine"},
    "server": {"engine", "weights", "model"},
    "benchmarks": {"model", "weights", "engine", "server"},
}
ALLOWED_TO_SERVER = {
    "engine.client",
    "engine.config",
    "engine.errors",
    "engine.messages",
    "engine.sampling_params",
    "engine.token_stream",
    "engine.validation",
    "engine.worker_process",
    "weights.layout",
    "weights.ledger",
    "model.tokenizer",
    "model.vocabulary",
}

# Files that must stay free of torch, and so must whatever they import of ours.
NO_TORCH = [
    "model/config.py",
    "model/files.py",
    "model/tokenizer.py",
    "model/vocabulary.py",
    "weights/control_groups.py",
    "weights/digest.py",
    "weights/errors.py",
    "weights/files.py",
    "weights/hub.py",
    "weights/hugging_face_config.py",
    "weights/inspection.py",
    "weights/layout.py",
    "weights/ledger.py",
    "weights/new_directory.py",
    "weights/tensor_headers.py",
    "engine/block_manager.py",
    "engine/client.py",
    "engine/config.py",
    "engine/cpu_threads.py",
    "engine/errors.py",
    "engine/flight_recorder.py",
    "engine/kernel_folder.py",
    "engine/live_requests.py",
    "engine/memory.py",
    "engine/messages.py",
    "engine/sampling_params.py",
    "engine/sampling_row.py",
    "engine/scheduler.py",
    "engine/sequence.py",
    "engine/token_stream.py",
    "engine/validation.py",
    "engine/worker_process.py",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "server").rglob("*.py")),
]

# Imports inside a function: what may be absent, and why.
OPTIONAL = {
    "engine.attention_triton": "needs triton, which torch brings where it has CUDA",
    "engine.block_triton": "needs triton",
    "engine.step_triton": "needs triton",
    "huggingface_hub": "the extra `hub`",
    "tokenizers": "the extra `train`",
    "transformers": "a peer to measure against, of the extra `test`",
}


def sources(*rooms: str) -> list[Path]:
    """Every module of some rooms."""
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def imports(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """The modules that a file imports, by full name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nested = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if node in nested and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            # `from weights import layout` names a module of a package, not something in a module.
            is_package = (ROOT / Path(*module.split("."))).is_dir()
            yield from (
                {f"{module}.{alias.name}" for alias in node.names} if is_package else [module]
            )


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(*ROOMS, "benchmarks"), ids=name_of)
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]

    for module in imports(path):
        target = module.split(".")[0]
        if target in (*ROOMS, "benchmarks", "kvik", "tests") and target != room:
            assert target in ALLOWED_ROOMS[room], f"{room} must not import {module}"
            if room == "server":
                assert module in ALLOWED_TO_SERVER, f"server must not import {module}"


@pytest.mark.parametrize("path", sources("engine"), ids=name_of)
def test_the_engine_knows_no_http_no_text_and_no_metrics(path: Path) -> None:
    foreign = {"fastapi", "starlette", "uvicorn", "pydantic", "tiktoken", "prometheus_client"}

    assert foreign.isdisjoint(module.split(".")[0] for module in imports(path))


@pytest.mark.parametrize("name", NO_TORCH)
def test_light_files_stay_free_of_torch(name: str) -> None:
    heavy = {"torch", "safetensors.torch", "numba", "transformers"}

    for module in imports(ROOT / name):
        assert module not in heavy
        assert module.split(".")[0] not in heavy
        path = ROOT / Path(*module.split(".")).with_suffix(".py")
        if module.split(".")[0] in ROOMS and path.exists():
            assert name_of(path) in NO_TORCH, f"{module} may import torch"


@pytest.mark.parametrize(
    "module", ["weights.layout", "model.tokenizer", "engine.client", "server.app"]
)
def test_the_server_s_modules_load_no_torch(module: str) -> None:
    program = (
        f"import sys, {module}\n"
        "print(sorted({'torch', 'numba', 'transformers'} & sys.modules.keys()))"
    )

    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout

    assert found.strip() == "[]"


@pytest.mark.parametrize("path", sources("kvik"), ids=name_of)
def test_a_command_imports_its_room_when_it_runs(path: Path) -> None:
    top = {module.split(".")[0] for module in imports(path, inside_functions=False)}

    assert top <= {"kvik", "typer", "rich", *sys.stdlib_module_names}


# Arguments that end where a command is about to compute, or end it.
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["inspect", "."],
        ["prepare", "nowhere", "--out", "nowhere", "--tokenizer", "char"],
        ["serve", "--model", "nowhere/here/now"],
        ["bench", "serve", "http://127.0.0.1:9", "--num-requests", "1"],
    ],
    ids=" ".join,
)
def test_a_command_that_needs_no_torch_loads_none(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys, kvik.__main__\n"
        f"sys.argv = ['kvik', *{arguments!r}]\n"
        "try: kvik.__main__.main()\n"
        "except SystemExit: print({'torch', 'numba', 'transformers'} & sys.modules.keys())"
    )

    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip

    assert result.stdout.splitlines()[-1] == "set()", result.stderr


@pytest.mark.parametrize("path", sources(*ROOMS), ids=name_of)
def test_imports_stand_on_top_but_for_what_may_be_absent(path: Path) -> None:
    top = set(imports(path, inside_functions=False))
    inside = {module for module in imports(path) if module not in top}

    assert all(module in OPTIONAL or module.split(".")[0] in OPTIONAL for module in inside)


@pytest.mark.parametrize("path", sources(*ROOMS, "kvik", "tests"), ids=name_of)
def test_a_package_s_init_holds_a_docstring_and_nothing_else(path: Path) -> None:
    if path.name == "__init__.py":
        tree = ast.parse(path.read_text(encoding="utf-8"))

        assert len(tree.body) == 1
        assert ast.get_docstring(tree)


@pytest.mark.parametrize("path", sources(*ROOMS, "kvik", "benchmarks", "tests"), ids=name_of)
def test_no_file_is_named_for_nothing(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "common", "base", "misc"}


@pytest.mark.parametrize("path", sources(*ROOMS, "kvik"), ids=name_of)
def test_a_module_opens_with_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("room", [*ROOMS, "kvik"])
def test_the_tests_look_at_this_checkout(room: str) -> None:
    spec = importlib.util.find_spec(room)

    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).parent == ROOT / room
