"""References to the environment, all problems at once, schemas, ``check`` and ``schema``."""

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from concertmaster import local
from concertmaster.cli import app
from concertmaster.config import EngineFile, FleetFile, GatewaySection, PoolSection
from concertmaster.config_files import load_fleet, problems_of, schema
from concertmaster.config_reading import Reading
from concertmaster.core.errors import InputError
from test_config import EXAMPLES, POOL

REPO = Path(__file__).parents[1]
ENGINE = REPO / "examples" / "engine.toml"


def read(text: str, **environ: str) -> tuple[FleetFile | None, list[str]]:
    reading = Reading("f", environ)
    file = reading.read(tomllib.loads(text), FleetFile)
    return file, [str(problem) for problem in reading.problems]


def gateway(line: str, **environ: str) -> GatewaySection:
    file, problems = read(f"{POOL}[gateway]\n{line}", **environ)
    assert file is not None, problems
    return file.gateway


def complaint(line: str, **environ: str) -> str:
    _, (problem,) = read(f"{POOL}[gateway]\n{line}", **environ)
    return problem


# References to the environment.


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("${A}", "one"),
        ("x-${A}-${B}", "x-one-two"),
        ("${NO:-three}", "three"),
        ("${EMPTY:-three}", "three"),
        ("${EMPTY}", ""),
        ("${A:-three}", "one"),
        ("${NO:-}", ""),
        ("${NO:-a:-b}", "a:-b"),
        ("$${A}", "${A}"),
        ("$A $$ {A}", "$A $$ {A}"),
    ],
)
def test_text_may_refer_to_the_environment(written: str, meant: str) -> None:
    assert gateway(f"models = '{written}'", A="one", B="two", EMPTY="").models == meant


def test_items_of_lists_may_refer_to_it_too() -> None:
    file, _ = read(POOL + "endpoints = ['http://${HOST}:1', '${URL}']", HOST="x", URL="http://y:2")

    assert file is not None
    assert file.pools[0].endpoints == ["http://x:1", "http://y:2"]


def test_a_value_that_is_one_reference_may_be_a_number_or_a_word_of_a_set() -> None:
    told = gateway("port = '${PORT}'\nwindow_s = '${WINDOW:-0.5}'", PORT="81")
    file, _ = read(
        POOL + "prefix_caching = '${KEEP}'\nstate = '${STATE}'", KEEP="false", STATE="disk"
    )

    assert (told.port, told.window_s) == (81, 0.5)
    assert file is not None
    assert (file.pools[0].prefix_caching, file.pools[0].state) == (False, "disk")


def test_what_the_environment_holds_is_no_reference_itself() -> None:
    assert gateway("models = '${A}'", A="${B}", B="no").models == "${B}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "keys = '${NO}'",
            "gateway.keys: the environment has no NO (export NO=… or write ${NO:-default})",
        ),
        ("keys = '${1}'", "gateway.keys: expected ${NAME} or ${NAME:-default}, found '${1}'"),
        ("keys = 'a${B'", "gateway.keys: expected ${NAME} or ${NAME:-default}, found '${B'"),
        ("port = 'x${A}'", "gateway.port: expected `int`, got `str` (found 'xsecret')"),
    ],
)
def test_a_reference_that_leads_nowhere_is_named_with_its_key(line: str, message: str) -> None:
    assert complaint(line, A="secret") == f"f: {message}"


def test_a_complaint_does_not_show_what_the_environment_holds() -> None:
    said = complaint("port = '${A}'", A="secret") + complaint("hold_s = '${B}'", B="-7")

    assert "secret" not in said
    assert "-7" not in said
    assert "found '${A}'" in said


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_what_a_variable_holds_arrives_as_it_is(value: str) -> None:
    assert gateway("models = '${A}'", A=value).models == value


# All that is wrong.


def test_everything_that_is_wrong_is_said_at_once_each_with_its_place() -> None:
    text = (
        POOL.replace('gpu = "a100-80g"', "gpus = 3")
        + "replicas = 0\nstate = 'gone'\nendpoints = ['x', 3]\n"
        + "[[pools]]\nname = 4\nmodel = 'm'\ngpu = 'g'\n"
        + "[gateway]\nprot = 1\nport = 70000\n[[nodes]]\n[scaling]\ngpus = 0.5\n"
    )

    assert [problem.partition(" (")[0] for problem in read(text)[1]] == [
        'f: pools[0]: unknown key "gpus"',
        'f: pools[0]: missing key "gpu"',
        "f: pools[0].replicas: expected at least 1, found 0",
        "f: pools[0].endpoints[1]: expected `str`, got `int`",
        'f: pools[0].state: unknown state "gone"',
        "f: pools[1].name: expected `str`, got `int`",
        'f: nodes[0]: missing key "name"',
        'f: nodes[0]: missing key "gpu"',
        'f: nodes[0]: missing key "gpus"',
        'f: gateway: unknown key "prot"',
        "f: gateway.port: expected at most 65535, found 70000",
        "f: scaling.gpus: expected `int | null`, got `float`",
    ]


def test_rules_between_keys_are_checked_each_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        POOL
        + "block_tokens = 24\nleast_replicas = 5\nstopped = 'running'\n"
        + POOL.replace("llama", "lama")
        + "cluster = 'no'\n"
    )

    problems, _ = problems_of(path)

    assert [problem.where for problem in problems] == [
        "pools",
        "pools[0].least_replicas",
        "pools[0].block_tokens",
        "pools[1]",
        "pools",
    ]


# Schemas.


def by_schema(raw: dict[str, Any], kind: type[FleetFile | EngineFile] = FleetFile) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema(kind))
    return [error.message for error in validator.iter_errors(raw)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_fleet_fits_the_schema(path: Path) -> None:
    assert by_schema(tomllib.loads(path.read_text())) == []


def test_the_example_engine_fits_its_schema_and_no_fleet_does() -> None:
    raw = tomllib.loads(ENGINE.read_text())

    assert by_schema(raw, EngineFile) == []
    assert by_schema(raw)
    assert by_schema(tomllib.loads(EXAMPLES[0].read_text()), EngineFile)


def test_the_schemas_are_themselves_in_order() -> None:
    for kind in (FleetFile, EngineFile):
        jsonschema.Draft202012Validator.check_schema(schema(kind))


@pytest.mark.parametrize(
    "line",
    [
        "replcas = 2",
        "replicas = 0",
        'replicas = "4"',
        "replicas = true",
        "replicas = 2.5",
        "tensor_parallel = 0",
        "max_sequences = -1",
        "kv_blocks = 0",
        'state = "asleep"',
        'scheduling = "lifo"',
        'control = "lama.cpp"',
        'engine = "vlm"',
        'serves = "chats"',
        "least_replicas = -1",
        "memory_ratio = 1.5",
        "memory_ratio = 0",
        'endpoints = "http://x:1"',
        "served_name = 3",
        "[gateway]\nprot = 1",
        "[gateway]\nport = '8'",
        "[gateway]\nport = 70000",
        "[gateway]\nhold_s = 0",
        "[gateway]\nwindow_s = -1",
        "[emulator]\nspeed = 2",
        "[emulator]\nspeedup = 0",
        "[scaling]\nmost_changes = 0",
        "[scaling]\ncooldown_s = -1",
        '[[nodes]]\nname = "n"\ngpu = "h100"\ngpu_count = 2',
        '[[nodes]]\nname = "n"\ngpu = "h100"\ngpus = 0',
        '[[clusters]]\nname = "c"\nnetwork_ms = -4',
    ],
)
def test_a_wrong_line_fits_neither_the_schema_nor_the_reader(line: str) -> None:
    raw = tomllib.loads(POOL + line)
    found = Reading("f", {})

    assert found.read(raw, FleetFile) is None
    assert by_schema(raw)


@pytest.mark.parametrize("line", ["port = '${PORT:-80}'", "window_s = '${W}'", "keys = 'a${K}'"])
def test_a_reference_fits_the_schema(line: str) -> None:
    assert by_schema(tomllib.loads(f"{POOL}state = '${{STATE}}'\n[gateway]\n{line}")) == []


def test_a_schema_knows_every_bound_that_the_reader_does() -> None:
    """Whatever fits the schema of a gateway can be read, at and around every bound."""
    for key in ("port", "max_body_mb", "hold_s", "window_s", "forecast_budget_ms"):
        for value in (-1, 0, 0.5, 1, 65_535, 65_536, 1e9):
            raw = tomllib.loads(f"{POOL}[gateway]\n{key} = {value}")
            reads = Reading("f", {}).read(raw, FleetFile) is not None
            assert reads == (not by_schema(raw)), (key, value)


# Commands.


def said(*arguments: object) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    return result.exit_code, result.stdout.splitlines()


def test_check_says_nothing_but_good_of_all_examples() -> None:
    code, lines = said("check", *EXAMPLES, ENGINE)

    assert (code, lines) == (0, [f"{path}: good" for path in (*EXAMPLES, ENGINE)])


def test_check_prints_a_line_a_problem_and_exits_with_1(tmp_path: Path) -> None:
    bad, worse = tmp_path / "bad.toml", tmp_path / "worse.toml"
    bad.write_text(POOL + "replicas = 0\nzzz = 1\n")
    worse.write_text("a = = 1")

    code, lines = said("check", bad, worse, ENGINE, tmp_path / "no.toml")

    assert code == 1
    assert [line.replace(f"{tmp_path}/", "")[:40] for line in lines] == [
        'bad.toml: pools[0]: unknown key "zzz" (k',
        "bad.toml: pools[0].replicas: expected at",
        "worse.toml: not a TOML file: Invalid val",
        f"{ENGINE}: good"[:40].replace(f"{tmp_path}/", ""),
        "no.toml: no such file (see examples/flee",
    ]


@pytest.mark.parametrize(
    ("lines", "start"),
    [
        ("tensor_parallel = 7\n", "pools.a.tensor_parallel: "),
        ("[gateway]\npolicy = 'fcsf'\n", 'policy: unknown policy "fcsf"'),
        ("[gateway]\npolicy = 'oracle-stjf'\n", "policy: oracle-stjf: an oracle reads the truth"),
        ("endpoints = ['http://x:1']\n[gateway]\nhost = '0.0.0.0'\n", "gateway.host: without keys"),
        ("endpoints = ['http://x:1']\napi_key_env = 'NO_SUCH'\n", "pools[0].api_key_env: the env"),
        ("endpoints = ['http://x:1']\n[gateway]\nkeys = 'no'\n", "gateway.keys: no such file: no"),
        ("endpoints = ['http://x:1']\n[gateway]\nadmin = 'x'\n", "gateway.admin: expected HOST:"),
    ],
)
def test_check_builds_what_the_file_asks_for(tmp_path: Path, lines: str, start: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(POOL + lines)

    code, (line,) = said("check", path)

    assert code == 1
    assert line.startswith(f"{path}: {start}")


def test_check_asks_the_engines_if_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    pool = PoolSection(name="a", model="llama-3.1-8b-instruct", gpu="a100-80g")
    with local.engines(FleetFile(pools=[pool])) as urls:
        (url,) = urls.values()
        path.write_text(POOL + f"endpoints = ['{url}', 'http://127.0.0.1:9']\n")
        code, lines = said("check", path, "--probe")
        path.write_text(POOL + f"endpoints = ['{url}']\n")
        alone = said("check", path, "--probe")
        path.write_text(POOL + f"endpoints = ['{url}']\nserved_name = 'other'\n")
        misnamed = said("check", path, "--probe")

    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}: a-1 at http://127.0.0.1:9: ")
    assert alone == (0, [f"{path}: good"])
    assert "it serves llama-3.1-8b-instruct, not other" in misnamed[1][0]


def test_schema_prints_what_lies_beside_the_docs() -> None:
    for kind in ("fleet", "engine"):
        code, lines = said("schema", kind)
        written = (REPO / "docs" / f"{kind}.schema.json").read_text()
        assert (code, json.loads("\n".join(lines))) == (0, json.loads(written))


def test_a_file_with_a_reference_that_leads_nowhere_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(POOL + "served_name = '${CM_TEST_NAME}'\n")
    with pytest.raises(InputError, match="the environment has no CM_TEST_NAME"):
        load_fleet(path)
    monkeypatch.setenv("CM_TEST_NAME", "mine")

    assert load_fleet(path).pools[0].served_name == "mine"
