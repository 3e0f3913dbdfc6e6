#!/bin/sh
# Brings this guest up, once: filesystems, the host's name, the network.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -o remount,rw /
mount -a
hostname -F /etc/hostname
modprobe -q virtio_net
ip link set lo up
# the card may appear while this script already runs
tries=0
until [ -e /sys/class/net/eth0 ] || [ $tries -ge 50 ]; do
    sleep 0.2
    tries=$((tries + 1))
done
ifup -a
