import io

from rich.console import Console

from training.display import TerminalDisplay


def test_terminal_shows_an_evaluation_that_is_not_finite_as_such() -> None:
    terminal = io.StringIO()
    display = TerminalDisplay(Console(file=terminal, width=80))

    display.show({"step": 2, "tokens": 64, "val_loss": None, "bits_per_byte": None})
    display.show({"step": 4, "tokens": 128, "val_loss": 1.25, "bits_per_byte": 1.8033688})

    assert terminal.getvalue().splitlines() == [
        "step 2: val loss is not finite",
        "step 4: val loss 1.2500, 1.8034 bits a byte",
    ]
