"""How many threads: what was asked for, the cores, or what a container's quota leaves of them."""

from pathlib import Path

import pytest

from engine.cpu_threads import choose_threads

LIMITED = "the quota here is 2.5 of 8 cores"


def choose(folder: Path, groups: str, *, asked: int | None = None) -> tuple[int, str]:
    """Choose on a machine of 8 cores, in a folder that stands for the system's."""
    (folder / "process").write_text(groups)
    threads = choose_threads(asked, 8, process=folder / "process", cgroups=folder)
    return threads.count, threads.reason


def write(folder: Path, **contents: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"cpu.{name}").write_text(f"{content}\n")


def test_a_core_a_thread_where_nothing_is_limited(tmp_path: Path) -> None:
    write(tmp_path, max="max 100000")

    assert choose(tmp_path, "0::/\n") == (8, "one a core")


def test_another_system_has_no_groups(tmp_path: Path) -> None:
    threads = choose_threads(None, 8, process=tmp_path / "nothing", cgroups=tmp_path / "here")

    assert threads.count == 8


@pytest.mark.parametrize("path", ["/", "/a/b", "/elsewhere/on/the/machine"])
def test_a_quota_is_seen_in_the_group_and_in_those_around_it(tmp_path: Path, path: str) -> None:
    write(tmp_path / "a" / "b", max="max 100000")
    write(tmp_path, max="250000 100000")

    assert choose(tmp_path, f"0::{path}\n") == (2, LIMITED)


def test_the_tightest_quota_counts(tmp_path: Path) -> None:
    write(tmp_path, max="600000 100000")
    write(tmp_path / "a", max="50000 20000")
    write(tmp_path / "a" / "b", max="700000 100000")

    assert choose(tmp_path, "0::/a/b\n") == (2, LIMITED)


@pytest.mark.parametrize("path", ["/", "/docker/1234"])
@pytest.mark.parametrize("mounted", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_the_first_version_is_seen(tmp_path: Path, mounted: str, path: str) -> None:
    write(tmp_path / mounted, cfs_quota_us="250000", cfs_period_us="100000")

    groups = f"5:memory:/docker/1234\n4:{mounted}:{path}\n"

    assert choose(tmp_path, groups) == (2, LIMITED)


def test_no_quota_of_the_first_version_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path / "cpu", cfs_quota_us="-1", cfs_period_us="100000")

    assert choose(tmp_path, "1:cpu:/\n") == (8, "one a core")


@pytest.mark.parametrize("quota", ["800000", "1200000"])
def test_a_quota_above_the_cores_changes_nothing(tmp_path: Path, quota: str) -> None:
    write(tmp_path, max=f"{quota} 100000")

    assert choose(tmp_path, "0::/\n") == (8, "one a core")


def test_less_than_a_core_is_a_thread(tmp_path: Path) -> None:
    write(tmp_path, max="20000 100000")

    assert choose(tmp_path, "0::/\n") == (1, "the quota here is 0.2 of 8 cores")


def test_what_was_asked_for_is_had(tmp_path: Path) -> None:
    write(tmp_path, max="250000 100000")

    assert choose(tmp_path, "0::/\n", asked=5) == (5, "as was asked for")
