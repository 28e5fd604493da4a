"""Reads SASS, NVIDIA's machine code: the loops that hold matrix products, and what else is in them.

A loop is the code from a target of a backward branch to the branch. Only loops that hold products, and no other such loop,
count.
"""

import re

INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)*`?\(?.*?0x([0-9a-f]+)")
HGMMA = re.compile(r"\bHGMMA\.64x(\d+)x16")
HMMA_16816_PRODUCTS = 16 * 8 * 16  # multiplications of one warp's instruction


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of each instruction of a dump by cuobjdump -sass."""
    found = (INSTRUCTION.match(line) for line in sass.splitlines())
    return [(int(m[1], 16), m[2].strip()) for m in found if m]


def innermost_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The texts of the instructions of each loop that holds products and no other loop that does."""
    spans = set()
    for address, text in code:
        branch = BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            spans.add((int(branch[1], 16), address))
    products = [address for address, text in code if "HGMMA" in text or "HMMA" in text]
    spans = {s for s in spans if any(s[0] <= address <= s[1] for address in products)}
    # Code that a loop seldom needs stands behind it and branches back into it.
    spans = {s for s in spans if not any(o[0] < s[0] <= o[1] < s[1] for o in spans)}
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[text for address, text in code if start <= address <= end] for start, end in sorted(inner)]


def multiplications(loop: list[str], warps: int) -> int:
    """Those of the matrix instructions of one pass through the loop, over all warps of a block."""
    hgmma = sum(64 * int(m[1]) * 16 for text in loop if (m := HGMMA.search(text)))
    hmma = sum("HMMA.16816" in text for text in loop)
    return hgmma * (warps // 4) + hmma * HMMA_16816_PRODUCTS * warps


def matrix_loops(sass: str, warps: int) -> list[dict[str, int]]:
    """For each innermost loop with matrix products: their multiplications, and the accesses to local memory (spills)."""
    found = []
    for loop in innermost_loops(instructions(sass)):
        amount = multiplications(loop, warps)
        if amount:
            local = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in loop)
            found.append({"multiplications": amount, "local": local, "instructions": len(loop)})
    return found


def count(sass: str, opcode: str) -> int:
    return len(re.findall(rf"\b{re.escape(opcode)}\b", sass))
