#!/bin/bash
# fs-life.sh KIND DEVICE [MOUNT_OPTIONS]: the life of one file system, for guests. Needs root and fio.
#
# mkfs, mount, copy a tree, fio with O_DIRECT and verification, fsync, fstrim, unmount, fsck, mount
# again, compare. KIND is ext4, xfs or btrfs; the device has 300 MiB or more. Prints one line at the
# end; at the first thing that fails it says which, in which step, and ends with status 1. Leaves
# the device unmounted with the file system on it, and its checksums in /run/fs-life/sums.
#
# MKFS_OPTIONS: more words for mkfs. DISCARD=no: the device takes no discard, so nothing is trimmed.
set -euo pipefail
kind=$1 device=$2 options=${3:-defaults}
tree=/usr/include/linux # a thousand small files that every machine with gcc has
work=/run/fs-life
root=$work/mnt

main() {
    begin mkfs
    make
    begin mount
    attach
    begin copy
    cp -a "$tree" "$root/tree"
    begin fio
    verified_writes
    begin fsync
    synced_writes
    begin fstrim
    trim
    begin checksums
    checksums >$work/sums
    begin unmount
    umount "$root"
    begin fsck
    fsck_without_mending
    begin remount
    forget_cached
    attach
    begin compare
    checksums >$work/sums.again
    cmp $work/sums $work/sums.again
    begin "last unmount"
    umount "$root"
    echo "$kind on $device: $(wc -l <$work/sums) files are the same, $trimmed"
}

begin() {
    step=$1
    : >$work/log
}

make() {
    case $kind in
        ext4) mkfs.ext4 -qF -b 4096 ${MKFS_OPTIONS:-} "$device" ;;
        xfs) mkfs.xfs -qf ${MKFS_OPTIONS:-} "$device" ;;
        btrfs) mkfs.btrfs -qf ${MKFS_OPTIONS:-} "$device" ;;
    esac
} >$work/log 2>&1

attach() {
    mount -t "$kind" -o "$options" "$device" "$root"
}

verified_writes() {
    timeout 240 fio --name=verified --directory="$root" --size=24m --rw=randwrite \
        --bsrange=4k-64k --blockalign=4k --direct=1 --ioengine=libaio --iodepth=8 --fsync=64 \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 --thread \
        --minimal
} >$work/log 2>&1

synced_writes() {
    dd if=/dev/urandom of="$root/synced" bs=64k count=64 conv=fsync
    dd if=/dev/urandom of="$root/direct" bs=64k count=64 oflag=direct,dsync
    dd if=/dev/urandom of="$root/gone" bs=64k count=256 conv=fsync
    rm "$root/gone" # for fstrim
    sync --file-system "$root"
} >$work/log 2>&1

trim() {
    trimmed="not trimmed"
    [ "${DISCARD:-yes}" = yes ] || return 0
    fstrim --verbose "$root" >$work/log 2>&1
    trimmed="trimmed $(sed 's/.*(\([0-9]*\) bytes).*/\1/' $work/log) bytes"
}

checksums() {
    (cd "$root" && find . -type f -print0 | sort -z | xargs -0 md5sum)
}

fsck_without_mending() {
    case $kind in
        ext4) e2fsck -fn "$device" ;;
        xfs) xfs_repair -n "$device" ;;
        btrfs) btrfs check --readonly "$device" ;;
    esac
} >$work/log 2>&1

forget_cached() {
    echo 3 >/proc/sys/vm/drop_caches
}

failed() {
    echo "FAILED: $kind on $device in $step"
    tail -n 5 $work/log | cut -c -160
    dmesg | tail -n 5
    umount "$root" 2>/dev/null || true
}

mkdir -p $root
modprobe -q -a "$kind" crc32c_generic || true # built in, where there is no module
exec 3>&1 # a function that fails still has its own output when the trap runs
trap '[ $? = 0 ] || failed >&3' EXIT
main
