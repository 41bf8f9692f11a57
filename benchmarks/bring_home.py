"""Puts what came back from a device into results/, and into the claims.

    python -m benchmarks.bring_home results.tgz [--force] [--dry-run]

Says what each step came to and which tests failed; those go to .pack/again.txt, which the second call runs again. Every
result file is checked against the schema and goes under the name of its condition. Refused is one that is not whole: a
quick look, a rehearsal, a run that was interrupted or whose rows did not all succeed, one that names a place on a
machine. A file that is there already is replaced with --force alone. In what is kept only two things are changed: --out
in argv is the file's place under results/, and the commit is the packed one where the device had no checkout. Exit code
1 if a file was refused, 2 if the archive cannot be read.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from benchmarks import claims, pack
from bgcbench.errors import ResultFileError
from bgcbench.results.document import Document, document_of, dumps
from bgcbench.results.files import write_atomically
from bgcbench.theory.paper import WORKLOAD

# An absolute path begins a string, or follows a blank or an equals sign in one.
MACHINE_PATH = re.compile(r'["= ](/[\w.-]+){2,}|[A-Z]:\\')
SOURCE = "source.json"


def contents(archive: Path) -> dict[str, bytes]:
    """The plain files at the top of ``archive``; nothing is unpacked to the disk."""
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            path = PurePosixPath(member.name)
            file = opened.extractfile(member) if member.isfile() and path.parent == PurePosixPath() else None
            if file is not None:
                found[path.name] = file.read()
    return found


def condition(document: Document) -> str:
    """The name of a result's file: what was measured, where and how."""
    command, config, where = document.command, document.config, document.environment.device.type
    if command == "train":
        recipe = config["recipe"] + ("-eager" if config["recipe"] == "fast" and not config["compile"] else "")
        return f"train-{config['model']}-{config['data']}-{where}-{recipe}.json"
    if command != "profile":
        raise ResultFileError(f"a '{command}' run has no name here; put it into results/ by hand")
    state = f"{where}-{config['precision']}-{config['layout']}"
    if "model" in config:
        mode = "" if config["mode"] == "eager" else f"-{config['mode']}"
        return f"network-{config['model']}-{state}{mode}.json"
    if any(config[name] != value for name, value in WORKLOAD.items()):
        raise ResultFileError("this layer is not Table 4's and has no name here; put it into results/ by hand")
    return f"table4-{state}-{config['mode']}.json"


def check_whole(document: Document) -> None:
    """Raise ResultFileError for a result that is no evidence."""
    if document.quality != "full":
        raise ResultFileError(f"of {document.quality} quality")
    if not document.complete:
        raise ResultFileError(f"not complete: {document.exit_reason}")
    failed = [f"{row.key}: {row.reason}" for row in document.results if row.status != "ok"]
    if failed:
        raise ResultFileError(f"not all rows succeeded: {failed[0]}")


def read(name: str, text: bytes, source: dict[str, Any]) -> tuple[str, str]:
    """(name under results/, text) of one file that came back; raises ResultFileError where it is refused."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ResultFileError("not complete JSON") from error
    if isinstance(content, dict) and "schema" not in content and {"command", "environment"} <= set(content):
        # One of the scripts' own files.
        if content.get("rehearsal") or not content.get("complete"):
            raise ResultFileError("a rehearsal" if content.get("rehearsal") else "not complete")
        written = json.dumps(content, indent=1) + "\n"
    else:
        document = document_of(json.loads(text), name)
        check_whole(document)
        name = condition(document)
        if "--out" in document.argv:
            content["argv"][document.argv.index("--out") + 1] = f"results/{name}"
        if document.tool.git_commit is None:
            content["tool"] |= source
        written = dumps(content)
    if found := MACHINE_PATH.search(written):
        raise ResultFileError(f"it names a place on a machine: {found[0]}")
    return name, written


def failed_tests(cases: list[ElementTree.Element]) -> Iterator[str]:
    """The node ids of the tests that failed."""
    for case in cases:
        if case.find("failure") is None and case.find("error") is None:
            continue
        parts = case.get("classname", "").split(".")
        for length in range(len(parts), 0, -1):  # a class follows the module
            path = Path(*parts[:length]).with_suffix(".py")
            if (pack.ROOT / path).exists():
                yield "::".join([path.as_posix(), *parts[length:], case.get("name", "")])
                break


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--force", action="store_true", help="replace files that results/ has")
    parser.add_argument("--dry-run", action="store_true", help="check and say, and write nothing")
    options = parser.parse_args()
    try:
        files = contents(options.archive)
    except (OSError, tarfile.TarError, EOFError) as problem:
        parser.error(f"{options.archive} cannot be read: {problem}; give the results.tgz of on_device.sh")
    print(files.get("steps.txt", b"").decode(errors="replace"), end="")
    source = json.loads(files.get(SOURCE, b"{}"))
    taken = refused = 0
    for name, text in sorted(files.items()):
        if not name.endswith(".json") or name == SOURCE:
            continue
        try:
            target, written = read(name, text, source)
            path = claims.ROOT / "results" / target
            if path.exists() and not options.force:
                raise ResultFileError(f"results/{target} is there already; --force replaces it")
        except (ResultFileError, KeyError) as problem:
            print(f"refused {name}: {f'it has no {problem}' if isinstance(problem, KeyError) else problem}")
            refused += 1
            continue
        taken += 1
        print(f"{'would take' if options.dry_run else 'took'} {name} as results/{target}")
        if not options.dry_run:
            write_atomically(path, written.encode())
    cases: list[ElementTree.Element] = []
    for name, text in sorted(files.items()):
        try:
            cases += ElementTree.fromstring(text).iter("testcase") if name.endswith(".xml") else ()
        except ElementTree.ParseError as problem:  # pytest was killed while it wrote
            print(f"refused {name}: {problem}")
    tests = list(failed_tests(cases))
    for test in tests:
        print(f"failed {test}")
    skipped = sum(case.find("skipped") is not None for case in cases)
    print(f"{taken} files taken, {refused} refused; {len(cases)} tests, {len(tests)} failed, {skipped} skipped")
    if not options.dry_run:
        pack.AGAIN.parent.mkdir(exist_ok=True)
        pack.AGAIN.write_text("".join(f"{test}\n" for test in tests), encoding="utf-8")
        if taken:
            claims.write()
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
