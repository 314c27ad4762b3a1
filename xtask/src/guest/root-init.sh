#!/bin/busybox sh
# First program of the guest's root file system: runs the workload, then stops the machine with a clean disk.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
exec </dev/console >/dev/console 2>&1
# The host's commands need not come back as output.
/bin/busybox stty -echo
/bin/workload serve /data/pages
/bin/busybox sync
/bin/busybox mount -o remount,ro / && echo HEARTH-GUEST-CLEAN
exec /bin/busybox poweroff -f
