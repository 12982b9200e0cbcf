"""Requests of the NBD transmission phase, without I/O: a stream of bytes becomes commands.

The first half of the hot path (`replies` is the second). What keeps it short: one receive buffer,
parsed in place, and every whole request that has arrived becomes a `Command` of one batch, its
payload a view of the buffer. Flags and type of a request are one integer and one dictionary
look-up, which knows which flags go with which type (`_DECODE`); what is not in it is EINVAL.

A large write need not be copied at all: `bulk_write` names one whose payload is still arriving, and
the connection may receive the rest of it straight into memory. After one, the next receive takes
little more than a header, so that the next payload can go the same way.

Rules that live here: what is refused whatever the namespace is, and which payload is drained.
Source: doc/proto.md of the NBD project, "Transmission".
"""

from pmblk.nvme.command import (
    ALLOCATE,
    CONTIGUOUS,
    DATASET_MANAGEMENT,
    FAST_ONLY,
    FIRST_EXTENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Command,
)
from pmblk.nvme.status import Status
from pmblkd.nbd import wire
from pmblkd.nbd.wire import Cmd, CmdFlag

BUFFER_BYTES = 4 << 20
# What one batch may ask for, so that no client holds the event loop: bytes to read, and for each
# block status as much as that costs.
BATCH_READ_BYTES = 8 << 20
BLOCK_STATUS_COST_BYTES = 1 << 20
BULK_BYTES_MIN = 64 << 10
BULK_WINDOW_BYTES = 1 << 10
BATCH_MAX = 512  # two buffers a read: what one sendmsg takes (IOV_MAX)

_BATCH = range(BATCH_MAX)
_HEADER_BYTES = wire.REQUEST.size

# NBD type -> (opcode, {NBD flag -> engine flag}). FUA is valid with every command.
_RULES: dict[Cmd, tuple[int, dict[CmdFlag, int]]] = {
    Cmd.READ: (READ, {CmdFlag.DF: CONTIGUOUS}),
    Cmd.WRITE: (WRITE, {}),
    Cmd.FLUSH: (FLUSH, {}),
    Cmd.TRIM: (DATASET_MANAGEMENT, {}),
    Cmd.CACHE: (PREFETCH, {}),
    Cmd.WRITE_ZEROES: (WRITE_ZEROES, {CmdFlag.NO_HOLE: ALLOCATE, CmdFlag.FAST_ZERO: FAST_ONLY}),
    Cmd.BLOCK_STATUS: (GET_LBA_STATUS, {CmdFlag.REQ_ONE: FIRST_EXTENT}),
}
_CHANGES_DATA = (WRITE, DATASET_MANAGEMENT, WRITE_ZEROES)


def _decode_table() -> dict[int, tuple[int, int]]:
    """flags << 16 | type -> (opcode, engine flags), for every valid combination."""
    table = {}
    for kind, (opcode, own) in _RULES.items():
        translations = list(own.items())
        translations.append((CmdFlag.FUA, FUA if opcode in _CHANGES_DATA else 0))
        for choice in range(1 << len(translations)):
            chosen = [pair for bit, pair in enumerate(translations) if choice >> bit & 1]
            flags = sum(int(nbd) for nbd, _ in chosen)
            table[flags << 16 | kind] = (opcode, sum(engine for _, engine in chosen))
    return table


_DECODE = _decode_table()
_UNKNOWN = 0xFF  # no opcode of the engine
_OPCODES = {int(kind): opcode for kind, (opcode, _) in _RULES.items()}
_DISC = int(Cmd.DISC)


class ProtocolError(Exception):
    """The stream is out of sync; the connection can only be closed."""


class RequestStream:
    """The requests of one connection after its handshake.

    Loop: fill `receive_buffer()`, say how much with `received(n)`, take batches with
    `next_batch()` until one is empty. Payload views of a batch are valid until the next call of
    `receive_buffer`. `disconnecting`: the client said DISC, nothing more will come.
    """

    def __init__(self, *, allocation_context: bool, leftover: bytes = b"") -> None:
        self.disconnecting = False
        self._allocation_context = allocation_context
        self._small = self._view = memoryview(bytearray(max(BUFFER_BYTES, len(leftover))))
        self._start = 0
        self._end = len(leftover)
        self._view[: self._end] = leftover
        self._wanted = _HEADER_BYTES  # bytes of the request that `_start` stands at
        self._to_drain = 0
        self._after_bulk = False
        self.bulk_write: Command | None = None  # a large write that is not here in whole

    def receive_buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._start == self._end:
            self._start = self._end = 0
            if self._wanted <= len(self._small):
                self._view = self._small
            if self._after_bulk:
                self._after_bulk = False
                return self._view[:BULK_WINDOW_BYTES]
        if self._start + self._wanted > len(self._view):
            self._make_room()
        return self._view[self._end :]

    def _make_room(self) -> None:
        """The request at `_start` does not fit behind it: move it to the front, or out."""
        pending = self._end - self._start
        target = self._view
        if self._wanted > len(target):
            target = memoryview(bytearray(self._wanted))
        target[:pending] = self._view[self._start : self._end]
        self._view = target
        self._start, self._end = 0, pending

    def received(self, count: int) -> None:
        self._end += count

    def take_bulk_payload(self) -> memoryview:
        """What is here of `bulk_write`'s payload; the rest of it is the caller's to receive.

        The stream goes on behind that payload. The view is valid until the next `receive_buffer`.
        """
        assert self.bulk_write is not None
        self.bulk_write = None
        payload = self._view[self._start + _HEADER_BYTES : self._end]
        self._start = self._end
        self._wanted = _HEADER_BYTES
        self._after_bulk = True
        return payload

    def next_batch(self) -> list[Command]:
        """Whole requests, in order, as many as one batch may hold; empty: more bytes are needed.

        Raises ProtocolError on a wrong magic number.
        """
        if self._to_drain:
            self._drain()
        batch: list[Command] = []
        append = batch.append
        unpack = wire.REQUEST.unpack_from
        decode = _DECODE.get
        view = self._view
        position, end = self._start, self._end
        last_header = end - _HEADER_BYTES
        self._wanted = _HEADER_BYTES
        self.bulk_write = None
        budget = BATCH_READ_BYTES
        for _ in _BATCH:
            if position > last_header or budget <= 0:
                break
            magic, flags_and_type, cookie, offset, length = unpack(view, position)
            if magic != wire.REQUEST_MAGIC:
                if batch:
                    break  # what came before it is answered first
                raise ProtocolError(f"request magic {magic:#x}")
            after = position + _HEADER_BYTES
            decoded = decode(flags_and_type)
            if decoded is None:
                command = self._refused(flags_and_type, cookie, offset, length)
            else:
                command = Command(*decoded, offset, length, cookie)
            opcode = command.opcode
            if opcode == READ:
                budget -= length
                if length > wire.PAYLOAD_BYTES_MAX:
                    command.status = Status.INVALID_FIELD
            elif opcode == WRITE:
                if length > wire.PAYLOAD_BYTES_MAX:
                    command.status = Status.INVALID_FIELD
                    self._to_drain = length
                    append(command)
                    position = after
                    break
                if end - after < length:
                    self._wanted = _HEADER_BYTES + length
                    if not command.status and length >= BULK_BYTES_MIN:
                        self.bulk_write = command
                    break
                command.payload = view[after : after + length]
                after += length
            elif flags_and_type & 0xFFFF == _DISC:
                self.disconnecting = True
                position = end
                break
            else:
                self._judge(command)
                if opcode == GET_LBA_STATUS:
                    budget -= BLOCK_STATUS_COST_BYTES
            append(command)
            position = after
        self._start = position
        return batch

    @staticmethod
    def _refused(flags_and_type: int, cookie: int, offset: int, length: int) -> Command:
        """A type or flag that is not known. Its opcode stays, as the shape of its reply does."""
        opcode = _OPCODES.get(flags_and_type & 0xFFFF, _UNKNOWN)
        return Command(opcode, 0, offset, length, cookie, status=Status.INVALID_FIELD)

    def _judge(self, command: Command) -> None:
        """What the protocol refuses whatever the namespace is."""
        opcode = command.opcode
        if (opcode == FLUSH and (command.offset or command.length)) or (
            opcode == GET_LBA_STATUS and not (self._allocation_context and command.length)
        ):
            command.status = Status.INVALID_FIELD

    def _drain(self) -> None:
        """Drop payload that was refused, as far as it has arrived."""
        dropped = min(self._to_drain, self._end - self._start)
        self._start += dropped
        self._to_drain -= dropped
