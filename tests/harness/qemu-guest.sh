# What every script in a guest of `qemu.py` can call. Sourced; all of it ends the script when it fails.

# pause NAME: say it, and wait until the host has left `guest.paused(NAME)`.
pause() {
    echo "$1"
    until [ -e "/run/w/resumed-$1" ]; do sleep 0.1; done
}

# await PATH: until it is there, as devices are a moment after their module.
await() {
    local tries
    for tries in $(seq 600); do
        [ ! -e "$1" ] || return 0
        sleep 0.1
    done
    echo "no $1 after $tries tries"
    return 1
}

# nvme_disk SERIAL: the name of the disk whose controller has that serial number.
nvme_disk() {
    local file
    modprobe nvme
    for _ in $(seq 600); do
        for file in /sys/class/nvme/nvme*/serial; do
            if grep -q "^$1 *$" "$file" 2>/dev/null && [ -b "/dev/$(basename "${file%/serial}")n1" ]; then
                echo "/dev/$(basename "${file%/serial}")n1"
                return 0
            fi
        done
        sleep 0.1
    done
    echo "no NVMe controller $1" >&2
    return 1
}

# dax_devices: make /dev/pmem0 and those after it fit for DAX, which their first user has to do.
dax_devices() {
    local namespace
    modprobe -a nfit nd_e820 nd_pmem
    await /dev/pmem0
    for namespace in /sys/bus/nd/devices/namespace*; do
        if [ "$(cat "$namespace/mode")" = raw ]; then
            ndctl create-namespace --force --mode=fsdax --map=mem \
                --reconfig="$(basename "$namespace")" >/dev/null 2>/run/ndctl || cat /run/ndctl
        fi
    done
    await /dev/pmem0
}

# dax_offset: where /dev/pmem0 starts in the file that it is, in bytes; before it are labels.
dax_offset() {
    echo $(($(cat /sys/block/pmem0/device/resource) - $(cat /sys/bus/nd/devices/region0/resource)))
}
