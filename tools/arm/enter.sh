#!/bin/sh
# Runs a command beside or in the Arm root, with /proc, /sys and /dev as a device has them.
#
#   unshare --mount --propagation private --pid --fork --kill-child enter.sh ROOT CPUINFO COMMAND...
#
# Everything that is mounted here is seen by COMMAND and its children alone, and is gone when they are. /proc/cpuinfo is the Arm
# processor's: the emulator passes the host's on, and the CPU detection of ONNX Runtime 1.28 and newer crashes when it reads an x86
# one in an Arm process. The root lies at /mnt/device as well: every folder above it is root's there, as OpenSSH wants it.
set -eu
root=$1 cpuinfo=$2
shift 2
ulimit -c 0
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/device
mount --bind "$root" /mnt/device
mount -t proc proc /mnt/device/proc
mount -t sysfs -o ro sysfs /mnt/device/sys
mount --bind "$cpuinfo" /mnt/device/proc/cpuinfo
for name in null zero full random urandom; do
    [ -e "/mnt/device/dev/$name" ] || touch "/mnt/device/dev/$name"
    mount --bind "/dev/$name" "/mnt/device/dev/$name"
done
exec "$@"
