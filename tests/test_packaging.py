"""What is installed and what goes into the image, against the packages that lie here."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = set(
    tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
)


def test_every_package_but_the_tests_is_installed() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOT.iterdir()
        if (room / "__init__.py").exists() and room.name != "tests"
        for path in room.rglob("__init__.py")
    }

    assert found == PACKAGES


def test_the_image_is_built_from_every_package() -> None:
    rooms = {name.split(".")[0] for name in PACKAGES}
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    let_through = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()

    assert {f"COPY {room} ./{room}" for room in rooms} <= set(dockerfile)
    assert {f"!{room}" for room in rooms} <= set(let_through)
