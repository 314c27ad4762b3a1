#!/bin/busybox sh
# First program of the guest's kernel: loads what reaches the disk, and goes over to it.
/bin/busybox mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
for module in $(/bin/busybox cat /modules.order); do
	/bin/busybox insmod "/modules/$module" || echo "HEARTH-GUEST-FAILED module $module does not load"
done
/bin/busybox mount -t ext4 -o noatime /dev/vda1 /root ||
	echo "HEARTH-GUEST-FAILED the root file system on /dev/vda1 cannot be mounted"
exec /bin/busybox switch_root /root /sbin/init
