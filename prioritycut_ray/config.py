"""The configuration: an immutable tree that is read from YAML and changed by dotted overrides.

This module imports neither torch nor ray, so that the command line validates a configuration and
prints help at once. Models never see these classes: they take plain keyword arguments.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from prioritycut_ray.errors import UserError, reason_of
from prioritycut_ray.storage.paths import expanded, is_url, resolved
from prioritycut_ray.validation import describe_problems, keys_of, mapping_values, section_type
from prioritycut_ray.yaml_text import Loader, Number, TextLoader, parse_yaml

Decoder = Literal["decord", "pyav", "torchcodec"]
DEFAULT_DECODER: Decoder = "decord" if find_spec("decord") else "pyav"
"""decord has no build for ARM and macOS, where everything else works."""

Fraction = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Halvings = Annotated[int, Field(ge=1, le=16)]
"""How often the side of a frame is halved."""
Samples = Annotated[int, Field(ge=0)]
"""Frame pairs seen by all workers together."""


def _word(value: Any) -> Any:
    """Convert ``true`` and ``false`` to yes and no."""
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("use letters, digits, '.', '_' and '-', and start with a letter or digit")
    return name


Name = Annotated[str, AfterValidator(_check_name)]

Place = Annotated[str, AfterValidator(expanded)]
"""A path or a URL; ``~`` and ``$VARIABLES`` are expanded."""


def _check_workers(workers: int | str) -> int | str:
    if re.fullmatch(r"0|[1-9]\d*", str(workers)):
        return int(workers)
    if re.fullmatch(r"[1-9]\d*\.\.[1-9]\d*", str(workers)):
        return workers
    raise ValueError(
        'must be a number of processes, "A..B" to start with A and grow to at most B, or 0 to '
        "train in this process"
    )


def _refuse_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    return value


AutoYesNo = Annotated[Literal["auto", "yes", "no"], BeforeValidator(_word)]


def _wants_text(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _wants_text(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return all(map(_wants_text, options))
    return annotation is str


def _as_text(value: Any) -> Any:
    if isinstance(value, Number):
        return value.text
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Section(BaseModel):
    """A section of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _take_numbers_as_text(cls, tree: Any) -> Any:
        """Restore the spelling of numbers where text is expected: a run may be named ``1.10``."""
        if not isinstance(tree, Mapping):
            return tree
        fields = keys_of(cls)
        return {
            key: _as_text(value) if key in fields and _wants_text(fields[key].annotation) else value
            for key, value in tree.items()
        }


AnySection = TypeVar("AnySection", bound=Section)


class HourglassConfig(Section):
    """Size of an hourglass network (method §1)."""

    block_expansion: Count
    max_features: Count = 1024
    num_blocks: Halvings = 5
    scale_factor: Fraction = 0.25


class DetectorConfig(HourglassConfig):
    """The keypoint detector."""

    block_expansion: Count = 32
    temperature: Annotated[float, Field(gt=0)] = 0.1
    single_jacobian_map: bool = False


class DenseMotionConfig(HourglassConfig):
    """The dense motion network."""

    block_expansion: Count = 64


class GeneratorConfig(Section):
    """The occlusion-aware generator."""

    block_expansion: Count = 64
    max_features: Count = 512
    num_down_blocks: Halvings = 2
    num_bottleneck_blocks: Count = 6


class FirstOrderConfig(Section):
    """The generator side: the first-order motion family (method §1)."""

    family: Literal["first_order"] = "first_order"
    num_keypoints: Count = 10
    detector: DetectorConfig = DetectorConfig()
    dense_motion: DenseMotionConfig = DenseMotionConfig()
    generator: GeneratorConfig = GeneratorConfig()

    @property
    def num_motions(self) -> int:
        """Motions that dense motion combines: one for each keypoint, and the background's."""
        return self.num_keypoints + 1

    def check(self, size: int) -> None:
        """Check that frames of ``size`` pixels can be halved as often as the networks do."""
        for key, hourglass in (("detector", self.detector), ("dense_motion", self.dense_motion)):
            _check_hourglass(f"model.{key}", size, hourglass)
        if size % 2**self.generator.num_down_blocks:
            raise ValueError(
                f"data.size={size} must be divisible by 2^model.generator.num_down_blocks"
            )


class InpaintingConfig(Section):
    """The inpainting network of the thin-plate family, which halves the frame three times."""

    block_expansion: Count = 64
    max_features: Count = 512


class MotionDropoutConfig(Section):
    """Motions that early training steps leave out at random, so that all of them are learned."""

    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the motions that the first step leaves out, ..."""
    peak: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """... and share after ``ramp_samples``, to which it rises linearly."""
    ramp_samples: Samples = 0
    end_samples: Samples = 0
    """Samples seen after which no motion is left out."""


class ThinPlateConfig(Section):
    """The generator side: the thin-plate spline family (method §7)."""

    family: Literal["thin_plate"]
    num_splines: Count = 10
    """K; each spline is determined by five keypoints."""
    resnet_channels: Count = 64
    """Channels of the first stage of the detector's and the background's ResNet; published: 64."""
    dense_motion: DenseMotionConfig = DenseMotionConfig()
    inpainting: InpaintingConfig = InpaintingConfig()
    background: bool = True
    """Whether a network predicts the motion of the background, in training alone."""
    background_start: Samples = 0
    """Samples seen before the background's motion is used."""
    motion_dropout: MotionDropoutConfig = MotionDropoutConfig()

    @property
    def num_keypoints(self) -> int:
        """Keypoints of all splines together."""
        return 5 * self.num_splines

    @property
    def num_motions(self) -> int:
        """Motions that dense motion combines: the splines, and the background's."""
        return self.num_splines + 1

    def check(self, size: int) -> None:
        """Check that frames of ``size`` pixels can be halved as often as the networks do."""
        motion = self.dense_motion
        if motion.scale_factor not in (1, 0.5, 0.25, 0.125):
            raise ValueError(
                f"model.dense_motion.scale_factor={motion.scale_factor} must be 1, 0.5, 0.25 or "
                "0.125 in the thin_plate family"
            )
        _check_hourglass("model.dense_motion", size, motion)
        coarse = 4 + round(math.log2(motion.scale_factor))
        if motion.num_blocks < coarse:
            raise ValueError(
                f"model.dense_motion.num_blocks={motion.num_blocks} must be at least {coarse} with "
                f"scale_factor={motion.scale_factor}: occlusion maps have four resolutions"
            )


def _family(tree: Any) -> str:
    """Return the family that a section describes; without a name it is first_order."""
    default = "first_order"
    if isinstance(tree, Mapping):
        return str(tree.get("family", default))
    return str(getattr(tree, "family", default))


ModelConfig = Annotated[
    Annotated[FirstOrderConfig, Tag("first_order")] | Annotated[ThinPlateConfig, Tag("thin_plate")],
    Discriminator(_family),
]


class DiscriminatorConfig(Section):
    """The discriminator and its size (method §3)."""

    kind: Literal["patch", "unet", "none"] = "unet"
    use_keypoints: bool = True
    max_features: Count = 1024
    patch_block_expansion: Count = 32
    patch_num_blocks: Count = 4
    patch_spectral_norm: bool = False
    unet_base_channels: Count = 64


class PriorityCutConfig(Section):
    """Mixing of real and generated images (method §4); ``priority_cut: null`` disables it."""

    mask: Literal["priority", "cutmix"] = "priority"
    top_k: Annotated[float, Field(ge=0, le=100)] = 20.0
    """Percentage of the foreground that is cut (with ``mask: priority``)."""
    background_threshold: Probability = 0.5
    swap_prob: Probability = 0.0
    mix_prob: Probability = 0.5
    warmup_samples: Samples = 0
    variant: Literal["full_batch", "additive"] = "full_batch"
    consistency: NonNegative = 1.0
    """Weight λ_cons of the consistency loss."""


NAMED_WEIGHTS = ("pretrained", "efficientnet_lite0", "random")
"""Values of ``loss.perceptual.weights`` that are not paths."""


class PerceptualConfig(Section):
    """The perceptual loss (method §2)."""

    weights: Place = "pretrained"
    """pretrained | efficientnet_lite0 (a proxy) | random | path of a VGG-19 state dict."""
    seed: int = 0
    """Seed of random weights."""
    scales: tuple[Fraction, ...] = (1.0, 0.5, 0.25, 0.125)
    weight: NonNegative = 10.0


class LossConfig(Section):
    """Weights of the generator's losses (method §2)."""

    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: NonNegative = 1.0
    feature_matching: NonNegative = 10.0
    equivariance_value: NonNegative = 10.0
    equivariance_jacobian: NonNegative = 10.0
    """first_order alone."""
    warp: NonNegative = 10.0
    """thin_plate alone: warped encoder maps of the source against those of the driving frame."""
    background: NonNegative = 10.0
    """thin_plate alone: the background's motion forth and back."""


class AugmentConfig(Section):
    """Random changes, the same for both frames of a pair; jitter is a range around no change."""

    horizontal_flip: bool = True
    time_flip: bool = True
    brightness: NonNegative = 0.1
    contrast: NonNegative = 0.1
    saturation: NonNegative = 0.1
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1


class DataConfig(Section):
    """The shards, and how frame pairs are drawn from them."""

    url: Place = "data"
    """Folder of shards as written by ``prioritycut shard``; a path or an fsspec URL."""
    split: str = "train"
    validation_split: str = "val"
    """Split with the clips that ``train.validate_every`` scores."""
    index: Place | None = None
    """Folder whose ``index.arrow`` lists the clips; the folder ``url`` by default."""
    known: Place | None = None
    """Folder with the ``index.arrow`` of clips that an earlier model has seen; see ``replay``."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the samples that is drawn from clips in ``known``; the others are new clips."""
    size: Annotated[int, Field(ge=32, multiple_of=32)] = 256
    """Side of the square frames in pixels; a multiple of 32, as the decoder requires."""
    visit: Literal["clip", "identity"] = "clip"
    """Visit all clips equally often; or all identities, and the clips of each in turn."""
    num_repeats: Count = 75
    """Visits to each clip, or to each identity, per epoch."""
    pairs_per_visit: Count = 1
    """Consecutive frame pairs from a clip that is opened: more is cheaper, but they are similar."""
    decoder: Decoder = DEFAULT_DECODER
    """Library that decodes the shards; all give the same frames (docs/data.md)."""
    cache_dir: Place | None = None
    """Local folder that caches clips of remote shards; null fetches them every time."""
    cache_gb: Annotated[float, Field(gt=0)] = 20.0
    """Size limit of the cache in gigabytes (10^9 bytes); the oldest clips are removed first."""
    loader_workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes for each training worker; 0 decodes in the worker itself."""
    augment: AugmentConfig = AugmentConfig()


class OptimConfig(Section):
    """The optimiser, Adam, and its schedule in samples seen."""

    lr: NonNegative = 2e-4
    detector_lr: NonNegative = 2e-4
    discriminator_lr: NonNegative = 2e-4
    betas: tuple[Probability, Probability] = (0.5, 0.999)
    milestones: tuple[int, ...] = ()
    """Samples seen at which every learning rate is multiplied by ``gamma``."""
    gamma: Fraction = 0.1
    weight_decay: NonNegative = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Norm that the gradients of each network are clipped to; null does not clip."""
    grad_norm: Literal["euclidean", "maximum"] = "euclidean"
    """Which norm: of all gradients together, or the largest one."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the animator's moving average, used to evaluate and animate; 0 = no average."""
    max_skipped_in_a_row: Count = 10
    """Consecutive non-finite updates after which the run stops."""


VALIDATION = "val/"
"""Prefix of the scalars of a validation."""
VAL_L1 = f"{VALIDATION}l1"
_HIGHER_IS_BETTER = (f"{VALIDATION}psnr", f"{VALIDATION}ssim")


class TrainConfig(Section):
    """Length, parallelism and intervals of a run; samples are frame pairs over all workers."""

    samples: Count = 2_000_000
    batch_size: Count = 40
    """Global batch size, divided equally among the workers."""
    accumulate: Count = 1
    """Micro-batches that a worker's share of a batch is split into."""
    workers: Annotated[
        int | str, BeforeValidator(_refuse_boolean), AfterValidator(_check_workers)
    ] = 1
    """Training processes: ``N``, or ``"A..B"`` to start with A and grow to at most B.

    0 trains in this process, without Ray, and computes what one worker computes.
    """
    cpus_per_worker: Count = 1
    use_gpu: AutoYesNo = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the networks; auto = bfloat16 if the hardware of all workers supports it."""
    compile: bool = False
    """Compile the blocks of the networks with torch.compile; the first step takes minutes."""
    activation_checkpointing: bool = False
    """Recompute activations of the perceptual network: less memory, more time."""
    deterministic: bool = False
    """On GPUs, compute bit-identical results, as CPUs always do; slower."""
    seed: int = 0
    log_every: Count = 50
    """Steps between logged scalars."""
    image_every: Count = 500
    """Steps between logged images."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Count = 3
    """Number of newest checkpoints to keep, ..."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """... number of those with the lowest ``best_metric`` to keep, ..."""
    best_metric: str | None = None
    """Any scalar that the run logs and that is better when lower.

    null is ``val/l1`` with ``validate_every``, else ``generator/perceptual``.
    """
    keep_every: Annotated[int, Field(ge=0)] = 0
    """... and keep those at multiples of this many steps; 0 = none."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations: held-out clips scored with the averaged weights; 0 = none."""
    validate_clips: Count = 32
    """Maximum number of clips to score; the same ones at every validation."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Validations in a row without a new lowest ``val/l1`` after which the run ends; 0 = never."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Consecutive restarts from the last checkpoint without progress, after which the run ends."""
    grace_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that a run has to save its state after SIGTERM or Ctrl-C."""
    collective_timeout_s: Count = 600
    """Seconds that ranks wait for another one before the run ends and names it."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """The minimum and the maximum number of workers; this process counts as one."""
        first, _, last = str(self.workers or 1).partition("..")
        return int(first), int(last or first)

    @property
    def ranked_by(self) -> str:
        """The scalar that ranks checkpoints; lower is better."""
        return self.best_metric or (VAL_L1 if self.validate_every else "generator/perceptual")


HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
"""Pattern of a model's name on the Hugging Face Hub."""


class Config(Section):
    """Everything that determines a training run."""

    name: Name = "run"
    """Name of the run and of its folder below ``storage``; the same name resumes."""
    storage: Place = "runs"
    """Folder that all nodes share, or an fsspec URL such as ``s3://bucket/runs``."""
    init: Place | None = None
    """Model whose weights a new run starts from: a run, ``RUN/best``, an export, or OWNER/NAME."""
    data: DataConfig = DataConfig()
    model: ModelConfig = FirstOrderConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    priority_cut: PriorityCutConfig | None = PriorityCutConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @property
    def run(self) -> str:
        """Path or URL of the run's folder."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @model_validator(mode="after")
    def _check(self) -> "Config":
        """Rules that span sections."""
        size = self.data.size
        self.model.check(size)
        if self.discriminator.kind == "unet" and size & (size - 1):
            raise ValueError(
                f"discriminator.kind=unet requires a power of two, not data.size={size}"
            )
        if self.discriminator.kind != "unet" and self.priority_cut is not None:
            raise ValueError(
                "mixing requires per-pixel logits: set discriminator.kind=unet or priority_cut=null"
            )
        smallest = size * min(self.loss.perceptual.scales)
        if self.loss.perceptual.weights != "efficientnet_lite0" and smallest < 16:
            raise ValueError(
                f"VGG-19 requires 16 pixels at the smallest of loss.perceptual.scales, not "
                f"{smallest:g}: remove scales below {16 / size:g}"
            )
        _check_shares(self.train)
        _check_validation(self.train, self.data)
        return self


def _check_shares(train: TrainConfig) -> None:
    """Check that the global batch can be divided equally among any allowed number of workers.

    Unequal shares would weight samples differently depending on the number of workers.
    """
    fewest, most = train.worker_range
    if fewest > most:
        raise ValueError(
            f'train.workers="{train.workers}": the first number must be the smaller one'
        )
    shares = math.lcm(*range(fewest, most + 1)) * train.accumulate
    if train.batch_size % shares == 0:
        return
    multiple = math.ceil(train.batch_size / shares) * shares
    if fewest == most:
        raise ValueError(
            f"train.batch_size={train.batch_size} (global) must be divisible by "
            f"train.workers × train.accumulate = {shares}: set it to {multiple}"
        )
    raise ValueError(
        f"train.batch_size={train.batch_size} (global) must be divisible by every number of "
        f'workers in train.workers="{train.workers}" × train.accumulate={train.accumulate}: '
        f"set it to {multiple}, or choose a shorter range"
    )


def _check_validation(train: TrainConfig, data: DataConfig) -> None:
    if train.ranked_by in _HIGHER_IS_BETTER:
        raise ValueError(f"train.best_metric={train.ranked_by} is better when higher: use {VAL_L1}")
    if train.validate_every:
        if data.validation_split == data.split:
            raise ValueError(
                f"data.validation_split={data.validation_split} is the split to train on: "
                "choose another one, or set train.validate_every=0"
            )
    elif train.ranked_by.startswith(VALIDATION):
        raise ValueError(f"train.best_metric={train.ranked_by} requires train.validate_every")
    elif train.patience:
        raise ValueError(f"train.patience={train.patience} requires train.validate_every")


def _check_hourglass(key: str, size: int, hourglass: HourglassConfig) -> None:
    side = size * hourglass.scale_factor
    if side != int(side) or int(side) % 2**hourglass.num_blocks:
        raise ValueError(
            f"data.size={size} × {key}.scale_factor={hourglass.scale_factor} must be a whole "
            f"number divisible by 2^{key}.num_blocks={2**hourglass.num_blocks}"
        )


def load_config(source: str, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration and apply overrides.

    Args:
        source: a YAML file, or the name of a shipped configuration such as ``vox256``.
        overrides: ``dotted.key=value`` words; values are YAML (``null`` disables a section).

    Raises:
        UserError: if the file or a key is not valid; it names both.
    """
    return parse_config(apply_overrides(read_mapping(source), overrides), source)


def apply_overrides(
    tree: Mapping[str, Any], overrides: Iterable[str], section: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Apply ``dotted.key=value`` words to a tree of plain values.

    Args:
        tree: the values.
        overrides: the words.
        section: the section that the tree describes. Keys of its mappings may contain dots, as in
            ``node_selector.topology.kubernetes.io/zone=a``, and their values are text.

    Raises:
        UserError: if a word is malformed.
    """
    changed = dict(tree)
    for word in overrides:
        _apply_override(changed, word, section)
    return changed


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Validate a tree of plain values.

    Raises:
        UserError: if a key or a value is not valid; it names the nearest valid key.
    """
    return parse_section(Config, tree, source)


def parse_section(section: type[AnySection], tree: Mapping[str, Any], source: str) -> AnySection:
    """Validate a tree of plain values as a section.

    Raises:
        UserError: if a key or a value is not valid; it names the nearest valid key.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {describe_problems(error, section)}") from error


def load_section(
    section: type[AnySection], source: str | None, overrides: Iterable[str] = ()
) -> AnySection:
    """Read a section from a YAML file, or from its defaults, and apply overrides.

    Raises:
        UserError: if the file or a key is not valid; it names both.
    """
    tree = read_mapping(source) if source else {}
    return parse_section(section, apply_overrides(tree, overrides, section), source or "options")


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Format values by dotted key as overrides for :func:`load_config`."""
    return [f"{key}={_as_yaml(value)}" for key, value in values.items()]


def _as_yaml(value: Any) -> str:
    """Format a value as JSON that YAML reads back: YAML rejects surrogates and some characters."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", text
    )


def dump_config(config: Config) -> str:
    """Format the resolved configuration as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def shipped_configs() -> dict[str, Path]:
    """Return the paths of the configurations in the package, by name."""
    folder = Path(__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_mapping(source: str) -> dict[str, Any]:
    """Read a YAML file, or a shipped configuration, as plain values.

    Args:
        source: a path, any fsspec URL, or the name of a shipped configuration.

    Raises:
        UserError: if there is no such file, or it is not a mapping.
    """
    shipped = shipped_configs()
    path = str(shipped.get(source, source))
    try:
        content = _read_url(path) if is_url(path) else Path(path).read_bytes()
        tree = parse_yaml(content)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{source}: {reason_of(error)}; give a YAML file or one of the shipped "
            f"configurations: {', '.join(shipped)}"
        ) from error
    except ValueError as error:
        raise UserError(f"{source}: is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{source}: is not a mapping of keys to values")
    return tree


def _read_url(url: str) -> bytes:
    from prioritycut_ray.storage.filesystem import filesystem
    from prioritycut_ray.storage.reading import read_bytes

    fs, path = filesystem(url)
    return read_bytes(fs, path, url)


def _apply_override(tree: dict[str, Any], word: str, section: type[BaseModel] | None) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r}: an override has the form dotted.key=value")
    (*parents, leaf), loader = _parts(key, section)
    try:
        value = parse_yaml(text, loader)
    except ValueError as error:
        raise UserError(f"{word!r}: the value is not valid YAML: {error}") from error
    if value is None and loader is TextLoader:
        value = ""
    node = tree
    for parent in parents:
        child = node.get(parent)
        node[parent] = child = dict(child) if isinstance(child, dict) else {}
        node = child
    node[leaf] = value


def _parts(key: str, section: type[BaseModel] | None) -> tuple[list[str], type[yaml.SafeLoader]]:
    """Split a dotted key, and choose how its value is read.

    The rest of a key after the name of a mapping is one part, including its dots, unless the values
    of the mapping are sections.
    """
    parts: list[str] = []
    names = key.split(".")
    while names:
        parts.append(names.pop(0))
        field = section.model_fields.get(parts[-1]) if section else None
        values = mapping_values(field.annotation) if field else None
        if values is None:
            section = section_type(field.annotation) if field else None
        elif isinstance(values, type) and issubclass(values, BaseModel):
            parts += names[:1]
            names, section = names[1:], values
        elif names:
            loader = Loader if values is Any else TextLoader
            return [*parts, ".".join(names)], loader
    return parts, Loader


def _resolved_model(place: str) -> str:
    """Make a model's path absolute; a name that is no path may be on the Hugging Face Hub."""
    folder = Path(place).parent if Path(place).name == "best" else Path(place)
    return resolved(place) if folder.exists() or not re.fullmatch(HUB_ID, place) else place


def with_absolute_paths(config: Config) -> Config:
    """Make paths absolute, relative to the current folder: workers run in folders of their own."""
    perceptual = config.loss.perceptual
    weights = perceptual.weights
    if weights not in NAMED_WEIGHTS:
        weights = resolved(weights)
    return config.model_copy(
        update={
            "storage": resolved(config.storage),
            "init": config.init and _resolved_model(config.init),
            "data": config.data.model_copy(
                update={
                    "url": resolved(config.data.url),
                    "cache_dir": config.data.cache_dir and resolved(config.data.cache_dir),
                }
            ),
            "loss": config.loss.model_copy(
                update={"perceptual": perceptual.model_copy(update={"weights": weights})}
            ),
        }
    )
