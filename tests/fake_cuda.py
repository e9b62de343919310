"""A fake GPU: counts the operations of a training step on any machine.

Inside :func:`fake_cuda` torch sees one GPU. Tensors on the CPU are real; those on ``cuda:0``
have shapes, strides and formats but no numbers, and values that the host reads back are made up.
Operations, transfers and waits are those of a real GPU, in the order of a real step. It cannot show
numbers, streams or several GPUs.

    python -m tests.fake_cuda vox256 loss.perceptual.weights=random train.batch_size=34

prints the counts of one training step. Activations are distinguished from weights by their size, a
multiple of 17, so the batch size must be one too.
"""

import heapq
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import prioritycut_ray
from prioritycut_ray.config import Config, load_config
from prioritycut_ray.data.stream import Batch
from prioritycut_ray.errors import Preempted
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.training import trainer
from prioritycut_ray.training.worker import Worker, WorkerStatus
from tests.clip_sets import NO_CLIPS

CUDA = torch.device("cuda", 0)
LARGE = 4096
"""Number of elements from which the format of a tensor matters."""
SAMPLES = 17
"""Batch sizes are a multiple of it and layer sizes are not: this identifies activations."""

_PACKAGE = str(Path(prioritycut_ray.__file__).parent) + "/"
_TORCH = str(Path(torch.__file__).parent) + "/"
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"} | {
    "new_empty_strided", "lift_fresh", "_unsafe_view"
}  # fmt: skip
_COPIES = {"_to_copy", "copy_", "copy", "_foreach_copy_"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_DATA_DEPENDENT = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "equal"}
"""Operations on a GPU after which the host reads the result or its size."""


_STAND_INS: dict[str, Callable[..., Any]] = {
    "cudnn_grid_sampler": lambda image, grid: torch.ops.aten.grid_sampler_2d(
        image, grid, 0, 0, True
    ),
    "cudnn_grid_sampler_backward": lambda image, grid, gradient: (
        torch.ops.aten.grid_sampler_2d_backward(gradient, image, grid, 0, 0, True, [True, True])
    ),
}
"""For operations of cuDNN without a fake form: others whose results have the same shapes."""


class MixedDevicesError(RuntimeError):
    """An operation that a real GPU would refuse."""


class Place(NamedTuple):
    """A line of the project that is running, or whose backward pass is.

    Attributes:
        file: below the package.
        line: in the file.
        function: its qualified name.
        backward: whether its gradient is being computed.
    """

    file: str
    line: int
    function: str
    backward: bool = False

    def named(self) -> str:
        """File and function only, the same for comprehensions in the function."""
        return f"{self.file} {self.function.split('.<locals>')[0]}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}{' (backward)' * self.backward}"


_GRADIENTS = Place("gradients of parameters", 0, "")


class Activation(NamedTuple):
    """A large tensor with one row per sample, or the gradient of one."""

    place: Place
    operation: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.place}: {self.operation} {list(self.shape)}"


@dataclass
class Seen:
    """The recorded operations, transfers and waits.

    Attributes:
        operations: kernels launched, by (phase, operation, place).
        waits: where the host waited for the GPU, once for every wait.
        uploads: copies from the host to the GPU.
        blocking: those of them that stop the host: from pageable memory, or not ``non_blocking``.
        float32: large activations in float32.
        planes: activations that go through a convolution and are not channels last.
        convolutions: how many there were, forward and backward.
        peak: most bytes of memory in use at a time.
    """

    operations: Counter[tuple[str, str, Place]] = field(default_factory=Counter)
    waits: list[Place] = field(default_factory=list)
    uploads: list[Place] = field(default_factory=list)
    blocking: list[Place] = field(default_factory=list)
    float32: list[Activation] = field(default_factory=list)
    planes: list[Activation] = field(default_factory=list)
    convolutions: int = 0
    peak: int = 0

    def count(self) -> int:
        """The number of operations."""
        return self.operations.total()

    def by_phase(self) -> Counter[str]:
        """Operations in each phase of the step."""
        return _summed((phase, count) for (phase, _, _), count in self.operations.items())

    def by_name(self) -> Counter[str]:
        """How often each operation ran."""
        return _summed((name, count) for (_, name, _), count in self.operations.items())

    def by_place(self) -> Counter[str]:
        """Operations by the place in the project that caused them, backward passes included."""
        return _summed((str(place), count) for (_, _, place), count in self.operations.items())

    def complaints(
        self, *, may_be_float32: Callable[[Activation], bool] | None = None
    ) -> list[str]:
        """The problems of a step, one line for each kind and place.

        Args:
            may_be_float32: whether a large activation needs no bfloat16; none does if it is None.
        """
        found = []
        if len(self.waits) > 1:
            found += [f"the host waits: {place}" for place in self.waits]
        found += [f"the host stops for a copy: {place}" for place in self.blocking]
        found += [f"not channels last: {activation}" for activation in self.planes]
        if may_be_float32 is not None:
            found += [
                f"float32: {activation}"
                for activation in self.float32
                if not may_be_float32(activation)
            ]
        return [line + (f" ({n} times)" if n > 1 else "") for line, n in Counter(found).items()]


def _summed(items: Iterable[tuple[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for key, count in items:
        total[key] += count
    return total


class FakeGpu(TorchDispatchMode):
    """Records every operation below autograd and autocast; runs CPU operations, fakes the others.

    Attributes:
        seen: since the last :meth:`restart`.
        phase: under which operations are counted.
        answer: writes what the host reads of a tensor on the GPU into a tensor of its shape. Unless
            it is set, random numbers from (0, 1), 1 and True.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Seen()
        self.phase = ""
        self.answer: Callable[[Tensor], object] | None = None
        self.engine = _Engine()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._generator = torch.Generator().manual_seed(0)
        self._pinned: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._live = 0

    def restart(self) -> Seen:
        """Restart the count; return the previous record."""
        before, self.seen = self.seen, Seen(peak=self._live)
        return before

    def wait(self) -> None:
        """Record that the host waits for the GPU here."""
        self.seen.waits.append(self.place())

    def place(self) -> Place:
        """The line of the project that is running, or whose backward pass is."""
        # With gradients on, a backward pass recomputes activations that were not kept.
        if self.engine.place and not torch.is_grad_enabled():
            return self.engine.place._replace(backward=True)
        place = _running_place()
        self.engine.note(place)
        return place

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and _is_composite(func):
            with self:  # Elsewhere autograd has decomposed it.
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(_on_gpu(tensor) for tensor in given):
            device = kwargs.get("device")
            if device is None or torch.device(device).type != "cuda":
                return self._on_the_host(func, name, args, kwargs)
        self._check_devices(func, name, args, given)
        if name == "_local_scalar_dense":
            self.wait()
            return self._made_up(given[0].detach()).item()
        if name in _DATA_DEPENDENT:
            self.wait()
        with self._fake:
            run = _in_float16 if name.startswith("convolution") else _as_it_is
            out = run(_STAND_INS.get(name, func), args, kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in ("copy_", "_to_copy"):
            source, target = (given[1], given[0]) if name == "copy_" else (given[0], results[0])
            self._transfer(source, target, bool(kwargs.get("non_blocking") or True in args[2:]))
            if name == "copy_" and not _on_gpu(target):
                return target.copy_(self._made_up(source))
        elif name in _INDEXING:
            for index in given[1:]:
                self._transfer(index, given[0], False)
        place = self.place()
        launched = not func.is_view and name not in _ALLOCATIONS
        if launched and any(_on_gpu(tensor) for tensor in (*given, *results)):
            self.seen.operations[self.phase, name, place] += 1
            self._look(name, place, given, results)
        for tensor in results:
            self._track(tensor)
        return tree_map_only(FakeTensor, lambda x: x if _on_gpu(x) else self._made_up(x), out)

    def _on_the_host(
        self, func: OpOverload[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a CPU operation, except for pinned memory, which needs a driver."""
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        pin = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        return self._pin(out) if pin else out

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _check_devices(
        self, func: OpOverload[..., Any], name: str, args: tuple[Any, ...], given: list[Tensor]
    ) -> None:
        """Check devices as CUDA does: only pointwise operations take CPU scalars."""
        if name in _COPIES:
            return
        pointwise = torch.Tag.pointwise in func.tags or name == "where"
        if name in _INDEXING:  # Indices may be on any device.
            given = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor)]
            pointwise = _on_gpu(args[0])
        strangers = [tensor for tensor in given if not _on_gpu(tensor)]
        scalars = all(tensor.dim() == 0 for tensor in strangers)
        if strangers and not (pointwise and scalars):
            shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in given]
            raise MixedDevicesError(f"{name} of tensors on several devices: {shapes[:8]}")

    def _transfer(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if _on_gpu(source) == _on_gpu(target):
            return
        if _on_gpu(source):
            if not (non_blocking and self._is_pinned(target)):
                self.wait()
            return
        place = self.place()
        self.seen.uploads.append(place)
        if not (non_blocking and self._is_pinned(source)):
            self.seen.blocking.append(place)

    def _look(self, name: str, place: Place, given: list[Tensor], results: list[Tensor]) -> None:
        """Check the formats and layouts of an operation."""
        self.seen.float32 += [
            Activation(place, name, tuple(tensor.shape))
            for tensor in results
            if tensor.dtype == torch.float32 and _is_large_activation(tensor)
        ]
        if name.startswith("convolution"):
            self.seen.convolutions += 1
            self.seen.planes += [
                Activation(place, name, tuple(tensor.shape))
                for tensor in (*given, *results)
                if _is_large_activation(tensor) and not _channels_last(tensor)
            ]

    def _made_up(self, like: Tensor) -> Tensor:
        """Made-up numbers on the CPU for a tensor of the GPU."""
        out = torch.empty(like.shape, dtype=like.dtype)
        if self.answer is not None:
            self.answer(out)
        elif out.is_floating_point():
            out.uniform_(generator=self._generator)
        else:
            out.fill_(1)
        return out

    def _track(self, tensor: Tensor) -> None:
        if not _on_gpu(tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self._live += size
        self.seen.peak = max(self.seen.peak, self._live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)


Hook = Callable[[Tensor], Tensor | None]


class _Engine:
    """Backward passes in place of torch's own engine, which asks the driver for its devices.

    Nodes run in the same order: the highest sequence number first, gradients of parameters at once.

    Attributes:
        place: whose gradient is being computed, None outside of a backward pass.
    """

    def __init__(self) -> None:
        self.place: Place | None = None
        self._passes = 0
        self._places: dict[int, Place] = {}
        self._hooks: defaultdict[tuple[Any, int], list[Hook]] = defaultdict(list)

    def running(self) -> int:
        """The number of the running backward pass, or -1; replaces torch's own."""
        return -1 if self.place is None else self._passes

    def note(self, place: Place) -> None:
        """Record where the newest node of the graph was created."""
        self._places.setdefault(torch._C._autograd._get_sequence_nr() - 1, place)

    def register_hook(self, tensor: Tensor, hook: Hook) -> None:
        """Replaces ``Tensor.register_hook``, without the handle."""
        self._hooks[tensor.grad_fn, tensor.output_nr].append(hook)

    def backward(self, root: Tensor, *_: object, **__: object) -> None:
        """Replaces ``torch.autograd.backward``, for one scalar."""
        self._passes += 1
        missing = _uses(root.grad_fn)
        gradients: defaultdict[Any, dict[int, Tensor | None]] = defaultdict(dict)
        gradients[root.grad_fn][root.output_nr] = torch.ones_like(root)
        ready = [_ranked(root.grad_fn)]
        with torch.no_grad():
            while ready:
                node = heapq.heappop(ready)[-1]
                self.place = self._places.get(node._sequence_nr(), _GRADIENTS)
                given = {
                    slot: self._hooked(node, slot, gradient)
                    for slot, gradient in gradients.pop(node).items()
                }
                for (after, slot), gradient in zip(
                    node.next_functions, _run(node, given), strict=False
                ):
                    if after is None:
                        continue
                    gradients[after][slot] = _sum(
                        gradients[after].get(slot), _fitted(gradient, after, slot)
                    )
                    missing[after] -= 1
                    if missing[after] == 0:
                        heapq.heappush(ready, _ranked(after))
        self.place = None
        self._hooks.clear()
        self._places.clear()

    def _hooked(self, node: Any, slot: int, gradient: Tensor | None) -> Tensor | None:
        for hook in self._hooks.pop((node, slot), []):
            if gradient is not None:
                changed = hook(gradient)
                gradient = gradient if changed is None else changed
        return gradient


def _uses(root: Any) -> Counter[Any]:
    """The number of gradients that each node of a graph waits for."""
    uses: Counter[Any] = Counter()
    seen, todo = {root}, [root]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
    return uses


def _ranked(node: Any) -> tuple[int, int, Any]:
    return -node._sequence_nr(), id(node), node


def _run(node: Any, given: dict[int, Tensor | None]) -> Sequence[Tensor | None]:
    if all(gradient is None for gradient in given.values()):
        return [None] * len(node.next_functions)
    gradients = [given.get(slot) for slot in range(len(node._input_metadata))]
    python = isinstance(node, torch.autograd.function.BackwardCFunction)
    out = node.apply(*gradients) if python else node(*gradients)
    return out if isinstance(out, tuple | list) else [out]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _fitted(gradient: Tensor | None, node: Any, slot: int) -> Tensor | None:
    """Convert a gradient as torch's engine does before it passes it on."""
    if gradient is None:
        return None
    wanted = node._input_metadata[slot]
    if gradient.device != wanted.device:
        raise MixedDevicesError(f"the gradient for {node.name()} is on {gradient.device}")
    if gradient.shape != wanted.shape:
        gradient = gradient.sum_to_size(tuple(wanted.shape))
    return gradient.to(wanted.dtype)


def _as_it_is(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _in_float16(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Use float16 in place of bfloat16, for which torch queries the hardware."""
    bfloat16, float16 = torch.bfloat16, torch.float16
    if all(leaf.dtype != bfloat16 for leaf in tree_leaves(args) if isinstance(leaf, Tensor)):
        return func(*args, **kwargs)
    args = tree_map_only(Tensor, lambda x: x.to(float16) if x.dtype == bfloat16 else x, args)
    return tree_map_only(Tensor, lambda x: x.to(bfloat16), func(*args, **kwargs))


def _is_composite(func: OpOverload[..., Any]) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _is_large_activation(tensor: Tensor) -> bool:
    return _on_gpu(tensor) and tensor.numel() >= LARGE and tensor.numel() % SAMPLES == 0


def _channels_last(tensor: Tensor) -> bool:
    """Also true for a slice of channels, such as the gradient of a concatenation."""
    return tensor.stride(1) == 1 or tensor.shape[1] == 1


def _running_place() -> Place:
    """The innermost frame of the project, or else of the caller of torch."""
    frame: FrameType | None = sys._getframe(1)
    outside = Place("", 0, "")
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGE):
            file = code.co_filename.removeprefix(_PACKAGE)
            return Place(file, frame.f_lineno, code.co_qualname)
        if not outside.file and not code.co_filename.startswith((_TORCH, __file__)):
            outside = Place(code.co_filename, frame.f_lineno, code.co_qualname)
        frame = frame.f_back
    return outside


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replaces ``Module._apply``, which cannot put a fake parameter in place of a real one."""
    for child in self.children():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = fn(parameter)
            self._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


@contextmanager
def fake_cuda() -> Iterator[FakeGpu]:
    """Make torch see one GPU."""
    gpu = FakeGpu()
    replacements: tuple[tuple[object, str, object], ...] = (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_initialized", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "synchronize", lambda device=None: gpu.wait()),
        (torch.autograd, "backward", gpu.engine.backward),
        (torch._C, "_current_graph_task_id", gpu.engine.running),
        (torch.Tensor, "register_hook", lambda x, hook: gpu.engine.register_hook(x, hook)),
        (nn.Module, "_apply", _apply),
        (fake_tensor, "init_gpu_context", lambda device: None),
        # Used by copy.deepcopy, which then clones.
        (FakeTensor, "data_ptr", lambda self: 0),
        (FakeTensor, "tolist", lambda self: self.cpu().tolist()),
        # Device guards do nothing, and torch.tensor(..., device=...) is created on the CPU first.
        (FakeTensorMode, "avoid_device_init", True),
    )
    lifts = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(patch.object(owner, name, value))
        exactly_the_same = torch.are_deterministic_algorithms_enabled()
        stack.callback(torch.use_deterministic_algorithms, exactly_the_same)
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        torch._C._set_only_lift_cpu_tensors(True)
        torch._C._ensureCUDADeviceGuardSet()
        stack.enter_context(gpu)
        yield gpu


class _Phases(WorkerStatus):
    """Splits the record at the ends of steps and of their phases."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu
        self.seen: list[Seen] = []

    def mark(self, step: int, phase: str) -> None:
        super().mark(step, phase)
        self._gpu.phase = phase
        if phase == "waiting for data":
            self.seen.append(self._gpu.restart())


def frames(config: Config, *, start: int) -> Iterator[FramePair]:
    """The remaining batches of a run, as from a loader that pins its memory."""
    shape = (config.train.batch_size, config.data.size, config.data.size, 3)
    for _ in range(start, config.train.samples, config.train.batch_size):
        source, driving = (
            torch.zeros(shape, dtype=torch.uint8, pin_memory=True).permute(0, 3, 1, 2)
            for _ in range(2)
        )
        batch = Batch(source, driving, torch.arange(config.train.batch_size))
        yield trainer.prepare(batch, config, CUDA)


def train(gpu: FakeGpu, config: Config, steps: int, **options: Any) -> list[Seen]:
    """Run some steps of the project's own training loop.

    Args:
        gpu: the fake GPU to train on.
        config: the configuration of the run.
        steps: number of steps, after which the data end.
        options: for :func:`prioritycut_ray.training.trainer.train`.

    Returns:
        The record before the first step, followed by that of each step.
    """
    phases = _Phases(gpu)
    given: dict[str, Any] = {
        "worker": Worker(0, 1, CUDA),
        "writer": None,
        "checkpoint": None,
        "report": lambda scalars, state: None,
        "status": phases,
    }

    def pairs(*_: object, start: int) -> Iterator[FramePair]:
        return islice(frames(config, start=start), steps)

    with patch.object(trainer, "training_pairs", pairs), suppress(Preempted):
        trainer.train(config, NO_CLIPS, **(given | options))
    return phases.seen


def main(name: str, words: Sequence[str]) -> None:
    """Print the operations, transfers and waits of the second step of a run."""
    config = load_config(
        name, ["train.workers=1", "train.log_every=1000000", "train.samples=1000000", *words]
    )
    with fake_cuda() as gpu:
        seen = train(gpu, config, steps=2)[2]
    print(f"{seen.count()} operations: {dict(seen.by_phase())}; {seen.convolutions} convolutions")
    print(f"peak memory: {seen.peak / 1e9:.2f} GB")
    for title, counts in (
        ("operations by name", seen.by_name()),
        ("operations by place", seen.by_place()),
        ("waits", Counter(map(str, seen.waits))),
        ("uploads that block", Counter(map(str, seen.blocking))),
        ("uploads", Counter(map(str, seen.uploads))),
        ("convolutions that are not channels last", Counter(map(str, seen.planes))),
        ("large activations in float32", Counter(map(str, seen.float32))),
    ):
        print(f"\n{title}: {counts.total()}")
        for text, count in counts.most_common(40):
            print(f"{count:6} {text}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
