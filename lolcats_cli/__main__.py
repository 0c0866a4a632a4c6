"""The process `lolcats`: signals are handled before anything that takes long is imported."""

from __future__ import annotations

from lolcats_cli import stopping


def main() -> None:
    stopping.install()

    from lolcats_cli.main import main as run

    run()


if __name__ == "__main__":
    main()
