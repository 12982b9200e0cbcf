"""The path of an I/O without a representation: what describing memory costs is the difference.

`BareNamespace` slices the mapping itself. Nothing is held, counted or remembered, so it is the
fastest form that the path can have, and no device: a discard would take memory away from readers.

`python -m bench.bare CONFIG [--set key=value ...]` serves a config with it, as `pmblk serve` would.
"""

import sys
from collections.abc import Iterable, Sequence

from pmblk import Command, Namespace
from pmblk.nvme.command import READ, WRITE
from pmblkd import cli, registry


class BareNamespace(Namespace):
    def execute(self, commands: Sequence[Command]) -> Sequence[Command]:
        """Reads and writes of memory that is there; everything else as usual."""
        view, covers, size = self.media.view, self.media.allocation.covers, self.size
        others = []
        for command in commands:
            offset, length = command.offset, command.length
            if not command.status and 0 < length <= size - offset and covers(offset, length):
                if command.opcode == READ:
                    command.segments = [view[offset : offset + length]]
                    continue
                if command.opcode == WRITE and not command.flags:
                    if command.received < length:
                        assert command.payload is not None
                        view[offset + command.received : offset + length] = command.payload
                    continue
            others.append(command)
        return super().execute(others) if others else ()

    def release(self, commands: Iterable[Command]) -> None:
        """Nothing was held, but by what went the usual way."""
        if self.representation.leases:
            super().release(commands)

    def window(self, command: Command) -> memoryview | None:
        offset, length = command.offset, command.length
        if length > self.size - offset or not self.media.allocation.covers(offset, length):
            return super().window(command)
        return self.media.view[offset + command.received : offset + length]

    def received(self, command: Command, length: int) -> None:
        command.received += length


def main() -> None:
    assert registry.Namespace is Namespace, "the one that is served"  # type: ignore[attr-defined]
    registry.Namespace = BareNamespace  # type: ignore[attr-defined]
    sys.argv[1:1] = ["serve"]
    cli.main()


if __name__ == "__main__":
    main()
