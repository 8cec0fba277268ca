"""A challenger that won serves on after a restart, unless something is wrong with it."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from builders import a_fleet, a_request
from concertmaster import forecaster
from concertmaster.config import GatewaySection
from concertmaster.learning.background import Done
from concertmaster.learning.installed import NOTE, fingerprint, installed
from concertmaster.learning.loop import LearningLoop
from concertmaster.learning.upkeep import School
from concertmaster.predictors.store import load_predictor
from store_builders import a_store, some_plans
from test_loop import Scripted, a_stage, says


class Site:
    """A configured store, a file of labels, and a challenger that won over it."""

    def __init__(self, folder: Path) -> None:
        self.models = a_store(folder / "models")
        self.labels = folder / "labels.sqlite"
        self.challengers = folder / "labels.sqlite.challengers"
        self.win("a")

    def win(self, place: str) -> Path:
        """Train a challenger in one of the places, and install it."""
        won = a_store(self.challengers / place, some_plans(9, seed=ord(place), app=place))
        school = self.school()
        school.champion = won
        school.note()
        return won

    def school(self) -> School:
        settings = GatewaySection(models=str(self.models), feedback=str(self.labels))
        return forecaster._school(settings, self.labels, ())

    def start(self) -> Path:
        """Start a gateway's predictor; return the store that serves."""
        settings = GatewaySection(models=str(self.models), feedback=str(self.labels))
        loop = forecaster.serving_predictor(settings, a_fleet())
        assert isinstance(loop, LearningLoop)
        loop.end()
        assert loop._school is not None
        return loop._school.champion


@pytest.fixture
def site(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Site:
    caplog.set_level(logging.INFO, "concertmaster.learning")
    return Site(tmp_path)


def test_a_restart_takes_up_what_was_installed_and_says_which(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    assert site.start() == site.challengers / "a"
    (line,) = caplog.messages
    assert line.startswith(f"learning: took up path={site.challengers / 'a'} trained=20")


def test_the_one_installed_last_is_taken_up_and_two_are_kept(site: Site) -> None:
    for place in ("b", "a", "b"):
        won = site.win(place)
        assert site.start() == won

    names = {path.name for path in site.challengers.iterdir()}
    assert names == {"a", "b", NOTE}


def test_what_serves_after_a_restart_is_not_trained_over(site: Site) -> None:
    school = site.school()
    school.take_up()

    assert school.place() == site.challengers / "b"


def test_it_is_the_challenger_that_forecasts(site: Site) -> None:
    taken_up, told = site.school().take_up(), load_predictor(site.models)
    request = a_request(app="a", role="coder")

    assert taken_up.predict(request).source == "role"
    assert told.predict(request).source == "global"


def test_other_models_are_served_as_they_are_told(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(site.models)
    a_store(site.models, some_plans(12, seed=5))

    assert site.start() == site.models
    assert [line for line in caplog.messages if "models has changed since" in line]


def test_a_broken_challenger_is_said_once_and_not_served(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    (site.challengers / "a" / "laws.npz").write_bytes(b"cut")

    assert site.start() == site.models
    (line,) = caplog.messages
    assert line.startswith("learning: installed unreadable path=")


def test_a_challenger_of_a_newer_format_is_said_once_and_not_served(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = site.challengers / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    school = site.school()
    school.champion = site.challengers / "a"
    school.note()

    assert site.start() == site.models
    (line,) = caplog.messages
    assert "expected format 1 or older, found 99" in line


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"store": "a"}'])
def test_a_note_that_says_nothing_is_said_once(
    site: Site, note: str, caplog: pytest.LogCaptureFixture
) -> None:
    (site.challengers / NOTE).write_text(note)

    assert site.start() == site.models
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("name", ["../models", "c", ""])
def test_a_note_names_no_other_place(site: Site, name: str) -> None:
    said = {"store": name, "is": fingerprint(site.challengers / name)}
    said["over"] = fingerprint(site.models)
    (site.challengers / NOTE).write_text(json.dumps(said))

    assert installed(site.challengers, said["over"]) is None


def test_a_challenger_that_was_trained_over_the_installed_one_is_not_taken_up(site: Site) -> None:
    a_store(site.challengers / "a", some_plans(20, seed=7))

    assert site.start() == site.models


def test_a_win_is_noted_by_the_loop_and_a_full_disk_only_delays_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = a_stage(tmp_path, challenger=Scripted(says(3.0)))
    stage.school.over = "told"
    won = a_store(stage.school.folder / "a")
    stage.until_drift()
    stage.trainer.state = Done(won)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("concertmaster.learning.upkeep.write_note", full)
        stage.serve(400, 3.0)
    assert stage.school.champion == won
    assert installed(stage.school.folder, "told") is None
    assert len([line for line in caplog.messages if "installed_not_noted" in line]) == 1
    stage.tick()

    assert installed(stage.school.folder, "told") == won
    note = stage.school.folder / NOTE
    written_ns = note.stat().st_mtime_ns
    stage.tick()
    assert note.stat().st_mtime_ns == written_ns


def test_a_note_that_cannot_be_written_leaves_the_one_before(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "disk is full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk is full"):
        site.win("b")

    assert site.start() == site.challengers / "a"


def test_a_win_just_before_the_end_is_noted(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    stage.school.over = "told"
    stage.school.champion = a_store(stage.school.folder / "b")
    stage.loop.end()

    assert installed(stage.school.folder, "told") == stage.school.champion
