"""The command line. Bad input: one line on standard error and exit code 2."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from concertmaster import (
    __version__,
    cli_config,
    cli_keys,
    commands,
    commands_explain,
    commands_learning,
    commands_reproduce,
    commands_serve,
    forecaster,
)
from concertmaster.core.errors import InputError
from concertmaster.observe.console import console

app = typer.Typer(
    name="concertmaster",
    help="A scheduler for agent workflows on mixed LLM fleets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_keys.app, name="keys")
app.command()(cli_config.check)
app.command()(cli_config.schema)

Fleet = Annotated[Path, typer.Option("-f", "--fleet", help="Fleet file (TOML).")]
Workloads = Annotated[
    list[str],
    typer.Option(
        "-w", "--workload", help="FILE, FILE#NAME, sample, or a generator; may be given again."
    ),
]
Arrivals = Annotated[
    str | None,
    typer.Option(help="trace, poisson, gamma:CV, burst:… or step:…. Default: as recorded."),
]
Rate = Annotated[float | None, typer.Option(help="Mean workflows a second, with --arrivals.")]
RateScale = Annotated[float, typer.Option(help="Divides every gap between arrivals.")]
Limit = Annotated[int | None, typer.Option(help="Most workflows to keep.")]
Seed = Annotated[int, typer.Option(help="Fixes all randomness.")]
Routing = Annotated[
    list[Path] | None,
    typer.Option("-r", "--routing", help="Folder of a routing set; may be given again."),
]
Models = Annotated[
    str,
    typer.Option(help="Forecasts: folder of a store, default (shipped), or recent (lengths)."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report here.")]

INTERRUPTED = 130
"""What typer makes of Ctrl-C, without a word."""


def _version(value: bool) -> None:  # noqa: FBT001  # typer's callback form
    if value:
        typer.echo(f"concertmaster {__version__}")
        raise typer.Exit


@app.callback()
def root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Schedule agent workflows on mixed LLM fleets."""


@app.command()
def demo(
    *,
    policy: Annotated[
        list[str] | None, typer.Option("-p", "--policy", help="Policies to compare.")
    ] = None,
    workflows: Annotated[int, typer.Option(help="Workflows of the sample to play.")] = 160,
    keep: Annotated[bool, typer.Option(help="Leave the gateway up until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(help="Port of the gateway; 0 takes a free one.")] = 0,
    json: Json = Path("runs/demo.json"),
) -> None:
    """Play the sample workload through a live gateway over emulated engines, and compare.

    Example: concertmaster demo --keep
    """
    commands.demo(policies=policy, workflows=workflows, keep=keep, port=port, json=json)


@app.command()
def serve(
    *,
    config: Annotated[Path, typer.Option("-c", "--config", help="Fleet file with endpoints.")],
    host: Annotated[str | None, typer.Option(help="Overrides gateway.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Overrides gateway.port.")] = None,
    policy: Annotated[str | None, typer.Option("-p", help="Overrides gateway.policy.")] = None,
    models: Annotated[str | None, typer.Option(help="Overrides gateway.models.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write every event and decision here.")] = None,
) -> None:
    """Stand between agents and engines: the gateway.

    Example: concertmaster serve -c examples/fleets/local.toml --port 8000
    """
    changes = {"host": host, "port": port, "policy": policy, "models": models}
    commands_serve.serve(config, changes, trace)


@app.command()
def engine(
    *,
    config: Annotated[Path, typer.Option("-c", "--config", help="Engine file (TOML).")],
    host: Annotated[str | None, typer.Option(help="Overrides host.")] = None,
    port: Annotated[int | None, typer.Option(help="Overrides port.")] = None,
) -> None:
    """Run one emulated engine that speaks vLLM's API.

    Example: concertmaster engine -c examples/engine.toml --port 8100
    """
    commands.engine(config=config, host=host, port=port)


@app.command()
def simulate(
    *,
    fleet: Fleet,
    workload: Workloads,
    policy: Annotated[str, typer.Option("-p", "--policy", help="NAME or PLACEMENT+ORDERING.")],
    arrivals: Arrivals = None,
    rate: Rate = None,
    rate_scale: RateScale = 1.0,
    limit: Limit = None,
    models: Models = forecaster.RECENT,
    seed: Seed = 0,
    json: Json = None,
    trace: Annotated[Path | None, typer.Option(help="Write every event and decision here.")] = None,
    reference: Annotated[
        bool, typer.Option(help="Use the plain per-iteration engine model (slow).")
    ] = False,
) -> None:
    """Run a workload through one policy in virtual time.

    Example: concertmaster simulate -f examples/fleets/small-big.toml -w sample -p least-tokens+las
    """
    what = commands.Ask(workload, arrivals, rate, rate_scale, limit)
    commands.simulate(
        fleet=fleet,
        ask=what,
        policy=policy,
        models=models,
        seed=seed,
        json=json,
        trace=trace,
        reference=reference,
    )


@app.command()
def compare(
    *,
    fleet: Fleet,
    workload: Workloads,
    policy: Annotated[list[str], typer.Option("-p", "--policy", help="Given once a policy.")],
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, … of each policy.")] = 5,
    arrivals: Arrivals = None,
    rate: Rate = None,
    rate_scale: RateScale = 1.0,
    limit: Limit = None,
    models: Models = forecaster.RECENT,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw makespans to a .png or .svg.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
) -> None:
    """Run a workload through several policies, with intervals over seeds.

    Example: concertmaster compare -f examples/fleets/small-big.toml -w sample -p round-robin -p las
    """
    what = commands.Ask(workload, arrivals, rate, rate_scale, limit)
    commands.compare(
        fleet=fleet,
        ask=what,
        policies=policy,
        models=models,
        seeds=seeds,
        json=json,
        plot=plot,
        jobs=jobs,
    )


@app.command()
def train(
    *,
    workload: Workloads,
    routing: Routing = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write the store to.")],
    encoder: Annotated[
        str,
        typer.Option(help="default, hashed, onnx:FOLDER, hub:NAME, or a table that distill wrote."),
    ] = "default",
    everything: Annotated[
        bool, typer.Option("--all", help="Hold no fifth of the groups back.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Learn to forecast calls from recorded workflows, and success from graded answers.

    Example: concertmaster train -w workflow_stages.parquet -r routing -o runs/store
    """
    commands_learning.train(
        workloads=workload,
        routing=routing or [],
        out=out,
        encoder=encoder,
        everything=everything,
        seed=seed,
    )


@app.command()
def evaluate(
    *,
    model: Annotated[
        str, typer.Option("-m", "--models", help="Folder of a store, or default: the shipped one.")
    ] = commands_learning.SHIPPED,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "-w", "--workload", help="FILE, FILE#NAME, sample, or a generator; may be given again."
        ),
    ] = None,
    routing: Routing = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only groups that training holds back.")
    ] = False,
    online: Annotated[
        bool, typer.Option("--online", help="Measure once more while it learns.")
    ] = False,
    seed: Seed = 0,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Folder to draw pictures into.")] = None,
) -> None:
    """Say how good the forecasts of a store are, on data that it was not trained on.

    Example: concertmaster evaluate -m runs/store -w workflow_stages.parquet --held-out
    """
    commands_learning.evaluate(
        model=model,
        workloads=workload or [],
        routing=routing or [],
        held_out=held_out,
        online=online,
        seed=seed,
        json=json,
        plot=plot,
    )


@app.command()
def replay(
    *,
    url: Annotated[str, typer.Option(help="Address of a live gateway.")],
    workload: Workloads,
    arrivals: Arrivals = None,
    rate: Rate = None,
    rate_scale: RateScale = 1.0,
    limit: Limit = None,
    seed: Seed = 0,
    speedup: Annotated[float, typer.Option(help="As in the fleet file of emulated engines.")] = 1.0,
    json: Json = None,
) -> None:
    """Play a workload against a live gateway, open loop; the report is simulate's.

    Example: concertmaster replay --url http://127.0.0.1:8000 -w sample --speedup 10
    """
    what = commands.Ask(workload, arrivals, rate, rate_scale, limit)
    commands.replay(url=url, ask=what, seed=seed, speedup=speedup, json=json)


@app.command()
def explain(
    trace: Annotated[
        str, typer.Argument(help="Trace or file of receipts; or an id to ask a gateway about.")
    ],
    request: Annotated[
        str | None, typer.Argument(help="Id of a call in it.", show_default=False)
    ] = None,
    *,
    url: Annotated[
        str, typer.Option(help="Address of a live gateway, asked where no file is named.")
    ] = "http://127.0.0.1:8000",
    json: Json = None,
) -> None:
    """Say why a call went where it went.

    Example: concertmaster explain runs/one.trace.jsonl coding-0001/0
    """
    commands_explain.explain(where=trace, request=request, url=url, json=json)


@app.command()
def reproduce(
    *,
    name: Annotated[
        str, typer.Argument(help=f"Study: {', '.join(commands_reproduce.available())}.")
    ],
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, … of each run.")] = 5,
    full: Annotated[
        bool, typer.Option("--full", help="The whole grid, not what runs in minutes.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
    json: Json = None,
    plots: Annotated[Path | None, typer.Option(help="Folder to draw pictures into.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report here as a page.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget runs that are finished.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder with routing sets, for studies that need them.")
    ] = None,
) -> None:
    """Repeat a published comparison, and say which of its claims hold here.

    Example: concertmaster reproduce orders --seeds 5 --plots runs/orders
    """
    met = commands_reproduce.reproduce(
        name=name,
        seeds=seeds,
        full=full,
        jobs=jobs,
        json=json,
        plots=plots,
        markdown=markdown,
        fresh=fresh,
        data=data,
    )
    if not met:
        raise typer.Exit(code=1)


def main() -> None:
    """Run the command line and turn errors of the user's into one line."""
    try:
        app()
    except InputError as error:
        console(stderr=True).print(
            str(error), style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except SystemExit as ending:
        if ending.code == INTERRUPTED:
            console(stderr=True).print("stopped", markup=False)
        raise
