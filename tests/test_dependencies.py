"""What we stand on: pinned, under licences that we accept, for a stated reason, and in use.

Known faults are for ``make audit``, which asks an advisory service over the network.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    packages_distributions,
)
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[1]
TEXT = (REPO / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]
OWN = "concertmaster"

ACCEPTED = (
    r"MIT(-0|-CMU)?|Apache-2\.0( WITH LLVM-exception)?|BSD(-[23]-Clause)?|0BSD|ISC|PSF-2\.0|Zlib|"
    r"MPL-2\.0|Unlicense|CC0-1\.0|HPND|Python-2\.0(\.1)?|BSL-1\.0|CNRI-Python"
)
"""Licences that let anybody run and ship this; MPL's share-alike is per file, and we ship none."""

WORDS = {
    "GPL": r"GPL|GNU",
    "MIT": r"\bMIT\b",
    "Apache-2.0": r"Apache",
    "BSD": r"\bBSD\b",
    "ISC": r"\bISC\b",
    "MPL-2.0": r"Mozilla|MPL",
    "PSF-2.0": r"Python Software Foundation|\bPSF",
    "HPND": r"HPND|Historical Permission",
    "Unlicense": r"Unlicense|public domain",
}
"""How packages word a licence that they give no SPDX name of."""

KNOWN: dict[str, str] = {}
"""Licences read by a person where a package's metadata names none."""


def direct(*groups: str) -> list[Requirement]:
    """Requirements of the project, and of some of its extras."""
    lines = list(PROJECT["dependencies"])
    for group in groups:
        lines += PROJECT["optional-dependencies"][group]
    return [Requirement(line) for line in lines]


def name_of(requirement: Requirement) -> str:
    return canonicalize_name(requirement.name)


@cache
def installed() -> dict[str, Distribution]:
    """Whatever is needed here, and what that needs in turn, by name."""
    found: dict[str, Distribution] = {}
    asked: set[tuple[str, str]] = set()
    todo = [(one, "") for one in direct("data", "otel", "train", "plots", "dev")]
    while todo:
        requirement, extra = todo.pop()
        name = name_of(requirement)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if name == OWN or (name, wanted) in asked:
                continue
            asked.add((name, wanted))
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                pytest.fail(f"{name} is needed and not installed: run make setup")
            todo += [(Requirement(line), wanted) for line in found[name].requires or ()]
    return found


@cache
def pins() -> dict[str, str]:
    lines = (REPO / "constraints.txt").read_text().split()
    return {canonicalize_name(one.partition("==")[0]): one.partition("==")[2] for one in lines}


def licences(found: Distribution) -> list[str]:
    """SPDX names of a package's licences, or the nearest; empty if it says nothing."""
    about = found.metadata
    name = canonicalize_name(about["Name"])
    if name in KNOWN:
        return [KNOWN[name]]
    expressions = about.get_all("License-Expression")
    if expressions:
        return re.split(r" (?:AND|OR) ", expressions[0].strip("() "))
    classifiers = [c for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    said = " ".join([*classifiers, *(one[:300] for one in about.get_all("License") or ())])
    return [licence for licence, word in WORDS.items() if re.search(word, said)]


@pytest.mark.parametrize("name", sorted(installed()))
def test_every_package_is_pinned_to_what_is_installed(name: str) -> None:
    assert pins().get(name) == installed()[name].version, "write it into constraints.txt"


def test_nothing_is_pinned_that_nothing_needs() -> None:
    tools = {"uv", "pip"}

    stale = {*pins()} - {*installed()} - tools

    assert not stale, "take it out of constraints.txt"


def test_pins_are_plain_exact_and_in_order() -> None:
    lines = (REPO / "constraints.txt").read_text().splitlines()

    assert all(re.fullmatch(r"[a-z0-9._-]+==[0-9][\w.+]*", line) for line in lines)
    assert [*lines] == sorted(lines)


@pytest.mark.parametrize("name", sorted(installed()))
def test_every_licence_is_one_that_we_accept(name: str) -> None:
    found = licences(installed()[name])

    assert found, "its metadata names no licence: read it, and write it into KNOWN"
    wrong = [one for one in found if not re.fullmatch(ACCEPTED, one.strip("() "))]
    assert not wrong


@pytest.mark.parametrize(
    "said", ["AGPL-3.0-only", "GPL-2.0-or-later", "LicenseRef-Proprietary", "SSPL-1.0"]
)
def test_a_licence_that_binds_our_users_is_noticed(said: str) -> None:
    assert not re.fullmatch(ACCEPTED, said)


def test_every_direct_dependency_has_its_reason_beside_it() -> None:
    for requirement in direct(*PROJECT["optional-dependencies"]):
        if name_of(requirement) != OWN:
            line = rf'^  "{re.escape(str(requirement))}", +# \S.+$'
            assert re.search(line, TEXT, re.MULTILINE), str(requirement)


def imported() -> Iterator[str]:
    """Names of the packages that our sources import, wherever in a file."""
    for path in (REPO / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (one.name.partition(".")[0] for one in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def test_sources_import_what_is_declared_and_no_more() -> None:
    owners = packages_distributions()
    declared = {name_of(one) for one in direct(*PROJECT["optional-dependencies"])}
    absent = {
        "autogen_ext",
        "autogen_agentchat",
        "autogen_core",
        "crewai",
        "onnxruntime",
        "tokenizers",
        "torch",
        "transformers",
        "safetensors",
    }
    foreign = {*imported()} - {*sys.stdlib_module_names} - {OWN} - absent

    for module in sorted(foreign):
        names = {canonicalize_name(owner) for owner in owners.get(module, ())}
        assert names & (declared | {"langchain-core"}), f"{module} is imported and not declared"


def test_every_dependency_at_run_time_is_imported() -> None:
    owners = packages_distributions()
    used = {canonicalize_name(owner) for module in imported() for owner in owners.get(module, ())}

    assert {name_of(one) for one in direct()} <= used
