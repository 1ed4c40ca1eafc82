"""The command line: verbs only; each calls one function of the library."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import path


def _at(help: str, **shown: Any) -> Any:
    return typer.Option(parser=path, metavar="PATH", help=help, **shown)


_TRUST = typer.Option("--trust-code", help="Run the code of your own that the folder or file names.")
app = typer.Typer(
    name="everlong",
    help="Sequence models whose cost stays linear: compare, train, generate, check, bench.",
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
        int | None, typer.Option(help="Parameters of every model, within 5 %.", show_default="400,000; quick: 150,000")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that every model is trained on.", show_default="500,000; quick: 120,000"),
    ] = None,
    out: Annotated[Path | None, _at("Folder of the results.", show_default="runs/compare")] = None,
    seed: Annotated[int, typer.Option(help="Of initial values, order of the text, and samples.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Short: small models, hardly trained.")] = False,
) -> None:
    """Train architectures on the same text and compare what they learn, recall and cost.

    Writes OUT/results.json, OUT/report.html (opens offline) and a folder for each model. Ctrl-C reports what there is;
    the same command again goes on.

    [bold]Examples[/]\n
      everlong compare   [dim](six architectures)[/]\n
      everlong compare --quick --mixers attention,mamba2\n
      everlong compare --data ~/notes book.txt --params 2000000 --tokens 5000000 --out runs/notes\n
      everlong compare --mixers mamba2,my_package.my_mixer --out runs/mine\n
      everlong generate runs/compare/mamba2 "def read_csv("   [dim](writes on with one of the models)[/]
    """
    from .compare.run import compare as run
    from .compare.settings import profile

    _own_code()
    text = [*(data or []), *(paths or [])]
    if paths and not data:
        raise ValueError(f"unexpected {paths[0]!r}; name text with --data, as in --data {paths[0]}")
    names = _names(mixers)
    settings = profile(quick, seed=seed, params=params, tokens=tokens)
    if not run(out, names=names, data=text or None, settings=settings, command=_typed()):
        sys.exit(130)


@app.command()
def generate(
    model: Annotated[
        Path,
        typer.Argument(parser=path, help="Folder of a model, as written by compare, train or everlong.save."),
    ],
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
        _at("Go on from the session in this file, if it exists, and save it there at the end."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights in fp32, bf16, int8 or int4; fewer bits are faster.", show_default="as saved"),
    ] = None,
    trust_code: Annotated[bool, _TRUST] = False,
) -> None:
    """Continue a text, streaming.

    [bold]Examples[/]\n
      everlong generate runs/compare/mamba2 "def read_csv("\n
      cat book.txt | everlong generate runs/compare/rwkv7 --max-tokens 500 --seed 1\n
      everlong generate MODEL "Once upon" --session chat.safetensors   [dim](again: it goes on from there)[/]
    """
    from .checkpoints.stream import continue_text
    from .generation.sampler import Sampling
    from .tokenizer import utf8

    _own_code()
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    data = _standard_input() if prompt == "-" else utf8(prompt)
    text = data.decode("utf-8", errors="surrogateescape")  # also where the locale knows less than UTF-8
    pieces = continue_text(
        model,
        text,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop or (),
        session=session,
        weights=weights,
        trust_code=trust_code,
    )
    print(text, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def train(
    typed: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, folders or globs; none: the sources of Python's standard library.", show_default=False
        ),
    ] = None,
    mixer: Annotated[str, typer.Option(help="A name from `everlong list`, or the dotted path of your own.")] = "mamba2",
    config: Annotated[
        Path | None,
        _at("A model's config as JSON (or the folder of a model), in place of --mixer, --d-model and --layers."),
    ] = None,
    d_model: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on in all.", show_default="2,000,000")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of one training sequence.", show_default="256")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of one step.", show_default="16")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Parts in which a step is computed, to save memory.", show_default="1")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default="0.002")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json; without it, bytes.")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16", help="Compute in bfloat16 where that is safe.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same run.", show_default="0")] = None,
    out: Annotated[Path | None, _at("Folder of the run.", show_default="runs/train-MIXER")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Save the run every so many steps.", show_default="100")
    ] = None,
    resume: Annotated[Path | None, _at("Go on with the run in this folder.")] = None,
    trust_code: Annotated[bool, _TRUST] = False,
) -> None:
    """Train a language model on text; killed at any moment, --resume goes on from the last save.

    [bold]Examples[/]\n
      everlong train\n
      everlong train book.txt notes/ "src/**/*.py" --mixer rwkv7 --tokens 5000000\n
      everlong train data/ --mixer my_package.my_mixer --d-model 256 --layers 6 --out runs/mine\n
      everlong train --resume runs/mine
    """
    from .train import job, show

    _own_code()
    if resume is not None:
        show.refuse_other_options(typed, "resume")
        show.train(job.read_job(resume, trust_code=trust_code), resume)
        return
    given = {
        "tokens": tokens,
        "context": context,
        "batch": batch,
        "accumulate": accumulate,
        "lr": lr,
        "bf16": bf16,
        "seed": seed,
        "save_every": save_every,
    }
    settings = job.Trainer.Config().replace(**{name: value for name, value in given.items() if value is not None})
    if config is not None:
        show.refuse_other_options(typed, "config", "mixer", "d_model", "layers")
        model, name = job.read_model_config(config, trust_code=trust_code), config.stem
    else:
        vocabulary = job.open_tokenizer(tokenizer).vocab_size
        model, name = job.simple_model(mixer, d_model, layers, vocabulary), mixer
    made = job.Job(model=model, train=settings, paths=tuple(paths or ()), tokenizer=tokenizer)
    show.train(made, out or Path("runs", f"train-{name}"))


@app.command("list")
def list_architectures() -> None:
    """Show every architecture: equation, memory, sizes, cost of a token, what is native."""
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

    _own_code()
    if not check_mixer(mixer):
        sys.exit(1)


bench = typer.Typer(
    name="bench",
    help="Time ops and models beside the machine's limits and the engines of others.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(bench)

_THREADS = typer.Option(help="Threads of every contender.", show_default="one for each core")
_SECONDS = typer.Option(help="For the rounds of one comparison; three rounds are always made.")
_MINUTES = typer.Option(help="No measurement begins later than this; the rest is skipped.")
_GOALS = typer.Option("--goals", hidden=True, help="Hold the figures to the goals of the project.")
_BENCH_OUT = _at("Folder of results.json and report.html.")
_COMMAS = "separated by commas"


@bench.command("ops")
def bench_ops(
    ops: Annotated[str, typer.Option(help=f"Names of ops, {_COMMAS}.", show_default="all")] = "",
    cases: Annotated[
        str, typer.Option(help=f"Sizes, {_COMMAS}; tests: those of the tests.", show_default="four of real layers")
    ] = "",
    dtypes: Annotated[str, typer.Option(help=f"fp32, bf16, {_COMMAS}.", show_default="both")] = "",
    backends: Annotated[str, typer.Option(help=f"Forms, {_COMMAS}.", show_default="all")] = "",
    seconds: Annotated[float | None, _SECONDS] = None,
    minutes: Annotated[float | None, _MINUTES] = None,
    threads: Annotated[int | None, _THREADS] = None,
    out: Annotated[Path, _BENCH_OUT] = Path("runs", "bench", "ops"),
    quick: Annotated[
        bool, typer.Option("--quick", help="One small case in fp32; nothing begins after 5 minutes.")
    ] = False,
    goals: Annotated[bool, _GOALS] = False,
) -> None:
    """Time every form of every op, forward and with gradients, in turn; GFLOP/s and GB/s beside the machine's limits.

    A form whose outputs or gradients differ from the reference is shown in red, with its error and no time.

    [bold]Examples[/]\n
      everlong bench ops --quick\n
      everlong bench ops --ops selective_scan --cases mamba-130m --dtypes fp32 --seconds 10\n
      everlong bench ops --ops delta_rule,linear_attention --backends native,torch --out runs/bench/rules
    """
    from .bench.plan import ops_plan
    from .bench.run import Terms
    from .report.bench import bench as run

    plan = ops_plan(
        ops=_names(ops),
        cases=_names(cases),
        dtypes=_names(dtypes),
        backends=_names(backends),
        seconds=seconds,
        quick=quick,
    )
    if not run("ops", plan, Terms(out, threads, _or(minutes, 5.0 if quick else 60.0), _typed(), goals)):
        sys.exit(1)


@bench.command("models")
def bench_models(
    models: Annotated[
        str, typer.Option(help=f"Presets, {_COMMAS}.", show_default="mamba-130m,mamba2-130m,rwkv7-0.1b")
    ] = "",
    measure: Annotated[
        str, typer.Option(help=f"prefill, decode, batch, training, memory, loss, {_COMMAS}.", show_default="all")
    ] = "",
    weights: Annotated[str, typer.Option(help=f"fp32, bf16, int8, int4, {_COMMAS}.", show_default="all")] = "",
    lengths: Annotated[
        str | None, typer.Option(help=f"Tokens of the prompts, {_COMMAS}.", show_default="512,2048")
    ] = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens read before decoding.", show_default="512")] = None,
    batches: Annotated[str | None, typer.Option(help="Rows decoded together.", show_default="1,4,16")] = None,
    texts: Annotated[
        str | None,
        typer.Option(help="Tokens of the texts whose reading is watched for memory.", show_default="10000,100000"),
    ] = None,
    against: Annotated[str, typer.Option(help=f"transformers, llama.cpp, {_COMMAS}.", show_default="nobody")] = "",
    seconds: Annotated[float | None, _SECONDS] = None,
    minutes: Annotated[float | None, _MINUTES] = None,
    threads: Annotated[int | None, _THREADS] = None,
    out: Annotated[Path, _BENCH_OUT] = Path("runs", "bench", "models"),
    quick: Annotated[
        bool, typer.Option("--quick", help="One model in bf16, short prompts; nothing begins after 5 minutes.")
    ] = False,
    goals: Annotated[bool, _GOALS] = False,
) -> None:
    """Time whole models at random weights: prompts, tokens, batches, training, memory; with --against, beside others.

    Others run on the same weights, in the same rounds; an engine whose logits differ is shown in red, without a time.
    They come with pip install "everlong\\[peers]".

    [bold]Examples[/]\n
      everlong bench models --quick\n
      everlong bench models --models mamba-130m --measure prefill --weights bf16 --against transformers,llama.cpp\n
      everlong bench models --models mamba-130m --measure decode --contexts 1024,131072\n
      everlong bench models --measure training --against transformers --out runs/bench/training
    """
    from .bench.plan import models_plan
    from .bench.run import Terms
    from .report.bench import bench as run

    plan = models_plan(
        models=_names(models),
        measures=_names(measure),
        weights=_names(weights),
        sizes={"lengths": lengths, "contexts": contexts, "batches": batches, "texts": texts},
        against=_names(against),
        seconds=seconds,
        quick=quick,
    )
    if not run("models", plan, Terms(out, threads, _or(minutes, 5.0 if quick else 90.0), _typed(), goals)):
        sys.exit(1)


def _standard_input() -> bytes:
    """All of standard input. ``ValueError`` where it is closed."""
    if sys.stdin is None:
        raise ValueError("there is no standard input to read a prompt from; give the prompt as an argument")
    return sys.stdin.buffer.read()


def _or(given: float | None, usual: float) -> float:
    return usual if given is None else given


def _own_code() -> None:
    """A dotted path is looked for in the folder one is in, too: only while it is imported, and behind all libraries."""
    from .config import import_from

    import_from("")


def _names(text: str) -> list[str]:
    """``"a, b"`` as ``["a", "b"]``."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _typed() -> str:
    """The command as it was typed, for reports."""
    import shlex

    return shlex.join(["everlong", *sys.argv[1:]])


def main() -> None:
    """Entry point: errors meant for the user are one clear line, not a traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(AttributeError):  # not one of Python's own, as in a notebook
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what an 8-bit locale lacks
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
    if sys.path and sys.path[0] == os.getcwd():  # put there by python -m; files lying there are no commands
        del sys.path[0]
    main()
