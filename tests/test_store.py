import random
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from builders import a_request
from concertmaster.core.errors import InputError
from concertmaster.core.request import ModelName
from concertmaster.learning.datasets import seen_hashes
from concertmaster.learning.rehearsal import rehearse, serve
from concertmaster.predictors import store as store_module
from concertmaster.predictors.encoder import StaticEncoder
from concertmaster.predictors.evidence import Evidence
from concertmaster.predictors.heads import FIGURES
from concertmaster.predictors.interface import Prompt
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.manifest import FORMAT, EncoderFacts, Manifest, rendered
from concertmaster.predictors.store import (
    encoder_named,
    encoder_of,
    judge_of,
    load_predictor,
    read_store,
    restore,
    write_store,
)
from concertmaster.predictors.words import BUCKETS
from store_builders import (
    BIG,
    DIMS,
    SMALL,
    a_manifest,
    a_store,
    a_success_head,
    an_encoder,
    some_heads,
    some_parts,
    some_plans,
)

PARTS = ("baselines", "calibration", "encoder", "heads", "laws", "success")
Fields = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_store(tmp_path_factory.mktemp("store") / "whole")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def refusal(folder: Path) -> str:
    """Read what must be refused; return the one line."""
    with pytest.raises(InputError) as caught:
        read_store(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(folder))
    return line.removeprefix(str(folder))


def rewrite(folder: Path, change: Callable[[Fields], object]) -> None:
    """Change the manifest as its writer would have written it."""
    path = folder / "manifest.json"
    fields = msgspec.json.decode(path.read_bytes())
    change(fields)
    path.write_bytes(rendered(msgspec.convert(fields, Manifest)))


def put(folder: Path, name: str, raw: bytes) -> None:
    """Replace a data file and state its hash, as someone with bad intent would."""
    (folder / name).write_bytes(raw)
    rewrite(folder, lambda fields: fields["files"].update({name: sha256(raw).hexdigest()}))


def put_arrays(folder: Path, part: str, **changes: npt.NDArray[Any] | None) -> None:
    arrays = {**read_store(folder).parts[part], **changes}
    raw = BytesIO()
    kept = {key: array for key, array in arrays.items() if array is not None}
    np.savez(raw, allow_pickle=True, **kept)
    put(folder, f"{part}.npz", raw.getvalue())


# What was written comes back.


def test_what_is_written_comes_back(whole: Path) -> None:
    store = read_store(whole)
    plans = some_plans(6)
    wanted = some_parts(plans)

    assert sorted(store.parts) == sorted(wanted) == list(PARTS)
    for name, arrays in wanted.items():
        assert sorted(store.parts[name]) == sorted(arrays)
        for key, array in arrays.items():
            assert store.parts[name][key].tolist() == array.tolist()
    assert store.seen.tolist() == seen_hashes(plans, ()).tolist()
    assert store.manifest.figures == {"loss": 0.125}
    assert store.manifest.trained_on.names == ("made up",)
    assert store.manifest.features == FIGURES


def test_a_predictor_from_a_store_forecasts_as_the_one_that_was_written(whole: Path) -> None:
    plans, unseen = some_plans(6), some_plans(4, seed=9)
    evidence = Evidence()
    for _ in rehearse(plans, evidence):
        pass
    original = LearnedPredictor(evidence, some_heads(), adapt=False)
    restored = load_predictor(whole, adapt=False)

    for plan in unseen:
        for mine, theirs in zip(serve(plan, original), serve(plan, restored), strict=True):
            for target in ("output_tokens", "remaining_tokens", "remaining_calls"):
                law, other = getattr(mine.forecast, target), getattr(theirs.forecast, target)
                assert other.values == pytest.approx(law.values, rel=1e-2), target


def test_each_predictor_of_a_store_learns_for_itself(whole: Path) -> None:
    store = read_store(whole)
    taught, other = restore(store), restore(store)
    before = other.predict(a_request(app="chat", role="coder"))

    for plan in some_plans(20, seed=3):
        for _ in serve(plan, taught):
            pass

    assert other.predict(a_request(app="chat", role="coder")) == before
    assert taught.predict(a_request(app="chat", role="coder")) != before


def test_a_frozen_predictor_says_the_same_after_any_outcome(whole: Path) -> None:
    frozen = load_predictor(whole, adapt=False)
    before = frozen.predict(a_request(app="chat", role="coder"))

    for plan in some_plans(20, seed=3):
        for _ in serve(plan, frozen):
            pass

    assert frozen.predict(a_request(app="chat", role="coder")) == before


def test_success_is_forecast_for_the_models_of_the_fleet(whole: Path) -> None:
    predictor = load_predictor(whole, models=(BIG, SMALL))

    success = predictor.predict(a_request(), Prompt(text="what is 2 + 2?")).success

    assert set(success) == {BIG, SMALL}
    assert 0 < success[SMALL] < success[BIG] < 1


def test_a_store_without_success_head_forecasts_lengths_alone(tmp_path: Path) -> None:
    predictor = load_predictor(a_store(tmp_path / "s", success=None, encoder=None), models=(BIG,))

    forecast = predictor.predict(a_request())

    assert forecast.success == {}
    assert forecast.output_tokens is not None


def test_the_same_training_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    again = a_store(tmp_path / "again")

    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


@pytest.mark.parametrize(
    ("facts", "arrays"),
    [
        (EncoderFacts(name="hashed-16", dims=16), {}),
        (
            EncoderFacts(name="hashed-3-projected", dims=3),
            {"projection": np.ones((8, 3), np.float32)},
        ),
    ],
)
def test_hashed_encoders_come_back(
    whole: Path, facts: EncoderFacts, arrays: dict[str, npt.NDArray[Any]]
) -> None:
    store = read_store(whole)
    store = store._replace(
        manifest=Manifest(encoder=facts), parts={**store.parts, "encoder": arrays}
    )

    encoder = encoder_of(store)

    assert encoder is not None
    assert (encoder.name, encoder.dims) == (facts.name, facts.dims)
    assert encoder.encode(["some words"]).shape == (1, facts.dims)


def test_the_static_encoder_comes_back(whole: Path) -> None:
    encoder = encoder_of(read_store(whole))

    assert isinstance(encoder, StaticEncoder)
    assert encoder.dims == DIMS


# Writing.


def test_a_store_takes_the_place_of_one_that_is_there(tmp_path: Path) -> None:
    folder = a_store(tmp_path / "s")
    a_store(folder, some_plans(2, seed=5), success=None, encoder=None)

    assert "success" not in read_store(folder).parts
    assert not (folder / "success.npz").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json.bak", "other"])
def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("dear")
    (folder / "manifest.json").write_text("{}")

    with pytest.raises(InputError, match=r'mine: expected a store or nothing, found ".*" there'):
        a_store(folder)

    assert (folder / name).read_text() == "dear"


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("dear")

    with pytest.raises(InputError, match="expected a folder, found a file"):
        a_store(tmp_path / "s")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert read_store(a_store(tmp_path)).manifest.made == "2026-01-02"


def test_parents_are_made(tmp_path: Path) -> None:
    assert read_store(a_store(tmp_path / "a" / "b")).seen.size


@pytest.mark.parametrize("fails_at", range(10))
def test_a_write_that_breaks_off_leaves_the_store_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    folder = a_store(tmp_path / "s")
    before = read_store(folder).seen.tolist()
    calls = 0

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:  # noqa: ANN401
            nonlocal calls
            calls += 1
            if calls == fails_at + 1:
                raise OSError(28, "No space left on device")
            return original(*args, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing(Path.write_bytes))
        patch.setattr(Path, "rename", failing(Path.rename))
        with pytest.raises(InputError, match="cannot write: No space left"):
            a_store(folder, some_plans(2, seed=5))

    assert read_store(folder).seen.tolist() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_what_a_crash_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".s.part").mkdir()
    (tmp_path / ".s.part" / "laws.npz").write_text("half")

    a_store(tmp_path / "s")

    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


# Damage.


@pytest.mark.parametrize("name", ["manifest.json", "seen.npz", *(f"{part}.npz" for part in PARTS)])
def test_no_flipped_bit_and_no_truncation_goes_unnoticed(copy: Path, name: str) -> None:
    rng = random.Random(name)
    path = copy / name
    raw = path.read_bytes()
    for _ in range(60):
        if rng.random() < 0.7:
            at = rng.randrange(len(raw))
            bad = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
        else:
            bad = raw[: rng.randrange(len(raw))]
        path.write_bytes(bad)

        refusal(copy)

    path.write_bytes(raw)
    read_store(copy)


@pytest.mark.parametrize("part", PARTS)
def test_damage_behind_a_right_hash_is_an_input_error_too(copy: Path, part: str) -> None:
    rng = random.Random(part)
    raw = (copy / f"{part}.npz").read_bytes()
    for _ in range(40):
        bad = bytearray(raw[: rng.choice([len(raw), rng.randrange(len(raw))])])
        for _ in range(rng.randrange(1, 4)):
            if bad:
                bad[rng.randrange(len(bad))] = rng.randrange(256)
        put(copy, f"{part}.npz", bytes(bad))
        try:
            store = read_store(copy)
            predictor = restore(store, models=(BIG,))
            predictor.predict(a_request(), Prompt(text="what is it?"))
        except InputError:
            continue


@pytest.mark.parametrize("name", ["seen.npz", "laws.npz", "encoder.npz"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()

    assert refusal(copy) == f"/{name}: expected this file, found none (train it again)"


def test_a_folder_in_place_of_a_file_is_named(copy: Path) -> None:
    (copy / "laws.npz").unlink()
    (copy / "laws.npz").mkdir()

    assert refusal(copy) == "/laws.npz: cannot read: Is a directory"


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    hint = "(concertmaster train writes one)"
    (tmp_path / "file").write_text("")

    assert refusal(tmp_path / "nowhere") == (
        f": expected the folder of a store, found nothing there {hint}"
    )
    assert refusal(tmp_path / "file") == f": expected the folder of a store, found a file {hint}"


def test_a_folder_without_manifest_is_no_store(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        "/manifest.json: expected this file, found none "
        "(a store has one: concertmaster train writes it)"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "expected a JSON object, found: Input data was truncated"),
        (b"not json", "expected a JSON object, found: JSON is malformed"),
        (b"[]", "expected a JSON object, found: Expected `object`, got `array`"),
        (b"\xff\xfe", "expected a JSON object, found: "),
        (b'{"format": 1, "figures": 3}', "expected a manifest: Expected `object`"),
        (b'{"format": 1}', "it was changed since it was written"),
    ],
)
def test_a_manifest_that_is_none_is_refused(copy: Path, content: bytes, problem: str) -> None:
    (copy / "manifest.json").write_bytes(content)

    assert refusal(copy).startswith(f"/manifest.json: {problem}")


def test_a_newer_format_is_told_apart_from_damage(copy: Path) -> None:
    newer = msgspec.json.encode({"format": FORMAT + 1, "other": ["things"]})
    (copy / "manifest.json").write_bytes(newer)

    assert refusal(copy) == (
        f"/manifest.json: format: expected format {FORMAT} or older, found {FORMAT + 1} "
        "(update concertmaster)"
    )


def test_a_manifest_changed_by_hand_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"loss": 0.125', '"loss": 0.100'))

    assert "it was changed since it was written" in refusal(copy)


@pytest.mark.parametrize(
    ("key", "change", "found"),
    [
        ("features", lambda known: [*known[:-1], "phase_of_moon"], "found others: phase_of_moon"),
        ("features", lambda known: known[::-1], "found others: another order"),
        ("features", lambda known: known[1:], f"found others: {FIGURES[0]}"),
        ("levels", lambda known: known[1:], "found others: 0.05"),
        ("targets", lambda known: known[:2], "found others: remaining_calls"),
    ],
)
def test_heads_that_read_other_figures_are_refused(
    copy: Path, key: str, change: Callable[[Any], object], found: str
) -> None:
    rewrite(copy, lambda fields: fields.update({key: change(fields[key])}))

    line = refusal(copy)

    assert line.startswith(f"/manifest.json: {key}: expected the ")
    assert line.endswith(f"{found} (train it again)")


@pytest.mark.parametrize("name", ["../laws.npz", "/etc/passwd", "laws.pkl"])
def test_a_manifest_cannot_reach_out_of_its_folder(copy: Path, name: str) -> None:
    rewrite(copy, lambda fields: fields["files"].update({name: "0" * 64}))

    assert f'expected names of .npz files, found "{name}"' in refusal(copy)


@pytest.mark.parametrize("part", ["laws", "heads", "calibration"])
def test_a_part_that_every_forecast_needs_is_asked_for(copy: Path, part: str) -> None:
    rewrite(copy, lambda fields: fields["files"].pop(f"{part}.npz"))

    assert refusal(copy) == (
        f": manifest.json: expected the part {part}, found none (train it again)"
    )


def test_an_unknown_encoder_is_refused(copy: Path) -> None:
    rewrite(copy, lambda fields: fields.update(encoder={"name": "oracle", "dims": DIMS}))

    with pytest.raises(
        InputError, match='encoder: expected static-N, hashed-N, onnx:… or hub:…, found "oracle"'
    ):
        load_predictor(copy)


def test_an_encoder_that_the_success_head_was_not_fitted_on_is_refused(tmp_path: Path) -> None:
    folder = a_store(tmp_path / "s", success=a_success_head("hashed-4").arrays())

    with pytest.raises(InputError, match='expected the encoder "hashed-4", found "static-4"'):
        judge_of(read_store(folder))


def test_prompts_are_read_at_once_where_the_encoder_lies_outside_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = an_encoder()
    outside.name = "onnx:somewhere"
    monkeypatch.setattr(store_module, "_outside", lambda _: outside)
    folder = a_store(tmp_path / "s", success=a_success_head(outside.name).arrays(), encoder=None)
    rewrite(folder, lambda fields: fields.update(encoder={"name": outside.name, "dims": DIMS}))

    within, without = judge_of(read_store(a_store(tmp_path / "t"))), judge_of(read_store(folder))

    assert within is not None
    assert without is not None
    assert not within._at_once
    assert without._at_once


def test_a_success_head_without_an_encoder_is_refused(copy: Path) -> None:
    rewrite(copy, lambda fields: fields.update(encoder={"name": "", "dims": DIMS}))

    with pytest.raises(InputError, match='expected the encoder "static-4", found ""'):
        load_predictor(copy)


# Arrays.


def test_python_objects_are_refused_unread(copy: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return pytest.fail, ("it was unpickled",)

    raw = BytesIO()
    np.savez(raw, allow_pickle=True, **{"tool_call.leaves": np.array([Trap()], dtype=object)})
    put(copy, "heads.npz", raw.getvalue())

    assert refusal(copy).startswith("/heads.npz: expected arrays without Python objects, found: ")


def test_a_file_of_other_things_is_refused(copy: Path) -> None:
    raw = BytesIO()
    np.save(raw, np.zeros(3))
    for content in (b"", b"PK\x03\x04", b"words", raw.getvalue()):
        put(copy, "laws.npz", content)
        assert refusal(copy).startswith("/laws.npz: expected arrays without Python objects")


@pytest.mark.parametrize(
    ("part", "key", "array", "problem"),
    [
        ("laws", "output_tokens.counts", None, "expected the array output_tokens.counts, found "),
        ("laws", "output_tokens.counts", np.zeros((2, 3)), "expected shape (8, "),
        ("laws", "output_tokens.workflows", np.full(8, -1.0), "expected at least 0, found -1"),
        ("laws", "output_tokens.depths", np.zeros(8), "expected whole numbers, found float64"),
        ("laws", "output_tokens.paths", np.zeros(8, np.int8), "expected texts, found int8"),
        ("heads", "words.offsets", np.full(3, np.nan), "expected finite numbers, found others"),
        ("heads", "words.offsets", np.zeros(4, np.float32), "expected shape (3), found (4,)"),
        ("heads", "words.rarity", np.zeros(BUCKETS, np.float32), "expected no zero"),
        ("heads", "quantiles.features", np.full((24, 3), 999), "expected 0 to "),
        ("heads", "quantiles.features", np.full((24, 3), -1), "expected 0 to "),
        ("heads", "quantiles.outputs", np.array([7]), "expected trees for 24 outputs, found 24"),
        ("heads", "tool_call.leaves", np.zeros((1, 5)), "expected complete trees, found 3 forks"),
        ("calibration", "offsets", np.zeros((2, 8)), "expected shape (0, 8), found (2, 8)"),
        ("success", "trunk_centre", np.zeros(3, np.float32), "expected shape ("),
        ("success", "trunk_gates", np.array([5]), "expected domains below 1"),
        ("success", "trunk_second", np.zeros((1, 4, 2), np.float32), "expected 1 networks of 4"),
        ("success", "trunk_spread", np.zeros(1, np.float32), "expected shape ("),
        ("success", "means", np.zeros((1, 2), np.float32), "expected shape (2, 2), found (1, 2)"),
        ("encoder", "scale", np.zeros(3, np.float32), "expected shape (4), found (3,)"),
        ("encoder", "vocab", np.zeros(3, np.uint8), "table: expected 1 rows, found 5"),
        ("encoder", "table", None, "expected the array table, found none"),
        ("baselines", "depths", np.ones(4, np.int8), "expected the quantiles of everything"),
        ("baselines", "quantiles", np.zeros((4, 4, 7)), "expected shape (4, 4, 8)"),
        ("baselines", "quantiles", np.zeros((4, 4, 8), complex), "expected numbers or texts"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    copy: Path, part: str, key: str, array: npt.NDArray[Any] | None, problem: str
) -> None:
    put_arrays(copy, part, **{key: array})

    line = refusal(copy)

    assert line.startswith(f"/{part}.npz: ")
    assert problem in line
    assert line.endswith("(train it again)")


def test_hashes_of_the_wrong_kind_are_refused(copy: Path) -> None:
    raw = BytesIO()
    np.savez(raw, seen=np.zeros(3))
    put(copy, "seen.npz", raw.getvalue())

    assert "expected the hashes of what it was trained on" in refusal(copy)


def test_a_model_that_nobody_knows_is_left_out_of_success(whole: Path) -> None:
    success = judge_of(read_store(whole))

    assert success is not None
    assert list(success("text", [ModelName("mystery"), BIG])) == [BIG]


def test_a_part_without_arrays_is_not_written(tmp_path: Path) -> None:
    parts = some_parts(some_plans(3)) | {"encoder": {}, "success": {}}
    write_store(tmp_path / "s", a_manifest(), parts, np.zeros(0, np.uint64))

    assert not (tmp_path / "s" / "encoder.npz").exists()
    assert sorted(read_store(tmp_path / "s").parts) == ["baselines", "calibration", "heads", "laws"]


@pytest.mark.parametrize(("name", "extra"), [("onnx:nowhere", "encoders"), ("hub:x", "hub")])
def test_an_encoder_that_is_not_installed_says_what_to_install(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("onnxruntime", "transformers", "torch", "tokenizers"):
        monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(InputError, match=rf"concertmaster\[{extra}\]"):
        encoder_named(name)


def test_an_encoder_of_that_name_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected default, hashed, onnx:FOLDER, hub:NAME"):
        encoder_named(str(tmp_path / "no.npz"))

    assert encoder_named("hashed").name == "hashed-256"
