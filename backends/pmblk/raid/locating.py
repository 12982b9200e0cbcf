"""Which chunk of a RAID6 row lies, told by P and Q. Pure.

If one data chunk is wrong by X, the P that the data make differs from the stored one by X, and Q by
2**z * X, where z is the power of that chunk: the quotient of the two differences names it. If P is
wrong, only P differs; if Q is, only Q. Source: H. Peter Anvin, "The mathematics of RAID-6",
section 4, "Single-disk corruption recovery".
"""

import numpy as np

from pmblk.raid import galois
from pmblk.raid.layout import Stripe
from pmblk.raid.parity import Bytes


def _logarithms() -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    table = np.zeros(256, dtype=np.int64)
    for exponent in range(255):
        table[galois.power(exponent)] = exponent
    return table


_LOGARITHMS = _logarithms()


def liar(stripe: Stripe, p_difference: Bytes, q_difference: Bytes) -> int | None:
    """The slot whose bytes alone explain both differences; None: no single one does."""
    wrong = (p_difference != 0) | (q_difference != 0)
    assert wrong.any()
    p, q = p_difference[wrong], q_difference[wrong]
    if not q.any():
        return stripe.p
    if not p.any():
        return stripe.q
    if not (p.all() and q.all()):
        return None
    quotients = (_LOGARITHMS[q] - _LOGARITHMS[p]) % 255
    power = int(quotients[0])
    if power not in stripe.powers or (quotients != power).any():
        return None
    return stripe.data[stripe.powers.index(power)]
