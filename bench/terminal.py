"""What a person watches: a progress bar, a line for each finished job, the table at the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console

Report = Callable[[str, int, int], None]  # (unit, done, total)
NO_ROOM = ("load s", "CPU s", "peak MB", "key")
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def watching() -> Iterator[tuple[Callable[[str], Report], Callable[[str], None]]]:
    """(watch, say): watch(title) gives a progress function, say prints a line beside the bar.

    A bar is drawn on a terminal only; elsewhere the lines of finished jobs are all there is.
    """

    def say(line: str) -> None:
        out.print(line, markup=False)

    if not out.is_terminal:
        yield (lambda title: lambda unit, done, total: None), say
        return
    columns = (
        bars.TextColumn("{task.description}  {task.fields[unit]}", markup=False),
        bars.MofNCompleteColumn(),
        bars.BarColumn(),
        bars.TimeRemainingColumn(compact=True),
        bars.TextColumn("left"),
    )
    # Redrawn twice a second: it runs on the cores that are being timed.
    with bars.Progress(*columns, console=out, transient=True, refresh_per_second=2) as progress:
        bar = progress.add_task("", total=None, unit="starts")

        def watch(title: str) -> Report:
            current = "starts"
            progress.reset(bar, total=None, description=title, unit=current)

            def report(unit: str, done: int, total: int) -> None:
                nonlocal current
                if unit != current:  # each unit has a speed of its own
                    current = unit
                    progress.reset(bar, total=total, unit=unit)
                progress.update(bar, completed=done, total=total)

            return report

        yield watch, say


def line_of(row: dict[str, Any], was_cached: bool) -> str:
    """One plain line about a finished job, with its figures or its reason."""
    title = f"{row['method']}({row['settings']})" if row["settings"] else row["method"]
    if row["error"]:
        return f"{title}  {row['status']}: {row['error']}"
    forms = {
        "perplexity": "perplexity {:.3f}",
        "size_bytes": "{:.1f} MB",
        "bits_per_weight": "{:.2f} bits/weight",
        "prefill_ms": "prefill {:.0f} ms",
        "decode_tokens_per_s": "decode {:.1f} tokens/s",
        "compress_s": "compress {:.1f} s",
    }
    scaled = row | {"size_bytes": row["size_bytes"] and row["size_bytes"] / 1e6}
    present = (name for name in forms if scaled[name] is not None)
    figures = [forms[name].format(scaled[name]) for name in present]
    status = "cached" if was_cached else row["status"]
    return "  ".join([title, status, *figures, row["key"]])


def draw(cells: list[list[str]]) -> None:
    """Print the leaderboard's table in aligned columns, without those that there is no room for."""
    shown = [i for i, name in enumerate(cells[0]) if name not in NO_ROOM]
    lines = [[line[i] for i in shown] for line in cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, 1, len(shown) - 1)  # method, settings, status
    out.print()
    for line in lines:
        padded = [
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.print("  ".join(padded).rstrip(), markup=False)
