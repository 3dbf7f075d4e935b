"""``python -m lightning_ft``."""

from lightning_ft.cli import main

if __name__ == "__main__":
    main()
