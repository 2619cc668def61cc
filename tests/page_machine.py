"""Pages for many rows, and beside them what each should hold, in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.slots import Slots
from kvjax.cache.tail import empty_tail
from kvjax.serve import pages as paged
from kvjax.serve.pages import Shape

ROWS, LAYERS, HEADS, WIDTH, PAGES, PAGE, DIM = SHAPE = 4, 2, 2, 6, 30, 4, 4
# Slots of a prompt's pool, and of the tail.
PROMPT, TAIL = 24, 3


def empty(parts=1):
    pages = paged.empty_pages(Shape(*SHAPE[:-1]), DIM, jnp.float32, parts=parts)
    return pages, empty_tail(pages.slots, TAIL).replace(cursor=jnp.zeros((ROWS,), jnp.int32))


def shuffled(x, axis, parts):
    """Slots in order as `parts` devices have them."""
    split = x.reshape(*x.shape[:axis], -1, parts, *x.shape[axis + 1 :])
    return split.swapaxes(axis, axis + 1).reshape(x.shape)


class Machine:
    """Pages, and beside them what each row and context should hold, layer by layer."""

    def __init__(self, seed, parts=1):
        self.rng = np.random.default_rng(seed)
        self.parts = parts
        self.pages, self.tail = empty(parts)
        self.rows: dict[int, list[dict]] = {}
        self.room: dict[int, int] = {}
        self.contexts: list[tuple] = []
        self.swapped: list[tuple] = []
        self.next = 0

    # ------------------------------------------------------------------ what may happen
    def prompt(self):
        """Random entries of every head, in slots as a compressed prompt has them."""
        arrays = (
            np.full((1, PROMPT, 2 * DIM), np.nan, np.float32),
            np.full((1, PROMPT), -1, np.int8),
            np.full((1, PROMPT), -1, np.int32),
        )
        entries, owners, positions = arrays
        counts = self.rng.integers(0, 6, (1, LAYERS, HEADS)).astype(np.int32)
        held, start = [], 0
        for layer in range(LAYERS):
            mine = {}
            for head, count in enumerate(counts[0, layer]):
                for _ in range(count):
                    at = start + len(mine)
                    value = np.full(2 * DIM, self.next, np.float32)
                    entries[0, at], owners[0, at], positions[0, at] = value, head, self.next
                    mine[self.next] = head
                    self.next += 1
            held.append(mine)
            start += -(-len(mine) // PAGE) * PAGE
        entries, owners, positions = (shuffled(x, 1, self.parts) for x in arrays)
        slots = Slots(
            entries=jnp.asarray(entries),
            owners=jnp.asarray(owners),
            positions=jnp.asarray(positions),
            counts=jnp.asarray(counts),
            page=PAGE,
            dtype=jnp.dtype(jnp.float32),
            parts=self.parts,
        )
        return slots, held

    def free(self):
        return int((np.asarray(self.pages.holders) == 0).sum())

    def place(self):
        return next((row for row in range(ROWS) if row not in self.rows), None)

    def admit(self):
        row, more = self.place(), int(self.rng.integers(0, 4))
        slots, held = self.prompt()
        sizes = [len(mine) + HEADS * more for mine in held]
        if row is None or self.needed(sizes) > self.free():
            return
        self.pages = admitted(self.pages, slots, jnp.array(sizes, jnp.int32), np.int32(row))
        self.rows[row], self.room[row] = held, more

    def needed(self, sizes):
        return sum(-(-size // PAGE) for size in sizes)

    def end(self):
        gone = np.zeros((ROWS,), bool)
        for row in list(self.rows):
            if self.rng.random() < 0.5:
                gone[row] = True
                del self.rows[row]
        self.pages = released(self.pages, gone)

    def flush(self):
        """Tokens of an answer, with holes between them, into the rows that have room."""
        mine, tail = np.zeros((ROWS,), bool), np.full((ROWS, TAIL), -1, np.int32)
        keys = np.full((LAYERS, ROWS, HEADS, TAIL, DIM), np.nan, np.float32)
        for row in self.rows:
            count = int(self.rng.integers(0, min(self.room[row], TAIL) + 1))
            at = np.sort(self.rng.permutation(TAIL)[:count])
            mine[row] = self.rng.random() < 0.7
            for slot in at:
                tail[row, slot] = self.next
                for layer in range(LAYERS):
                    for head in range(HEADS):
                        number = self.next + 1 + layer * HEADS + head
                        keys[layer, row, head, slot] = number
                        if mine[row]:
                            self.rows[row][layer][number] = (head, self.next)
                self.next += 1 + LAYERS * HEADS
            if mine[row]:
                self.room[row] -= count
        self.pages = flushed(self.pages, self.tail.replace(
            keys=tuple(jnp.asarray(keys)), values=tuple(jnp.asarray(keys)),
            positions=jnp.asarray(tail)), mine)  # fmt: skip

    def keep(self):
        slots, held = self.prompt()
        sizes = [len(mine) for mine in held]
        if self.needed(sizes) <= self.free() and len(self.contexts) < 3:
            self.pages, lease = kept(self.pages, slots, jnp.array(sizes, jnp.int32))
            self.contexts.append((lease, held))

    def drop(self):
        if self.contexts:
            lease, _ = self.contexts.pop(int(self.rng.integers(len(self.contexts))))
            self.pages = dropped(self.pages, lease)

    def fork(self):
        row, more = self.place(), int(self.rng.integers(0, 4))
        if row is None or not self.contexts:
            return
        lease, held = self.contexts[int(self.rng.integers(len(self.contexts)))]
        own = [len(mine) % PAGE + HEADS * more for mine in held]
        if self.needed(own) > self.free():
            return
        self.pages = forked(self.pages, lease, np.int32(HEADS * more), np.int32(row))
        self.rows[row], self.room[row] = [dict(mine) for mine in held], more

    def swap_out(self):
        if self.rows:
            row = int(self.rng.choice(list(self.rows)))
            lease, slots = copied_out(self.pages, np.int32(row))
            self.pages = released(self.pages, np.arange(ROWS) == row)
            self.swapped.append((lease, slots, self.rows.pop(row), self.room[row]))

    def swap_in(self):
        row = self.place()
        if row is None or not self.swapped:
            return
        lease, slots, held, room = self.swapped[-1]
        if self.needed(np.asarray(lease.sizes)) <= self.free():
            self.swapped.pop()
            self.pages = copied_in(self.pages, lease, slots, np.int32(row))
            self.rows[row], self.room[row] = held, room

    # ------------------------------------------------------------------ what must hold
    def poison(self):
        """NaN in every slot that holds no entry: of free pages, and behind those in use."""
        slots, holders = self.pages.slots, np.asarray(self.pages.holders)
        free = np.repeat(holders == 0, PAGE)
        owners = shuffled(np.asarray(slots.owners[0]), 0, PAGES * PAGE // self.parts)
        nothing = shuffled(free | (owners < 0), 0, self.parts)
        self.pages = poisoned(self.pages, nothing)

    def stored(self):
        """Entries, owners and positions of all slots, in order of pages."""
        arrays = (self.pages.slots.entries, self.pages.slots.owners, self.pages.slots.positions)
        return [shuffled(np.asarray(x[0]), 0, PAGES * PAGE // self.parts) for x in arrays]

    def found(self, stored, row, layer):
        """Head and position of every entry that a row's pages have, by its number."""
        entries, owners, positions = stored
        pages = np.asarray(self.pages.table[row, layer])
        numbers = (pages[:, None] * PAGE + np.arange(PAGE)).reshape(-1)
        numbers = numbers[: int(self.pages.used[row, layer])]
        mine = numbers[owners[numbers] >= 0]
        found = {int(entries[at, 0]): (int(owners[at]), int(positions[at])) for at in mine}
        assert len(found) == len(mine)
        return found

    def told(self, row, layer):
        """The same as it should be."""
        held = self.rows[row][layer] if row in self.rows else {}
        return {n: h if isinstance(h, tuple) else (h, n) for n, h in held.items()}

    def check(self):
        table, sizes = np.asarray(self.pages.table), np.asarray(self.pages.sizes)
        counts, stored = np.asarray(self.pages.slots.counts), self.stored()
        holders = np.zeros((PAGES,), int)
        for lease, _ in self.contexts:
            mine = np.asarray(lease.table)
            holders += np.bincount(mine[mine < PAGES], minlength=PAGES)
        for row in range(ROWS):
            for layer in range(LAYERS):
                pages = table[row, layer, : -(-sizes[row, layer] // PAGE)]
                holders += np.bincount(pages, minlength=PAGES)
                assert len(set(pages)) == len(pages)
                told = self.told(row, layer)
                assert self.found(stored, row, layer) == told
                each = np.bincount([head for head, _ in told.values()], minlength=HEADS)
                np.testing.assert_array_equal(counts[row, layer], each)
        # Held and free pages are all pages, each as often as somebody holds it.
        np.testing.assert_array_equal(self.pages.holders, holders)


@jax.jit
def admitted(pages, slots, sizes, row):
    pages, lease = paged.take(pages, sizes)
    pages, lease = paged.copy_in(pages, lease, paged.with_table(slots))
    return paged.put_row(pages, row, lease)


@jax.jit
def poisoned(pages, nothing):
    entries = jnp.where(nothing[None, :, None], jnp.nan, pages.slots.entries)
    return pages.replace(slots=pages.slots.replace(entries=entries))


@jax.jit
def kept(pages, slots, sizes):
    pages, lease = paged.take(pages, sizes)
    return paged.copy_in(pages, lease, paged.with_table(slots))


@jax.jit
def forked(pages, lease, more, row):
    pages, lease = paged.fork(pages, lease, more)
    return paged.put_row(pages, row, lease)


@jax.jit
def copied_out(pages, row):
    lease = paged.lease_of(pages, row)
    return lease, paged.copy_out(pages, lease, LAYERS * WIDTH)


@jax.jit
def copied_in(pages, lease, slots, row):
    pages, own = paged.take(pages, lease.sizes)
    pages, own = paged.copy_in(pages, own, slots, lease.used)
    return paged.put_row(pages, row, own)


released, flushed, dropped = (jax.jit(f) for f in (paged.release, paged.flush, paged.give_back))
