"""What control groups leave a process."""

from __future__ import annotations

from pathlib import Path

from jaxllm.config.control_group import ControlGroup, control_group

GIB = 2**30


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_limits_of_version_2(tmp_path: Path):
    """Also those of the groups around count; "max" is none."""
    write(tmp_path / "job", cpu__max="350000 100000\n", memory__max="max\n", memory__current="9\n")
    write(tmp_path / "job" / "step", cpu__max="max 100000\n", memory__max="8589934592\n")
    write(tmp_path / "other", cpu__max="100000 100000\n")
    (tmp_path / "own").write_text("0::/job/step\n")
    found = control_group(tmp_path, tmp_path / "own")
    assert found == ControlGroup(cores=3.5, memory_bytes=8 * GIB, memory_left=None)
    # a container sees the path of its host, and its own group at the top
    write(tmp_path, cpu__max="200000 100000\n", memory__max="max\n")
    (tmp_path / "own").write_text("0::/../../elsewhere\n")
    found = control_group(tmp_path, tmp_path / "own")
    assert found == ControlGroup(cores=2, memory_bytes=None, memory_left=None)


def test_limits_of_version_1(tmp_path: Path):
    write(tmp_path / "cpu,cpuacct" / "job", **{"cpu__cfs_quota_us": "150000", "cpu__cfs_period_us": "100000"})
    write(tmp_path / "cpu,cpuacct", **{"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"})
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes=str(GIB))
    write(
        tmp_path / "memory" / "job",
        memory__limit_in_bytes=str(2 * GIB),
        memory__usage_in_bytes=str(GIB),
        memory__stat="cache 7\ninactive_file 5\ntotal_inactive_file 6\n",
    )
    (tmp_path / "own").write_text("5:memory:/job\n4:cpu,cpuacct:/job\n0::/\n")
    found = control_group(tmp_path, tmp_path / "own")
    assert found == ControlGroup(cores=1.5, memory_bytes=2 * GIB, memory_left=GIB + 6)
    found = control_group(tmp_path, tmp_path / "none")
    assert found == ControlGroup(cores=None, memory_bytes=None, memory_left=None)


def test_what_is_left_is_the_least_of_all_groups(tmp_path: Path):
    """What was read from files counts as used, and is given back where memory is short."""
    write(
        tmp_path,
        memory__max=str(4 * GIB),
        memory__current=str(3 * GIB),
        memory__stat=f"anon {GIB}\ninactive_file {GIB}\nactive_file 5\n",
    )
    write(tmp_path / "job", memory__max=str(3 * GIB), memory__current=str(GIB // 2))
    (tmp_path / "own").write_text("0::/job\n")
    assert control_group(tmp_path, tmp_path / "own").memory_left == 2 * GIB
