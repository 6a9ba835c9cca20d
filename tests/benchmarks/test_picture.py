"""The picture of the benchmarks: every line in it, nothing by chance."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the extra `bench`, of the extra `test`")

from benchmarks.comparison import Comparison
from benchmarks.picture import draw, main, panels_of, spread
from tests.benchmarks.test_comparison import measured


def a_run(dtype: str, *names: str, speed: float = 10) -> Comparison:
    measurements = [
        one
        for name in names
        for load in ("1", "8")
        for one in measured(name, "streams", load, speed * int(load))
    ]
    contestants = [{"name": name} for name in names]
    return Comparison(
        conditions={"dtype": dtype}, contestants=contestants, measurements=measurements
    )


def test_the_same_numbers_are_the_same_bytes() -> None:
    runs = [a_run("bfloat16", "kvik", "other")]

    assert draw(runs) == draw(runs)
    assert draw(runs) != draw([a_run("bfloat16", "kvik", "other", speed=11)])


def test_a_picture_has_every_precision_and_every_name() -> None:
    picture = draw([a_run("bfloat16", "kvik", "one"), a_run("int8", "kvik", "two q8_0")])

    ElementTree.fromstring(picture)
    words = re.findall(r"<!-- (.*?) -->", picture)
    assert {"bfloat16", "int8", "one", "two q8_0", "streams", "tokens/s"} <= set(words)
    assert words.count("kvik") == 2


def test_every_colour_has_one_for_dark_pages() -> None:
    picture = draw([a_run("bfloat16", "kvik", *"abcde")])

    used = set(re.findall(r"(?:fill|stroke): (#\w+)", picture.split("@media")[0]))
    replaced = set(re.findall(r'(?:fill|stroke): (#\w+)"\]', picture.split("@media")[1]))

    assert len(used) > 8
    assert used <= replaced


def test_one_run_is_drawn_as_it_was_measured() -> None:
    panels = panels_of([a_run("int8", "kvik", "one"), a_run("float32", "kvik", speed=3)])

    assert panels == {
        "int8": {"kvik": {1: 10, 8: 80}, "one": {1: 10, 8: 80}},
        "float32": {"kvik": {1: 3, 8: 24}},
    }


def test_a_peer_keeps_the_ratio_that_it_had_in_its_run() -> None:
    fast, slow = a_run("int8", "kvik", "one", speed=30), a_run("int8", "kvik", "two", speed=10)

    panels = panels_of([fast, slow])

    assert panels == {"int8": {name: {1: 20, 8: 160} for name in ("kvik", "one", "two")}}


def test_runs_without_streams_are_left_out() -> None:
    other = a_run("int8", "kvik")
    other.measurements = measured("kvik", "long", "long", 5)

    assert list(panels_of([other, a_run("float32", "kvik")])) == ["float32"]
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([other])


def test_labels_stand_apart_in_their_order() -> None:
    assert spread([10, 0, 1, 2], 3) == [10, 0, 3, 6]
    assert spread([5, 5], 1) == [5, 6]


def test_a_picture_is_drawn_from_what_runs_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run("bfloat16", "kvik", "other")
    run.write(tmp_path / "run.json")
    out = tmp_path / "speed.svg"
    monkeypatch.setattr("sys.argv", ["picture", str(tmp_path / "run.json"), "--out", str(out)])

    main()

    assert out.read_text(encoding="utf-8") == draw([run])
