from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path

import jsonschema
import pytest

from bgcbench import results
from bgcbench.errors import OutputError, ResultFileError
from tests.example import example_document


def test_the_schema_is_a_schema_and_the_example_satisfies_it() -> None:
    jsonschema.Draft202012Validator.check_schema(results.schema())
    jsonschema.validate(example_document(), results.schema())


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    document, path = example_document(), tmp_path / "r.json"
    results.ResultWriter(path).write(document)
    assert results.read(path) == document
    assert list(tmp_path.iterdir()) == [path]


def test_samples_stand_on_one_line_and_strings_are_untouched() -> None:
    document = {"reason": "a list [\n 1,\n 2\n] in text", "samples_s": [0.1, 2e-05, 3.0], "empty": []}
    text = results.dumps(document)
    assert '"samples_s": [0.1, 2e-05, 3.0]' in text
    assert json.loads(text) == document


def test_not_a_number_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.dumps({"median_s": math.nan})


def test_a_new_file_has_the_permissions_of_any_file(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours.json"
    plain.touch()
    results.ResultWriter(ours).write(example_document())
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_older_file_survives_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, document = tmp_path / "r.json", example_document()
    writer = results.ResultWriter(path)
    writer.write(document)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer.write({**document, "warnings": ["newer"]})
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
    writer.write(example_document())
    assert writer.rescued_to is not None
    assert results.read(writer.rescued_to) == example_document()
    assert list(rescue.iterdir()) == [writer.rescued_to]


def test_the_probe_refuses_what_exists_and_what_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text("something of the user's")
    with pytest.raises(OutputError, match="exists; use --force"):
        results.ResultWriter(file).probe(replace=False)
    results.ResultWriter(file).probe(replace=True)
    assert file.read_text() == "something of the user's"
    with pytest.raises(OutputError, match="is a folder"):
        results.ResultWriter(tmp_path).probe(replace=True)
    with pytest.raises(OutputError, match="is no folder"):
        results.ResultWriter(file / "r.json").probe(replace=False)
    results.ResultWriter(tmp_path / "new" / "folder" / "r.json").probe(replace=False)
    assert (tmp_path / "new" / "folder").is_dir()


def broken(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_files_that_are_no_results_are_refused_in_one_line(tmp_path: Path) -> None:
    path, text = tmp_path / "r.json", results.dumps(example_document())
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
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultFileError, match="not UTF-8"):
        results.read(path)
    with pytest.raises(ResultFileError, match="cannot be read: No such file"):
        results.read(tmp_path / "missing.json")
    with pytest.raises(ResultFileError, match="cannot be read"):
        results.read(tmp_path)


def test_keys_of_a_later_minor_version_are_ignored(tmp_path: Path) -> None:
    document = {**example_document(), "news": {"any": "thing"}}
    document["schema"] = {"name": "bgcbench.result", "version": "1.7"}
    path = broken(tmp_path / "r.json", results.dumps(document))
    assert results.read(path)["news"] == {"any": "thing"}


def test_only_a_like_run_on_the_same_device_may_continue_a_file() -> None:
    document = example_document()
    settings, environment = document["settings"], document["environment"]
    results.check_resumable(document, "profile", settings, environment, "r.json")
    changes = [
        ("train", settings, environment, "holds a 'profile' run"),
        ("profile", {**settings, "seed": 7}, environment, "its seed was 0 and is 7"),
        ("profile", settings, {**environment, "torch": "9.9"}, "its torch was"),
        ("profile", settings, {**environment, "device": {"type": "cuda"}}, "its device was"),
    ]
    for command, new_settings, new_environment, message in changes:
        with pytest.raises(ResultFileError, match=message):
            results.check_resumable(document, command, new_settings, new_environment, "r.json")
    results.check_resumable(document, "profile", settings, {**environment, "os": "upgraded"}, "r.json")


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
    document = {**example_document(), "results": [{"status": status} for status in statuses], "warnings": []}
    results.finish(document, planned, interrupted=interrupted, failed=failed)
    assert (document["exit_reason"], document["complete"]) == expected
    assert document["finished_at"] is not None
    assert document["warnings"] == ([failed] if failed else [])
