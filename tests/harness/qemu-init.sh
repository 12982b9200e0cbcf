#!/bin/busybox sh
# /init of a guest that `qemu.py` boots: busybox, and in /modules what the root needs, in order. The
# root becomes an overlay: the host's / (9p, read-only) below, tmpfs above, so nothing that is
# written reaches the host but what goes to /run/w, the folder of this guest.
busybox=/bin/busybox
options=trans=virtio,version=9p2000.L,msize=512000
$busybox mkdir -p /proc /sys /lower /upper /root
for module in /modules/*; do $busybox insmod "$module"; done
$busybox mount -t 9p -o $options,ro,cache=loose root /lower
$busybox mount -t tmpfs -o size=60% upper /upper
$busybox mkdir /upper/files /upper/work
$busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root ||
    $busybox poweroff -f
cd /root || $busybox poweroff -f
$busybox mount -t proc proc proc
$busybox mount -t sysfs sys sys
$busybox mount -t devtmpfs dev dev
$busybox mkdir -p dev/pts dev/shm dev/md
$busybox mount -t devpts pts dev/pts
$busybox mount -t tmpfs shm dev/shm
$busybox mount -t tmpfs run run
$busybox mkdir run/w run/lock
$busybox mount -t 9p -o $options,cache=none work run/w
for link in fd stdin:/0 stdout:/1 stderr:/2; do
    case $link in
        *:*) $busybox ln -sfn "/proc/self/fd${link#*:}" "dev/${link%:*}" ;;
        *) $busybox ln -sfn /proc/self/fd dev/fd ;;
    esac
done
exec $busybox switch_root /root /bin/bash -c '
  export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
  mkdir -p /lib/modules
  ln -sfn "$(cat /run/w/modules)" "/lib/modules/$(uname -r)"
  ip link set lo up
  cd / && bash /run/w/command </dev/null >/run/w/output 2>&1
  echo $? >/run/w/status
  sync; exec busybox poweroff -f'
