"""The command line: verbs and options. Heavy packages are imported only when a verb runs."""

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.console import Console
from typer.models import OptionInfo

from prioritycut_ray.config import dump_config, load_config
from prioritycut_ray.errors import DiskFull, ExitCode, UserError, describe, is_disk_full
from prioritycut_ray.storage.paths import expanded, is_url

if TYPE_CHECKING:
    from prioritycut_ray.importers.published import ImportReport

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


def _on_this_machine(path: str | Path) -> Path:
    if is_url(str(path)):
        raise UserError(f"{path}: is a URL; use a path on this machine")
    return Path(expanded(str(path)))


def local_path(text: str) -> OptionInfo:
    """Return an option for a local path; shells do not expand ``~`` in ``--out=~/x``."""
    return cast(OptionInfo, typer.Option(help=text, parser=_on_this_machine, metavar="PATH"))


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_show_tracebacks, is_eager=True, help="Show the traceback of an error."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the configuration: `dotted.key=value`.", metavar="KEY=VALUE"),
]
Run = Annotated[
    str, typer.Argument(help="Run, checkpoint, or RUN/best: a folder or an fsspec URL.")
]


@app.command(epilog="Example: `prioritycut quickstart --out quickstart`")
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, local_path("Folder for all files that it creates.")] = Path("quickstart"),
    debug: Debug = False,
) -> None:
    """Run all steps on synthetic puppets: shard, train, evaluate, animate."""
    from prioritycut_ray.commands.quickstart import run_quickstart

    with writing_to(out):
        run_quickstart(out, overrides or [], console)


Videos = Annotated[
    list[str],
    typer.Argument(
        help="Video files, folders, globs, WebDataset shards (`'s-{000..123}.tar'`), or `.csv` "
        "files: manifests (file, identity, split, start, end, left, top, right, bottom) or "
        "published metadata (video_id, start, end, bbox, fps, ...). Paths or fsspec URLs."
    ),
]
Data = Annotated[
    str, typer.Argument(help="Data set made by `prioritycut shard`: a folder or an fsspec URL.")
]
Copy = Annotated[
    bool,
    typer.Option("--copy", help="Copy H.264 streams of the right size; reject all other videos."),
]
Preset = Annotated[
    Literal["default", "random-access"],
    typer.Option(help="How clips are encoded. `random-access`: read faster, with more bytes."),
]
MaxFrames = Annotated[
    int, typer.Option(min=2, help="Split longer videos into equal clips of at most this length.")
]
Fps = Annotated[
    float | None,
    typer.Option(
        help="Pack folders of `.png` or `.jpg` frames too, each as a clip of this frame rate."
    ),
]
StripWidth = Annotated[
    int | None,
    typer.Option(
        help="Pack pictures of frames side by side too, each as a clip of frames of this width."
    ),
]
IdentityFrom = Annotated[
    str,
    typer.Option(
        help="What names the identity: `folder`, `name`, or a regular expression for the path, "
        "such as `'(id[0-9]+)'`. Default: the file name before `#`, or else each file its own.",
        show_default=False,
        metavar="folder|name|REGEX",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if a video is rejected.")]


@app.command("shard", epilog="Example: `prioritycut shard clips/ --out data --size 256`")
def shard_verb(
    videos: Videos,
    out: Annotated[str, typer.Option(help="New folder or fsspec URL for the shards.")],
    size: Annotated[
        int, typer.Option(min=32, help="Width and height of the frames in pixels.")
    ] = 256,
    copy: Copy = False,
    preset: Preset = "default",
    max_frames: MaxFrames = 1024,
    fps: Fps = None,
    strip_width: StripWidth = None,
    identity_from: IdentityFrom = "",
    strict: Strict = False,
    debug: Debug = False,
) -> None:
    """Crop, resize and pack videos into WebDataset shards. The same command resumes."""
    from prioritycut_ray.commands.shard import shard
    from prioritycut_ray.packing.layout import Layout

    with writing_to(out):
        shard(
            videos,
            out,
            size=size,
            copy=copy,
            preset=preset,
            max_frames=max_frames,
            layout=Layout(fps, strip_width, identity_from),
            strict=strict,
            console=console,
        )


data_app = typer.Typer(name="data", help="Inspect and extend a data set.", no_args_is_help=True)
app.add_typer(data_app)


@data_app.command("verify", epilog="Example: `prioritycut data verify s3://bucket/data`")
def data_verify(
    url: Data,
    sample: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Check the index and this many clips, drawn at random (always the same ones); by "
            "default everything.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Verify all checksums and shards, and decode all frames."""
    from prioritycut_ray.commands.data import verify_data

    verify_data(url, sample, console)


@data_app.command("info", epilog="Example: `prioritycut data info data`")
def data_info(url: Data, debug: Debug = False) -> None:
    """Print the number of splits, clips, identities, frames and bytes, and the fingerprint."""
    from prioritycut_ray.commands.data import show_info

    show_info(url, console)


@data_app.command("preview", epilog="Example: `prioritycut data preview data --out data.html`")
def data_preview(
    url: Data,
    out: Annotated[Path, local_path("A .png (contact sheet) or a .html (playable page).")] = Path(
        "preview.png"
    ),
    clips: Annotated[int, typer.Option(min=1, help="Number of clips to show, evenly spaced.")] = 24,
    debug: Debug = False,
) -> None:
    """Show sample clips of a data set."""
    from prioritycut_ray.commands.data import show_preview

    with writing_to(out):
        show_preview(url, out, clips=clips, console=console)


@data_app.command("upgrade", epilog="Example: `prioritycut data upgrade s3://bucket/data`")
def data_upgrade(url: Data, debug: Debug = False) -> None:
    """Replace the `index.json` of version 0.1 by `index.arrow`. Shards are not changed."""
    from prioritycut_ray.commands.data import upgrade

    with writing_to(url):
        upgrade(url, console)


@data_app.command(
    "index",
    epilog="Example: `prioritycut data index 's3://bucket/shards/{000000..000999}.tar' --out data`",
)
def data_index(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="WebDataset shards: tars, folders, globs, braces (`'s-{000..123}.tar'`). Paths or "
            "fsspec URLs, which every node must see."
        ),
    ],
    out: Annotated[str, typer.Option(help="New folder or fsspec URL for the index.")],
    video_extension: Annotated[
        str, typer.Option(help="Extension of the videos: all that follows a name's first dot.")
    ] = "mp4",
    json_extension: Annotated[
        str,
        typer.Option(help="Extension of the JSON objects; `none` indexes videos without JSON."),
    ] = "json",
    trust: Annotated[
        bool,
        typer.Option(
            "--trust", help="Take the number of frames from each video's header; do not decode it."
        ),
    ] = False,
    identity_from: IdentityFrom = "",
    strict: Strict = False,
    debug: Debug = False,
) -> None:
    """Make a data set of existing WebDataset shards where they lie. The same command resumes.

    Nothing is copied or packed again: training reads those shards. Their videos must be square
    H.264 mp4s; each is decoded to check it.
    """
    from prioritycut_ray.commands.shard import index

    with writing_to(out):
        index(
            shards,
            out,
            video=video_extension,
            json_extension=json_extension,
            trust=trust,
            identity_from=identity_from,
            strict=strict,
            console=console,
        )


@data_app.command("append", epilog="Example: `prioritycut data append data new_clips/`")
def data_append(
    url: Data,
    videos: Videos,
    copy: Copy = False,
    preset: Preset = "default",
    max_frames: MaxFrames = 1024,
    fps: Fps = None,
    strip_width: StripWidth = None,
    identity_from: IdentityFrom = "",
    strict: Strict = False,
    debug: Debug = False,
) -> None:
    """Add videos in new shards, which become visible together when the index is replaced."""
    from prioritycut_ray.commands.shard import append
    from prioritycut_ray.packing.layout import Layout

    with writing_to(url):
        append(
            url,
            videos,
            copy=copy,
            preset=preset,
            max_frames=max_frames,
            layout=Layout(fps, strip_width, identity_from),
            strict=strict,
            console=console,
        )


@app.command(
    "train", epilog="Example: `prioritycut train vox256 name=vox data.url=data train.workers=4`"
)
def train_verb(
    config: Annotated[
        str, typer.Argument(help="YAML file, or the name of a shipped configuration.")
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a model, or resume the run of the same name."""
    resolved = load_config(config, overrides or [])
    if dry_run:
        sys.stdout.write(dump_config(resolved))
        return
    from prioritycut_ray.launch.train import train

    with writing_to(resolved.run):
        run = train(resolved)
    look = shlex.join(["tensorboard", "--logdir", run])
    console.print(f"Run:  {run}", f"Look: {look}", sep="\n", markup=False)
    if resolved.train.validate_every:
        console.print(f"Best: {run}/best", markup=False)


@app.command(
    "tune", epilog="Example: `prioritycut tune tune_configs/top_k.yaml data.url=data --resume`"
)
def tune_verb(
    search: Annotated[str, typer.Argument(help="YAML file of the search; see tune_configs/.")],
    overrides: Overrides = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run the small size in the file, to try it out.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the search of this name if it exists."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Search hyperparameters with Ray Tune. Each trial is a training run."""
    from prioritycut_ray.commands.tune import tune

    with writing_to(search):
        tune(search, overrides or [], smoke=smoke, resume=resume, console=console)


models_app = typer.Typer(
    name="models", help="List, compare, promote, pin and roll back models.", no_args_is_help=True
)
app.add_typer(models_app)
Models = Annotated[str, typer.Option(help="Models folder or fsspec URL.")]


@app.command("retrain", epilog="Example: `prioritycut retrain retrain.yaml data=data budget=50000`")
def retrain_verb(
    settings: Annotated[
        str, typer.Argument(help="YAML file of the settings; see docs/retraining.md.")
    ],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Train the current model on new clips, and promote the result if it is better."""
    from prioritycut_ray.commands.retrain import retrain

    with writing_to(settings):
        retrain(settings, overrides or [], console)


@models_app.command("list", epilog="Example: `prioritycut models list --models models`")
def models_list(models: Models = "models", debug: Debug = False) -> None:
    """List all models, and show which one is current."""
    from prioritycut_ray.commands.models import list_models

    list_models(models, console)


@models_app.command("promote", epilog="Example: `prioritycut models promote runs/vox`")
def models_promote(
    model: Annotated[str, typer.Argument(help="Name of a model, a run, or RUN/best.")],
    models: Models = "models",
    name: Annotated[
        str | None,
        typer.Option(help="Name of the new model if MODEL is a run; default: the run's."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a model current. The first model comes from a training run."""
    from prioritycut_ray.commands.models import promote_model

    with writing_to(models):
        promote_model(models, model, name, console)


@models_app.command("pin", epilog="Example: `prioritycut models pin`")
def models_pin(
    model: Annotated[
        str | None, typer.Argument(help="Name of a model.", show_default="the current model")
    ] = None,
    models: Models = "models",
    debug: Debug = False,
) -> None:
    """Make a model the anchor, which no candidate may be worse than by more than a tolerance."""
    from prioritycut_ray.commands.models import pin_model

    with writing_to(models):
        pin_model(models, model, console)


@models_app.command("diff", epilog="Example: `prioritycut models diff first candidate-0123456789`")
def models_diff(
    first: Annotated[str, typer.Argument(help="Name of a model, or the folder of a run.")],
    second: Annotated[str, typer.Argument(help="Another one; changes are second − first.")],
    models: Models = "models",
    data: Annotated[
        str | None, typer.Option(help="Folder of shards; by default that of the last retraining.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Held-out split; by default that of the last retraining.")
    ] = None,
    slices: Annotated[
        list[str] | None,
        typer.Option(
            "--slice",
            help="`identity`, or a key of the clips' JSON; may be repeated. By default those of "
            "the last retraining.",
        ),
    ] = None,
    out: Annotated[Path, local_path("Folder of the page.")] = Path("diff"),
    workers: Annotated[
        int | None, typer.Option(min=0, help="As for `evaluate`; 0 runs without Ray.")
    ] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open it in a browser.")] = True,
    debug: Debug = False,
) -> None:
    """Show two models side by side on held-out clips, and by slices."""
    from prioritycut_ray.commands.models import diff_models

    with writing_to(out):
        diff_models(
            models,
            (first, second),
            data=data,
            split=split,
            slices=slices or [],
            out=out,
            workers=workers,
            show=show,
            console=console,
        )


@models_app.command("rollback", epilog="Example: `prioritycut models rollback`")
def models_rollback(models: Models = "models", debug: Debug = False) -> None:
    """Roll back to the previously promoted model, and pin it."""
    from prioritycut_ray.commands.models import roll_back

    roll_back(models, console)


@app.command("evaluate", epilog="Example: `prioritycut evaluate runs/vox data --split test`")
def evaluate_verb(
    run: Run,
    data: Data,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Run to compare with the first; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set to evaluate on.")] = "test",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Ray tasks at a time; by default as many as the cluster has room for. 0 runs "
            "without Ray. The scores are the same for any number.",
        ),
    ] = None,
    lpips: Annotated[
        str,
        typer.Option(
            help="`hub` (LPIPS with torchvision's AlexNet), a file of torchvision's AlexNet or "
            "VGG-16 weights, or `proxy` (another network, works offline; not LPIPS)."
        ),
    ] = "proxy",
    faces: Annotated[
        bool,
        typer.Option(
            "--faces", help="Also measure AKD, MKR and AED; slow, requires the extra `faces`."
        ),
    ] = False,
    transfer: Annotated[
        bool,
        typer.Option(
            "--transfer",
            help="Also animate another identity with each clip; measure identity distance, pose "
            "transfer and flicker, which need no ground truth.",
        ),
    ] = False,
    out: Annotated[
        Path | None, local_path("Folder of the report; RUN/evaluation/SPLIT by default.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Reconstruct held-out clips from their first frame, score them, and write a report."""
    from prioritycut_ray.commands.evaluate import evaluate_and_print

    with writing_to(out or run):
        evaluate_and_print(
            run,
            data,
            compare=compare or [],
            split=split,
            workers=workers,
            lpips=lpips,
            faces=faces,
            transfer=transfer,
            out=out,
            console=console,
        )


Model = Annotated[
    str,
    typer.Argument(
        help="A run, a checkpoint, RUN/best, a folder written by `prioritycut export`, or "
        "OWNER/NAME on the Hugging Face Hub."
    ),
]


benchmark_app = typer.Typer(no_args_is_help=True, help="Score models where the truth is known.")
app.add_typer(benchmark_app, name="benchmark")


@benchmark_app.command(
    "puppets", epilog="Example: `prioritycut benchmark puppets runs/vox --identities 50`"
)
def benchmark_puppets_verb(
    run: Model,
    identities: Annotated[int, typer.Option(min=1, help="Number of held-out puppets.")] = 20,
    frames: Annotated[int, typer.Option(min=2, help="Number of frames of each clip.")] = 32,
    workers: Annotated[
        int | None, typer.Option(min=0, help="As for `evaluate`; 0 runs without Ray.")
    ] = None,
    out: Annotated[
        Path | None, local_path("Folder of the results; RUN/benchmark/puppets by default.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Rebuild synthetic puppets, move them as others move, and compare with the true rendering.

    Measures the error where the source shows nothing, at the rim of those parts and elsewhere, and
    flicker against the true motion. The puppets are the same every time, and in no training set.
    """
    from prioritycut_ray.commands.benchmark import benchmark_and_print

    with writing_to(out or run):
        benchmark_and_print(
            run,
            identities=identities,
            frames=frames,
            workers=workers,
            out=out,
            console=console,
        )


@app.command(
    "animate",
    epilog="Example: `prioritycut animate runs/vox --source me.png --driving him.mp4 --out me.mp4`",
)
def animate_verb(
    run: Model,
    source: Annotated[
        str, typer.Option(help="An image, or a video, of which the first frame is used.")
    ],
    driving: Annotated[str, typer.Option(help="A video with the motion to apply.")],
    out: Annotated[
        Path, local_path("A .mp4, a .gif, or a new folder (no extension) for PNG frames.")
    ],
    relative: Annotated[
        bool,
        typer.Option(help="Apply the motion since the initial driving frame, or the pose itself."),
    ] = True,
    adapt_scale: Annotated[
        bool, typer.Option("--adapt-scale", help="Scale relative motion to the size of the source.")
    ] = False,
    best_frame: Annotated[
        bool,
        typer.Option(
            "--best-frame", help="Start from the driving frame whose pose best matches the source."
        ),
    ] = False,
    smooth: Annotated[
        bool,
        typer.Option("--smooth", help="Smooth the driving keypoints over 1/3 s, against jitter."),
    ] = False,
    crop: Annotated[
        str,
        typer.Option(
            help="What the model sees of both: `auto` (largest square, where the motion is), "
            "`none` (the whole frame, resized), or LEFT,TOP,RIGHT,BOTTOM in pixels."
        ),
    ] = "auto",
    source_crop: Annotated[
        str | None, typer.Option(help="Crop of the source, if it differs from --crop.")
    ] = None,
    panel: Annotated[
        bool, typer.Option("--panel", help="Show source, driving frame and result side by side.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Animate a source image with the motion of a driving video."""
    from prioritycut_ray.commands.animate import animate
    from prioritycut_ray.inference.scene import Motion

    with writing_to(out):
        animate(
            run,
            source,
            driving,
            out,
            motion=Motion(relative, adapt_scale, best_frame, smooth),
            crop=crop,
            source_crop=source_crop,
            panel=panel,
            console=console,
        )


@app.command("export", epilog="Example: `prioritycut export runs/vox --out vox --torch-export`")
def export_verb(
    run: Run,
    out: Annotated[Path, local_path("New folder for the model.")],
    torch_export: Annotated[
        bool,
        typer.Option(
            "--torch-export", help="Also export a torch.export graph, checked against the model."
        ),
    ] = False,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx",
            help="Also export two ONNX graphs, checked against the model (extra `onnx`).",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Export a model for the Hugging Face Hub: safetensors, config.json, model card."""
    from prioritycut_ray.commands.export import export

    with writing_to(out):
        export(run, out, graph=torch_export, onnx=onnx, console=console)


@app.command("app", epilog="Example: `prioritycut app runs/vox runs/baseline`")
def app_verb(
    runs: Annotated[
        list[str], typer.Argument(help="One or two models, as for `animate`.", metavar="RUN [RUN2]")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port; default: the first free one from 7860.")
    ] = None,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Maximum size of an upload.")] = 50,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Maximum length of a video.")] = 30.0,
    debug: Debug = False,
) -> None:
    """Serve a local web page that animates with one or two models (extra `app`)."""
    from prioritycut_ray.commands.app import serve

    serve(
        runs,
        host=host,
        port=port,
        max_megabytes=max_megabytes,
        max_seconds=max_seconds,
        console=console,
    )


jobs_app = typer.Typer(
    no_args_is_help=True, help="Show, follow and stop the jobs of a Ray cluster."
)
k8s_app = typer.Typer(no_args_is_help=True, help="Render and validate manifests for KubeRay.")
app.add_typer(jobs_app, name="jobs")
app.add_typer(k8s_app, name="k8s")

Address = Annotated[
    str | None,
    typer.Option(
        help="Dashboard of the cluster's head, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, "
        "or this machine."
    ),
]
JobId = Annotated[str, typer.Argument(help="Job that `prioritycut submit` printed.", metavar="JOB")]
_ON_KUBERNETES = "With --kubernetes"
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        "-n",
        help="Namespace of the RayJob; default: `prioritycut`.",
        rich_help_panel=_ON_KUBERNETES,
    ),
]
KubeContext = Annotated[
    str | None,
    typer.Option("--context", help="kubectl context.", rich_help_panel=_ON_KUBERNETES),
]
OptionsFile = Annotated[
    str | None, typer.Option("--options", help="YAML file with options of the manifests.")
]


def _dashboard(address: str | None) -> str:
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"


@app.command(
    "submit",
    epilog="Example: `prioritycut submit vox256 name=vox storage=s3://b/runs data.url=s3://b/data "
    "--address http://127.0.0.1:8265`, or `--kubernetes --image REGISTRY/NAME:TAG --workers 4`",
)
def submit_verb(
    config: Annotated[
        str, typer.Argument(help="YAML file, or the name of a shipped configuration.")
    ],
    overrides: Overrides = None,
    address: Address = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="Environment variable of the job, KEY=VALUE; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Files not to send, as a pattern of .gitignore; may be repeated."),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return without following the job.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent, and exit.")
    ] = False,
    kubernetes: Annotated[
        bool,
        typer.Option("--kubernetes", help="Create a RayJob with its own cluster, using kubectl."),
    ] = False,
    image: Annotated[
        str | None,
        typer.Option(help="Image of the pods.", rich_help_panel=_ON_KUBERNETES),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of worker pods.", rich_help_panel=_ON_KUBERNETES),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs per worker pod.", rich_help_panel=_ON_KUBERNETES),
    ] = None,
    namespace: Namespace = None,
    context: KubeContext = None,
    options: OptionsFile = None,
    assigned: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the manifests, such as `worker.memory_gib=64`; may be repeated. See "
            "`prioritycut k8s render --show-options`.",
            rich_help_panel=_ON_KUBERNETES,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train on a remote cluster. The same run name resumes.

    The working directory is sent too, except for files in .gitignore and .rayignore. The command
    follows the log, and its exit code is that of the training. Ctrl-C detaches: the job continues,
    and the command to follow it again is printed.
    """
    if kubernetes:
        _refuse_address(address)
        from prioritycut_ray.commands import submit_rayjob

        words = submit_rayjob.option_words(
            assigned or [],
            image=image,
            namespace=namespace,
            max_workers=workers,
            worker__gpus=gpus,
        )
        code = submit_rayjob.submit(
            config,
            overrides or [],
            flags=submit_rayjob.Flags(options, words, context),
            excludes=exclude or [],
            environment=env or [],
            detach=detach,
            dry_run=dry_run,
            console=console,
        )
        raise typer.Exit(code)
    _refuse_without_kubernetes(
        image=image,
        workers=workers,
        gpus=gpus,
        namespace=namespace,
        context=context,
        options=options,
        set=assigned,
    )
    from prioritycut_ray.commands.submit import submit

    code = submit(
        config,
        overrides or [],
        address=_dashboard(address),
        excludes=exclude or [],
        environment=env or [],
        detach=detach,
        dry_run=dry_run,
        console=console,
    )
    raise typer.Exit(code)


def _refuse_address(address: str | None) -> None:
    if address is not None:
        raise UserError("--address and --kubernetes are mutually exclusive: remove one of them")


def _refuse_without_kubernetes(**flags: object) -> None:
    """Reject flags that would be ignored; each is None if it is not set."""
    for name, value in flags.items():
        if value is not None:
            raise UserError(f"--{name} requires --kubernetes: add it, or remove --{name}")


@jobs_app.command("status", epilog="Example: `prioritycut jobs status`")
def jobs_status(
    job: Annotated[str | None, typer.Argument(help="Job to show; default: all jobs.")] = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Show the status of a job, or of all jobs of a cluster."""
    from prioritycut_ray.commands.submit import show_status
    from prioritycut_ray.ray_cluster.jobs import Cluster

    show_status(Cluster(_dashboard(address)), job, console)


@jobs_app.command("logs", epilog="Example: `prioritycut jobs logs vox-1a2b3c4d --follow`")
def jobs_logs(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log until the job ends.")
    ] = False,
    address: Address = None,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="JOB is a RayJob.")] = False,
    namespace: Namespace = None,
    context: KubeContext = None,
    debug: Debug = False,
) -> None:
    """Print the log of a job. With --follow, the exit code is that of the job."""
    if kubernetes:
        _refuse_address(address)
        from prioritycut_ray.commands import rayjob

        raise typer.Exit(rayjob.logs(job, namespace, context, is_followed=follow, console=console))
    _refuse_without_kubernetes(namespace=namespace, context=context)
    from prioritycut_ray.commands import submit
    from prioritycut_ray.ray_cluster.jobs import Cluster

    cluster = Cluster(_dashboard(address))
    if follow:
        raise typer.Exit(submit.follow(cluster, job, console))
    console.print(cluster.logs(job), end="", markup=False)


@jobs_app.command("stop", epilog="Example: `prioritycut jobs stop vox-1a2b3c4d`")
def jobs_stop(job: JobId, address: Address = None, debug: Debug = False) -> None:
    """Stop a job. It saves its state, and the same submission resumes it."""
    from prioritycut_ray.commands.submit import stop
    from prioritycut_ray.ray_cluster.jobs import Cluster

    stop(Cluster(_dashboard(address)), job, console)


@jobs_app.command("interrupt", epilog="Example: `prioritycut jobs interrupt --seconds 100`")
def jobs_interrupt(
    seconds: Annotated[float, typer.Option(help="How long to wait for the jobs.")] = 100,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Let the jobs of a terminating head save their state and fail, so that they are retried."""
    from prioritycut_ray.commands.submit import interrupt
    from prioritycut_ray.ray_cluster.jobs import Cluster

    interrupt(Cluster(_dashboard(address)), seconds, console)


@jobs_app.command("drain", epilog="Example: `prioritycut jobs drain --seconds 100`")
def jobs_drain(
    seconds: Annotated[float, typer.Option(help="Time until the machine terminates.")] = 100,
    debug: Debug = False,
) -> None:
    """Drain the Ray node on this machine: runs save their state and move to other nodes."""
    from prioritycut_ray.launch.drain import drain_here

    is_idle = drain_here(seconds)
    console.print("the node is idle" if is_idle else f"the node is still busy after {seconds:g} s")


@k8s_app.command("render", epilog="Example: `prioritycut k8s render max_workers=8 --out cluster`")
def k8s_render(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the options: `key=value`.", metavar="KEY=VALUE"),
    ] = None,
    options: OptionsFile = None,
    out: Annotated[Path, local_path("Folder for the manifests.")] = Path("cluster"),
    show_options: Annotated[
        bool, typer.Option("--show-options", help="Print all options as YAML, and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Render the manifests for a cluster, training, search and nightly retraining."""
    from prioritycut_ray.commands import k8s
    from prioritycut_ray.kubernetes.options import describe_options, load_options

    chosen = load_options(options, overrides or [])
    if show_options:
        sys.stdout.write(describe_options(chosen))
        return
    with writing_to(out):
        k8s.render_files(chosen, out, console)


@k8s_app.command("validate", epilog="Example: `prioritycut k8s validate cluster/*.yaml`")
def k8s_validate(
    files: Annotated[list[Path], typer.Argument(help="Manifests to validate.", metavar="FILE...")],
    debug: Debug = False,
) -> None:
    """Validate manifests without a cluster: schemas, the operator's rules, and run-time failures.

    Errors are what the API server or the operator rejects, or what cannot run; the exit code is 1.
    Warnings do not change the exit code: placeholders, feature gates that are off by default, and
    what may be intended.
    """
    from prioritycut_ray.commands import k8s

    k8s.validate(files, console)


@app.command(
    "doctor",
    epilog="Example: `prioritycut doctor --address HEAD:6379 --storage s3://bucket/runs --data "
    "s3://bucket/data`",
)
def doctor_verb(
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="HOST:PORT of the cluster's head; default: a local Ray is started.",
        ),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Storage for runs: a path or an fsspec URL.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set that all nodes must be able to read.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all checks as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Check this machine and every node of the cluster, and show how to fix problems."""
    from prioritycut_ray.commands.doctor import doctor

    doctor(address=address, storage=storage, data=data, as_json=as_json, console=console)


@app.command(
    "import-fomm",
    epilog="Example: `prioritycut import-fomm vox-adv-cpk.pth.tar --out runs/vox-adv`",
)
def import_fomm(
    file: Annotated[str, typer.Argument(help="Checkpoint of the First Order Motion Model.")],
    out: Annotated[Path, local_path("New folder for the run.")],
    debug: Debug = False,
) -> None:
    """Import published First Order Motion weights as a run to animate, evaluate or train."""
    from prioritycut_ray.importers.first_order import import_checkpoint

    _import(file, out, import_checkpoint)


@app.command(
    "import-tpsmm",
    epilog="Example: `prioritycut import-tpsmm vox.pth.tar --out runs/vox-tps`",
)
def import_tpsmm(
    file: Annotated[str, typer.Argument(help="Checkpoint of the Thin-Plate Spline Motion Model.")],
    out: Annotated[Path, local_path("New folder for the run.")],
    size: Annotated[
        int, typer.Option(help="Side in pixels of the frames it was trained with; ted: 384.")
    ] = 256,
    debug: Debug = False,
) -> None:
    """Import published thin-plate spline weights as a run to animate, evaluate or train."""
    from prioritycut_ray.importers.thin_plate import import_checkpoint

    _import(file, out, partial(import_checkpoint, size=size))


def _import(
    file: str, out: Path, import_checkpoint: "Callable[[Path, Path], ImportReport]"
) -> None:
    """Import a checkpoint from a path or a URL, and print how to go on."""
    from prioritycut_ray.storage.reading import fetched

    with writing_to(out), fetched(file) as weights:
        report = import_checkpoint(weights, out)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    train = ["prioritycut", "train", str(report.checkpoint / "config.yaml"), "data.url=DATA"]
    console.print(f"Run:   {out}", f"Train: {shlex.join(train)}", sep="\n", markup=False)


@contextmanager
def writing_to(place: str | Path) -> Iterator[None]:
    """Name the path in the error if the disk is full; the system's error does not."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(
                f"{place}: no space left on the device; free some and run the same command again"
            ) from error
        raise


def main() -> None:
    """Run the command line. Errors become one line and an exit code (docs/failures.md)."""
    global _debug
    _debug = False
    try:
        app()
    except Exception as error:
        if _debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {explain(error)}\n")
        sys.exit(error.exit_code if isinstance(error, UserError) else ExitCode.USER_ERROR)


def explain(error: Exception) -> str:
    """Return one line on an error: the thing, the reason and the way out."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"unexpected {describe(error)}; run again with --debug and report it"
