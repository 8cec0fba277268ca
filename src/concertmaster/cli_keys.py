"""``concertmaster keys``: how its commands are called."""

from pathlib import Path
from typing import Annotated

import typer

from concertmaster import commands_keys
from concertmaster.state.keys import Limits

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

File = Annotated[Path, typer.Option("--file", help="File of keys, as in gateway.keys.")]
Tenant = Annotated[str, typer.Option(help="Who will use it; made if there is none of that name.")]
Requests = Annotated[
    int | None, typer.Option("--requests-per-min", help="Of the tenant. Default: no limit.")
]
Tokens = Annotated[
    int | None, typer.Option("--tokens-per-min", help="Prompt and output. Default: no limit.")
]
InFlight = Annotated[
    int | None, typer.Option("--in-flight", help="Requests at a time. Default: no limit.")
]
Weight = Annotated[
    int | None, typer.Option(help="Share beside other tenants while several wait. Default: 1.")
]
FILE = Path("keys.sqlite")


@app.callback()
def keys() -> None:
    """Make, list and revoke the API keys that a gateway asks for."""


@app.command()
def create(
    *,
    tenant: Tenant,
    name: Annotated[str, typer.Option(help="What its owner calls it.")] = "",
    operator: Annotated[
        bool, typer.Option("--operator", help="Open metrics, state and the page as well.")
    ] = False,
    requests_per_min: Requests = None,
    tokens_per_min: Tokens = None,
    in_flight: InFlight = None,
    weight: Weight = None,
    file: File = FILE,
) -> None:
    """Make a key and print its secret, this once.

    If any limit is given, they replace those of the tenant.

    Example: concertmaster keys create --tenant team-a --tokens-per-min 200000
    """
    limits = _limits(requests_per_min, tokens_per_min, in_flight, weight)
    commands_keys.create(file=file, tenant=tenant, name=name, operator=operator, limits=limits)


@app.command()
def limit(
    *,
    tenant: Annotated[str, typer.Option(help="Whose.")],
    requests_per_min: Requests = None,
    tokens_per_min: Tokens = None,
    in_flight: InFlight = None,
    weight: Weight = None,
    file: File = FILE,
) -> None:
    """Set what a tenant may use, in place of all it was told before.

    Example: concertmaster keys limit --tenant team-a --in-flight 8
    """
    limits = _limits(requests_per_min, tokens_per_min, in_flight, weight)
    commands_keys.limit(file=file, tenant=tenant, limits=limits)


@app.command(name="list")
def listed(*, file: File = FILE) -> None:
    """List keys, without their secrets, and what their tenants may use.

    Example: concertmaster keys list
    """
    commands_keys.listed(file=file)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id of a key, as list shows it.")],
    *,
    file: File = FILE,
) -> None:
    """End a key, for good; a gateway that serves follows within a second.

    Example: concertmaster keys revoke key-0123456789ab
    """
    commands_keys.revoke(file=file, key_id=key_id)


def _limits(
    requests_per_min: int | None,
    tokens_per_min: int | None,
    in_flight: int | None,
    weight: int | None,
) -> Limits:
    return Limits(
        requests_per_min=requests_per_min,
        tokens_per_min=tokens_per_min,
        in_flight=in_flight,
        weight=weight,
    )
