"""What the report says beside its figures: where they are from, and what they can say. Pure."""

from pmblk.units import format_size
from pmblkd.compare.results import Results

TITLE = "How to describe the memory under an I/O"
DEVICES_TITLE = "Large devices, at rest"
DEVICES_TEXT = (
    "What a representation keeps for a device before anybody uses it, and what one I/O takes. The"
    " engine alone, without a daemon and without fio; sparse files, so that no memory of that size"
    " is needed. The frames of page-cache come on top of its metadata."
)


def origin(results: Results) -> list[str]:
    """Where and how, for whoever wants to have the same figures."""
    setup = results.setup
    return [
        f"Made by {setup.command} on {setup.date}",
        f"Machine: {setup.machine}",
        f"Versions: {', '.join(setup.versions)}",
        (
            f"Media: a file of {format_size(setup.file_bytes)} on {setup.file_system}, durability"
            f" {setup.durability}: {setup.durability_reason}"
        ),
        (
            f"Device: {format_size(setup.size_bytes)} in blocks of {setup.lba_bytes} bytes; the"
            " last 1/64 of the file is a reserve for a page table, whoever serves"
        ),
        (
            f"{_count(len(results.rows), 'load')}, {_count(setup.rounds, 'round')},"
            f" {setup.seconds:g} s a run; in every round the contenders take turns in rotated order"
        ),
    ]


def how_to_read(results: Results) -> list[str]:
    """What the figures can and cannot say."""
    setup = results.setup
    lines = [
        (
            f"One daemon serves one device of {format_size(setup.size_bytes)}, filled beforehand;"
            " a live switch brings in each representation, clients stay connected. Offsets are"
            " random at every block size, so that nothing on the way merges neighbours."
        ),
        (
            "Bytes copied are those that the representation itself copies. Over a socket and"
            " through FUSE the kernel copies every byte once more, for all of them alike, so rates"
            " differ by less than the copies do."
        ),
        (
            f"The file lies on {setup.file_system}. The kernel underneath has struct pages of its"
            " own for that memory; what is measured here comes on top, and is what a user of the"
            " representation would pay, not what the machine would save."
        ),
        (
            "It is Python that builds the descriptors. Counts and sizes are those of any"
            " implementation; times of small I/Os contain an interpreter's constant."
        ),
        (
            "A page form builds one bio_vec a page, the form of 2015. Since Linux 5.1 contiguous"
            " pages become one bio_vec; how many that would be is the column of SGL descriptors."
        ),
        _remembering(setup.durability),
        (
            "Server CPU is user and system time of the daemon, with the flush that ends a write"
            f" run. With busy_poll_us = {setup.busy_poll_us}, "
            + (
                "a single client at QD1 is answered without sleep: the daemon looks again for that"
                " long, and that is CPU time too."
                if setup.busy_poll_us
                else "the daemon sleeps whenever it has nothing to do."
            )
            + " Above a loop device the kernel works in threads of its own, which are not counted."
        ),
        ("Per I/O means per block of the load's size that the engine transferred."),
        (
            "page-cache has an arena that is smaller than the device, else it would measure DRAM:"
            f" {_arena(results)}. It starts cold after each switch."
        ),
    ]
    if setup.loop_refusal:
        lines.append(f"There are no loads of a loop device: {setup.loop_refusal}.")
    lines += [f"Left out: {reason}." for reason in setup.left_out]
    return lines


def _remembering(durability: str) -> str:
    """What a dirty mark costs and saves depends on what has to be written back here."""
    if durability == "pmem":
        return (
            "On pmem every store has to be written back from the CPU's caches. extent and"
            " transient-page do that at once; the dirty marks of struct-page and pfn save it at"
            " each store, and a flush does it once for each page."
        )
    return (
        f"Here (durability {durability}) no store has to be written back from the CPU's caches, so"
        " remembering what is dirty is a cost with no gain: extent and transient-page pay nothing"
        " for writing back at once, struct-page and pfn pay for their marks and for the scan at a"
        " flush. On pmem marks save a write-back at each store."
    )


def _arena(results: Results) -> str:
    arenas = [one.options["arena"] for one in results.contenders if "arena" in one.options]
    return f"{arenas[0]} for {format_size(results.setup.size_bytes)}" if arenas else "not compared"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
