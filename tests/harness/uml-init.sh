#!/bin/bash
# init of a User-mode Linux guest that `uml.py` boots. W (a host folder, writable from here) comes from
# the kernel command line as environment. The root becomes an overlay: the host's / (hostfs, read-only)
# below, tmpfs above, so nothing that is written reaches the host but what goes to W.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
modules=/usr/lib/uml/modules/$(uname -r)
mount -t proc proc /proc
insmod "$modules/kernel/fs/overlayfs/overlay.ko"
mount -t tmpfs -o size=90% up /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
cd /mnt/root || exit 1
mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev
mkdir -p run tmp dev/shm dev/pts
mount -t tmpfs run run
mount -t tmpfs shm dev/shm
mount -t devpts pts dev/pts
ln -sfn /proc/self/fd dev/fd
mkdir -p run/w run/old lib/modules
mount -t hostfs none run/w -o "$W"
ln -sfn "$modules" "lib/modules/$(uname -r)"
pivot_root . run/old
exec chroot . /bin/bash -c '
  ip link set lo up
  cd / && bash /run/w/command </dev/null >/run/w/output 2>&1
  echo $? >/run/w/status
  sync; halt -f -w 2>/dev/null; halt -f'
