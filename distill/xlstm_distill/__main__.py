"""Entry point of `xlstm-distill` and `python -m xlstm_distill`."""

from __future__ import annotations

from xlstm_distill.cli.app import main

if __name__ == "__main__":
    main()
