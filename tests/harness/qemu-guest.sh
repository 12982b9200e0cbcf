# What every script in a guest of `qemu.py` can call. Sourced; all of it ends the script when it fails.

# pause NAME: say it, and wait until the host has left `guest.paused(NAME)`.
pause() {
    echo "$1"
    until [ -e "/run/w/resumed-$1" ]; do sleep 0.1; done
}

# await PATH: until it is there, as devices are a moment after their module.
await() {
    local tries
    for tries in $(seq 100); do
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
    for _ in $(seq 100); do
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
