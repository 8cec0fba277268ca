"""Fleets of studies: their sizes, and that they serve what their workloads ask for."""

from importlib.resources import files

import pytest

from concertmaster.compose import check_models
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet
from concertmaster.reproduce.fleets import study_fleet
from concertmaster.workload.arrivals import POISSON
from concertmaster.workload.load import load_workloads

NAMES = sorted(
    one.name.removesuffix(".toml")
    for one in files("concertmaster.reproduce").joinpath("fleets").iterdir()
    if one.name.endswith(".toml")
)
SIXTEEN = [name for name in NAMES if name.startswith(("research", "video", "coding"))]


def gpus(fleet: Fleet) -> int:
    return sum(pool.tensor_parallel for pool, _, _ in fleet.replicas.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("times", [1, 3])
def test_every_fleet_can_be_had_larger(name: str, times: int) -> None:
    one, larger = study_fleet(name), study_fleet(name, times=times)

    assert one.name == larger.name == name
    assert len(larger.replicas) == times * len(one.replicas)
    assert larger.pools == one.pools


@pytest.mark.parametrize("name", SIXTEEN)
def test_fleets_of_mixed_gpus_have_sixteen(name: str) -> None:
    assert gpus(study_fleet(name)) == 16
    assert gpus(study_fleet(name, times=8)) == 128


@pytest.mark.parametrize("name", [name for name in SIXTEEN if not name.startswith("coding")])
def test_a_fleet_serves_the_workload_that_it_is_named_after(name: str) -> None:
    spec = f"{name.partition('-')[0]}:workflows=9"
    workload = load_workloads([spec], seed=0, arrivals=POISSON, rate_rps=1.0)

    check_models(study_fleet(name), workload)
    with pytest.raises(InputError):
        check_models(study_fleet("contended"), workload)
