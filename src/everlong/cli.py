"""The command line: verbs only; each calls one function of the library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

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
def compare(
    paths: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH...",
            help="Text files, folders or globs; without it, the sources of Python's standard library.",
        ),
    ] = None,
    mixers: Annotated[
        str,
        typer.Option(
            help="Architectures, separated by commas: the default ones, any name from "
            "`everlong list`, dotted paths of your own.",
        ),
    ] = "attention,mamba,mamba2,rwkv7,griffin,jamba",
    params: Annotated[
        int | None, typer.Option(help="Parameters of every model, within 5 %.", show_default="400,000")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that every model is trained on.", show_default="chosen for a run of some 5 minutes"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="runs/compare")] = None,
    seed: Annotated[int, typer.Option(help="Of initial values, order of the text, and samples.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: small models, hardly trained.")] = False,
) -> None:
    """Train architectures on the same text and compare what they learn, recall and cost.

    Writes OUT/results.json, OUT/report.html (opens offline) and a folder for each model. Ctrl-C reports what there is;
    the same command again goes on.

    [bold]Examples[/]\n
      everlong compare   [dim](six architectures, some 5 minutes on two cores)[/]\n
      everlong compare --quick --mixers attention,mamba2\n
      everlong compare --data ~/notes book.txt --params 2000000 --tokens 5000000 --out runs/notes\n
      everlong compare --mixers mamba2,my_package.my_mixer --out runs/mine\n
      everlong generate runs/compare/mamba2 "def read_csv("   [dim](writes on with one of the models)[/]
    """
    from .compare.run import compare as run
    from .compare.settings import profile

    text = [*(data or []), *(paths or [])]
    if paths and not data:
        raise ValueError(f"unexpected {paths[0]!r}; name text with --data, as in --data {paths[0]}")
    names = [name.strip() for name in mixers.split(",") if name.strip()]
    settings = profile(quick, seed=seed, params=params, tokens=tokens)
    if not run(out, names=names, data=text or None, settings=settings, command=_typed()):
        sys.exit(130)


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
    seed: Annotated[int | None, typer.Option(help="Draw the same text again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    session: Annotated[
        Path | None,
        typer.Option(help="Go on from the session in this file, if it exists, and save it there at the end."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights in fp32, bf16, int8 or int4; fewer bits are faster.", show_default="as saved"),
    ] = None,
) -> None:
    """Continue a text, streaming.

    [bold]Examples[/]\n
      everlong generate runs/compare/mamba2 "def read_csv("\n
      cat book.txt | everlong generate runs/compare/rwkv7 --max-tokens 500 --seed 1\n
      everlong generate MODEL "Once upon" --session chat.safetensors   [dim](again: it goes on from there)[/]
    """
    from .checkpoints.stream import continue_text
    from .models.generate import Sampling

    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    pieces = continue_text(
        model, text, max_tokens=max_tokens, sampling=sampling, stop=stop or (), session=session, weights=weights
    )
    print(text, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def train(
    context: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, folders or globs; none: the sources of Python's standard library.", show_default=False
        ),
    ] = None,
    mixer: Annotated[str, typer.Option(help="A name from `everlong list`, or the dotted path of your own.")] = "mamba2",
    config: Annotated[
        Path | None,
        typer.Option(
            help="A model's config as JSON (or the folder of a model), in place of --mixer, --d-model and --layers."
        ),
    ] = None,
    d_model: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens to train on in all.")] = 2_000_000,
    length: Annotated[int, typer.Option("--context", help="Tokens of one training sequence.")] = 256,
    batch: Annotated[int, typer.Option(help="Sequences of one step.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Parts in which a step is computed, to save memory.")] = 1,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json; without it, bytes.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where that is safe.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/train-MIXER")] = None,
    save_every: Annotated[int, typer.Option(help="Save the run every so many steps.")] = 100,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
) -> None:
    """Train a language model on text; killed at any moment, it goes on where it was.

    [bold]Examples[/]\n
      everlong train\n
      everlong train book.txt notes/ "src/**/*.py" --mixer rwkv7 --tokens 5000000\n
      everlong train data/ --mixer my_package.my_mixer --d-model 256 --layers 6 --out runs/mine\n
      everlong train --resume runs/mine
    """
    from .train import job, show

    if resume is not None:
        show.refuse_other_options(context, "resume")
        show.train(job.read_job(resume), resume)
        return
    settings = job.Trainer.Config(
        tokens=tokens,
        context=length,
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        bf16=bf16,
        seed=seed,
        save_every=save_every,
    )
    if config is not None:
        show.refuse_other_options(context, "config", "mixer", "d_model", "layers")
        model, name = job.read_model_config(config), config.stem
    else:
        vocabulary = job.open_tokenizer(tokenizer).vocab_size
        model, name = job.simple_model(mixer, d_model, layers, vocabulary), mixer
    made = job.Job(model=model, train=settings, paths=tuple(paths or ()), tokenizer=tokenizer)
    show.train(made, out or Path("runs", f"train-{name}"))


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


def _typed() -> str:
    """The command as it was typed, for reports."""
    import shlex

    return shlex.join(["everlong", *sys.argv[1:]])


def main() -> None:
    """Entry point: errors meant for the user are one clear line, not a traceback."""
    sys.path.append("")  # a mixer of your own is found from the folder you are in; its files shadow no library's
    try:
        app()
    except BrokenPipeError:  # the reader of a pipe has left (| head): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
