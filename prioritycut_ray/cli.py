"""The command line: one verb a job. Heavy packages are imported when a verb runs, not before."""

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prioritycut_ray.config import dump_config, load_config
from prioritycut_ray.errors import UserError

app = typer.Typer(
    name="prioritycut",
    help="Train image-animation models with PriorityCut, distributed on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(highlight=False, soft_wrap=True)
_debug = False


def _show_tracebacks(debug: bool) -> bool:
    global _debug
    _debug = _debug or debug
    return debug


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_show_tracebacks, is_eager=True, help="Show the traceback of an error."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the config as `dotted.key=value`.", metavar="KEY=VALUE"),
]
Run = Annotated[Path, typer.Argument(help="Folder of a run, or of one of its checkpoints.")]


@app.command(epilog="Example: `prioritycut quickstart --out quickstart`")
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("quickstart"),
    debug: Debug = False,
) -> None:
    """Run the whole job on synthetic puppets: shard, train, evaluate, animate."""
    from prioritycut_ray.quickstart import run_quickstart

    with _writing_to(out):
        run_quickstart(out, overrides or [], console)


@app.command("shard", epilog="Example: `prioritycut shard clips/ --out data --size 256`")
def shard_verb(
    videos: Annotated[
        list[str],
        typer.Argument(help="Files, folders, globs, or a .csv manifest (file, identity, split)."),
    ],
    out: Annotated[str, typer.Option(help="New folder for the shards, or an fsspec URL.")],
    size: Annotated[int, typer.Option(min=32, help="Side of the square frames in pixels.")] = 256,
    debug: Debug = False,
) -> None:
    """Crop, resize and pack videos into WebDataset shards."""
    from prioritycut_ray.commands.shard import shard

    with _writing_to(out):
        shard(videos, out, size=size, console=console)


@app.command(
    "train", epilog="Example: `prioritycut train vox256 name=vox data.url=data train.workers=4`"
)
def train_verb(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and stop.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a model, or resume the run of the same name."""
    resolved = load_config(config, overrides or [])
    if dry_run:
        sys.stdout.write(dump_config(resolved))
        return
    from prioritycut_ray.commands.train import train

    run = train(resolved)
    console.print(f"Run:  {run}", f"Look: tensorboard --logdir {run}", sep="\n")


@app.command("evaluate", epilog="Example: `prioritycut evaluate runs/vox data --split test`")
def evaluate_verb(
    run: Run,
    data: Annotated[str, typer.Argument(help="Folder of `prioritycut shard`, or an fsspec URL.")],
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="Another run to compare with the first; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which clips.")] = "test",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Ray tasks at once, the scores are the same for any number; all that the "
            "cluster has room for unless given; 0 runs without Ray.",
        ),
    ] = None,
    lpips: Annotated[
        str,
        typer.Option(
            help="`hub` (LPIPS, AlexNet by torchvision), a file of torchvision's AlexNet or VGG-16 "
            "weights, or `proxy` (another network, offline; not LPIPS)."
        ),
    ] = "proxy",
    faces: Annotated[
        bool, typer.Option("--faces", help="Also AKD, MKR and AED, by the extra `faces`; slow.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; RUN/evaluation if not given.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Rebuild held-out clips from their first frame, score them, and write a report."""
    from prioritycut_ray.commands.evaluate import evaluate
    from prioritycut_ray.evaluation import Measures

    with _writing_to(out or run):
        evaluate(
            run,
            data,
            compare=compare or [],
            split=split,
            workers=workers,
            measures=Measures(lpips, faces),
            out=out,
            console=console,
        )


@app.command(
    "animate",
    epilog="Example: `prioritycut animate runs/vox --source me.png --driving him.mp4 --out me.mp4`",
)
def animate_verb(
    run: Run,
    source: Annotated[Path, typer.Option(help="An image, or a video for its first frame.")],
    driving: Annotated[Path, typer.Option(help="The video that gives the motion.")],
    out: Annotated[Path, typer.Option(help="The .mp4 to write.")],
    relative: Annotated[
        bool,
        typer.Option(help="Move by the change since the first driving frame; or take its pose."),
    ] = True,
    adapt_scale: Annotated[
        bool, typer.Option("--adapt-scale", help="Scale relative motion to the source's size.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Move a source image like a driving video."""
    from prioritycut_ray.commands.animate import animate

    with _writing_to(out):
        animate(run, source, driving, out, relative=relative, adapt_scale=adapt_scale)
    console.print(f"Animation: {out}")


@app.command(
    "import-fomm",
    epilog="Example: `prioritycut import-fomm vox-adv-cpk.pth.tar --out runs/vox-adv`",
)
def import_fomm(
    file: Annotated[Path, typer.Argument(help="A checkpoint of First Order Motion.")],
    out: Annotated[Path, typer.Option(help="New folder of the run.")],
    debug: Debug = False,
) -> None:
    """Turn published First Order Motion weights into a run that animates, evaluates and trains."""
    from prioritycut_ray.reference import import_checkpoint

    with _writing_to(out):
        report = import_checkpoint(file, out)
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(
        f"Run:   {out}",
        f"Train: prioritycut train {report.checkpoint / 'config.yaml'} data.url=DATA",
        sep="\n",
    )


@contextmanager
def _writing_to(place: str | Path) -> Iterator[None]:
    """Name the place where a full disk stopped the body: the system's error does not."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{place}: no space left on its disk; free some and run the same command again"
            ) from error
        raise


def main() -> None:
    """Run the command line; errors become one line and exit code 1 (usage errors: 2)."""
    try:
        app()
    except Exception as error:
        if _debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {explain(error)}\n")
        sys.exit(1)


def explain(error: Exception) -> str:
    """One line on an error: the thing, the reason, and the way out."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {reason}; run again with --debug and report it"
