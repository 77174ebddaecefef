"""Sums over the cards that share a model's layers, inside the one launch: pushed to each other, added in one order.

Output and down are split along their rows, so that each card has a part of every sum. The block that has a part on one
card has the others' counterpart on theirs, for all plan alike: a thread writes its part into every card's inbox, waits
for all cards' parts of its result in its own and adds them in the cards' order. All cards get the same bits, and blocks
meet within their own card only, as with one card.

A word of an inbox is 64 bits, a float32 and the number of the reduction, written and read whole: who finds the number
has the value, without fences. An inbox starts as zeros; the launch waits for all cards before it runs on any (Mosaic
GPU's barrier), and no card leaves before it has read all that was written to it. Reductions use two places in turn: a
card writes the next but one only after it has read all parts of the next, which a peer writes after its blocks have met
and thus read all of this one.
"""

from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.group import PLACES
from pallas_kernels.decode_step.plan import STRIP, Matrix, Plan
from pallas_kernels.kv_attention import warp as w


class Exchange:
    """One reduction of a layer, for one thread.

    `pointers` hold "inbox", "rank" (this card's number in the group) and "inbox_of" (emits a card's inbox address).
    """

    def __init__(self, plan: Plan, pointers, matrix: Matrix, block, layer):
        self.plan, self.pointers, self.matrix = plan, pointers, matrix
        self.place = ("output", "down").index(matrix.name)
        self.number = w.iadd(w.imul(layer, PLACES), self.place + 1)
        # Columns that the last block shares with the one before are the latter's.
        self.first_own = w.imul(block, matrix.block_strips * STRIP)
        self.peers = [pointers["inbox_of"](card) for card in range(plan.cards)]

    def _word(self, pointer, card, row, column):
        plan = self.plan
        line = w.iadd(w.imul(w.iadd(card, self.place * plan.cards), plan.batch), row)
        return w.element(pointer, w.iadd(w.imul(line, plan.hidden), column), 8)

    def push(self, exists, row, column, value):
        """Hands this card's part to all."""

        def write():
            for peer in self.peers:
                d.push(self._word(peer, self.pointers["rank"], row, column), value, self.number)

        w.when(w.both(exists, self._own(column)), write)

    def total(self, exists, row, column, store):
        """`store(sum)` of all cards' parts."""

        def read():
            total = None
            for card in range(self.plan.cards):
                part = d.await_pushed(self._word(self.pointers["inbox"], w.i32(card), row, column), self.number)
                total = part if total is None else w.add(total, part)
            store(total)

        w.when(w.both(exists, self._own(column)), read)

    def _own(self, column):
        return w.less(w.iadd(self.first_own, -1), column)
