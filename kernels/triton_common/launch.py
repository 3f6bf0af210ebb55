"""Registering the ops of the Triton backend, and launching their kernels.

An op is one typed function. The last of its parameters is the options of a call, a ``NamedTuple`` of numbers, flags and
rows of the tables of functions: torch's registry knows only scalars, so the fields become arguments of the
schema, and a row is its ``code`` on the other side. A kernel takes its arguments by name from one mapping
(:class:`~.cached_launcher.CachedKernel`). So a new argument of a kernel is a parameter of the kernel and one entry: a
field of the options, or a key of the mapping.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, reduce
from operator import or_
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from ..activations import Activation
from ..float32_precision import tf32_allowed
from ..inputs import PLAIN
from ..optional_triton import interpreted, triton
from ..routing import Routing, inner_product_image_gradient
from ..tracing import transformed
from .cached_launcher import CachedKernel, Plan
from .tiles import DECODE_ROWS, Tile, arch_of, column_splits, has_tf32, precision_of, tiles_for_call
from .visual_tokens import Visual, rows_of_one_image

DEVICE_KEYS = ("CPU", "CUDA", "XPU")
NO_CODE = -1  # of a function without a branch in the kernels, which compile none then
MIN_ROWS = 16  # of the smallest block
FEW_ROWS = 64  # per processor: with fewer some have nothing to do, whatever the tile

_logger = logging.getLogger(__name__)
_library = torch.library.Library("routingvl", "FRAGMENT")
interpreter_lock = threading.RLock()  # Triton's interpreter patches its language's module while a kernel runs
# By kernel and tiles: the first that the device could launch, where that is not the first of them.
_first_fit: dict[tuple[str, tuple[Tile, ...]], int] = {}
_not_compiled: dict[str, str] = {}  # kernel -> what its compiler said
_said: set[str] = set()

_PLAIN = frozenset(PLAIN)
MAX_LAUNCHES = 256  # kept for one options object

Result = TypeVar("Result")
Options = TypeVar("Options", bound=tuple)
Part = tuple[Sequence[int], torch.dtype]
# Of a launch: grid, arguments, and shapes and dtypes of tensors that are made for it.
Prepared = tuple[tuple[int, ...], Mapping[str, Any], Mapping[str, Part]]


class NoTileFitsError(RuntimeError):
    """No tile of a kernel fits the device, or it does not compile; nothing was launched or written."""


def remembering(options: Options) -> Options:
    """The same options, for calls that are alike in every shape, dtype and device: ops keep launches on them.

    An op that is called with such options is run at once and not through torch's registry, unless something looks at
    what torch runs or changes it.
    """
    kind = _with_room(type(options))
    kept = kind._make(options)
    kept.lowered = kind._make(NO_CODE if x is None else x for x in (getattr(x, "code", x) for x in options))
    kept.lowered.launches = {}
    return kept


def is_planned(options: tuple) -> bool:
    """Whether they come from :func:`remembering`: the call was one of plain tensors that nothing transformed."""
    return hasattr(options, "lowered")


@cache
def _with_room(kind: type) -> type:
    """The class of options, whose objects can have attributes."""
    return type(kind.__name__, (kind,), {})


def observed() -> bool:
    """Whether something looks at what torch runs, or changes it: a compiler, a transformation, a mode, a profiler."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled() or transformed()


def define_op(fake: Callable[..., Any], *, mutates: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Register the decorated function as an op ``routingvl::name``; in its place stands a call that lowers the options.

    Registered ops are what torch.compile, autocast, activation checkpointing and the interpreter agree on. They stand
    below autograd: only an autograd function may call them on tensors that need gradients. The schema is inferred from
    the annotations. ``torch.library.custom_op`` does all of this too, but a call takes several times as long on the
    host: 55 against 6 microseconds for an op that writes one tensor in place (torch 2.13, one thread).

    Args:
        fake: shapes and dtypes of the results, for tracing; takes the same arguments.
        mutates: parameters that are written in place.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(run, eval_str=True)
        *plain, last = signature.parameters.values()
        types = get_type_hints(last.annotation)
        rows = [index for index, kind in enumerate(types.values()) if kind in (Routing, Activation)]
        kinds = [int if kind in (Routing, Activation) else kind for kind in types.values()]
        fields = [last.replace(name=name, annotation=kind) for name, kind in zip(types, kinds, strict=True)]

        def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: function(*args[: len(plain)], last.annotation(*args[len(plain) :]))

        def prototype() -> None:
            """Only its signature is read."""

        prototype.__signature__ = signature.replace(parameters=[*plain, *fields])
        _library.define(run.__name__ + torch.library.infer_schema(prototype, mutates_args=mutates))
        for key in DEVICE_KEYS:
            _library.impl(run.__name__, with_options(run), key)
        torch.library.register_fake(f"routingvl::{run.__name__}", with_options(fake), lib=_library)
        op = getattr(torch.ops.routingvl, run.__name__).default

        def call(*args: Any) -> Any:
            lowered = getattr(args[-1], "lowered", None)
            if lowered is not None and not observed():
                return run(*args[:-1], lowered)
            *others, options = args
            scalars = list(options)
            for index in rows:
                code = scalars[index].code
                scalars[index] = NO_CODE if code is None else code
            return op(*others, *scalars)

        call.op = op
        return call

    return register


def launch(kind: str, tiles: tuple[Tile, ...], attempt: Callable[[Tile], Result]) -> Result:
    """``attempt(tile)`` with the first tile whose resources the device has; it must launch its kernel first of all.

    Raises:
        NoTileFitsError: none of them; in later calls without another attempt. :func:`unfit_kernels` remembers it, and
            the reason that :func:`routingvl.kernels.select_backend` gives says so from then on.
    """
    if interpreted():
        with interpreter_lock:
            return attempt(tiles[0])
    start = _first_fit.get((kind, tiles), 0) if _first_fit else 0  # hashing tiles takes its time
    for index in range(start, len(tiles)):
        try:
            result = attempt(tiles[index])
        except triton.OutOfResources as error:
            _logger.warning("%s does not fit this device with %s (%s): trying less", kind, tiles[index], error)
            continue
        except (triton.TritonError, RuntimeError) as error:
            if not _of_compiler(error):
                raise
            _not_compiled[kind] = " ".join(str(error).split())[-200:]
            break  # another tile of the same code would fail as well, after as long a wait
        if index > start:
            _first_fit[kind, tiles] = index
        return result
    _first_fit[kind, tiles] = len(tiles)
    raise NoTileFitsError(unfit_message(kind))


def _of_compiler(error: Exception) -> bool:
    """Whether Triton could not compile a kernel; its passes over the code report that as a plain RuntimeError."""
    return not isinstance(error, RuntimeError) or "PassManager" in str(error)


def unfit_kernels() -> tuple[str, ...]:
    """Kernels of which a launch in this process found that no tile fits the device, in alphabetical order."""
    return tuple(sorted({kind for (kind, tiles), first in _first_fit.items() if first == len(tiles)}))


def unfit_message(kind: str) -> str:
    """What it means that no tile of this kernel fits, and what to do."""
    found = f"no tile of {kind} fits this device"
    if kind in _not_compiled:
        found = f"{kind} does not compile for this device ({_not_compiled[kind]})"
    if kind.endswith("_forward"):
        return f"{found}: set ROUTINGVL_BACKEND=eager"
    return (
        f"{found}, so there are no gradients: set ROUTINGVL_BACKEND=eager or pass backend='eager' (model.backend of a "
        "run), or take a smaller rank, and run again"
    )


def eager_instead(error: NoTileFitsError) -> None:
    """Say, once for each kernel, that a forward pass is computed eagerly after all."""
    if str(error) not in _said:
        _said.add(str(error))
        _logger.warning("%s; computed eagerly until then", error)


def contiguous_rows(x: Tensor) -> Tensor:
    """x [..., K] as rows [M, K] with K contiguous: a view wherever strides allow, else one copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where programs run one after another."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 64


def fitting_tiles(kind: str, width: int, x: Tensor, **call: bool) -> tuple[Tile, ...]:
    """Tiles for a kernel on x [M, K] with a low-rank activation of this width, best first.

    ``call`` holds what else :func:`~.tiles.tiles_for_call` wants to know of the call.
    """
    arch = arch_of(x.device)
    rows, many = x.shape[0], processors(x.device)
    options = {"few": rows < FEW_ROWS * many, "one_wave": rows <= MIN_ROWS * many, **call}
    return tiles_for_call(kind, width, precision_of(x.dtype, arch), x.shape[0] <= DECODE_ROWS, arch, **options)


def sum_of_blocks(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """What the programs of each image wrote separately [B, programs, n], added up: [B, n]; or that, of one program."""
    found = blocks if blocks.dim() == 2 else blocks.sum(1)
    return found if found.dtype == dtype else found.to(dtype)


def tf32_matters(x: Tensor) -> bool:
    """Whether products of x may be rounded to tf32, which may change from a forward to its backward pass."""
    return x.dtype == torch.float32 and tf32_allowed()


def product_precision(x: Tensor) -> str:
    """How tl.dot multiplies float32: as precisely as x needs, in a form that the device has."""
    arch = arch_of(x.device)
    precision = precision_of(x.dtype, arch)
    if precision == "half":
        return "tf32" if has_tf32(arch) else "ieee"
    return precision


def _is_current(device: torch.device) -> bool:
    """Whether it is the current one, or one of which there is only one."""
    return device.index is None or device.type == "cpu" or device.index == getattr(torch, device.type).current_device()


def on_gpu_of(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which the GPU of x is the current one."""
    return nullcontext() if _is_current(x.device) else getattr(torch, x.device.type).device(x.device)


def launch_kernel(
    kernel: CachedKernel,
    width: int,
    key: tuple[Hashable, ...],
    options: tuple,
    pointers: Mapping[str, Tensor],
    prepare: Callable[[Tile], Prepared],
    *,
    rows: Tensor,
    tiles_of: str = "",
    **traits: bool,
) -> Mapping[str, Tensor]:
    """Launch a kernel for an op on the GPU of its tensors; equal calls are prepared once.

    Args:
        kernel: which one.
        width: components of the low-rank activation.
        key: the kind of the kernel, and what decides what ``prepare`` gives: strides, numbers, flags. The shapes and
            dtypes of tensors need not be in it, because they are the same in all calls with one ``options`` object.
        options: of the op.
        pointers: tensors by the kernel's names for them.
        prepare: for a tile the grid, the arguments that are neither tensors nor the tile's, and shape and dtype
            of further tensors by name, which the kernel writes; they take the place of the pointers of that name.
        rows: [M, K], of which tiles are chosen; M > 0.
        tiles_of: kind of the tiles, if another one.
        traits: what else :func:`~.tiles.tiles_for_call` wants to know.

    Returns:
        Those further tensors.
    """
    launches = getattr(options, "launches", None)
    plan = None if launches is None else launches.get(key)
    if plan is not None and _can_be_planned(pointers.values()) and _is_current(rows.device):
        parts = plan.parts and _new_parts(rows, plan.parts)
        if kernel.follow(plan, {**pointers, **parts} if parts else pointers):
            return parts

    def attempt(tile: Tile) -> tuple[Mapping[str, Tensor], Plan | None]:
        grid, arguments, shapes = prepare(tile)
        parts = _new_parts(rows, shapes)
        return parts, kernel(grid, {**vars(tile), **arguments, **pointers, **parts}, shapes)

    kind = key[0]
    with on_gpu_of(rows):
        parts, plan = launch(kind, fitting_tiles(tiles_of or kind, width, rows, **traits), attempt)
    if plan is not None and launches is not None and _can_be_planned(pointers.values()):
        if len(launches) >= MAX_LAUNCHES:
            launches.clear()
        launches[key] = plan
    return parts


def launch_again(
    kernel: CachedKernel, key: tuple[Hashable, ...], options: tuple, pointers: Mapping[str, Tensor], rows: Tensor
) -> Mapping[str, Tensor] | None:
    """Make the launch that :func:`launch_kernel` keeps for this key, and return the further tensors as it does; None,
    and nothing is done, where there is no such launch, or something looks on.

    ``options`` are those of a planned call, not yet lowered. The tensors are plain ones and :func:`aligned`.
    """
    plan = options.lowered.launches.get(key)
    if plan is None or observed() or not _is_current(rows.device):
        return None
    parts = plan.parts and _new_parts(rows, plan.parts)
    return parts if kernel.follow(plan, {**pointers, **parts} if parts else pointers) else None


def aligned(*tensors: Tensor) -> bool:
    """Whether all start at a multiple of 16 bytes, as memory that torch has just allocated does."""
    return not reduce(or_, map(Tensor.data_ptr, tensors)) & 15


def _can_be_planned(tensors: Collection[Tensor]) -> bool:
    return all_plain(tensors) and aligned(*tensors)


def all_plain(tensors: Collection[Tensor]) -> bool:
    """Whether none is of a subclass."""
    return _PLAIN.issuperset(map(type, tensors))


def _new_parts(like: Tensor, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    return {name: like.new_empty(shape, dtype=dtype) for name, (shape, dtype) in parts.items()}


def prepare_forward(x: Tensor, columns: int, tile: Tile, arguments: Mapping[str, Any], groups: int = 1) -> Prepared:
    """A forward kernel on rows x [M, K]; ``columns`` of the output are split among programs, for each of ``groups``."""
    rows, tokens, one_image = x.shape[0], arguments["tokens"], rows_of_one_image(arguments["visual"])
    span = tokens if one_image else rows
    tile = image_tile(tile, tokens, one_image)
    splits = groups * column_splits(tile, rows, columns, processors(x.device) // groups)
    grid = blocks_of(rows, span, tile.block_m), splits
    return grid, {**arguments, **vars(tile), "rows": rows, "span": span, "stride_xm": x.stride(0)}, {}


def prepare_backward(dy: Tensor, width: int, columns: int, tile: Tile, arguments: Mapping[str, Any]) -> Prepared:
    """Its backward kernel on rows dy [M, N]; ``columns`` of dx are split among programs.

    ``need_u`` among the arguments says whether the kernel writes ``p_du``, or ``p_dz`` in its place. Where several
    programs have rows of one image, they write to parts by those names instead, for :func:`image_gradient`.
    """
    rows, tokens, visual = dy.shape[0], arguments["tokens"], arguments["visual"]
    one_image, need_u = rows_of_one_image(visual), arguments["need_u"]
    tile = image_tile(tile, tokens, one_image)
    span = tokens if one_image else max(1, tile.block_m // tokens) * tokens
    blocks, several = blocks_of(rows, span, tile.block_m), need_u and span > tile.block_m
    parts: dict[str, Part] = {}
    if several and visual == Visual.ONE_TOKEN:
        parts["p_du"] = (rows // span, -(-span // tile.block_m), width), torch.float32
    elif several and visual == Visual.TOKENS:
        parts["p_dz"] = (rows, width), dy.dtype
    write_dz = need_u and (visual == Visual.GRAM or "p_dz" in parts)
    splits = column_splits(tile, blocks * tile.block_m, columns, processors(dy.device))
    arguments = {
        **arguments, **vars(tile), "rows": rows, "images": rows // tokens, "stride_dym": dy.stride(0), "span": span,
        "one_row": tokens == 1, "write_dz": write_dz,
        "write_du": need_u and not write_dz and visual != Visual.NO_IMAGE,
    }  # fmt: skip
    return (blocks, 1 if one_image or not arguments["write_dx"] else splits), arguments, parts


def image_gradient(parts: Mapping[str, Tensor], du: Tensor, t: Tensor, image: Tensor | None, relu: bool) -> Tensor:
    """du [B, L, R], which the backward kernel wrote, or made of the ``parts`` that it wrote instead."""
    if "p_du" in parts:
        return parts["p_du"].sum(1, keepdim=True).to(du.dtype)
    if "p_dz" in parts:
        shape = (image.shape[0], -1, image.shape[2])
        return inner_product_image_gradient(parts["p_dz"].view(shape), t.view(shape), image, relu)
    return du


def blocks_of(rows: int, span: int, block_m: int) -> int:
    """Programs that own ``rows`` when none crosses a multiple of ``span`` rows."""
    return -(-rows // span) * -(-span // block_m)


def image_tile(tile: Tile, tokens: int, one_image: bool) -> Tile:
    """A tile without more rows than an image has, if a program takes rows of one image only."""
    return replace(tile, block_m=min(tile.block_m, max(16, 1 << (tokens - 1).bit_length()))) if one_image else tile
