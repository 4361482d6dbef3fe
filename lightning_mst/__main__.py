"""``python -m lightning_mst`` is the command ``lightning-mst``."""

from lightning_mst.cli import main

if __name__ == "__main__":
    main()
