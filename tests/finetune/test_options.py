"""Settings as options and as JSON: one class, checked once."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench.errors import UsageError
from finetune import options
from finetune.options import setting


@dataclass(frozen=True)
class Oven:
    """A command with every type of field."""

    heat: float = setting(180.0, "Degrees.", least=50)
    minutes: int | None = setting(None, "How long.", least=1)
    mode: str = setting("fan", "Where heat comes from.", choices=("fan", "grill"))
    shelf: tuple[str, ...] = setting((), "What goes in.")
    tray: Path = setting(Path("tray"), "Where it stands.")
    light: bool = setting(True, "Whether one can see it.")


def bake(arguments: list[str]) -> tuple[int, list[Oven], str]:
    seen: list[Oven] = []
    app = typer.Typer()

    def run(oven: Oven) -> None:
        """Bake."""
        seen.append(oven)

    options.add_command(app, "bake", Oven, run)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, seen, result.output + str(result.exception or "")


def test_options_have_the_fields_names_types_and_defaults():
    code, seen, _ = bake([])
    assert (code, seen) == (0, [Oven()])
    arguments = ["--heat", "200", "--minutes", "7", "--mode", "grill", "--no-light"]
    code, seen, _ = bake([*arguments, "--tray", "a/b", "--shelf", "bread", "--shelf", "cake"])
    assert code == 0
    assert seen == [Oven(200.0, 7, "grill", ("bread", "cake"), Path("a/b"), False)]


def test_an_option_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = tmp_path / "oven.json"
    file.write_text(json.dumps({"heat": 90, "minutes": 3, "shelf": ["pie"]}))
    _, seen, _ = bake(["--config", str(file), "--minutes", "4"])
    assert seen == [Oven(90.0, 4, shelf=("pie",))]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heat": 20}, "heat must be at least 50"),
        ({"heat": "hot"}, "heat must be of type float"),
        ({"light": 1}, "light must be of type bool"),
        ({"mode": "sun"}, "mode must be one of fan, grill"),
        ({"minute": 1}, "no setting 'minute'; did you mean minutes"),
        ({"shelf": "pie"}, "shelf must be of type tuple"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(UsageError, match=message):
        options.build(Oven, values, "oven.json")


def test_json_round_trip():
    oven = Oven(shelf=("a",), tray=Path("x"))
    assert options.build(Oven, json.loads(json.dumps(options.to_json(oven)))) == oven


def test_help_shows_defaults_and_a_stop_exits_with_130():
    app = typer.Typer()

    def run(oven: Oven) -> None:
        """Bake."""
        raise KeyboardInterrupt("stopped after step 3")

    options.add_command(app, "bake", Oven, run)
    text = CliRunner().invoke(app, ["--help"]).output
    assert "Degrees." in text and "180.0" in text and "fan|grill" in text
    assert CliRunner().invoke(app, []).exit_code == 130
