"""What lanes and warps do together: shuffles, barriers, fences. Barriers of a whole block: see block.py."""

from __future__ import annotations

import numpy as np

from .decoding import Action, Modifiers, Table, for_all_lanes, operands
from .lanes import WARP, Lanes, Mask
from .parser import Fault, Instruction

LANE = np.arange(WARP)


def shuffle(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """shfl: each lane gets the value of another lane of its warp."""
    modifiers.need("sync")
    way = modifiers.need("bfly", "idx")
    modifiers.type("b32")
    target, source, which, clamp, members = operands(instruction, 5)
    if int(clamp, 0) != 31 or int(members, 0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise Fault(f"not among all lanes of a warp: {instruction}")
    read, lane, write = lanes.reader(source, "b32"), lanes.reader(which, "u32"), lanes.writer(target, "b32")

    def action(mask: Mask) -> None:
        wanted = lane().reshape(-1, WARP).astype(np.int64)
        if (wanted >= WARP).any():
            raise Fault(f"no such lane: {instruction}")
        origin = LANE ^ wanted if way == "bfly" else wanted
        write(np.take_along_axis(read().reshape(-1, WARP), origin, 1).reshape(-1), mask)

    return for_all_lanes(action, instruction)


def barrier(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """bar.warp.sync, which lanes that run in step need not wait for; bar.sync is the block's."""
    modifiers.need("warp")
    modifiers.need("sync")
    (members,) = operands(instruction, 1)
    if int(members, 0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise Fault(f"not among all lanes of a warp: {instruction}")
    return for_all_lanes(lambda mask: None, instruction)


def fence(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """fence.proxy.async: what was written to shared memory can be read by wgmma."""
    for name in ("proxy", "async", "shared::cta"):
        modifiers.need(name)
    return for_all_lanes(lambda mask: lanes.block.shared.fence(lanes.warps), instruction)


TABLE: Table = {"shfl": shuffle, "bar": barrier, "fence": fence}
