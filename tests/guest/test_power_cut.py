"""Power cuts: the whole machine ends amid writes, and what it was promised is there after a boot.

The daemon runs in the guest, its media are on a DAX file system on /dev/pmem0. What a killed QEMU
leaves is what had reached the NVDIMM's file: everything in DRAM is gone, page cache, frames of the
daemon, and changes of the file system that were not in its journal.
"""

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.guest import promises
from tests.harness import qemu
from tests.harness.daemon import scratch
from tests.harness.programs import wait_for

pytestmark = pytest.mark.guest

HERE = Path(__file__).parent
PYTHON = sys.executable
PMBLK = Path(PYTHON).with_name("pmblk")
KINDS = {
    "extent": '"extent"',
    "page-cache": '{ kind = "page-cache", arena = "1MiB" }',
    "struct-page": '"struct-page"',
    "transient-page": '{ kind = "transient-page", pool_pages = 256 }',
    "pfn": '"pfn"',
}
ENOUGH = 100  # promises for each namespace, before the power goes
GUEST_SECONDS = 300

# A daemon as it must not be: it maps its file without MAP_SYNC and never asks for a sync. It has a
# file system of its own, /dev/pmem1: a sync for the others would commit what it has changed, too.
FORGETFUL = """
import os
from pmblk.media import durability
durability.MAP_SYNC = 0
os.fdatasync = lambda fd: None
from pmblkd.cli import main
main()
"""


def config(names: Sequence[str], *, to: str) -> str:
    """A guest's daemon; `to` names its sockets."""
    namespaces = "".join(
        f"""
[[namespace]]
name = "{name}"
path = "/run/dax{0 if name in KINDS else 1}/{name}.img"
size = "4MiB"
representation = {KINDS.get(name, KINDS["extent"])}
"""
        for name in names
    )
    return f"""{namespaces}
[nbd]
listen = ["unix:/run/{to}.nbd"]
[control]
socket = "/run/{to}.control"
"""


BEFORE = f"""
cat >/run/honest.toml <<'END'
{config([*KINDS], to="honest")}
END
cat >/run/forgetful.toml <<'END'
{config(["forgetful"], to="forgetful")}
END
cat >/run/forgetful.py <<'END'
{FORGETFUL}
END
dax_devices
for number in 0 1; do
    mkfs.ext4 -q -b 4096 /dev/pmem$number
    mkdir /run/dax$number
    mount -o dax=always,commit=300 /dev/pmem$number /run/dax$number
done
{PMBLK} serve /run/honest.toml &
{PYTHON} /run/forgetful.py serve /run/forgetful.toml &
await /run/honest.nbd
await /run/forgetful.nbd
{PMBLK} list --json --socket /run/honest.control >/run/w/list
seed=SEED
write() {{
    python3 {HERE}/promises.py "nbd+unix:///$1?socket=/run/$2.nbd" $seed >/run/w/$1 &
    seed=$((seed + 1))
}}
for name in {" ".join(KINDS)}; do write $name honest; done
write forgetful forgetful
wait -n
echo "nothing may end before the power cut"
exit 1
"""

AFTER = f"""
cat >/run/again.toml <<'END'
{config([*KINDS, "forgetful"], to="again")}
END
dax_devices
for number in 0 1; do
    mkdir /run/dax$number
    mount -o dax=always /dev/pmem$number /run/dax$number
done
{PMBLK} serve /run/again.toml &
await /run/again.nbd
for name in {" ".join(KINDS)} forgetful; do
    nbdcopy "nbd+unix:///$name?socket=/run/again.nbd" /run/w/$name
done
kill %1
wait %1
umount /run/dax0 /run/dax1
e2fsck -fn /dev/pmem0
"""


def test_what_was_acknowledged_as_durable_survives_a_power_cut() -> None:
    """Power cut of a machine with pmem: all that FUA and flush promised is there after a boot."""
    with scratch() as directory:
        nvdimms = [qemu.Nvdimm(file=directory / f"nvdimm{number}") for number in range(2)]
        for nvdimm in nvdimms:
            nvdimm.file.touch()
            os.truncate(nvdimm.file, 256 << 20)
        promised, reports = _until_the_power_goes(nvdimms)
        for report in reports:
            assert report["durability"] == "pmem", report
            assert "took MAP_SYNC: clwb and fence" in report["durability_reason"], report
        with qemu.booted(AFTER, devices=nvdimms) as guest:
            guest.wait()
            for name in KINDS:
                image = (guest.folder / name).read_bytes()
                assert promises.lost(image, promised[name]) == [], name
            image = (guest.folder / "forgetful").read_bytes()
            assert promises.lost(image, promised["forgetful"]), "a forgetful daemon is found out"


def _until_the_power_goes(
    nvdimms: Sequence[qemu.Nvdimm],
) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """What each writer was promised, and what the daemon said of its namespaces."""
    names = [*KINDS, "forgetful"]
    seed = random.randrange(1 << 20)
    print(f"seed {seed}")
    script = BEFORE.replace("SEED", str(seed))
    with qemu.booted(script, devices=nvdimms, seconds=GUEST_SECONDS) as guest:
        wait_for(
            lambda: not guest.running or all(_kept(guest.folder / n) >= ENOUGH for n in names),
            seconds=GUEST_SECONDS,
        )
        time.sleep(random.Random(seed).uniform(0, 0.5))  # at any moment of a batch
        assert guest.running, guest.output
        guest.cut_power()
        promised = {name: (guest.folder / name).read_text().splitlines() for name in names}
        return promised, json.loads((guest.folder / "list").read_text())


def _kept(path: Path) -> int:
    return path.read_text().count("kept") if path.exists() else 0


def test_the_check_of_promises_finds_a_write_that_is_lost() -> None:
    """The check itself: a version that is older than the kept one is found, a newer one is not."""
    image = bytearray(promises.SIZE)
    lines = ["issued 3 7", "kept 3 7", "issued 3 9", "issued 4 8"]
    place = slice(3 * promises.STRIDE_BYTES, 3 * promises.STRIDE_BYTES + promises.SLOT_BYTES)
    for version, verdict in ((7, 0), (9, 0), (0, 1), (6, 1)):
        image[place] = promises.content(version)
        assert len(promises.lost(image, lines)) == verdict
