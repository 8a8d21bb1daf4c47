"""Crashes, full disks and damage: the previous checkpoint stays the valid newest one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from nemo_hybrid.agreement import OneProcess
from nemo_hybrid.checkpoint import manifest, steps
from nemo_hybrid.checkpoint.directory import new_directory, verify, write_directory
from nemo_hybrid.checkpoint.manifest import CheckpointError
from nemo_hybrid.checkpoint.state import load_state
from nemo_hybrid.checkpoint.steps import find_latest, prune, resolve
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import FileRecord, hash_file, replace_file, whole_directory, write_file


class Killed(BaseException):
    """kill -9: nothing catches it, nothing is cleaned up."""


class Saboteur:
    """Counts syncs, renames and new directories, and acts in place of the n-th one. Once it killed,
    nothing is deleted either, until it is armed again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.act, self.killed = 0, -1, lambda _: None, False
        for name in ("fsync", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))
        rmtree = shutil.rmtree
        monkeypatch.setattr(
            shutil, "rmtree", lambda *args, **kw: self.killed or rmtree(*args, **kw)
        )

    def _wrap(self, real):
        def wrapper(*args, **kwargs):
            self.count += 1
            if self.count - 1 == self.at:
                self.killed = self.act in (killed_early, killed_while_writing)
                self.act(args)
            return real(*args, **kwargs)

        return wrapper

    def arm(self, at: int, act) -> None:
        self.count, self.at, self.act, self.killed = 0, at, act, False


def killed_early(args) -> None:
    raise Killed


def killed_while_writing(args) -> None:
    """The file has its name, but half of its bytes."""
    if isinstance(args[0], int) and not os.path.isdir(f"/proc/self/fd/{args[0]}"):
        os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
    raise Killed


def disk_full(args) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def read_step(path: Path, toy) -> torch.Tensor:
    wanted = toy.fragments(0, 1, 1, filled=False)
    load_state(path, wanted)
    return torch.cat([f.tensors["exp_avg_sq"] for f in wanted])


@pytest.mark.parametrize("act", [killed_early, killed_while_writing, disk_full])
@pytest.mark.parametrize("world", [1, 2])
def test_a_save_that_dies_anywhere(tmp_path, monkeypatch, toy, other_toy, act, world) -> None:
    saboteur = Saboteur(monkeypatch)
    toy.save(tmp_path, 1)
    old = read_step(tmp_path / "step_00000001", toy)
    saboteur.arm(-1, act)
    other_toy.save(tmp_path, 2, world, world, max_shard_bytes=9000)
    new = read_step(tmp_path / "step_00000002", toy)
    assert not torch.equal(old, new)
    operations = saboteur.count
    assert operations > 10
    survived, left_behind = {1: 0, 2: 0}, 0
    for at in range(operations):
        shutil.rmtree(tmp_path / "step_00000002", ignore_errors=True)
        (tmp_path / "latest").write_text("step_00000001\n")
        saboteur.arm(at, act)
        results = other_toy.save(tmp_path, 2, world, world, max_shard_bytes=9000)
        if act is disk_full and at == 0:  # mkdir of a directory that exists may well fail
            assert results == [tmp_path / "step_00000002"] * world
        elif act is disk_full:
            assert all(isinstance(r, UserError) and str(tmp_path) in str(r) for r in results)
            assert not list(tmp_path.glob(".tmp-step*"))
        else:
            assert any(isinstance(r, Killed) for r in results)
            left_behind += len(list(tmp_path.glob(".tmp-step*")))
        newest = find_latest(tmp_path)
        step = steps.step_of(newest)
        assert torch.equal(read_step(newest, toy), old if step == 1 else new)
        survived[step] += 1
        saboteur.arm(-1, act)
        results = other_toy.save(
            tmp_path, 2, world, world, max_shard_bytes=9000
        )  # the next attempt cleans up
        assert results == [tmp_path / "step_00000002"] * world
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "latest", "step_00000001", "step_00000002",
        ]  # fmt: skip
    assert survived[1] > survived[2] > 0
    assert (left_behind > operations // 2) == (act is not disk_full)  # as a real kill does


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch) -> None:
    """Ctrl-C at any sync, rename or new directory."""

    def interrupt(args) -> None:
        raise KeyboardInterrupt

    def write(writer) -> None:
        writer.write_text("a", "a")

    saboteur, found = Saboteur(monkeypatch), []
    for at in range(20):
        saboteur.arm(at, interrupt)
        done = False
        try:
            write_directory(tmp_path / "out", OneProcess(), write, lambda writer, parts: None)
            done = True
        except KeyboardInterrupt:
            pass
        found.append([p.name for p in tmp_path.iterdir()])
        if done:
            break
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert found[-1] == ["out"]
    assert [] in found
    assert all(names in ([], ["out"]) for names in found)


def test_replacing_a_checkpoint_of_the_same_step(tmp_path, monkeypatch, toy, other_toy) -> None:
    """After a roll-back the same step is saved again; the only checkpoint is never lost."""
    saboteur = Saboteur(monkeypatch)
    toy.save(tmp_path, 1)
    old = read_step(tmp_path / "step_00000001", toy)
    at, seen = 0, []
    while True:
        saboteur.arm(at, killed_early)
        (result,) = other_toy.save(tmp_path, 1, max_shard_bytes=9000)
        newest = find_latest(tmp_path)
        seen.append(torch.equal(read_step(newest, toy), old))
        if not isinstance(result, Killed):
            break
        at += 1
        shutil.rmtree(newest)
        saboteur.arm(-1, killed_early)
        toy.save(tmp_path, 1, max_shard_bytes=9000)
    assert seen[0]
    assert not seen[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncate": lambda path: os.truncate(path, path.stat().st_size - 1),
    "extend": lambda path: path.open("ab").write(b"\0"),
    "bit flip": flip,
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
    "symlink": lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to("x")),
    "other step's": lambda path: shutil.copy(path.parents[1] / "step_00000001" / path.name, path),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_named_and_skipped(tmp_path, toy, other_toy, damage, caplog) -> None:
    toy.save(tmp_path, 1)
    path = other_toy.save(tmp_path, 2)[0]
    same = ("config.json", "generation_config.json", "model.safetensors.index.json",
            "optimizer.index.json", "run.yaml", "rank-00000.safetensors")  # fmt: skip
    names = sorted(p.name for p in path.iterdir())
    assert len(names) > 8
    for name in names:
        if damage == "other step's" and name in same:
            continue  # equal in both steps
        backup = tmp_path / "backup"
        shutil.copytree(path, backup)
        caplog.clear()
        if damage == "other step's" and name == "manifest.json":
            expected = path  # a whole manifest, of other contents: some file does not fit it
        else:
            expected = path / name
        DAMAGE[damage](path / name)
        with pytest.raises(CheckpointError, match=str(expected)):
            verify(path)
        assert find_latest(tmp_path) == tmp_path / "step_00000001"
        assert str(expected) in caplog.text
        shutil.rmtree(path)
        backup.rename(path)
    assert find_latest(tmp_path) == path


def test_shallow_verification_sees_sizes_only(tmp_path, toy) -> None:
    path = toy.save(tmp_path, 1)[0]
    flip(path / "optimizer-r00000-master.safetensors")
    verify(path, deep=False)
    with pytest.raises(CheckpointError, match="optimizer-r00000"):
        verify(path)


def test_wrong_manifests(tmp_path, toy) -> None:
    path = toy.save(tmp_path, 1)[0]
    written = path / "manifest.json"
    good = json.loads(written.read_text())
    outside = manifest.manifest_text({"../latest": FileRecord(1, "")})
    broken = manifest.to_json({"files": {"a": 1}, "sha256": ""})
    empty = manifest.to_json({"files": [], "sha256": ""})
    for wrong in ("[]", "{}", empty, broken, outside, manifest.to_json(good | {"sha256": "0"})):
        written.write_text(wrong)
        with pytest.raises(CheckpointError, match=str(written)):
            verify(path)


def test_the_path_of_a_new_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_directory("~/x") == tmp_path / "x"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert new_directory(tmp_path / "link") == tmp_path / "empty"
    (tmp_path / "empty" / "in").symlink_to(tmp_path / "absent")
    assert new_directory(tmp_path / "link" / "in") == tmp_path / "absent"
    with pytest.raises(UserError, match=r"\S+/link exists and is not empty"):
        new_directory(tmp_path / "link")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert new_directory("x/../y") == tmp_path / "cwd" / "y"
    for way in (".", "../cwd", tmp_path / "cwd"):
        with pytest.raises(UserError, match="is the working directory"):
            new_directory(way)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(UserError, match="volume is a mount point; name a directory in it"):
        new_directory(tmp_path / "volume")
    assert new_directory(tmp_path / "volume/in") == tmp_path / "volume/in"


def test_two_writers_of_one_directory(tmp_path) -> None:
    def second(writer) -> None:
        writer.write_text("a", "first")
        with pytest.raises(UserError, match=r"another process is writing .*/out: wait for it"):
            write_directory(tmp_path / "out", OneProcess(), lambda w: None, lambda w, parts: None)

    write_directory(tmp_path / "out", OneProcess(), second, lambda writer, parts: None)
    verify(tmp_path / "out")
    # Nobody holds what a killed one left.
    (tmp_path / ".tmp-next").mkdir()
    write_directory(tmp_path / "next", OneProcess(), lambda w: None, lambda w, parts: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next", "out"]


def test_a_damaged_checkpoint_whose_predecessor_is_still_there_is_replaced(
    tmp_path, toy, other_toy
) -> None:
    """As a kill after the renaming leaves it, and damage to the new one after that."""
    toy.save(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.replaced")
    toy.save(tmp_path, 1)
    toy.save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001.replaced")
    next((tmp_path / "step_00000001").glob("*.safetensors")).write_bytes(b"")
    (result,) = other_toy.save(tmp_path, 1)
    assert result == tmp_path / "step_00000001"
    verify(tmp_path / "step_00000001")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_what_others_have_beside_a_directory_stays(tmp_path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced/theirs").write_text("")
    for content in ("once", "again"):
        write_directory(
            tmp_path / "out", OneProcess(),
            lambda writer, text=content: writer.write_text("a", text), lambda writer, parts: None,
        )  # fmt: skip
    assert (tmp_path / "out/a").read_text() == "again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]
    (tmp_path / "out.replaced/theirs").unlink()
    (tmp_path / "out.replaced").rmdir()
    write_directory(tmp_path / "out", OneProcess(), lambda w: None, lambda w, parts: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_checkpoints_none_valid_and_bad_pointers(tmp_path, toy, caplog) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "absent") is None
    path = toy.save(tmp_path, 1)[0]
    for pointer in ("", "step_00000009\n", "../elsewhere", "\0"):
        (tmp_path / "latest").write_text(pointer)
        caplog.clear()
        assert find_latest(tmp_path) == path
        assert str(tmp_path / "latest") in caplog.text
        assert resolve(tmp_path) == path
    (path / "run_state.json").unlink()
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        find_latest(tmp_path)


def test_resolve_accepts_every_way_of_saying_it(tmp_path, toy) -> None:
    run = tmp_path / "run"
    toy.save(run / "checkpoints", 1)
    path = toy.save(run / "checkpoints", 2)[0]
    for way in (run, run / "checkpoints", run / "checkpoints" / "latest", path, str(path)):
        assert resolve(way) == path
    assert resolve(run / "checkpoints" / "step_00000001") == run / "checkpoints" / "step_00000001"
    (run / "checkpoints" / "latest").write_text("step_00000001")
    assert resolve(run).name == "step_00000001"
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    assert resolve(tmp_path / "hub") == tmp_path / "hub"
    cache = tmp_path / "models--a--b"
    (cache / "snapshots" / "0a").mkdir(parents=True)
    (cache / "snapshots" / "0a" / "config.json").write_text("{}")
    for wrong, says in (
        (tmp_path, "holds no checkpoint"),
        (tmp_path / "no", "does not exist: give a local directory"),
        (tmp_path / "hub/config.json", f"is a file: name its directory, {tmp_path}/hub"),
        (cache, f"holds no checkpoint.*{cache}/snapshots/0a"),
    ):
        with pytest.raises(UserError, match=says):
            resolve(wrong)


def test_directories_that_a_failure_leaves_empty_go(tmp_path) -> None:
    def fail(beside: str) -> list[str]:
        """What is left where nothing is written to a/b/c/d, but meanwhile something beside."""
        with suppress(UserError), whole_directory(tmp_path / "a/b/c/d") as partial:
            (partial / "file").touch()
            (partial / beside).touch()
            raise UserError("no")
        return sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))

    (tmp_path / "a").mkdir()
    assert fail("other") == ["a"]
    assert fail("../../mine") == ["a", "a/b", "a/b/mine"]


def test_prune_keeps_the_newest_and_never_the_last_good_one_dies(tmp_path, toy) -> None:
    paths = [toy.save(tmp_path, step)[0] for step in (1, 2, 3, 4)]
    assert prune(tmp_path, 0) == []
    assert prune(tmp_path, 2, trusted=paths[3]) == [paths[1], paths[0]]
    assert find_latest(tmp_path) == paths[3]
    flip(paths[3] / "optimizer-r00000-master.safetensors")
    assert prune(tmp_path, 1) == []  # the newest looks whole, but is not
    assert find_latest(tmp_path) == paths[2]
    (paths[3] / "run.yaml").unlink()
    newest = toy.save(tmp_path, 5, keep=1)[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", newest.name]


def test_prune_spares_what_was_just_written(tmp_path, toy) -> None:
    """Also where checkpoints of later steps fill the places."""
    paths = [toy.save(tmp_path, step)[0] for step in (1, 2, 3, 4)]
    assert prune(tmp_path, 2, trusted=paths[0]) == [paths[1]]
    assert find_latest(tmp_path) == paths[3]
    assert paths[0].is_dir()


def test_a_directory_without_a_checkpoint_is_passed_by(tmp_path, toy) -> None:
    whole = toy.save(tmp_path, 1)[0]
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "latest").write_text("step_00000002\n")
    assert resolve(tmp_path) == whole


def test_unwritable_directories(tmp_path, toy, in_ranks) -> None:
    (tmp_path / "file").write_text("")
    results = toy.save(tmp_path / "file", 1, 2, 2)
    assert all(isinstance(r, UserError) and str(tmp_path / "file") in str(r) for r in results)


def test_a_real_write_error(tmp_path, toy) -> None:
    toy.save(tmp_path, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, old[1]))
    try:
        results = toy.save(tmp_path, 2, 2, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert all(isinstance(r, UserError) for r in results)
    assert ".tmp-step_00000002/optimizer-r00000-master.safetensors: File too large" in str(
        results[1]
    )
    assert find_latest(tmp_path) == tmp_path / "step_00000001"


def test_one_failing_rank_fails_all(tmp_path, in_ranks) -> None:
    def action(world) -> None:
        def write(writer) -> None:
            writer.write_text("same name", "a")

        write_directory(tmp_path / "out", world, write, lambda writer, parts: None)

    results = in_ranks(3, action)
    assert all(isinstance(r, UserError) and "same name" in str(r) for r in results)
    assert list(tmp_path.iterdir()) == []

    def refuse(world) -> None:
        def fail() -> None:
            raise UserError("only rank 0 knows")

        world.from_rank_0(fail)

    assert [str(r) for r in in_ranks(3, refuse)] == ["only rank 0 knows"] * 3


def test_pieces_of_any_size_are_written_and_hashed(tmp_path) -> None:
    parts = [b"", b"a" * 5, bytes(range(256)) * (1 << 13), memoryview(b"b" * ((16 << 20) + 3))]
    record = write_file(tmp_path / "f", parts)
    content = (tmp_path / "f").read_bytes()
    assert content == b"".join(parts)
    assert record == FileRecord(len(content), hashlib.sha256(content).hexdigest())
    assert hash_file(tmp_path / "f") == record.sha256
    for act in (lambda: write_file(tmp_path / "f", [b""]), lambda: hash_file(tmp_path / "no")):
        with pytest.raises(UserError, match=str(tmp_path)):
            act()
    replace_file(tmp_path / "f", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", "new")]


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (UserError("no such store"), "no such store"),
        (OSError(errno.EIO, "Input/output error"), "rank 1: [Errno 5] Input/output error"),
        (MemoryError(), "rank 1: out of memory"),
    ],
    ids=["user", "disk", "memory"],
)
def test_failure_of_one_rank_reaches_all(in_ranks, failure, said) -> None:
    def action(world) -> None:
        with world.agreed():
            if world.rank == 1:
                raise failure

    results = in_ranks(3, action)
    assert all(isinstance(r, UserError) and str(r) == said for r in results), results


def test_failures_of_several_ranks_are_all_told_once(in_ranks) -> None:
    def action(world) -> None:
        with world.agreed():
            raise UserError("no store" if world.rank else "no model")

    assert [str(r) for r in in_ranks(3, action)] == ["no model; no store"] * 3


def test_a_defect_is_not_taken_for_a_mistake(in_ranks) -> None:
    """It ends its rank, whose agent ends the others: here they would wait for it."""

    def action(world) -> None:
        with world.agreed():
            raise KeyError("a defect")

    assert [type(r) for r in in_ranks(2, action)] == [KeyError, KeyError]


def test_what_rank_0_gives_is_everyones(in_ranks) -> None:
    called = []

    def action(world) -> str:
        return world.from_rank_0(lambda name: called.append(name) or f"of {name}", "rank 0")

    assert in_ranks(3, action) == ["of rank 0"] * 3
    assert called == ["rank 0"]


def test_one_process_agrees_with_itself() -> None:
    with pytest.raises(UserError, match="full"), OneProcess().agreed():
        raise OSError(errno.ENOSPC, "the disk is full")
    assert OneProcess().from_rank_0(len, "four") == 4
