from __future__ import annotations

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from msgspec.structs import replace

from bgcbench import results
from bgcbench.cli.output import Output
from bgcbench.errors import OutputError, ResultFileError
from bgcbench.interrupts import Interrupts
from bgcbench.results import Document, document_of
from tests.conftest import ROOT
from tests.example import example_document
from tests.example_transfer import transfer_document


def example() -> Document:
    return document_of(example_document(), "the example")


def with_warning(text: str) -> Document:
    return replace(example(), warnings=(text,))


def test_the_schema_is_a_schema_and_the_example_satisfies_it() -> None:
    jsonschema.Draft202012Validator.check_schema(results.schema())
    jsonschema.validate(example_document(), results.schema())


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    document, path = example(), tmp_path / "r.json"
    results.ResultWriter(path).write(document)
    assert results.read(path) == document
    assert list(tmp_path.iterdir()) == [path]


def test_samples_stand_on_one_line_and_strings_are_untouched() -> None:
    document = replace(
        with_warning("a list [\n 1,\n 2\n] in text"), config={"samples_s": [0.1, 2e-05, 3.0], "empty": []}
    )
    text = results.dumps(document)
    assert '"samples_s": [0.1, 2e-05, 3.0]' in text
    assert document_of(json.loads(text), "text") == document


def test_not_a_number_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.dumps(replace(example(), config={"median_s": math.nan}))


def test_a_new_file_has_the_permissions_of_any_file(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours.json"
    plain.touch()
    results.ResultWriter(ours).write(example())
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_older_file_survives_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, document = tmp_path / "r.json", example()
    writer = results.ResultWriter(path)
    writer.write(document)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer.write(with_warning("newer"))
    monkeypatch.undo()
    assert results.read(path) == document
    assert list(tmp_path.iterdir()) == [path]
    assert writer.problem == "No space left on device"
    assert writer.rescued_to is None  # the temporary folder refused too


def test_a_file_that_can_no_longer_be_written_is_rescued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rescue, target = tmp_path / "rescue", tmp_path / "target"
    rescue.mkdir()
    target.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(rescue))
    writer = results.ResultWriter(target / "r.json")
    target.rmdir()
    writer.write(example())
    assert writer.rescued_to is not None
    assert results.read(writer.rescued_to) == example()
    assert list(rescue.iterdir()) == [writer.rescued_to]


def claim(path: Path, *, replace: bool) -> None:
    writer = results.ResultWriter(path)
    try:
        assert writer.claim(replace=replace) is None
    finally:
        writer.release()


def test_what_exists_and_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text("something of the user's")
    with pytest.raises(OutputError, match="exists; use --force"):
        claim(file, replace=False)
    claim(file, replace=True)
    assert file.read_text() == "something of the user's"
    with pytest.raises(OutputError, match="is a folder"):
        claim(tmp_path, replace=True)
    with pytest.raises(OutputError, match="is no folder"):
        claim(file / "r.json", replace=False)
    claim(tmp_path / "new" / "folder" / "r.json", replace=False)
    assert list((tmp_path / "new" / "folder").iterdir()) == []  # a lock leaves nothing behind


def in_another_process(path: Path, then: str = "print('got it', flush=True); input()") -> subprocess.Popen[str]:
    """A process that takes the lock of ``path``; the first line that it prints is how that went."""
    code = f"""
import os, pathlib, sys
from bgcbench.results import ResultWriter
writer = ResultWriter(pathlib.Path(sys.argv[1]))
try:
    writer.claim(replace=True)
except Exception as error:
    sys.exit(print(error))
{then}
"""
    return subprocess.Popen([sys.executable, "-c", code, str(path)], text=True, cwd=ROOT,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip


def test_a_file_has_one_writer_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    path, lock = tmp_path / "r.json", tmp_path / ".r.lock"
    first = in_another_process(path)
    assert first.stdout is not None
    assert first.stdout.readline() == "got it\n"
    with pytest.raises(OutputError, match=rf"r\.json is being written by another run \(process {first.pid} on "):
        claim(path, replace=True)
    with pytest.raises(OutputError, match="another run"):
        claim(tmp_path / "r", replace=True)  # whose checkpoints would be the same folder
    assert in_another_process(path).communicate()[0].startswith(f"--out {path} is being written by another run")
    claim(tmp_path / "other.json", replace=False)
    first.kill()
    first.communicate()
    assert lock.exists()
    claim(path, replace=True)
    assert list(tmp_path.iterdir()) == []


def test_a_child_of_a_killed_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    """As a DataLoader's worker that outlives the process that has forked it by some seconds."""
    forks = "child = os.fork()\nif not child: input(); os._exit(0)\nprint('got it', flush=True); input()"
    parent = in_another_process(tmp_path / "r.json", forks)
    assert parent.stdout is not None
    assert parent.stdin is not None
    assert parent.stdout.readline() == "got it\n"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    claim(tmp_path / "r.json", replace=True)
    parent.stdin.close()  # ends the child


def test_of_many_that_ask_at_once_one_gets_it_each_time(tmp_path: Path) -> None:
    """Taking, giving back and removing the lock's file overlap in every way; what it guards stays one process's."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    code = """
import pathlib, sys, time
from bgcbench.locks import FileLock
lock, counter = FileLock(pathlib.Path(sys.argv[1]) / ".lock"), pathlib.Path(sys.argv[1]) / "counter"
for _ in range(100):
    while True:
        try:
            lock.acquire()
            break
        except BlockingIOError:
            time.sleep(0.0002)
    counter.write_text(str(int(counter.read_text()) + 1))
    lock.release()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert counter.read_text() == "400"
    assert list(tmp_path.iterdir()) == [counter]


def test_where_nothing_can_be_locked_the_run_is_told_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("bgcbench.locks._lock", no_locks)
    writer = results.ResultWriter(tmp_path / "r.json")
    assert "cannot lock files (No locks available): see to it" in str(writer.claim(replace=False))
    writer.write(example())
    assert writer.problem is None


def test_a_file_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    path, document = tmp_path / "r.json", example()
    writer = results.ResultWriter(path)
    writer.claim(replace=False)
    writer.write(document)
    writer.write(document)  # its own file, again
    theirs = results.dumps(document)
    path.write_text(theirs, encoding="utf-8")  # the same bytes, and not by us
    writer.write(with_warning("newer"))
    writer.write(with_warning("newest"))
    writer.release()
    assert path.read_text(encoding="utf-8") == theirs
    assert writer.problem == "another program has written it meanwhile"
    assert writer.rescued_to is not None
    assert results.read(writer.rescued_to) == with_warning("newest")
    assert sorted(tmp_path.iterdir()) == sorted([path, writer.rescued_to])


def test_a_file_that_was_removed_meanwhile_is_written_again(tmp_path: Path) -> None:
    writer = results.ResultWriter(tmp_path / "r.json")
    writer.write(example())
    writer.path.unlink()
    writer.write(example())
    assert results.read(writer.path) == example()
    assert writer.problem is None


def test_a_file_that_changed_since_it_was_read_is_not_gone_on_with(tmp_path: Path) -> None:
    writer = results.ResultWriter(tmp_path / "r.json")
    writer.write(example())
    stored = results.read(writer.path)
    resumed = Output(writer.path, to_stdout=False, replace=True, form="auto", quiet=True)
    with resumed.claimed(stored, Interrupts()) as claimed:
        assert claimed is not None
    results.ResultWriter(writer.path).write(with_warning("another run's"))
    with (
        pytest.raises(OutputError, match="written by another run while this one began"),
        resumed.claimed(stored, Interrupts()),
    ):
        pass
    assert writer.claim(replace=True) is None  # nobody holds it any more
    writer.release()


def broken(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_files_that_are_no_results_are_refused_in_one_line(tmp_path: Path) -> None:
    path, text = tmp_path / "r.json", results.dumps(example())
    cases = {
        text[: len(text) // 2]: "not complete JSON",
        "": "not complete JSON",
        "[1, 2]": "not a bgcbench result",
        '{"schema": {"name": "pytest.benchmark", "version": "1.0"}}': "not a bgcbench result",
        text.replace('"version": "1.0"', '"version": "2.0"', 1): "schema version 2.0; this bgcbench reads 1.x",
        text.replace('"status": "ok"', '"status": "fine"', 1): "is damaged: results/",
        text.replace('"median_s"', '"middle_s"', 1): "is damaged: results/",
        '{"schema": {"name": "bgcbench.result", "version": "1.0"}}': "is damaged",
    }
    for content, message in cases.items():
        with pytest.raises(ResultFileError, match=message) as caught:
            results.read(broken(path, content))
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfd\x00")
    with pytest.raises(ResultFileError, match="not UTF-8"):
        results.read(path)
    with pytest.raises(ResultFileError, match="cannot be read: No such file"):
        results.read(tmp_path / "missing.json")
    with pytest.raises(ResultFileError, match="cannot be read"):
        results.read(tmp_path)


def test_what_other_programs_do_to_text_files_is_known(tmp_path: Path) -> None:
    path, text = tmp_path / "r.json", results.dumps(example())
    path.write_text(text, encoding="utf-8-sig")  # an editor on Windows
    assert results.read(path) == example()
    for encoding in ("utf-16", "utf-16-be"):
        path.write_bytes(("\ufeff" if encoding.endswith("be") else "").encode(encoding) + text.encode(encoding))
        with pytest.raises(ResultFileError, match=r"is UTF-16, as PowerShell's > writes.*--out FILE"):
            results.read(path)


def test_keys_of_a_later_minor_version_are_ignored() -> None:
    later = {**example_document(), "news": {"any": "thing"}, "schema": {"name": "bgcbench.result", "version": "1.7"}}
    assert document_of(later, "later").results == example().results


def test_what_older_files_say_in_words_only_gets_its_code() -> None:
    document = transfer_document(groups=(2,), epochs=3)
    for row in document["results"]:
        row.pop("stage", None)
        row["convert"]["kept"] = [{"name": "a", "reason": "N=2 does not divide 3 -> 5 channels"},
                                  {"name": "b", "reason": "a shortcut"}]  # fmt: skip
    done, untrained = [row for row in document["results"] if row["params"]["epochs"]][:2]
    untrained |= {"status": "interrupted", "reason": "whatever", "epochs": []}
    judged = next(row for row in document["results"] if not row["params"]["epochs"])
    document["warnings"] = ["GC N=2: N=2 does not divide, kept dense: a", "something else"]
    found = document_of(document, "old.json")
    assert [kept.code for kept in found.results[0].convert.kept] == ["indivisible", ""]
    stages = {row.key: row.stage for row in found.results}
    assert [stages[row["key"]] for row in (done, untrained, judged)] == ["trained", "evaluated", "evaluated"]
    assert found.warnings == ("something else",)


def test_only_a_like_run_on_the_same_device_may_continue_a_file() -> None:
    document = example()
    settings, environment = document.settings, document.environment
    with pytest.raises(ResultFileError, match="holds a 'profile' run"):
        results.check_command(document, "train", "r.json")
    changes = [
        (replace(settings, seed=7), environment, "its seed was 0 and is 7"),
        (settings, replace(environment, torch="9.9"), "its torch was"),
        (settings, replace(environment, device=replace(environment.device, name="another")), "its device was"),
    ]
    for new_settings, new_environment, message in changes:
        with pytest.raises(ResultFileError, match=message):
            results.check_resumable(document, new_settings, new_environment, "r.json")
    results.check_resumable(document, settings, replace(environment, os="upgraded"), "r.json")


@pytest.mark.parametrize(
    ("statuses", "planned", "interrupted", "failed", "expected"),
    [
        (["ok", "ok"], 2, False, None, ("ok", True)),
        (["ok", "invalid"], 2, False, None, ("ok", True)),
        (["ok", "oom"], 2, False, None, ("partial", False)),
        (["ok", "interrupted"], 2, True, None, ("interrupted", False)),
        (["ok"], 2, False, "the run broke off", ("error", False)),
    ],
)
def test_how_a_run_ended_is_in_the_file(statuses, planned, interrupted, failed, expected) -> None:
    document = example()
    some = document.results[0]
    document.results = tuple(replace(some, key=str(n), status=status) for n, status in enumerate(statuses))
    document.finish(planned, interrupted=interrupted, failed=failed)
    assert (document.exit_reason, document.complete, document.failure) == (*expected, failed)
    assert document.finished_at is not None


def test_a_run_that_goes_on_with_a_file_says_nothing_of_how_the_last_one_ended() -> None:
    document = example()
    document.finish(len(document.results) + 1, failed="ZeroDivisionError: a bug")
    again = results.reopened(document, {"groups": [2]})
    ended = (again.complete, again.finished_at, again.exit_reason, again.failure, again.config)
    assert ended == (False, None, "running", None, {"groups": [2]})
    assert again.results == document.results
