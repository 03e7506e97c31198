"""`python -m kimi_mm` is the command `kimi-mm`."""

from kimi_mm.cli.main import run

if __name__ == "__main__":
    run()
