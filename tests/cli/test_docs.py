"""docs/cli.md names every command."""

from pathlib import Path

import typer

from kimi_mm.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_every_command_is_in_the_table():
    table = PAGE.read_text(encoding="utf-8")
    names = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert "transcribe" in names
    assert [name for name in names if f"\n| `{name}" not in table] == []
