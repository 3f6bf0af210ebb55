"""The table of instructions: opcode -> how it is decoded, from the files of the groups."""

from __future__ import annotations

from . import arithmetic, bits, exchange, products, transfers
from .decoding import Action, Modifiers, Table
from .lanes import Lanes
from .parser import Fault, Instruction

TABLE: Table = {**arithmetic.TABLE, **bits.TABLE, **transfers.TABLE, **products.TABLE, **exchange.TABLE}


def decode(instruction: Instruction, lanes: Lanes) -> Action:
    """The function that runs ``instruction`` for ``lanes``.

    Raises:
        Fault: an opcode, modifier, type or operand is not known; the message names the instruction.
    """
    if instruction.opcode not in TABLE:
        raise Fault(f"unknown instruction {instruction}")
    modifiers = Modifiers(instruction)
    try:
        action = TABLE[instruction.opcode](instruction, modifiers, lanes)
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise Fault(f"cannot read {instruction}: {error!r}") from error
    except Fault as fault:
        raise fault if instruction.text in str(fault) else Fault(f"{fault}: {instruction}") from None
    modifiers.done()
    return action
