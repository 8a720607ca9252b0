"""Whatever ends a conversion, there is a complete result or none, the source is as it was, and the next run works."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from modeling_gated.checkpoints import files as files_module
from modeling_gated.checkpoints.output import clear_leftovers, scratch_directory
from modeling_gated.conversion import ConversionError, convert_checkpoint, plan_conversion, ungate_checkpoint
from tests.helpers.checkpoints import contents
from tests.helpers.processes import PROGRAMS, run_program
from tests.helpers.source_models import SOURCES, randomize


class SlowConversions:
    """Starts slow conversions, one at a time."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, PROGRAMS / "slow_conversions.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, source: Path, output: Path) -> int:
        """The process id of a conversion that has begun."""
        assert self.server.stdin is not None
        print(json.dumps([str(source), str(output)]), file=self.server.stdin, flush=True)
        return self._read()

    def wait(self) -> int:
        """The exit status of the conversion, when it has ended."""
        assert self.server.stdin is not None
        print(file=self.server.stdin, flush=True)
        return self._read()

    def _read(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Shells start what runs in the background with interrupts ignored, which its children then inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def slow_conversions() -> Iterator[SlowConversions]:
    conversions = SlowConversions()
    yield conversions
    conversions.server.kill()
    conversions.server.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("crash") / "source"
    model = AutoModelForCausalLM.from_config(SOURCES["llama, biases, llama3 rope"]())
    randomize(model)
    model.save_pretrained(directory, max_shard_size="100KB")
    return directory


@pytest.fixture(scope="module")
def seconds(slow_conversions: SlowConversions, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a slow conversion takes when nobody kills it."""
    slow_conversions.start(checkpoint, tmp_path_factory.mktemp("whole") / "gated")
    started = time.perf_counter()
    assert slow_conversions.wait() == 0
    return time.perf_counter() - started


@pytest.mark.parametrize("moment", range(8))
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_point(
    slow_conversions: SlowConversions,
    checkpoint: Path,
    seconds: float,
    tmp_path: Path,
    moment: int,
    sent: signal.Signals,
) -> None:
    """At a random point of each eighth of the time; every second time there is a result already."""
    output, before = tmp_path / "gated", contents(checkpoint)
    wholes = [contents_of_a_whole_result(checkpoint, tmp_path)]
    if moment % 2:
        convert_checkpoint(checkpoint, output, granularity="elementwise")
        wholes.append(contents(output))
    process = slow_conversions.start(checkpoint, output)
    time.sleep(seconds * (moment + random.random()) / 8)
    os.kill(process, sent)
    slow_conversions.wait()

    assert contents(checkpoint) == before
    if output.exists():
        assert contents(output) in wholes
    elif moment % 2:  # killed between taking the old result away and putting the new one there
        assert sent != signal.SIGINT
    if sent == signal.SIGINT:
        assert {path.name for path in tmp_path.iterdir()} <= {"gated", "whole"}
    convert_checkpoint(checkpoint, output, overwrite=True)
    assert contents(output).keys() == wholes[0].keys()
    assert {path.name for path in tmp_path.iterdir()} == {"gated", "whole"}


def contents_of_a_whole_result(checkpoint: Path, tmp_path: Path) -> dict[str, str]:
    """What the slow conversion to tmp_path / "gated" writes: its card and manifest name the output."""
    convert_checkpoint(checkpoint, tmp_path / "gated", place="copy", overwrite=True)
    files = contents(tmp_path / "gated")
    (tmp_path / "gated").rename(tmp_path / "whole")
    return files


def test_the_next_run_puts_back_a_result_that_was_taken_away(llama: Path, tmp_path: Path) -> None:
    """Killed between the two renames of --overwrite."""
    output = tmp_path / "gated"
    convert_checkpoint(llama, output)
    before = contents(output)
    scratch = tmp_path / f".gated.{'0' * 32}"
    (scratch / "new").mkdir(parents=True)
    output.rename(scratch / "old")
    with pytest.raises(ConversionError, match="already exists"):
        convert_checkpoint(llama, output)
    assert contents(output) == before
    assert not scratch.exists()


def test_the_only_copy_of_a_result_is_not_cleared(llama: Path, tmp_path: Path) -> None:
    """Killed between the two renames, and then something else took the name."""
    output = tmp_path / "gated"
    convert_checkpoint(llama, output)
    before = contents(output)
    scratch = tmp_path / f".gated.{'0' * 32}"
    scratch.mkdir()
    output.rename(scratch / "old")
    output.mkdir()
    with pytest.raises(ConversionError, match="already exists"):
        convert_checkpoint(llama, output)
    assert contents(scratch / "old") == before
    convert_checkpoint(llama, output, overwrite=True)  # an empty directory
    clear_leftovers(output)
    assert not scratch.exists()


def test_what_still_runs_is_not_taken_for_a_leftover(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "gated"
    with scratch_directory(output) as scratch:
        (scratch / "half").touch()
        convert_checkpoint(llama, output)
        assert (scratch / "half").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "gated"}


def test_only_leftovers_of_the_same_output_are_cleared(tmp_path: Path) -> None:
    kept = [".gated", ".gated.txt", f".gated.{'0' * 31}", f".other.{'0' * 32}", f"gated.{'0' * 32}", ".gated.old"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / f".gated.{'1' * 32}").mkdir()
    (tmp_path / f".gated.{'2' * 32}").symlink_to(tmp_path / ".gated")
    clear_leftovers(tmp_path / "gated")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, f".gated.{'2' * 32}"}
    assert not any((tmp_path / ".gated").iterdir())


def test_everything_is_on_disk_before_it_takes_its_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[tuple[int, int]] = set()
    fsync, rename = os.fsync, Path.rename

    def spy(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced.add((status.st_dev, status.st_ino))

    def check(path: Path, target: Path) -> Path:
        assert target == tmp_path / "gated"
        written = [path, *path.rglob("*")]
        assert len(written) > 10
        assert {(file.stat().st_dev, file.stat().st_ino) for file in written} <= synced
        synced.clear()
        return rename(path, target)

    monkeypatch.setattr(files_module.os, "fsync", spy)
    monkeypatch.setattr(Path, "rename", check)
    convert_checkpoint(checkpoint, tmp_path / "gated", place="copy")
    assert synced == {(tmp_path.stat().st_dev, tmp_path.stat().st_ino)}  # and then the new name


@pytest.mark.parametrize("room", [1_000, 30_000, 300_000])
def test_a_file_that_cannot_grow(checkpoint: Path, tmp_path: Path, room: int) -> None:
    """The kernel refuses to write further, as on a full disk, in a process of its own."""
    before = contents(checkpoint)
    shard = max(path.stat().st_size for path in checkpoint.iterdir())
    result = run_program(
        "limit_file_size.py", str(room), "convert", checkpoint, tmp_path / "new" / "gated", "--place", "copy"
    )
    if room > shard:
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "File too large" in result.stderr
    assert contents(checkpoint) == before
    assert not any(tmp_path.iterdir())
    convert_checkpoint(checkpoint, tmp_path / "new" / "gated")


Usage = namedtuple("Usage", "total used free")


def test_the_room_on_the_disk_is_checked_before_anything_is_copied(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))

    def nothing(*_: object) -> None:
        raise AssertionError("a shard was copied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - weights, weights))
        patch.setattr("modeling_gated.checkpoints.shards.place_file", nothing)
        with pytest.raises(ConversionError, match=r"gated: [\d.]+ kB are needed, [\d.]+ kB are free"):
            convert_checkpoint(checkpoint, tmp_path / "gated", place="copy")
        assert not any(tmp_path.iterdir())
    convert_checkpoint(checkpoint, tmp_path / "gated", place="link")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - weights, weights - 1))
    convert_checkpoint(checkpoint, tmp_path / "linked", place="link")  # needs no room for them
    with pytest.raises(ConversionError, match=r"back: .* are needed"):
        ungate_checkpoint(tmp_path / "gated", tmp_path / "back", place="copy")
    ungate_checkpoint(tmp_path / "gated", tmp_path / "back", place="link")


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A directory that this process may use without root's rights, which read-only directories do not stop."""
    directory = Path(tempfile.mkdtemp(prefix="gated-", dir="/tmp"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def test_a_read_only_target(checkpoint: Path, unprivileged: Path) -> None:
    source = unprivileged / "source"
    shutil.copytree(checkpoint, source, copy_function=shutil.copyfile)  # readable by all
    target = unprivileged / "target"
    target.mkdir()
    target.chmod(0o555)
    result = run_program("convert_unprivileged.py", source, target / "new" / "gated", unprivileged / "first")
    assert result.returncode == 1
    assert result.stderr == f"{target / 'new' / 'gated'}: cannot be made: Permission denied\n"
    assert not any(target.iterdir())


def test_a_copy_ends_soon_after_an_interrupt(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that copy stop at their next part; the run does not wait for the rest of their shards."""
    monkeypatch.setattr("modeling_gated.checkpoints.placement._CHUNK", 1000)
    copy_file_range, parts, counter = os.copy_file_range, [], itertools.count(1)

    def slow(*arguments: int) -> int:
        time.sleep(0.01)
        parts.append(arguments)
        if next(counter) == 10:  # not the list's length, which two threads may have made 11 before one looks
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return copy_file_range(*arguments)

    monkeypatch.setattr(os, "copy_file_range", slow)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, tmp_path / "gated", place="copy")
    assert len(parts) < 30
    assert not any(tmp_path.iterdir())


def test_another_filesystem(checkpoint: Path, tmp_path: Path) -> None:
    """Copied by default; a hard link or reflink is refused in a line."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.fail("/dev/shm is no other filesystem here, so the test needs another place")
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        done = convert_checkpoint(checkpoint, Path(directory) / "gated")
        assert done.shared_bytes == 0
        for place in ("link", "reflink"):
            with pytest.raises(ConversionError, match=f"place='{place}': .* cannot be"):
                convert_checkpoint(checkpoint, Path(directory) / place, place=place)
        assert {path.name for path in Path(directory).iterdir()} == {"gated"}
        ungate_checkpoint(Path(directory) / "gated", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(checkpoint)


def test_a_plan_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_conversion(checkpoint, tmp_path / "new" / "gated")
    assert not any(tmp_path.iterdir())
    convert_checkpoint(checkpoint, tmp_path / "new" / "gated")
    files = {name: size for name, size, _ in plan.files()}
    assert files.keys() == contents(tmp_path / "new" / "gated").keys()
    for name, size in files.items():
        written = (tmp_path / "new" / "gated" / name).stat().st_size
        if name in plan.placed or name in plan.side_files:
            assert size == written
        elif name == plan.gate_shard:  # its tensors, without the header
            assert size is not None and size < written < size + 2000


def test_hashes_are_of_the_files_as_written(checkpoint: Path, tmp_path: Path) -> None:
    for granularity in ("headwise", "elementwise"):
        convert_checkpoint(checkpoint, tmp_path / granularity, granularity=granularity)
        manifest = json.loads((tmp_path / granularity / "gated_llama_manifest.json").read_text())
        files = contents(tmp_path / granularity)
        del files["gated_llama_manifest.json"]
        assert {name: record["sha256"] for name, record in manifest["files"].items()} == files
        for name, record in manifest["files"].items():
            assert record["size"] == (tmp_path / granularity / name).stat().st_size


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_while_the_old_result_is_removed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """The new result is complete, and nothing else is left."""
    output, rmtree, calls = tmp_path / "gated", shutil.rmtree, []
    if overwrite:
        convert_checkpoint(checkpoint, output, granularity="elementwise")

    def interrupted(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, output, overwrite=overwrite)
    assert len(calls) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"gated"}
    assert json.loads((output / "config.json").read_text())["gate_granularity"] == "headwise"
