"""What a fleet file comes to when it is served: all parts of a gateway, checked together."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from concertmaster import compose
from concertmaster.config import FleetFile, GatewaySection
from concertmaster.config_files import load_fleet
from concertmaster.config_rules import Check, broken
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet, ReplicaId
from concertmaster.core.policy import Policy
from concertmaster.gateway.peers import Peer, peers_of
from concertmaster.gateway.reach import check_safe
from concertmaster.policies.catalog import policy as policy_named


class Served(NamedTuple):
    """All that a gateway is made of.

    Attributes:
        urls: Address of each replica.
        peers: What is known of each replica's engine.
    """

    file: FleetFile
    settings: GatewaySection
    fleet: Fleet
    policy: Policy
    urls: Mapping[ReplicaId, str]
    peers: Mapping[ReplicaId, Peer]


def prepared(
    path: Path, changes: Mapping[str, object | None], environ: Mapping[str, str]
) -> Served:
    """Read a fleet file that is to be served.

    Args:
        path: The file.
        changes: Settings that the command line gives; ``None`` leaves the file's.
        environ: Has the keys of engines.

    Raises:
        InputError: The file, or something that it names, is wrong.
    """
    file = load_fleet(path)
    told = {key: value for key, value in changes.items() if value is not None}
    settings = replace(file.gateway, **told)
    check_safe(str(path), settings, environ)
    check_workers(str(path), file, settings.workers)
    fleet = compose.build_fleet(file, name=path.stem, served=True)
    urls = compose.endpoints(file, where=str(path))
    policy = serving_policy(settings)
    compose.check_residency(fleet, policy)
    return Served(file, settings, fleet, policy, urls, peers_of(str(path), file, environ))


def serving_policy(settings: GatewaySection) -> Policy:
    """Return the policy of a gateway.

    Raises:
        InputError: There is none of that name, or it is an oracle.
    """
    check_servable(settings.policy)
    policy = policy_named(settings.policy)
    if settings.window_s is None:
        return policy
    return dataclasses.replace(policy, window_s=settings.window_s)


def check_workers(where: str, file: FleetFile, workers: int) -> None:
    """Refuse several workers where the gateway starts engines itself.

    A scheduler that is killed leaves its engines behind, and the next one could not start them.

    Raises:
        InputError: A pool has a command.
    """
    pool = next((pool.name for pool in file.pools if pool.command), "")
    if workers > 1 and pool:
        problem = f'expected 1 where the gateway starts engines, as for pool "{pool}"'
        hint = "start its engines yourself, and leave out its command"
        raise InputError(where, "gateway.workers", f"{problem}, found {workers}", hint)


def check_servable(name: str) -> None:
    """Refuse a policy that reads the truth.

    Raises:
        InputError: It does, or there is no such policy.
    """
    if policy_named(name).clairvoyant:
        raise InputError(
            "policy", name, "an oracle reads the truth, so it cannot serve", "use it in simulate"
        )


def build_problems(path: Path, file: FleetFile, environ: Mapping[str, str]) -> Iterator[InputError]:
    """Yield what is wrong with a file that reads well: each part that cannot be built from it.

    A file that names no endpoints is for simulation, and is not checked for serving.
    """
    served = any(pool.endpoints for pool in file.pools)
    checks: list[Check] = [
        partial(_build, path, file, served=served),
        partial(serving_policy, file.gateway),
    ]
    if served:
        checks += [
            partial(compose.endpoints, file, where=str(path)),
            partial(peers_of, str(path), file, environ),
            partial(check_safe, str(path), file.gateway, environ),
            partial(check_workers, str(path), file, file.gateway.workers),
        ]
    for error in broken(checks):
        yield InputError(str(path), _place(path, error), error.problem, error.hint)


def _build(path: Path, file: FleetFile, *, served: bool) -> None:
    fleet = compose.build_fleet(file, name=path.stem, served=served)
    if served:
        compose.check_residency(fleet, serving_policy(file.gateway))


def _place(path: Path, error: InputError) -> str:
    parts = (error.file if error.file not in {str(path), "fleet"} else "", error.where)
    return ": ".join(filter(None, parts))
