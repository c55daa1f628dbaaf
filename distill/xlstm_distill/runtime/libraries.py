"""How loud the libraries are that a stage uses."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices off the terminal; errors still appear."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
