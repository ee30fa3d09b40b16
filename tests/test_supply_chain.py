"""What is installed is pinned with its hashes, and what the wheel contains of others is said."""

import re
import sys
import tomllib
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import lock
import sbom

PIN = re.compile(r"([a-z0-9-]+)==([\w.+]+)( ; python_version [^\\]*)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-").replace(".", "-")


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text()
    body = "".join(line for line in lines.splitlines(keepends=True) if not line.startswith("#"))
    assert PIN.sub("", body) == ""
    return {match[1]: match[2] for match in PIN.finditer(body)}


@pytest.mark.holds("held.1")
def test_18_the_lock_pins_all_that_is_needed_with_hashes_and_names_no_host() -> None:
    locked = pins()
    assert {name_of(requirement) for requirement in lock.wanted()} <= locked.keys()
    assert len(locked) > 40
    assert "://" not in (ROOT / "requirements.lock").read_text()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin, _, marker = line.partition(" ; ")
        name, equals, version = pin.partition("==")
        if equals and name_of(name) in locked and "aarch64" not in marker:
            assert locked[name_of(name)] == version, name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for requirement in project["build-system"]["requires"]:
        name, equals, version = requirement.partition("==")
        assert (equals, locked[name_of(name)]) == ("==", version)


def test_18_the_bill_of_materials_has_what_the_wheel_contains() -> None:
    document: dict[str, Any] = {"bomFormat": "CycloneDX", "components": [{"name": "numpy"}]}
    names = [component["name"] for component in sbom.with_contents(document)["components"]]
    assert names == ["numpy", "LLVM runtimes", "wasi-libc", "SceneParse150 class names"]
    notice = (ROOT / "NOTICE").read_text()
    for component in ("LLVM", "wasi-libc", "SceneParse150", "Copyright (c) 2016 ADE20k"):
        assert component in notice
    for source in (entry[3] for entry in sbom.CONTAINED[:2]):
        assert source in notice
