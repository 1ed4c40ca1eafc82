"""The command line: verbs only; each calls one function of the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    name="everlong",
    help="Sequence models whose cost stays linear: compare, train, generate, check.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a model, as written by compare, train or everlong.save.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")] = "-",
    max_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Leave out tokens below this share of the likeliest one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: make repeated tokens less likely.")] = 1.0,
    seed: Annotated[Optional[int], typer.Option(help="Draw the same text again.")] = None,
    stop: Annotated[Optional[list[str]], typer.Option(help="End before this text; may be given again.")] = None,
    session: Annotated[Optional[Path], typer.Option(help="Go on from the session in this file, if it exists, and "
                                                    "save it there at the end.")] = None,
) -> None:
    """Continue a text, streaming.

    [bold]Examples[/]\n
      everlong generate runs/compare/mamba2 "def read_csv("\n
      cat book.txt | everlong generate runs/compare/rwkv7 --max-tokens 500 --seed 1\n
      everlong generate MODEL "Once upon" --session chat.safetensors   [dim](again: it goes on from there)[/]
    """
    from .models.generate import Sampling
    from .checkpoints.stream import continue_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                        repetition_penalty=repetition_penalty, seed=seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    print(text, end="", flush=True)
    for piece in continue_text(model, text, max_tokens=max_tokens, sampling=sampling, stop=stop or (), session=session):
        print(piece, end="", flush=True)
    print()


@app.command("list")
def list_architectures() -> None:
    """Show every architecture: equation, memory, sizes, cost of a token, backends."""
    from .report.table import show

    show()


@app.command()
def check(
    mixer: Annotated[str, typer.Argument(help="A name from `everlong list`, or the dotted path of your own mixer.")],
) -> None:
    """Test the laws of the contract on a mixer.

    [bold]Examples[/]\n
      everlong check mamba2\n
      everlong check my_package.my_mixer
    """
    from .report.check import check_mixer

    if not check_mixer(mixer):
        sys.exit(1)


def main() -> None:
    """Entry point: errors meant for the user are one clear line, not a traceback."""
    sys.path.insert(0, "")  # a mixer of your own is found from the folder you are in
    try:
        app()
    except (ValueError, OSError) as error:
        from rich.console import Console

        from rich.markup import escape

        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
