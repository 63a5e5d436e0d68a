"""`python -m baselines`: make, list and remove the environments of the peer libraries."""

from typing import Annotated

import typer

from bench import environments
from bench.command_line import Debug, new_app, run_app
from bench.errors import UsageError
from bench.paths import cache_dir, folder_bytes, free_bytes
from bench.terminal import err, out

app = new_app("Environments of the peer libraries that the bench compares its methods with.")
Names = Annotated[list[str] | None, typer.Argument(help="Environments; see `list`.")]


@app.command("list")
def list_all(debug: Debug = False) -> None:
    """Every environment: its state, its disk space, what is in it."""
    for name in environments.names():
        environment = environments.get(name)
        state = environment.state()
        if environment.folder.is_dir():
            size = f"{folder_bytes(environment.folder) / 1e9:.1f} GB"
        else:
            size = f"about {environment.about['disk']}"
        out.print(f"{name:<16} {state:<10} {size:<14} {environment.about['about']}", markup=False)
    free = free_bytes(cache_dir()) / 1e9
    out.print(f"\nin {cache_dir() / 'envs'}, where {free:.1f} GB are free", markup=False)


@app.command()
def setup(
    names: Names = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    cuda: Annotated[
        bool | None,
        typer.Option(
            "--cuda/--no-cuda",
            help="Whether torch may come for CUDA (5 GB).",
            show_default="if there is an NVIDIA GPU",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make environments (venv and pip). Run again, it goes on where it was stopped."""
    wanted = _chosen(names, every)
    needed = sum(e.needs_bytes for e in wanted if e.state() == "missing")
    if len(wanted) > 1:
        out.print(f"{len(wanted)} environments, about {needed / 1e9:.1f} GB to come", markup=False)
    failed = []
    for environment in wanted:
        try:
            environments.setup(environment, lambda line: out.print(line, markup=False), cuda)
        except environments.SetupFailed as error:
            failed.append(environment.name)
            err.print(f"{environment.name}: failed: {error}", markup=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def remove(
    names: Names = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    debug: Debug = False,
) -> None:
    """Delete environments; they can be made again."""
    for environment in _chosen(names, every):
        freed = environments.remove(environment) / 1e9
        out.print(f"{environment.name}: {freed:.2f} GB freed", markup=False)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Import every library that is installed, and say what would mend the others."""
    unwell = False
    for name in environments.names():
        environment = environments.get(name)
        state = environment.state()
        if state == "ready":
            try:
                environments.smoke(environment)
            except environments.SetupFailed as error:
                state = f"broken: {error}"
        cure = ""
        if state != "ready":
            unwell = True
            cure = f"; run: python -m baselines setup {name}"
            if state.startswith("broken"):
                cure = f"; run: python -m baselines remove {name}, then setup {name}"
        out.print(f"{name:<16} {state}{cure}", markup=False)
    if unwell:
        raise typer.Exit(1)


def _chosen(names: list[str] | None, every: bool) -> list[environments.Environment]:
    if bool(names) == every:
        raise UsageError("name environments, or give --all; see: python -m baselines list")
    return [environments.get(name) for name in (environments.names() if every else names or [])]


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit codes as in `python -m bench`."""
    run_app(app, "python -m baselines", arguments)


if __name__ == "__main__":
    main()
